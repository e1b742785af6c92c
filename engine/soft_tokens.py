"""Soft tokens: embeddings of one's own in the place of tokens, and how they are optimised."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


def table_shape(model: PreTrainedModel) -> tuple[int, int]:
    """How many tokens have an embedding (ids from there on may be soft tokens), and of how many entries."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[1]


class Marks:
    """Which tokens of the last pass were marked, laid out as its ids: bool."""

    now: Tensor


@contextmanager
def marks(model: PreTrainedModel) -> Iterator[Marks]:
    """For a block, ids from the end of the vocabulary on stand for the ids so far below them, and say that these are marked.

    The marks stand on the ids themselves, so they are right under every layout, and in generation, whose new tokens have none.
    """
    size, seen = table_shape(model)[0], Marks()

    def read(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        seen.now = args[0] >= size
        return (torch.where(seen.now, args[0] - size, args[0]),)

    handle = model.get_input_embeddings().register_forward_pre_hook(read)
    try:
        yield seen
    finally:
        handle.remove()


class StandIns:
    """Where the ids of the last pass stood for others: the number of each, below 0 where it stands for itself."""

    index: Tensor

    def moved(self, states: Tensor, added: Tensor) -> Tensor:
        """``states`` of the pass, plus ``added[i]`` where the id of number ``i`` stood; ``added`` is ``[num, dim]``."""
        moved = states + F.embedding(self.index.clamp(min=0), added).to(states.dtype)
        return torch.where(self.index[..., None] < 0, states, moved)


@contextmanager
def standing_for(model: PreTrainedModel, tokens: Tensor) -> Iterator[StandIns]:
    """For a block, id ``table_shape(model)[0] + i`` stands for ``tokens[i]``, ``[num]``, in passes and generation alike.

    Rows may be packed, padded and cached in any way.
    """
    size, seen = table_shape(model)[0], StandIns()

    def read(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        seen.index = args[0] - size
        return (torch.where(seen.index < 0, args[0], tokens[seen.index.clamp(min=0)]),)

    handle = model.get_input_embeddings().register_forward_pre_hook(read)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def soft_tokens(model: PreTrainedModel, tokens: Tensor, added: Tensor) -> Iterator[None]:
    """For a block, ids from the end of the vocabulary on stand for soft tokens, in passes and generation alike.

    Id ``table_shape(model)[0] + i`` has the embedding of ``tokens[i]`` plus ``added[i]``, through which gradients flow.

    Args:
        model: any causal language model of transformers whose layers see no ids; it may be sharded.
        tokens: ids of the vocabulary, ``[num]``.
        added: ``[num, dim]``, cast to the embeddings' dtype.
    """
    with standing_for(model, tokens) as seen:
        handle = model.get_input_embeddings().register_forward_hook(lambda _, args, out: seen.moved(out, added))
        try:
            yield
        finally:
            handle.remove()


def sign_descent(loss: Callable[[Tensor], Tensor], start: Tensor, num_steps: int, learning_rate: float) -> Tensor:
    """``x`` after ``num_steps`` times ``x <- x - learning_rate * sign(d loss / d x)`` from ``start``, detached.

    Cost: a forward and a backward pass a step; no parameter gets a gradient.
    """
    x = start
    for _ in range(num_steps):
        x = x.detach().requires_grad_()
        loss(x).backward(inputs=[x])
        assert x.grad is not None
        x = x.detach() - learning_rate * x.grad.sign()
    return x
