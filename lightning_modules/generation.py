"""Greedy answers to many prompts at once."""

import inspect
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from lightning_modules.weights import same_modes_after

PREFILL = 32  # prompts that are read at once; they are sorted by length, so few of like length need little padding
LEAVING = 0.75  # rows leave when no more than this share goes on: fewer rows are cheaper, but their past must be copied


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the tokenizer's and those that the model's generation config adds."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    return sorted({*ids, tokenizer.eos_token_id} - {None})


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 128,
) -> list[str]:
    """Greedy answers, batched by length and left-padded; the text does not depend on the batch size.

    Args:
        model: put into eval mode for the call, and back; its own generation config (penalties, beams) does not act.
        tokenizer: gives padding and end tokens, and turns ids back into text.
        prompts: token ids of each prompt, generation prompt included.
        max_new_tokens: an answer is cut there if no end token came.
        batch_size: prompts at once; memory grows with it, the text stays the same.

    Returns:
        An answer a prompt, without special tokens.
    """
    ends = end_tokens(model, tokenizer)
    answer = _greedy if _takes_cache(model) else _by_transformers
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    with same_modes_after(model):
        model.eval()
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            ids = [torch.tensor(prompts[i], device=model.device) for i in chunk]
            padded = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id, padding_side="left")
            mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True, padding_side="left")
            tokens = answer(model, padded, mask, max_new_tokens, ends, tokenizer.pad_token_id)
            for i, text in zip(chunk, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
                answers[i] = text
    return answers


def _takes_cache(model: PreTrainedModel) -> bool:
    """Whether the model's past is keys and values of all tokens, in a cache that it is handed."""
    arguments = inspect.signature(model.forward).parameters
    layers = DynamicCache(config=model.config).layers
    return (
        {"past_key_values", "position_ids"} <= set(arguments) and bool(layers) and all(type(la) is DynamicLayer for la in layers)
    )


class _Roomy(DynamicLayer):
    """A layer's keys and values with room for those to come, so that a new token copies nothing that is there."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.length, self.is_initialized = keys.shape[-2], True
        self.dtype, self.device = keys.dtype, keys.device
        self.roomy = [F.pad(past, (0, 0, 0, room)) for past in (keys, values)]
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Append, and return everything."""
        start, self.length = self.length, self.length + key_states.shape[-2]
        for past, new in zip(self.roomy, (key_states, value_states), strict=True):
            past[:, :, start : self.length] = new
        self.keys, self.values = (past[:, :, : self.length] for past in self.roomy)
        return self.keys, self.values

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        self.roomy = [past[rows] for past in self.roomy]


def _prefilled(model: PreTrainedModel, ids: Tensor, mask: Tensor, room: int) -> tuple[Tensor, list[_Roomy]]:
    """The last logits ``[batch, vocab]`` of prompts sorted by length, and their past, from passes with little padding."""
    logits: list[Tensor] = []
    pasts: list[list[list[Tensor]]] = []  # [group][layer][keys and values]
    for some, real in zip(ids.split(PREFILL), mask.split(PREFILL), strict=True):
        width = int(real.sum(1).max())
        some, real = some[:, -width:], real[:, -width:]
        cache, left = DynamicCache(config=model.config), ids.shape[1] - width
        logits.append(_last_logits(model, some, real, (real.cumsum(1) - 1).clamp(min=0), cache))
        pasts.append([[F.pad(past, (0, 0, left, 0)) for past in (la.keys, la.values)] for la in cache.layers])  # type: ignore
    layers = [[torch.cat(parts) for parts in zip(*groups, strict=True)] for groups in zip(*pasts, strict=True)]
    return torch.cat(logits), [_Roomy(keys, values, room) for keys, values in layers]


def _last_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **keep)
    return out.logits[:, -1]


def _greedy(model: PreTrainedModel, ids: Tensor, mask: Tensor, max_new_tokens: int, ends: list[int], pad: int) -> Tensor:
    """The likeliest token, again and again, ``[batch, new]``; rows at their end leave the batch."""
    tokens = torch.full((len(ids), max_new_tokens), pad, device=ids.device)
    rows, stop = torch.arange(len(ids), device=ids.device), torch.tensor(ends, device=ids.device)
    logits, layers = _prefilled(model, ids, mask, max_new_tokens)
    cache, positions = Cache(layers=list(layers)), mask.sum(1, keepdim=True)
    mask = F.pad(mask, (0, max_new_tokens), value=1)
    going = torch.ones_like(rows, dtype=torch.bool)
    for step in range(max_new_tokens):
        chosen = logits.argmax(-1)
        tokens[rows[going], step] = chosen[going]
        going = going & ~torch.isin(chosen, stop)
        if not going.any() or step + 1 == max_new_tokens:
            break
        if going.sum() <= LEAVING * len(rows):
            rows, chosen, mask, positions = rows[going], chosen[going], mask[going], positions[going]
            for layer in layers:
                layer.keep(going)
            going = going[going]
        logits = _last_logits(model, chosen[:, None], mask[:, : ids.shape[1] + step + 1], positions + step, cache)
    return tokens


def _by_transformers(model: PreTrainedModel, ids: Tensor, mask: Tensor, max_new_tokens: int, ends: list[int], pad: int) -> Tensor:
    """As ``_greedy``, for models that keep their past in a way of their own."""
    config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad, use_cache=True)
    shipped, model.generation_config = model.generation_config, GenerationConfig()  # else its penalties and beams act here too
    try:
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
    finally:
        model.generation_config = shipped
    return out[:, ids.shape[1] :]
