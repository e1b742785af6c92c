"""A task that stays at one distance from where it began."""

from dataclasses import dataclass

import torch
from torch import nn

from casehard.engine.gradients import norm
from casehard.engine.training import Around
from casehard.engine.weights import Weights, attack_vector, beside, local


@dataclass
class AtDistance(Around):
    """A task after every step of which the weights are put at one distance from their start, in the direction that they took.

    ``w <- start + distance * ||start|| * (w - start) / ||w - start||``, norms over all of ``start``. Memory: one copy of it.

    Args:
        task: whose hooks act, too.
        module: that is trained.
        start: what trains, where it began, by name.
        distance: as a share of the norm of ``start``, > 0.
    """

    module: nn.Module
    start: Weights
    distance: float

    @torch.no_grad()
    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """The task's, then the way to the distance. Weights that have not moved at all stay."""
        super().after_step(step, optimizer)
        moved = attack_vector(self.module, self.start)
        if size := float(norm(self.module, moved)):
            factor, own = self.distance * float(norm(self.module, self.start)) / size, dict(self.module.named_parameters())
            for name, vector in moved.items():
                (start,) = beside([self.start[name]], vector.device)
                local(own[name]).copy_(start + factor * vector)
