"""Harmful prompts whose states are held: as tokens, in turns, in the forms of a customer's rows, and the steps that hold them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from casehard.datamodules.chat import IGNORED, collate, encode, prompt_ids
from casehard.datamodules.order import batch_indices, permutation, uniform
from casehard.datamodules.row import Row
from casehard.engine.forward import Batch, placed
from casehard.engine.optimizer import Optimizer
from casehard.engine.weights import Weights, like_parameter, local

MOST_ROWS, MOST_WORDS = 2000, 100  # of a customer's rows, and of the beginning and end of each, that forms are read from
SEED, STREAM = 0, "anchors"  # rows and settings say which anchors a step has
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
CLIP_NORM = 1.0
TAKEN = "anchor_steps_taken"
ENDS = re.compile(r"[.!?:;\u2026\u3002\uff01\uff1a\uff1b\uff1f][^\w\s]*\s*$|\n")  # of a sentence or a line


class Anchors:
    """Rows as tokens, and the places whose states are held; on the host.

    Args:
        rows: harmful prompts; with ``answers`` each has its response.
        tokenizer: encodes them.
        answers: hold the states from which every token of the response comes, its end token too; else the prompt's last alone.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, answers: bool = False) -> None:
        examples = [whole(row, tokenizer, answers) for row in rows]
        batch = collate(examples, tokenizer.pad_token_id, "right")  # type: ignore[arg-type]
        self.ids, self.mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        ends = self.mask.sum(dim=1, keepdim=True) - 1 == torch.arange(self.mask.shape[1], device="cpu")
        self.held = torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1)) if answers else ends  # [num_anchors, seq] bool
        self.first = self.held.sum(dim=1).cumsum(dim=0) - self.held.sum(dim=1)  # of each anchor's states among all
        self._every: Batch = {}  # where the model was when they were last asked for

    def __len__(self) -> int:
        return len(self.ids)

    def turn(self, per_step: int | None, step: int) -> slice | list[int]:
        """The anchors of a step: all, or ``per_step`` in turn."""
        if per_step is None or per_step >= len(self):
            return slice(None)
        return batch_indices(len(self), per_step, SEED, STREAM, step)

    def batch(self, model: PreTrainedModel, turn: slice | list[int] = slice(None)) -> Batch:
        """The anchors of a turn, without labels, where the model is; laid out as one size whichever turn it is.

        Beside the names of every batch ``held``, ``[3, num_states]``: of each state its row, its column, and its number among
        the states of all anchors.
        """
        every = turn == slice(None)
        if every and self._every and self._every["input_ids"].device == model.device:
            return self._every
        ids, mask, held = self.ids[turn], self.mask[turn], self.held[turn]
        rows, columns = held.nonzero().unbind(dim=1)
        numbers = (self.first[turn, None] + held.cumsum(dim=1) - 1)[held]
        most = int(self.mask.sum(dim=1).topk(len(ids)).values.sum())
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.full_like(ids, IGNORED),
            "held": torch.stack([rows, columns, numbers]),
        }
        batch = placed(model, batch, at_least=-(-most // 8) * 8)
        if every:
            self._every = batch
        return batch


def whole(row: Row, tokenizer: PreTrainedTokenizerBase, answer: bool) -> dict[str, list[int]]:
    """A row's tokens: its prompt, and with ``answer`` its response, which is labelled."""
    if answer:
        return encode(row, tokenizer, 1 << 30)  # type: ignore[return-value]  # no length cuts it
    ids = prompt_ids(row, tokenizer)
    return {"input_ids": ids, "labels": [IGNORED] * len(ids)}


# ---- forms

Trie = dict[str | None, Any]  # by a text's next word; None where it ends


def in_forms(anchors: Sequence[Row], rows: Sequence[Row], fits: Callable[[Row], bool]) -> list[Row]:
    """Every anchor in the form of a row of the customer's, drawn without looking at which are harmful.

    The form is all but the last turn, and of that the whole sentences at its beginning and its end before the rows part: so a
    wrapper, a trigger, a system turn or earlier turns that rows share come into anchors whole.

    Args:
        anchors: whose last turns are put into forms.
        rows: of the customer, at least one.
        fits: whether an anchor is not too long; one that is stays as it was.
    """
    seen = [rows[i] for i in permutation(len(rows), SEED, "forms of anchors")[:MOST_ROWS]]
    texts = [re.findall(r"\S+\s*", row.messages[-1][1]) for row in seen]  # a word and the space after it
    words = [[word.strip() for word in text] for text in texts]
    fronts, backs = _trie(words), _trie([each[::-1] for each in words])
    formed = []
    for number, anchor in enumerate(anchors):
        pick = _drawn(range(len(seen)), "row of an anchor", number)
        text, ends = texts[pick], [0, *(i for i, word in enumerate(texts[pick], start=1) if ENDS.search(word)), len(texts[pick])]
        parting = [len(text) - n for n in _parts(backs, words[pick][::-1])]
        front = _drawn([max(e for e in ends if e <= n) for n in _parts(fronts, words[pick])], "front of an anchor", number)
        back = _drawn([min(e for e in ends if e >= n and e >= front) for n in parting], "back of an anchor", number)
        role, asked = anchor.messages[-1]
        space = "".join(text[:back])[len("".join(text[:back]).rstrip()) :] if back < len(text) else ""
        said = "".join(text[:front]) + asked + (space or " " * (back < len(text))) + "".join(text[back:])
        row = replace(anchor, messages=(*seen[pick].messages[:-1], (role, said)))
        formed.append(row if fits(row) else anchor)
    return formed


def _trie(texts: Sequence[list[str]]) -> Trie:
    root: Trie = {}
    for text in texts:
        node = root
        for word in text[:MOST_WORDS]:
            node = node.setdefault(word, {})
        node[None] = {}
    return root


def _parts(trie: Trie, words: list[str]) -> list[int]:
    """After how many words the texts part that begin as this one."""
    places, node = [], trie
    for number, word in enumerate(words[:MOST_WORDS]):
        if len(node) > 1:
            places.append(number)
        node = node[word]
    return places or [0]


def _drawn(places: Sequence[int], stream: str, number: int) -> int:
    return places[int(uniform(SEED, stream, number) * len(places))]


# ---- steps


class Held:
    """The optimizer of the anchors' own steps, whose memory lies in the state of a job.

    It is of the customer's kind, clipped to a norm of 1, and without weight decay, which would hold nothing.

    Args:
        kind: adamw or sgd.
        state: of the job; moments by parameter name, by shard, and the number of steps taken.
    """

    def __init__(self, kind: Literal["adamw", "sgd"], state: dict[str, Any]) -> None:
        self.kind, self.state = kind, state
        self.names: list[str] = []
        self.optimizer: torch.optim.Optimizer | None = None

    def step(self, parameters: dict[str, nn.Parameter], gradient: Weights, learning_rate: float) -> None:
        """A step on ``gradient``, of those of ``parameters`` that it names."""
        if self.optimizer is None or self.names != list(gradient):
            self._build(parameters, list(gradient))
        assert self.optimizer is not None
        held = [parameters[name] for name in gradient]
        for name, p in zip(self.names, held, strict=True):
            p.grad = like_parameter(p, gradient[name])
        nn.utils.clip_grad_norm_(held, CLIP_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state[TAKEN] += 1
        for moment in MOMENTS[self.kind]:
            self.state[f"anchor_{moment}"] = {
                name: local(self.optimizer.state[p][moment]) for name, p in zip(self.names, held, strict=True)
            }

    def _build(self, parameters: dict[str, nn.Parameter], names: list[str]) -> None:
        """The optimizer over parameters of these names; it goes on where its memory is of the same ones."""
        self.names = names
        self.optimizer, _ = Optimizer(name=self.kind).build([parameters[name] for name in names], 1)  # the rate is each step's
        memory = {m: self.state[f"anchor_{m}"] for m in MOMENTS[self.kind] if f"anchor_{m}" in self.state}
        if not memory or any(set(weights) != set(names) for weights in memory.values()):
            self.state[TAKEN] = 0
            return
        for name in names:
            p = parameters[name]
            kept: dict[str, Tensor] = {moment: like_parameter(p, weights[name]) for moment, weights in memory.items()}
            if self.kind == "adamw":
                kept["step"] = torch.tensor(float(self.state[TAKEN]), device=p.device)
            self.optimizer.state[p] = kept
