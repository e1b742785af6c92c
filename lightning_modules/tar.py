"""TAR: an attacker's whole path shall stay aligned."""

import math
from typing import Any

from torch import Tensor

from casehard.datamodules.order import counter_seed
from casehard.datamodules.row import Row
from casehard.engine.forward import Batch, label_positions, run
from casehard.engine.gradients import summed
from casehard.engine.optimizer import Optimizer
from casehard.engine.weights import Weights, check_device
from casehard.lightning_modules.attacker import InnerAttacker
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError

PAPERS = InnerAttacker(num_inner_steps=64, optimizer=Optimizer(learning_rate=2e-5), batch_size=4)


class TARModule(Defense):
    """Tamper-resistant safeguards (TAR, arXiv:2408.00761), an alignment stage defense against full-parameter fine-tuning.

    In every step an inner attacker fine-tunes a loan of the weights for ``K`` steps on harmful rows. After every
    ``loss_every``-th of them, the ``i``-th, the gradient ``g_i`` of ``tamper_loss`` is taken at the attacked weights, as if it
    were the one at the weights themselves (first order). A step's gradient is
    ``f + tamper_weight * sum(exp(decay * (i - K)) * g_i)``: ``f`` of ``sft_loss`` on the rows that are to be retained.

    ``tamper_loss`` is plain SFT on the data's refusals: the paper's own for refusing (DPO, refusals over harmful answers) has
    that as its first half, and this needs no second model. With ``entropy`` it is minus the entropy of the tokens predicted in
    harmful answers, the paper's for hazardous knowledge, after which an attacked model shall be of no use.

    ``1 + K + K / loss_every`` passes a step. Memory beyond plain SFT: the attacker's copy of the weights and moments, and up to
    four gradients.

    Args:
        checkpoint: the model to start from, as for ``Defense``; the authors' is safeguarded already.
        attacker: the inner attacker, of every parameter; ``num_inner_steps`` is ``K``, and 0 is plain SFT.
        more_attackers: others, which take turns with it, step by step: of other learning rates, steps or rows.
        tamper_weight: of the gradients of ``tamper_loss`` (the authors' 4), >= 0; 0 is plain SFT.
        loss_every: inner steps between two gradients, >= 1.
        decay: how much less those weigh that come earlier on the path (``lambda`` in the paper), >= 0.
        tamper_batch_size: rows of each ``tamper_loss``, over all processes, >= 1.
        entropy: which ``tamper_loss``, as above.
        copy_device: where the copy of the weights waits during an attack, such as cpu; null keeps it beside the model.
        settings: the rest of ``Defense``'s, without ``lora``.
    """

    # Departures from the authors' setting: (1) no term holds hidden states where a reference model has them; (2) attackers take
    # turns where the authors draw one, and none begins with benign rows; (3) the optimizer is plain, theirs is schedule-free.

    adaptive = "attack/adaptive/tar"
    stages = frozenset({"alignment"})

    def __init__(
        self,
        checkpoint: str,
        attacker: InnerAttacker = PAPERS,
        more_attackers: list[InnerAttacker] | None = None,
        tamper_weight: float = 4.0,
        loss_every: int = 4,
        decay: float = 0.0625,
        tamper_batch_size: int = 8,
        entropy: bool = False,
        copy_device: str | None = None,
        **settings: Any,
    ) -> None:
        for name, value, least in (("tamper_weight", tamper_weight, 0), ("loss_every", loss_every, 1), ("decay", decay, 0)):
            if not value >= least:
                raise SettingError(f"{name} of TAR must be >= {least}, got {value}.")
        attackers = [attacker, *(more_attackers or [])]
        if settings.get("lora") is not None or any(a.lora is not None for a in attackers):
            raise SettingError("lora must be null for TAR and its attackers: its gradients are of every parameter. Leave it out.")
        if any(0 < a.num_inner_steps < loss_every for a in attackers):
            raise SettingError(f"loss_every must be at most num_inner_steps of every attacker, got {loss_every}. Lower it.")
        super().__init__(checkpoint, **settings)
        self.attackers = [a for a in attackers if a.num_inner_steps and tamper_weight]
        self.tamper_weight, self.loss_every, self.decay, self.entropy = tamper_weight, loss_every, decay, entropy
        self.tamper_batch_size, self.copy_device = tamper_batch_size, copy_device

    def own_rows(self) -> list[Row]:
        """Harmful rows of the attackers' own."""
        return [row for attacker in self.attackers for row in attacker.own_rows()]

    def on_fit_start(self) -> None:
        """Lay out the rows, so that missing ones show before the first step."""
        check_device(self.copy_device)
        source = "alignment_harmful" if self.entropy else "refusals"
        if self.attackers and not self.data.rows[source]:
            raise SettingError(f"data.sources.{source} must name rows for TAR's tamper_loss, got none. Name some.")
        self.streams = [a.stream(self, f"tar attacker {which}") for which, a in enumerate(self.attackers)]
        self.held_out = self.stream(self.data.rows[source], self.tamper_batch_size, "tar")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Attack once a step, whatever is accumulated into it, and add what that gives to the gradient of ``sft_loss``."""
        super().on_before_optimizer_step(optimizer)
        if self.attackers:
            self.add_gradient(self.tamper_gradient(self.global_step), self.tamper_weight)

    def tamper_gradient(self, step: int) -> Weights:
        """``sum(exp(decay * (i - K)) * g_i)`` over the attack of ``step``; the weights themselves come back bit for bit."""
        turn, which = divmod(step, len(self.attackers))
        attacker, total = self.attackers[which], Weights()
        last, num_losses = attacker.num_inner_steps, attacker.num_inner_steps // self.loss_every
        stream, seed = self.streams[which], counter_seed(self.data.seed, "tar", step)
        with attacker.attack(self, stream, seed, turn * last, "TAR", self.copy_device) as attack:
            for i in filter(lambda i: i % self.loss_every == 0, attack.steps):
                batch = self.held_out(step * num_losses + i // self.loss_every - 1)
                value, gradient = self.loss_and_gradient(batch, self.tamper_loss)
                total = summed(total, gradient, math.exp(self.decay * (i - last)))
        self.num_passes += last + num_losses
        self.log_means({"train/tamper_loss": value})
        return total

    def tamper_loss(self, batch: Batch) -> Tensor:
        """What is low where an attack has failed: ``sft_loss`` on refusals, or minus the mean entropy of predicted tokens."""
        if not self.entropy:
            return self.sft_loss(batch)
        predicted = run(self.model, batch, logits_at=label_positions(batch["labels"])).logits.float().log_softmax(dim=-1)
        return (predicted.exp() * predicted).sum() / batch["num_labels"]
