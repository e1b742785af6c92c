"""An attack on quantised weights."""

from collections.abc import Iterator
from typing import Any, Literal

from casehard.callbacks.attack import Target, ThreatModel
from casehard.callbacks.fine_tuning import LoRAAttack
from casehard.engine.adapters import LoRA
from casehard.engine.compression import Way, send_through, written
from casehard.engine.weights import Changes
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError


class QuantisedAttack(LoRAAttack):
    """Quantise the weights, then train a LoRA adapter on top, as QLoRA does (arXiv:2305.14314).

    Every matrix of the decoder is rounded to nearest, row by row. Quantisation is simulated: the weights keep their dtype. A
    defense that holds by fine differences between weights loses them. Adapters of the defense itself are merged first,
    as in a release, and rounded with the rest.

    Args:
        threat_model: finetuning_service or open_weight.
        num_bits: of a weight, 8 or 4.
        lora: shape of the adapter.
        settings: the rest of ``LoRAAttack``'s.
    """

    def __init__(
        self,
        threat_model: ThreatModel,
        num_bits: Literal[8, 4] = 8,
        lora: LoRA = LoRA(),  # noqa: B008  frozen
        **settings: Any,
    ) -> None:
        if num_bits not in (8, 4):
            raise SettingError(f"num_bits must be 8 or 4, got {num_bits!r}.")
        super().__init__(threat_model, lora, **settings)
        self.num_bits = num_bits
        self.name = settings.get("name") or f"QuantisedAttack int{num_bits}"

    @property
    def way(self) -> Way:
        """Through what the weights go."""
        return "int8" if self.num_bits == 8 else "int4"

    def changes(self, module: Defense) -> Changes:
        """The decoder's matrices, which quantisation rounds; all where the defense has adapters, which are folded in."""
        return written(module, module.model, self.way)

    def steps(self, target: Target) -> Iterator[int]:
        """Quantise, then train."""
        target.state["changed"] = send_through(target.module.model, self.way)
        yield from super().steps(target)

    def notes(self, target: Target) -> list[str]:
        """Also whether the weights were on those levels before."""
        return super().notes(target) + ([] if target.state["changed"] else ["no weight changed by quantisation"])
