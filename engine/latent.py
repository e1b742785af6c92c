"""Perturbations of the residual stream at chosen tokens, and how they are optimised inside a ball."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from casehard.engine.anatomy import decoder_layers
from casehard.engine.outputs import changed_outputs
from casehard.engine.soft_tokens import standing_for

Norm = Literal["l2", "linf"]
INSIDE = 1 - 1e-6  # of the radius, so that no rounding is outside


@contextmanager
def perturbed(model: PreTrainedModel, layers: Sequence[int], tokens: Tensor, deltas: Tensor) -> Iterator[None]:
    """For a block, what decoder layers put out at marked tokens is moved, in passes and generation alike.

    A token is marked by its id: ``table_shape(model)[0] + i`` stands for ``tokens[i]``, whose states are moved by
    ``deltas[:, i]``. So rows may be packed, padded and cached in any way. Gradients flow to ``deltas``.

    Args:
        model: any causal language model of transformers whose layers see no ids; it may be sharded.
        layers: decoder layers, from 0.
        tokens: ids of the vocabulary, ``[num]``.
        deltas: ``[layers, num, dim]``, cast to the states' dtype.
    """
    every = decoder_layers(model)
    with standing_for(model, tokens) as seen:
        moved = [every[layer] for layer in layers]
        with changed_outputs(model, moved, lambda number, states: seen.moved(states, deltas[number])):
            yield


def projected(deltas: Tensor, radius: float, norm: Norm) -> Tensor:
    """The nearest perturbation in the ball: of every state's delta, the last dimension, the length (l2) or each entry."""
    if norm == "linf":
        return deltas.clamp(-radius, radius)
    lengths = deltas.norm(dim=-1, keepdim=True)
    return torch.where(lengths > INSIDE * radius, deltas * (INSIDE * radius / lengths), deltas)


def ball_descent(
    gradient: Callable[[Tensor], Tensor], start: Tensor, num_steps: int, radius: float, step_ratio: float, norm: Norm
) -> Tensor:
    """Projected gradient descent inside a ball, from ``start``: every step moves each state's delta by ``step_ratio * radius``.

    Args:
        gradient: of the loss at a perturbation.
        start: inside the ball.
        num_steps: how many.
        radius: of the ball, >= 0.
        step_ratio: length of a step, of every state's delta (l2) or of every entry (linf), as a share of the radius.
        norm: of the ball: l2 of every state's delta by itself, or linf.
    """
    deltas = start
    for _ in range(num_steps):
        slope = gradient(deltas)
        direction = slope.sign() if norm == "linf" else F.normalize(slope, dim=-1, eps=1e-30)
        deltas = projected(deltas - step_ratio * radius * direction, radius, norm)
    return deltas
