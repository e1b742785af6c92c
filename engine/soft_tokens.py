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


@contextmanager
def soft_tokens(model: PreTrainedModel, tokens: Tensor, added: Tensor) -> Iterator[None]:
    """For a block, ids from the end of the vocabulary on stand for soft tokens, in passes and generation alike.

    Id ``table_shape(model)[0] + i`` has the embedding of ``tokens[i]`` plus ``added[i]``, through which gradients flow.

    Args:
        model: any causal language model of transformers whose layers see no ids; it may be sharded.
        tokens: ids of the vocabulary, ``[num]``.
        added: ``[num, dim]``, cast to the embeddings' dtype.
    """
    size, index = table_shape(model)[0], torch.empty(0)

    def replace(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        nonlocal index
        index = args[0] - size
        return (torch.where(index < 0, args[0], tokens[index.clamp(min=0)]),)

    def add(_: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        return torch.where(index[..., None] < 0, out, out + F.embedding(index.clamp(min=0), added).to(out.dtype))

    embedding = model.get_input_embeddings()
    handles = [embedding.register_forward_pre_hook(replace), embedding.register_forward_hook(add)]
    try:
        yield
    finally:
        for handle in handles:
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
