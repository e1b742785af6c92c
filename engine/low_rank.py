"""What was added to the weights of a base model, from its largest singular value down."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from casehard.engine.sharding import edit, whole_of
from casehard.engine.weights import Weights

Cliff = tuple[int, float]
"""A rank, and by what factor the next singular value is smaller."""
HALF = 2  # a cliff is looked for in so large a part of the ranks: the smallest singular value of any matrix may be near zero


def cliff(matrix: Tensor) -> list[Cliff]:
    """Where the singular values of a matrix fall the most, in the first half of them.

    Args:
        matrix: ``[rows, columns]``, two of each or more, or a stack of such, of which each has its own.
    """
    values = torch.linalg.svdvals(matrix.flatten(0, -3) if matrix.ndim > 2 else matrix[None])
    num = values.shape[-1] // HALF + 1
    ratios = values[:, : num - 1] / values[:, 1:num].clamp(min=torch.finfo(values.dtype).tiny)
    factors, places = ratios.max(dim=-1)
    return [(int(place) + 1, float(factor)) for place, factor in zip(places, factors, strict=True)]


def without_top(matrix: Tensor, rank: int) -> Tensor:
    """``matrix`` without its ``rank`` largest singular values: zero where it has no more. A vector has one."""
    if rank == 0:
        return matrix
    if matrix.ndim < 2 or rank >= min(matrix.shape[-2:]):
        return torch.zeros_like(matrix)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[..., rank:] * values[..., None, rank:]) @ right[..., rank:, :]


def strip(model: PreTrainedModel, base: Weights, keeps: Mapping[str, float], remove_rank: int, spectrum: bool) -> list[Cliff]:
    """Edit, in place, every parameter: ``base + keep * (delta without its largest singular values)``, in float32, cast last.

    Args:
        model: sharded or not.
        base: by the names of ``model``'s parent's parameters, by shard; emptied.
        keeps: the share of the delta that stays, by the model's own names.
        remove_rank: singular values that are cut.
        spectrum: look for cliffs.

    Returns:
        The cliff of every matrix of the delta that is not zero and has four rows and columns or more.
    """
    cliffs: list[Cliff] = []

    def stripped(weight: Tensor, start: Tensor, keep: float) -> Tensor:
        start = start.to(weight.device, torch.float32)
        delta = weight.float() - start
        if spectrum and delta.ndim > 1 and min(delta.shape[-2:]) > 3 and delta.any():
            cliffs.extend(cliff(delta))
        if keep == 1 and not remove_rank:
            return weight  # to its bits
        return start if keep == 0 else start + keep * without_top(delta, remove_rank)

    own = dict(model.named_parameters())
    for name, keep in keeps.items():
        edit(own[name], partial(stripped, start=whole_of(base.pop(f"model.{name}"), own[name]), keep=keep))
    return cliffs
