"""Vaccine: alignment that holds where the attention's outputs are moved against it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from casehard.engine.anatomy import blocks
from casehard.engine.forward import Batch, label_positions, run
from casehard.engine.gradients import sum_over_ranks
from casehard.engine.outputs import changed_outputs
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError


class VaccineModule(Defense):
    """Vaccine (arXiv:2402.01109), an alignment stage defense.

    A first pass gives ``G``, the gradient of ``sft_loss`` with respect to what the attention of every layer puts out. The step
    then minimises ``sft_loss`` where ``radius * G / (norm(G) + 1e-7)`` is added to those outputs: the move of that length that
    hurts most. The norm is over all layers and all tokens of the whole batch, so a larger batch moves each token less.

    Two forward and backward passes a step. Memory beyond plain SFT: a copy of the attention's outputs, and one of the gradient
    during the first pass. Compiled layers run uncompiled.

    Args:
        checkpoint: the model to start from, as for ``Defense``. Every layer must have an attention.
        radius: length of the perturbation (``rho`` in the paper), >= 0; 0 is plain SFT.
        settings: the rest of ``Defense``'s.
    """

    # Departures from the authors' code: (1) under gradient accumulation each batch has a perturbation of the whole radius, where
    # theirs also divides the gradients; (2) the norm is over the batches of all ranks, where theirs is each rank's own.

    adaptive = "attack/adaptive/vaccine"

    def __init__(self, checkpoint: str, radius: float = 2.0, **settings: Any) -> None:
        if not radius >= 0:
            raise SettingError(f"radius of Vaccine must be >= 0, got {radius}. 0 is plain SFT.")
        super().__init__(checkpoint, **settings)
        self.radius = radius
        self.shifts: dict[int, Tensor] = {}  # what is added to the attention's outputs, by layer: [batch, seq, dim]

    def on_fit_start(self) -> None:
        """Look for the attention of every layer, so that a missing one shows before the first step."""
        blocks(self.model, "attention")

    def alignment_loss(self, batch: Batch, step: int) -> Tensor:
        """``sft_loss`` under the perturbation that the batch's own gradient gives."""
        if self.radius == 0:
            return self.sft_loss(batch)
        self.shifts = {}
        clean, _ = self.loss_and_gradient(batch, self.shifted_loss)
        gradients = {number: shift.grad for number, shift in self.shifts.items() if shift.grad is not None}
        squares = torch.stack([g.float().square().sum() for g in gradients.values()]).sum()
        # each rank's loss is as many times its part as there are ranks: a factor of G and of the norm alike
        scale = self.radius / (sum_over_ranks(squares, self.row_group).sqrt() + 1e-7)
        self.shifts = {number: (scale * g.float()).to(g.dtype) for number, g in gradients.items()}
        self.terms = {"sft_loss": clean}
        return self.shifted_loss(batch)

    def shifted_loss(self, batch: Batch) -> Tensor:
        """``sft_loss`` under ``shifts``. Rows are not folded: a token that they share is moved in each by itself."""
        with self.shifted_attention():
            return self.cross_entropy(
                run(self.model, batch, logits_at=label_positions(batch["labels"]), fold=False).logits, batch
            )

    def shifted_attention(self) -> AbstractContextManager[None]:
        """For a block, add ``shifts`` to what the attention puts out; where there is none yet, zeros that wait for a gradient."""

        def shifted(number: int, output: Tensor) -> Tensor:
            if number not in self.shifts:
                self.shifts[number] = torch.zeros_like(output, requires_grad=True)
            return output + self.shifts[number]

        parts = blocks(self.model, "attention")
        return changed_outputs(self.model, [b.attention for b in parts if b.attention is not None], shifted)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Layers that are computed again in the backward pass are under the same perturbation."""
        with self.shifted_attention() if self.shifts else nullcontext():
            super().backward(loss, *args, **kwargs)
        self.shifts = {}
