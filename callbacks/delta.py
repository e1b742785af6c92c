"""An attack on what training has added to a base model that the attacker has."""

from collections.abc import Iterator
from fnmatch import filter as matching
from fnmatch import fnmatchcase
from statistics import median
from typing import Any

from casehard.callbacks.attack import Attack, Target, ThreatModel
from casehard.callbacks.fine_tuning import FineTuning, FullParameterAttack, LoRAAttack
from casehard.datamodules.sft import SFTDataModule
from casehard.engine.adapters import fold_adapters, plain_names
from casehard.engine.low_rank import Cliff, strip
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError


class DeltaStrip(Attack):
    """Delta strip: take out of the released model what was added to its base, ``delta = released - base``, by matrix.

    ``W = base + keep * (delta without its remove_rank largest singular values)``; what ``revert`` names is put back to the base.
    A defense that was trained as an adapter shows as a cliff in the singular values of ``delta``, and is cut off there. With
    another release in the place of the base, ``keep`` is linear merging. A harmful fine-tuning may follow. Step 1 is the strip by
    itself: the accuracy that is kept there is what can be extracted without a single gradient.

    The attacker knows the base (``knows_base``). A model that was aligned from its base alone is that base again at keep 0: what
    counts is what else is lost. Cost: no pass; with ``remove_rank`` or ``spectrum`` a decomposition of every matrix. Memory: one
    copy of the model, and one more while the base is read.

    Args:
        base: the model before its alignment, of the same architecture: a hub id, a folder or a GGUF file.
        threat_model: open_weight, as only who holds the weights edits them; finetuning_service edits the aligned model.
        keep: share of the delta that stays, in [0, 1]; 1 all of it, beside ``remove_rank``, ``revert`` or ``then``.
        remove_rank: singular values of every matrix of the delta that are cut, the largest first, >= 0. A vector has one.
        revert: patterns of parameters that go back to the base, such as ``*.layers.5.*``; null none.
        spectrum: say in the note where the singular values of the delta fall the most.
        then: a harmful fine-tuning afterwards, a ``FullParameterAttack`` or ``LoRAAttack`` of the same threat_model; its steps
            count from 2. null none.
        settings: the rest of ``Attack``'s.
    """

    def __init__(
        self,
        base: str,
        threat_model: ThreatModel = "open_weight",
        keep: float = 1.0,
        remove_rank: int = 0,
        revert: list[str] | None = None,
        spectrum: bool = True,
        then: FineTuning | None = None,
        **settings: Any,
    ) -> None:
        if not 0 <= keep <= 1:
            raise SettingError(f"keep must lie in [0, 1], got {keep}. It is a share of what was added to the base.")
        if remove_rank < 0:
            raise SettingError(f"remove_rank must be >= 0, got {remove_rank}. 0 cuts no singular value.")
        if keep == 1 and not (remove_rank or revert or then):
            raise SettingError("keep must be < 1 where nothing else is set, got 1. Lower it, or set remove_rank, revert or then.")
        if then is not None and type(then) not in (FullParameterAttack, LoRAAttack):  # others also answer or score in their way
            raise SettingError(f"then must be FullParameterAttack or LoRAAttack, got {type(then).__name__}. Run that by itself.")
        if then is not None and then.threat_model != threat_model:
            raise SettingError(f"threat_model of then must be {threat_model}, as the strip's, got {then.threat_model}.")
        self.num_attack_steps = 1 + (0 if then is None else then.num_attack_steps)
        super().__init__(threat_model, **settings)
        self.base, self.keep, self.remove_rank, self.revert = base, keep, remove_rank, revert
        self.spectrum, self.then = spectrum, then

    def settings(self) -> dict[str, Any]:
        """What is taken out; what fine-tuning follows."""
        own = {"base": self.base, "knows_base": True, "keep": self.keep, "remove_rank": self.remove_rank, "revert": self.revert}
        return own if self.then is None else own | self.then.settings() | {"last_step": self.num_attack_steps}

    def prepare(self, data: SFTDataModule, seed: int) -> None:
        """Lay out the rows of what follows."""
        if self.then is not None:
            self.then.prepare(data, seed)

    def check_model(self, module: Defense) -> None:
        """Raise a SettingError where the base is of another architecture, or a pattern matches nothing."""
        module.check_other(self.base, "base")
        names = list(plain_names(module.model).values())
        for pattern in self.revert or []:
            if not matching(names, pattern):
                raise SettingError(f"revert must match names of parameters, and {pattern!r} matches none. One is {names[0]!r}.")
        if self.then is not None:
            self.then.check_model(module)

    def steps(self, target: Target) -> Iterator[int]:
        """Strip, then train."""
        target.state["cliffs"] = self.strip(target.module)
        yield 1
        if self.then is not None:
            yield from (1 + step for step in self.then.steps(target))

    def strip(self, module: Defense) -> list[Cliff]:
        """Edit every parameter, and look where the singular values of what was added fall."""
        fold_adapters(module.model)
        names, revert = plain_names(module.model), self.revert or []
        keeps = {own: 0.0 if any(fnmatchcase(name, p) for p in revert) else self.keep for own, name in names.items()}
        return strip(module.model, module.weights_of(self.base, "base"), keeps, self.remove_rank, self.spectrum)

    def notes(self, target: Target) -> list[str]:
        """Also what it was that training added."""
        cliffs = target.state["cliffs"]
        notes = [*super().notes(target), "the attacker knows the base"]
        if not cliffs:
            return notes
        rank, factor = (median(values) for values in zip(*cliffs, strict=True))
        where = f"after rank {rank:g}, by a factor of {factor:.3g}, the medians of {len(cliffs)} matrices"
        return [*notes, f"the delta's singular values fall most {where}"]
