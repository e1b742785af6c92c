"""Answers in passes of few shapes, for devices that make a plan for every new one.

Prompts of like length go through the model together, padded on the right, where no token sees the padding and attention needs no
mask. Then all rows go on together, one token a step, in one shape (``decode_step``). Rows that have ended go on too.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedModel

from casehard.engine.decode_graph import CudaGraph, Graph, GraphError
from casehard.engine.decode_step import Room, Step, settled
from casehard.engine.forward import prefill_padded
from casehard.engine.sharding import max_over_ranks
from casehard.engine.weights import group_of

MOST_PASSES = 4  # over the prompts of a chunk
MOST_PADDING = 0.1  # share of the prompts' tokens for which one more pass is made
LOOK_EVERY = 4  # steps between two looks whether all rows have ended: they cost up to three steps too many
WORTH_A_SHAPE = 64  # steps that a smaller shape must serve; a shape costs a plan, and a capture as long as a few eager steps
MULTIPLE = 64  # of the places that are attended to

Choose = Callable[[Tensor, Tensor, int], Tensor]
"""The token of every row, ``[rows]``, from logits ``[rows, vocab]``, the rows' places in their chunk, and the step."""

_WITHOUT_GRAPHS: WeakSet[PreTrainedModel] = WeakSet()  # that were found not to go by them


def dealt(lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Rows in chunks that are alike in their lengths, shortest first, so that one set of shapes serves all."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[chunk::num_chunks] for chunk in range(num_chunks)]


def passes(lengths: Sequence[int], most: int = MOST_PASSES, padding: float = MOST_PADDING) -> list[tuple[int, int]]:
    """Rows and width of the fewest passes that pad by at most ``padding`` of the tokens, or of the ``most`` that pad least.

    Args:
        lengths: of the rows, shortest first, which fill the passes in order.
        most: passes.
        padding: share of all tokens, >= 0.
    """
    ends = [i for i, (length, longer) in enumerate(pairwise(lengths), 1) if length < longer] + [len(lengths)]

    @cache
    def least(number: int, end: int) -> tuple[int, tuple[int, ...]]:
        """Tokens that so many passes take for the rows up to ``end``, and the row after the last of each."""
        width = lengths[end - 1]
        if number == 1:
            return end * width, (end,)
        tried = (least(number - 1, start) for start in ends if start < end)
        return min(((tokens + (end - cuts[-1]) * width, (*cuts, end)) for tokens, cuts in tried), default=least(number - 1, end))

    options = [least(number, len(lengths)) for number in range(1, most + 1)]
    _, cuts = next((option for option in options if option[0] <= (1 + padding) * sum(lengths)), options[-1])
    return [(end - start, lengths[end - 1]) for start, end in pairwise((0, *cuts))]


def places(longest: int, max_new_tokens: int) -> list[int]:
    """How many places steps may attend to, fewer first: half of what the longest answer needs where that serves for long."""
    most = _multiple(longest + max_new_tokens)
    half = _multiple(most // 2)
    return [half, most] if half < most and half - longest >= WORTH_A_SHAPE else [most]


def _multiple(number: int) -> int:
    return -(-number // MULTIPLE) * MULTIPLE


class Decoder:
    """Answers chunk after chunk, all in the same shapes.

    Args:
        model: under ``settled``, in eval mode, whose keys and values are all that it remembers.
        lengths: the most tokens of a prompt at every place of a chunk, shortest first.
        max_new_tokens: of an answer.
        ends: tokens that end an answer.
        pad: the token that stands where there is none.
        graphs: replay steps as graphs where that can be.
    """

    def __init__(
        self, model: PreTrainedModel, lengths: Sequence[int], max_new_tokens: int, ends: list[int], pad: int, graphs: bool
    ) -> None:
        self.model, self.max_new_tokens, self.pad, self.graphs = model, max_new_tokens, pad, graphs
        self.ends = torch.tensor(ends, device=model.device)
        self.passes = passes(lengths)
        self.extra_passes = max_over_ranks(model, len(self.passes)) - len(self.passes)
        self.places = places(lengths[-1], max_new_tokens)
        self.room = Room(len(lengths), self.places[-1])
        self.steps: dict[tuple[int, int], Step] = {}

    def __call__(self, prompts: Sequence[list[int]], choose: Choose) -> Tensor:
        """The chosen tokens, ``[rows, max_new_tokens]``, padded after an end.

        Args:
            prompts: shortest first; rows without one come after them.
            choose: how tokens are chosen.
        """
        try:
            return self._answer(prompts, choose)
        except GraphError as refused:
            warnings.warn(f"Answers are written without CUDA graphs, which is slower: {refused}.", stacklevel=2)
            _WITHOUT_GRAPHS.add(self.model)
            self.steps.clear()
            return self._answer(prompts, choose)

    def _answer(self, prompts: Sequence[list[int]], choose: Choose) -> Tensor:
        num_rows, steps, fewer = self.room.rows, self.max_new_tokens, self.room.rows // 4
        lengths = torch.tensor([len(prompt) for prompt in prompts] + [1] * (num_rows - len(prompts)))
        longest = int(lengths.max())
        logits, positions = self._prefill(prompts, lengths), lengths.to(self.model.device)[:, None]
        rows = torch.arange(num_rows, device=self.model.device)
        answers, ended = positions.new_full((num_rows, steps), self.pad), rows >= len(prompts)
        for step in range(steps):
            new = choose(logits, rows, step)
            answers[rows, step] = new.masked_fill(ended, self.pad)
            ended |= torch.isin(new, self.ends)
            if step + 1 == steps:
                break
            if step % LOOK_EVERY == LOOK_EVERY - 1:
                left = int((~ended).sum())
                if not max_over_ranks(self.model, left):
                    break
                if left <= fewer < len(rows) and steps - step > WORTH_A_SHAPE:
                    kept = ended.long().argsort(stable=True)[:fewer]
                    self.room.keep(kept)
                    rows, positions, ended, new = (x[kept] for x in (rows, positions, ended, new))
            seen = next(length for length in self.places if longest + step < length)
            logits = self._step(len(rows), seen)(new[:, None], positions + step)
        return answers

    def _prefill(self, prompts: Sequence[list[int]], lengths: Tensor) -> Tensor:
        """Logits after every prompt, ``[rows, vocab]``; what else they leave is in the room."""
        logits, first = [], 0
        for rows, width in self.passes:
            ids = torch.full((rows, width), self.pad)
            for row, prompt in zip(ids, prompts[first : first + rows], strict=False):
                row[: len(prompt)] = torch.tensor(prompt)
            after, cache = prefill_padded(self.model, ids, lengths[first : first + rows])
            self.room.take(cache, first)
            logits.append(after)
            first += rows
        for _ in range(self.extra_passes):  # other ranks make these
            prefill_padded(self.model, torch.full((1, 1), self.pad), torch.ones(1, dtype=torch.long))
        return torch.cat(logits)

    def _step(self, rows: int, length: int) -> Step:
        if (rows, length) not in self.steps:
            graph = graph_for(self.model) if self.graphs else None
            self.steps[rows, length] = Step(self.model, self.room, rows, length, graph)
        return self.steps[rows, length]


def graph_for(model: PreTrainedModel) -> Graph | None:
    """A new graph for a step of ``model``; None where it goes without: not on CUDA, or found not to go by one."""
    if model.device.type != "cuda" or model in _WITHOUT_GRAPHS:
        return None
    return CudaGraph(model.device)


def answers(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
    ends: list[int],
    pad: int,
    choice: Callable[[Sequence[int]], Choose],
    graphs: bool = True,
) -> list[list[int]]:
    """The chosen tokens after each prompt, ``max_new_tokens`` of them, padded after an end.

    Where the model is sharded every rank must call this, and makes as many passes as the busiest one.

    Args:
        model: see ``Decoder``.
        prompts: token ids of each.
        max_new_tokens: of an answer.
        batch_size: prompts at once.
        ends: tokens that end an answer.
        pad: the token that stands where there is none.
        choice: for the prompts of these numbers, how tokens are chosen; -1 stands for a row without a prompt.
        graphs: replay steps as graphs where that can be.
    """
    lengths = [len(prompt) for prompt in prompts]
    chunks = dealt(lengths, max_over_ranks(model, -(-len(prompts) // batch_size)))
    answered: list[list[int]] = [[]] * len(prompts)
    if not chunks:
        return answered
    longest = [max(lengths[chunk[place]] for chunk in chunks if place < len(chunk)) for place in range(len(chunks[0]))] or [1]
    graphs = graphs and group_of(model) is None  # asked here: inside, shards may be together, and FSDP2's hooks still act
    with settled(model):
        decoder = Decoder(model, longest, max_new_tokens, ends, pad, graphs)
        for chunk in chunks:
            choose = choice(chunk + [-1] * (len(longest) - len(chunk)))
            out = decoder([prompts[i] for i in chunk], choose)
            for i, ids in zip(chunk, out.tolist(), strict=False):
                answered[i] = ids
    return answered
