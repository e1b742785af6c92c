"""Booster: the loss on harmful rows shall not fall fast."""

from typing import Any

from torch import Tensor

from casehard.engine.forward import Batch
from casehard.engine.gradients import difference, norm
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError


class BoosterModule(Defense):
    """Booster (arXiv:2409.01586), an alignment stage defense.

    Minimises ``sft_loss(weights) + weight * (h(weights) - h(weights - radius * g / norm(g)))``, where ``h`` is the loss on the
    data's ``alignment_harmful`` rows and ``g`` its gradient: how far one normalised step of an attacker brings ``h`` down. The
    paper takes ``g / norm(g)`` for a constant, and a step's gradient is ``f + weight * (g - g')``: ``f`` of the first term,
    ``g'`` of ``h`` at the shifted weights.

    Three forward and backward passes a step. Memory beyond plain SFT: up to three copies of the gradient.

    Args:
        checkpoint: the model to start from, as for ``Defense``.
        weight: of the harmful term (``lambda`` in the paper), >= 0; 0 is plain SFT.
        radius: length of the attacker's step (``alpha`` in the paper), >= 0; 0 is plain SFT.
        harmful_batch_size: harmful rows a step, over all processes, >= 1.
        settings: the rest of ``Defense``'s.
    """

    adaptive = "attack/adaptive/booster"

    def __init__(
        self, checkpoint: str, weight: float = 5.0, radius: float = 0.1, harmful_batch_size: int = 10, **settings: Any
    ) -> None:
        for name, value, least in (("weight", weight, 0), ("radius", radius, 0), ("harmful_batch_size", harmful_batch_size, 1)):
            if not value >= least:
                raise SettingError(f"{name} of Booster must be >= {least}, got {value}.")
        super().__init__(checkpoint, **settings)
        self.weight, self.radius, self.harmful_batch_size = weight, radius, harmful_batch_size

    def on_fit_start(self) -> None:
        """Lay out the harmful rows, so that missing ones show before the first step."""
        rows = self.data.rows["alignment_harmful"]
        if not rows:
            raise SettingError(
                "data.sources.alignment_harmful must name harmful rows for Booster, got none. "
                "Give rows that no attack is measured with."
            )
        self.harmful = self.stream(rows, self.harmful_batch_size, "booster")

    def alignment_loss(self, batch: Batch, step: int) -> Tensor:
        """``sft_loss``; ``weight * (g - g')`` is added to its gradient."""
        harmful = self.harmful(step)
        here = self.gradient(harmful)
        there = self.gradient(harmful, at=here, scale=-self.radius / (float(norm(self, here)) + 1e-7))
        self.add_gradient(difference(here, there), self.weight)
        return self.sft_loss(batch)
