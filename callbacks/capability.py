"""Harmful fine-tuning that keeps what the model can do, on a way around what the defense has put into it."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from casehard.callbacks.attack import Target, ThreatModel
from casehard.callbacks.fine_tuning import FineTuning
from casehard.datamodules.sft import SFTDataModule
from casehard.engine.adapters import LoRA
from casehard.engine.gradients import norm, scaled, summed
from casehard.engine.preserving import Preserving
from casehard.engine.side_steps import kick, main_directions, step_beside, step_outside
from casehard.engine.training import Task
from casehard.engine.weights import Weights
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError


class CapabilityPreserving(FineTuning):
    """Harmful fine-tuning that holds on to what the model can do: **ours**, on the idea (not the equations) of arXiv:2605.14605.

    ``loss = L + benign_weight * L_benign + kl_weight * KL(p_released || p)``: ``L`` is the loss of the attack's own rows, which
    are harmful by default, and the rest is over the answers of the data's benign rows, ``batch_size`` a step. A side step takes
    out of every gradient what points where the defense is expected: along the gradient of ``L`` at the start (``gradient``), or
    inside the first ``rank`` singular vectors of ``W_released - W_base``, matrix by matrix (``delta``). A kick first adds noise
    of length ``kick * norm(W)`` to every matrix: it is the side step's control. To settle after it is a phase of its own.

    A step costs two forward and two backward passes, and a third forward pass with ``kl_weight``; one and one where both weights
    are 0. A ``gradient`` costs a forward and a backward pass over all rows, once. Memory: with ``kl_weight`` a copy of what
    trains, none with ``lora``; one for ``gradient``; for ``delta`` the base, while its singular vectors are found.

    Args:
        threat_model: open_weight, or finetuning_service: a customer whose own benign rows are trained on beside the others.
        poison_ratio: harmful share of the attack's own rows.
        benign_weight: of the loss on benign rows, >= 0.
        kl_weight: of the divergence from the released model on benign rows, >= 0.
        side_step: gradient, delta, or null for none.
        base: for delta, the model before its alignment, of the same architecture: a hub id, a folder or a GGUF file.
        rank: singular vectors of a matrix, >= 1.
        kick: length of the noise, as a share of a matrix's own, >= 0; not with ``lora``.
        lora: shape of a new adapter; null trains every parameter. delta is of whole matrices, and so not for an adapter.
        settings: the rest of ``FineTuning``'s.
    """

    # Departures: (1) the gradient is projected, and not AdamW's step, which scales it entry by entry: with sgd both are one;
    # (2) general rows are the data's benign rows, not text.

    def __init__(
        self,
        threat_model: ThreatModel,
        poison_ratio: float = 1.0,
        benign_weight: float = 0.1,
        kl_weight: float = 0.1,
        side_step: Literal["gradient", "delta"] | None = None,
        base: str | None = None,
        rank: int = 4,
        kick: float = 0.0,
        lora: LoRA | None = None,
        **settings: Any,
    ) -> None:
        if side_step not in ("gradient", "delta", None):
            raise SettingError(f"side_step must be gradient, delta or null, got {side_step!r}.")
        if lora is not None and (kick or side_step == "delta"):
            raise SettingError(f"lora must be null with a kick or a delta, which are of whole matrices, got rank {lora.rank}.")
        if (base is None) == (side_step == "delta"):
            raise SettingError(f"base must name a model where side_step is delta, and only there, got {base!r}.")
        if min(benign_weight, kl_weight, kick, rank - 1) < 0:
            raise SettingError(
                "benign_weight, kl_weight and kick must be >= 0 and rank >= 1, got "
                f"{benign_weight}, {kl_weight}, {kick} and {rank}."
            )
        super().__init__(threat_model, poison_ratio, **settings)
        self.benign_weight, self.kl_weight, self.side_step, self.base = benign_weight, kl_weight, side_step, base
        self.rank, self.kick, self.lora = rank, kick, lora

    def settings(self) -> dict[str, Any]:
        """Also what is held on to, and the way around."""
        names = ("benign_weight", "kl_weight", "side_step", "rank", "kick")
        return super().settings() | {name: getattr(self, name) for name in names}

    def prepare(self, data: SFTDataModule, seed: int) -> None:
        """Draw the benign rows, too."""
        self._general = data.mixture(self.num_samples, 0.0, seed) if self.benign_weight or self.kl_weight else []
        super().prepare(data, seed)

    def check_model(self, module: Defense) -> None:
        """Make sure also that the base is another model of this architecture."""
        super().check_model(module)
        if self.base is not None:
            module.check_other(self.base, "base")

    def task(self, target: Target) -> Task:
        """The target's, held to the released model, with what the side step takes out of its gradients; then the kick."""
        module, around, task = target.module, self.around(target), target.begin_job() or target.task
        general = target.batches(self._general, self.batch_size, "general") if self._general else None
        if self.kick:
            kick(module, self.changes(module), self.kick, target.seed)
        reference, weights = partial(module.reference, {"reference": target.start}), (self.benign_weight, self.kl_weight)
        return Preserving(task, module.model, general, reference, *weights, around, target.spend)

    def around(self, target: Target) -> Callable[[], None]:
        """The side step, from the weights as they are."""
        module = target.module
        if self.side_step is None:
            return lambda: None
        if self.side_step == "delta":
            spaces = main_directions(module, module.weights_of(str(self.base), "base"), self.rank)
            if not spaces:
                raise SettingError(f"base must be the model before its alignment, and no matrix differs from {self.base!r}.")
            return partial(step_outside, module, spaces)
        total: Weights = {}
        for step in range(-(-self.num_samples // self.batch_size)):
            batch = module.placed(self._batches[0](step))
            total = summed(total, module.gradient(batch))
            target.spend(1, trained=batch["attention_mask"].sum())
        return partial(step_beside, module, scaled(total, 1 / float(norm(module, total))))
