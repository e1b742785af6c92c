"""Lisa: a service's fine-tuning that keeps going back to alignment."""

from typing import Any

import torch
from torch import Tensor

from casehard.engine.forward import Batch
from casehard.engine.gradients import add_to_grad
from casehard.engine.weights import attack_vector, snapshot
from casehard.lightning_modules.defense import Defense
from casehard.lightning_modules.job import Job
from casehard.metrics.errors import SettingError


class LisaModule(Defense):
    """Lisa (Lazy safety alignment, arXiv:2405.18641), a fine-tuning stage defense.

    The service alternates ``num_alignment_steps`` steps on alignment rows (``rows``: the data's refusals and benign rows) and
    ``num_task_steps`` on the customer's, beginning with alignment. Each step minimises
    ``sft_loss + proximal_weight / 2 * norm(weights - other) ** 2``, over the weights that train, where ``other`` is where they
    stood at the last switch: neither kind of row may draw them far from what the other has made.

    It protects while the provider trains (``finetuning_service``). Whoever holds the weights leaves all of it out: no protection
    against ``open_weight`` attackers.

    One forward and backward pass a step; alignment steps are taken from the customer's. Memory beyond plain SFT: a copy of what
    trains, and one more around the optimizer's step.

    Args:
        checkpoint: the aligned model, as for ``Defense``.
        num_alignment_steps: steps in a row on alignment rows (``K1`` in the paper), >= 0; 0 trains on the customer's alone.
        num_task_steps: steps in a row on the customer's rows (``K2`` in the paper), >= 1.
        proximal_weight: of the distance (``rho`` in the paper), >= 0; 0 lets the weights go. With SGD it must stay well below
            2 / learning_rate, beyond which the steps overshoot.
        alignment_batch_size: alignment rows a step, over all processes, >= 1.
        settings: the rest of ``Defense``'s.
    """

    # Departures from the authors' setting: (1) the distance counts from the first step, where their code leaves it out for the
    # first tenth of a run; (2) alignment rows hold the data's own benign rows; (3) batches that Lightning accumulates into an
    # alignment step are the same one.

    adaptive = "attack/adaptive/lisa"

    def __init__(
        self,
        checkpoint: str,
        num_alignment_steps: int = 100,
        num_task_steps: int = 900,
        proximal_weight: float = 1.0,
        alignment_batch_size: int = 8,
        **settings: Any,
    ) -> None:
        for name, value, least in (
            ("num_alignment_steps", num_alignment_steps, 0),
            ("num_task_steps", num_task_steps, 1),
            ("proximal_weight", proximal_weight, 0),
            ("alignment_batch_size", alignment_batch_size, 1),
        ):
            if not value >= least:
                raise SettingError(f"{name} of Lisa must be >= {least}, got {value}.")
        super().__init__(checkpoint, **settings)
        self.num_alignment_steps, self.num_task_steps = num_alignment_steps, num_task_steps
        self.proximal_weight, self.alignment_batch_size = proximal_weight, alignment_batch_size

    def setup(self, stage: str) -> None:
        """Lay out the alignment rows, so that missing ones show before any weights load."""
        rows = self.rows(self.data)
        if self.num_alignment_steps and not rows:
            raise SettingError(
                "data.sources.refusals or alignment_benign must name rows for Lisa's alignment steps, got none. "
                "Name some, or set num_alignment_steps to 0."
            )
        self.alignment = self.stream(rows, self.alignment_batch_size, "lisa")

    def job(self) -> Job:
        """A fine-tuning of two states."""
        return LisaJob(self)


class LisaJob(Job):
    """A service's fine-tuning under Lisa. State: ``other``, the weights that train as they were at the last switch."""

    defense: LisaModule

    def where(self, step: int) -> tuple[int, int]:
        """How many turns of both states are over, and the step within this one."""
        return divmod(step, self.defense.num_alignment_steps + self.defense.num_task_steps)

    def begin(self) -> None:
        """Remember where the job starts."""
        if self.defense.proximal_weight:
            self.state["other"] = snapshot(self.defense)

    def loss(self, batch: Batch, step: int) -> Tensor:
        """Plain SFT, on alignment rows in their turn."""
        (turn, within), num_alignment_steps = self.where(step), self.defense.num_alignment_steps
        aligns = within < num_alignment_steps
        loss = self.defense.sft_loss(self.defense.alignment(turn * num_alignment_steps + within) if aligns else batch)
        self.terms = {"alignment_loss" if aligns else "task_loss": loss.detach()}
        return loss

    def before_step(self, step: int) -> None:
        """Add the gradient of the distance, ``proximal_weight * (weights - other)``: of shards, where weights are sharded."""
        if self.defense.proximal_weight:
            add_to_grad(self.defense, attack_vector(self.defense, self.state["other"]), self.defense.proximal_weight)

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Remember the weights where the next step is the first of a state."""
        if self.where(step + 1)[1] in (0, self.defense.num_alignment_steps):
            self.begin()
