"""Answers to many prompts at once, greedy or sampled."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from casehard.datamodules.chat import turn_end
from casehard.engine import few_shapes
from casehard.engine.forward import Batch, additive, prefill, takes_prefix_trees, uncompiled
from casehard.engine.layouts import layout_of
from casehard.engine.sharding import max_over_ranks
from casehard.engine.weights import group_of, same_modes_after

Neighbours = Literal["any", "equal", "none"]
_NEIGHBOURS: WeakKeyDictionary[PreTrainedModel, Neighbours] = WeakKeyDictionary()  # what ``neighbours`` has found


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the tokenizer's, the chat template's and those that the model's generation config adds."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    return sorted({*ids, tokenizer.eos_token_id, turn_end(tokenizer)} - {None})


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 128,
    graphs: bool = True,
) -> list[str]:
    """Greedy answers as texts; see ``sample``.

    Returns:
        What the model wrote to each prompt, special tokens and all; the last one is an end token unless it was cut.
    """
    answers = sample(model, tokenizer, prompts, max_new_tokens, batch_size=batch_size, graphs=graphs)
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in answers]  # type: ignore[misc]


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
    batch_size: int = 128,
    graphs: bool = True,
) -> list[list[int]]:
    """Answers as token ids, many at once. An answer does not depend on the batch size, nor on the prompts beside it.

    Where the model is sharded every rank must call this, with prompts or without: it makes as many passes as the busiest one.
    torch's generators are not used.

    Args:
        model: put into eval mode for the call, and back; its own generation config (penalties, beams) does not act.
        tokenizer: gives padding and end tokens.
        prompts: token ids of each prompt, generation prompt included.
        max_new_tokens: an answer is cut there if no end token came.
        temperature: of the distribution that tokens are drawn from, >= 0; 0 takes the likeliest.
        seeds: one a prompt, which with the prompt alone decides the answer; needed where ``temperature`` is above 0.
        batch_size: prompts at once; memory grows with it.
        graphs: on a CUDA device, replay steps as graphs where that can be.

    Returns:
        What the model wrote to each prompt; the last token is an end token unless the answer was cut.

    Raises:
        ValueError: a temperature below 0, or not a seed for every prompt.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must be >= 0, got {temperature}. 0 takes the likeliest token.")
    if temperature > 0 and len(seeds or ()) != len(prompts):
        raise ValueError(f"seeds must hold one for each of {len(prompts)} prompts, got {len(seeds or ())}.")
    ends, pad = end_tokens(model, tokenizer), tokenizer.pad_token_id

    def choice(rows: Sequence[int]) -> _Choice:
        """How tokens of these prompts are chosen; -1 stands for a row without one."""
        if not (temperature and seeds):
            return _Choice(temperature, None)
        return _Choice(temperature, _draws([0 if i < 0 else seeds[i] for i in rows], max_new_tokens, model.device))

    with _evaluating(model):
        if layout_of(model) != "prefix_tree" and _goes_by_steps(model, _longest(model, prompts) + max_new_tokens):
            chosen = few_shapes.answers(model, prompts, max_new_tokens, batch_size, ends, pad, choice, graphs)
        else:
            chosen = _in_chunks(model, prompts, max_new_tokens, batch_size, ends, pad, choice)
    return [_ended(ids, ends) for ids in chosen]


def _longest(model: PreTrainedModel, prompts: Sequence[list[int]]) -> int:
    """Tokens of the longest prompt on any rank that shares the weights."""
    return max_over_ranks(model, max(map(len, prompts), default=0))


def _in_chunks(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
    ends: list[int],
    pad: int,
    choice: Callable[[Sequence[int]], "_Choice"],
) -> list[list[int]]:
    """The chosen tokens after each prompt, padded after an end: every chunk in the shape that its rows have at each step."""
    answers: list[list[int]] = [[]] * len(prompts)
    beside: Neighbours = "any" if takes_prefix_trees(model, 0) else neighbours(model)
    chunks = _chunks([len(prompt) for prompt in prompts], batch_size, beside)
    for number in range(max_over_ranks(model, len(chunks))):
        chunk = chunks[number] if number < len(chunks) else []
        batch = _left_padded([prompts[i] for i in chunk] or [[pad]], pad, model.device)  # a row to keep step with
        by_steps = _goes_by_steps(model, max_over_ranks(model, batch["input_ids"].shape[1]) + max_new_tokens)
        out = (_step_by_step if by_steps else _by_transformers)(model, batch, max_new_tokens, ends, pad, choice(chunk or [-1]))
        for i, ids in zip(chunk, out.tolist(), strict=False):
            answers[i] = ids
    return answers


def _draws(seeds: Sequence[int], max_new_tokens: int, device: torch.device) -> Tensor:
    """Uniform numbers below 1, ``[batch, max_new_tokens]``, each row from its seed alone, as precise as the device has them."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    draws = torch.stack([torch.rand(max_new_tokens, generator=g, dtype=torch.float64, device="cpu") for g in generators])
    if _most_precise(device) == torch.float32:
        draws = (draws * 2**22).floor().float() / 2**22  # rounded down: a product with the whole must stay below it
    return draws.to(device)


def _most_precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class _Choice:
    """How the next token is chosen: the likeliest, or where a uniform number falls among the cumulated probabilities."""

    temperature: float
    draws: Tensor | None  # [batch, max_new_tokens], in the dtype that sums are made in; None takes the likeliest

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        """The token of every row, ``[rows]``, from ``logits`` ``[rows, vocab]``; ``rows`` are places in the whole batch."""
        if self.draws is None:
            return logits.argmax(dim=-1)
        cumulated = (logits.to(self.draws.dtype) / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        return torch.searchsorted(cumulated, self.draws[rows, step][:, None] * cumulated[:, -1:], right=True)[:, 0]


class _Chosen(LogitsProcessor):
    """Leaves transformers' own greedy search one token to choose."""

    def __init__(self, choose: _Choice, prompt_length: int) -> None:
        self.choose, self.prompt_length = choose, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = torch.arange(len(scores), device=scores.device)
        new = self.choose(scores, rows, input_ids.shape[1] - self.prompt_length)
        return torch.full_like(scores, -torch.inf).scatter(1, new[:, None], 0.0)


def _ended(ids: list[int], ends: list[int]) -> list[int]:
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))]


def _chunks(lengths: Sequence[int], batch_size: int, which: Neighbours) -> list[list[int]]:
    """Rows that are answered at once, by length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups = [order] if which == "any" else [list(rows) for _, rows in groupby(order, key=lengths.__getitem__)]
    batch_size = 1 if which == "none" else batch_size
    return [rows[start : start + batch_size] for rows in groups for start in range(0, len(rows), batch_size)]


def neighbours(model: PreTrainedModel) -> Neighbours:
    """Beside which rows ``model`` goes on from a row as it does from the row alone: any, those of equal length, or none.

    Recurrent models that take no mask read the padding in front of a shorter row, and some mix up the states of a batch. To be
    called in eval mode, and by every rank where the model is sharded.
    """
    if model not in _NEIGHBOURS:
        row, others = [5, 4, 8], {"any": [3, 4, 5, 6, 7, 8, 9, 3, 5, 7], "equal": [9, 3, 6]}
        alone = _next_logits(model, [row])
        fits = [which for which, other in others.items() if _alike(_next_logits(model, [other, row]), alone, model.dtype)]
        _NEIGHBOURS[model] = fits[0] if fits else "none"  # type: ignore[assignment]
    return _NEIGHBOURS[model]


def _alike(logits: Tensor, others: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits are the same up to rounding, as far as the tokens before them are."""
    same = (logits.argmax(dim=-1) == others.argmax(dim=-1)).cumprod(dim=0)
    steps = 1 + int(same[:-1].sum())
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    return bool((logits[:steps] - others[:steps]).norm() <= tolerance * others[:steps].norm())


def _next_logits(model: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    """Logits of the three tokens after the last row, ``[3, vocab]``."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=3, pad_token_id=0, use_cache=True, output_logits=True, return_dict_in_generate=True
    )
    with torch.autocast(model.device.type, enabled=False):
        batch = _left_padded(rows, 0, model.device)
        out = model.generate(**batch, generation_config=config, synced_gpus=group_of(model) is not None)  # type: ignore[operator]
    return torch.stack([logits[-1].float() for logits in out.logits])


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """No dropout, and nothing of the generation config that the model ships; both come back."""
    shipped, model.generation_config = model.generation_config, GenerationConfig()  # else its penalties and beams act here too
    try:
        with uncompiled(model), same_modes_after(model):
            model.eval()
            yield
    finally:
        model.generation_config = shipped


def _left_padded(prompts: Sequence[list[int]], pad: int, device: torch.device) -> Batch:
    ids = [torch.tensor(prompt) for prompt in prompts]
    padded = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left")
    return {"input_ids": padded.to(device), "attention_mask": mask.to(device)}


def _goes_by_steps(model: PreTrainedModel, length: int) -> bool:
    """Whether ``_step_by_step`` is right for rows of up to ``length`` tokens: keys and values must be all that is remembered."""
    layers = DynamicCache(config=model.config).layers
    return {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer} and takes_prefix_trees(model, length)


def _step_by_step(
    model: PreTrainedModel, batch: Batch, max_new_tokens: int, ends: list[int], pad: int, choose: _Choice
) -> Tensor:
    """The chosen tokens, ``[batch, max_new_tokens]``, padded after an end. Rows that have ended leave the batch.

    One that has only such rows goes on while another rank needs it to.
    """
    mask = batch["attention_mask"]
    answers = mask.new_full((len(mask), max_new_tokens), pad)
    rows, positions = torch.arange(len(mask), device=mask.device), mask.sum(dim=1, keepdim=True)
    attention_mask = additive(F.pad(mask, (0, max_new_tokens), value=1).bool()[:, None], model)
    ended, last = torch.zeros_like(rows, dtype=torch.bool), torch.tensor(ends, device=mask.device)
    logits, cache = prefill(model, batch)
    for step in range(max_new_tokens):
        new = choose(logits, rows, step)
        answers[rows, step] = new.masked_fill(ended, pad)
        ended |= torch.isin(new, last)
        left = (~ended).nonzero()[:, 0]
        if step + 1 == max_new_tokens or not max_over_ranks(model, len(left)):
            break
        if 0 < len(left) < 0.75 * len(rows):  # not for every row: each time the whole cache is copied
            cache.batch_select_indices(left)
            rows, positions, attention_mask, ended, new = (x[left] for x in (rows, positions, attention_mask, ended, new))
        seen = {"attention_mask": attention_mask[..., : mask.shape[1] + step + 1], "past_key_values": cache, "use_cache": True}
        logits = model(input_ids=new[:, None], position_ids=positions + step, **seen).logits[:, -1]
    return answers


def _by_transformers(
    model: PreTrainedModel, batch: Batch, max_new_tokens: int, ends: list[int], pad: int, choose: _Choice
) -> Tensor:
    """The same for any architecture, slower."""
    chosen = [] if choose.draws is None else [_Chosen(choose, batch["input_ids"].shape[1])]
    config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad, use_cache=True)
    synced = {"synced_gpus": group_of(model) is not None, "logits_processor": LogitsProcessorList(chosen)}
    out = model.generate(**batch, generation_config=config, **synced)  # type: ignore[operator]
    return out[:, batch["input_ids"].shape[1] :]
