"""Gradients of single rows, of all rows of a batch by one pass, with respect to the linear maps of the last decoder layer."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from casehard.engine.anatomy import decoder_layers, is_linear
from casehard.engine.forward import Batch, label_positions, label_targets, run
from casehard.engine.outputs import changed_maps


def last_maps(model: PreTrainedModel) -> list[nn.Module]:
    """The linear maps of the last decoder layer, without adapters' own."""
    named = decoder_layers(model)[-1].named_modules()
    return [module for name, module in named if "lora_" not in name and is_linear(module)]


class RowGradients(NamedTuple):
    """Gradients of rows, as what enters every map and the gradient of what it puts out, with as many tokens as the longest row.

    That of row i and map m is ``pulled[m][i].mT @ entered[m][i]``, of shape ``[out, in]``, which is not held: inner products and
    norms are sums over pairs of tokens.
    """

    entered: list[Tensor]  # [rows, seq, in], one a map, in float32
    pulled: list[Tensor]  # [rows, seq, out]
    size: float  # norm of all that the maps put out

    def of(self, row: int) -> list[Tensor]:
        """The gradient of a row, map by map."""
        return [d[row].mT @ a[row] for a, d in zip(self.entered, self.pulled, strict=True)]

    def norms(self) -> Tensor:
        """Of every row, over all maps, ``[rows]``."""
        squares = [((a @ a.mT) * (d @ d.mT)).sum(dim=(1, 2)) for a, d in zip(self.entered, self.pulled, strict=True)]
        return torch.stack(squares).sum(dim=0).clamp(min=0).sqrt()

    def cosines(self, other: list[Tensor]) -> Tensor:
        """Of the angles between every row's gradient and another one, ``[rows]``."""
        products = [((a @ h.mT) * d).sum(dim=(1, 2)) for a, d, h in zip(self.entered, self.pulled, other, strict=True)]
        return torch.stack(products).sum(dim=0) / (self.norms() * norm(other)).clamp(min=torch.finfo(torch.float32).tiny)

    def moved(self, direction: list[Tensor]) -> float:
        """Norm of what the maps would put out in addition, at weights moved by ``direction``."""
        return float(norm([a @ v.mT for a, v in zip(self.entered, direction, strict=True)]))


def norm(gradient: list[Tensor]) -> Tensor:
    """Euclidean norm over all maps."""
    return torch.stack([part.square().sum() for part in gradient]).sum().sqrt()


def row_losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean cross-entropy of the labels of every row, ``[rows]``, each row in a place of its own."""
    logits = run(model, batch, logits_at=label_positions(batch["labels"]), fold=False).logits
    losses = F.cross_entropy(logits.float(), label_targets(batch["labels"]), reduction="none")
    rows = label_positions(batch["labels"]) // batch["labels"].shape[1]
    sums = torch.zeros(len(batch["labels"]), device=losses.device).index_add(0, rows, losses)
    return sums / torch.bincount(rows, minlength=len(sums))


def row_gradients(model: PreTrainedModel, batch: Batch) -> RowGradients:
    """The gradient of every row's loss alone. No parameter gets a gradient, and none needs to require one.

    Where the model is sharded every rank must call this. Maps that see rows mixed, such as experts, are left out. Cost: a forward
    pass, and a backward pass through the last decoder layer.

    Args:
        model: any causal language model of transformers.
        batch: rows with labels.
    """
    entered: dict[int, Tensor] = {}
    sizes: list[Tensor] = []
    taps: dict[int, Tensor] = {}  # added to what maps put out, all zero: they get its gradient

    def tap(number: int, into: Tensor, out: Tensor) -> Tensor:
        if out.ndim != 3:
            return out
        if number not in entered:  # a layer may be computed again in the backward pass
            entered[number] = into.detach().float()
            sizes.append(out.detach().float().square().sum())
        return out + taps.setdefault(number, torch.zeros_like(out).requires_grad_())

    with torch.enable_grad(), changed_maps(model, last_maps(model), tap):
        row_losses(model, batch).sum().backward(inputs=list(taps.values()))
    pulled = [torch.zeros_like(tap) if tap.grad is None else tap.grad for tap in taps.values()]
    size = float(torch.stack(sizes).sum().sqrt())
    return RowGradients(list(entered.values()), [gradient.float() for gradient in pulled], size)


def moved_along(model: PreTrainedModel, direction: Sequence[Tensor], scale: float) -> AbstractContextManager[None]:
    """For a block, pass through weights moved by ``scale * direction``, ``[out, in]`` a map. The weights themselves stay.

    Args:
        model: whose maps see rows apart.
        direction: of ``row_gradients``' maps, in their order.
        scale: how far.
    """
    left = iter(direction)
    by_number: dict[int, Tensor] = {}

    def move(number: int, into: Tensor, out: Tensor) -> Tensor:
        if out.ndim != 3:
            return out
        if number not in by_number:
            by_number[number] = next(left)
        return out + (scale * into.float() @ by_number[number].mT).to(out.dtype)

    return changed_maps(model, last_maps(model), move)
