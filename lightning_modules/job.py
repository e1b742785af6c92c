"""One fine-tuning at a service: what ``fit`` and every attack on a service run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from casehard.datamodules.row import Row
from casehard.engine.forward import Batch

if TYPE_CHECKING:
    from casehard.lightning_modules.defense import Defense


class Job:
    """A customer's fine-tuning at a service, with all of its state; by itself it is plain SFT.

    A fine-tuning stage defense returns its own subclass from ``Defense.job``; ``fit`` and every attack at a service then run it.
    Hooks run in this order: ``freeze``, ``begin``, then for every optimizer step ``loss`` (once a micro-batch), ``before_step``,
    ``after_step``. A resumed ``fit`` calls ``freeze``, not ``begin``, and goes on.

    What a job remembers belongs into ``state``, not to the defense: an attack in the middle of ``fit`` runs another job on the
    same defense. Settings are the defense's, ``self.defense.weight``. ``rows()`` are what the customer has handed in, as the
    service sees them. Passes beside that of the loss are counted by ``spend``.

    Args:
        defense: whose model is trained. It is at the weights where the job starts.
    """

    def __init__(self, defense: Defense) -> None:
        self.defense = defense
        self.state: dict[
            str, Any
        ] = {}  # tensors, Weights and numbers, which a checkpoint of ``fit`` saves and resuming brings back
        self.terms: dict[str, Tensor] = {}  # detached parts of the last loss, for the logs
        self.rows: Callable[[], list[Row]] = list  # what the customer has handed in; set before ``begin``, and on resume
        self._spent: tuple[float, Tensor | int] = (0, 0)

    def freeze(self) -> None:
        """Freeze what the service does not train, before the optimizer is built."""

    def begin(self) -> None:
        """Take references into ``state``, before the first step. Not called on resume: the checkpoint brings ``state``."""

    def loss(self, batch: Batch, step: int) -> Tensor:
        """Loss of a batch, a scalar; ``step`` counts optimizer steps from 0.

        A term in the weights alone is right on shards as its gradient, which ``before_step`` adds.
        """
        return self.defense.sft_loss(batch)

    def before_step(self, step: int) -> None:
        """Change the gradients, which are averaged over the ranks and not yet clipped: project, mask."""

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Change the weights after the customer's optimizer has, whose learning rate is still that of the step."""

    def spend(self, passes: float, trained: Tensor | int = 0) -> None:
        """Count passes beside the one that is taken of every loss.

        Args:
            passes: forward and backward over a (global) batch.
            trained: tokens of this process's share of it, without padding.
        """
        self._spent = (self._spent[0] + passes, self._spent[1] + trained)

    def spent(self) -> tuple[float, Tensor | int]:
        """What was spent since this was last asked."""
        spent, self._spent = self._spent, (0, 0)
        return spent
