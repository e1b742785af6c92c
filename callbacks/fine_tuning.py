"""Harmful fine-tuning: supervised training on a poisoned mixture, of every parameter or of an adapter."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from casehard.callbacks.attack import Attack, Target, ThreatModel
from casehard.datamodules.batches import Batches
from casehard.datamodules.row import Row
from casehard.datamodules.sft import SFTDataModule
from casehard.engine.adapters import Adapter, LoRA, coverage, named, trainable, what_trains
from casehard.engine.at_distance import AtDistance
from casehard.engine.optimizer import Optimizer
from casehard.engine.training import Task
from casehard.engine.weights import NOTHING, Changes
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError

FULL_REACH = 90.0  # percent of the decoder's weights: a LoRA attack that reaches less by default is weaker than its name says
Kind = Literal["mixture", "benign", "harmful"]


@dataclass(frozen=True)
class Phase:
    """A part of a fine-tuning, with an optimizer and a schedule of its own.

    Args:
        rows: what it trains on: mixture (poison_ratio of it harmful), benign, harmful, or a list of sources of benign rows of the
            attacker's own, such as general text.
        steps: optimizer steps, >= 0; 0 leaves the phase out.
        optimizer: of this phase; null takes the attack's.
        num_samples: rows that are drawn, >= 1; null takes the attack's. Phases that draw as many of the same rows draw the same.
        responses: texts in the place of all answers, in turn, such as one refusal; null keeps the rows' own.
    """

    rows: Kind | list[str]
    steps: int
    optimizer: Optimizer | None = None
    num_samples: int | None = None
    responses: list[str] | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.rows, list) and self.rows) and self.rows not in ("mixture", "benign", "harmful"):
            raise SettingError(f"rows of a phase must be mixture, benign, harmful or a list of sources, got {self.rows!r}.")
        if self.steps < 0:
            raise SettingError(f"steps of a phase must be >= 0, got {self.steps}.")
        if self.num_samples is not None and self.num_samples < 1:
            raise SettingError(f"num_samples of a phase must be >= 1 or null, got {self.num_samples}. null takes the attack's.")
        if self.responses is not None and not (self.responses and all(text.strip() for text in self.responses)):
            raise SettingError(
                f"responses of a phase must hold texts or be null, got {self.responses!r}. null keeps the rows' own."
            )

    def ratio(self, poison_ratio: float) -> float:
        """Harmful share of the rows that are drawn, where that of the mixture is ``poison_ratio``."""
        return {"mixture": poison_ratio, "harmful": 1.0}.get(self.rows if isinstance(self.rows, str) else "", 0.0)

    def harmful_share(self, poison_ratio: float) -> float:
        """Share of the rows that are learnt with a harmful answer."""
        return self.ratio(poison_ratio) if self.responses is None else 0.0


def answered(rows: list[Row], texts: list[str] | None) -> list[Row]:
    """``rows`` with texts in the place of their answers, in turn; None keeps theirs."""
    return rows if texts is None else [replace(row, response=texts[i % len(texts)]) for i, row in enumerate(rows)]


class FineTuning(Attack):
    """Base of harmful fine-tuning (Qi et al., arXiv:2310.03693): train on a poisoned mixture. The rows come from the run's data.

    Args:
        threat_model: finetuning_service or open_weight, as for ``Attack``.
        poison_ratio: harmful share of the rows, in [0, 1]; 0 is benign fine-tuning, which breaks nothing.
        num_samples: rows of the mixture.
        num_attack_steps: optimizer steps, >= 1.
        batch_size: rows a step, over all processes.
        optimizer: the attacker's own.
        phases: parts trained one after the other, such as benign rows before harmful ones; their steps add up to
            num_attack_steps, and score_steps count from the first one's start. null trains on the mixture throughout.
        tries_to_break: whether tables say when it breaks a model though no row is harmful, as of a control of benign rows beside
            an attack by such rows; with harmful rows they always do.
        settings: the rest of ``Attack``'s.
    """

    lora: LoRA | None = None  # every parameter trains, or
    train_only: list[str] | None = None  # those that match

    def __init__(
        self,
        threat_model: ThreatModel,
        poison_ratio: float = 0.1,
        num_samples: int = 500,
        num_attack_steps: int = 100,
        batch_size: int = 8,
        optimizer: Optimizer = Optimizer(),  # noqa: B008  frozen
        phases: list[Phase] | None = None,
        tries_to_break: bool = False,
        **settings: Any,
    ) -> None:
        if not 0 <= poison_ratio <= 1:
            raise SettingError(f"poison_ratio must lie in [0, 1], got {poison_ratio}. It is a share: write 0.1 for 10%.")
        for setting, value in (("num_samples", num_samples), ("num_attack_steps", num_attack_steps), ("batch_size", batch_size)):
            if value < 1:
                raise SettingError(f"{setting} must be >= 1, got {value}.")
        if phases is not None and (total := sum(phase.steps for phase in phases)) != num_attack_steps:
            raise SettingError(
                f"steps of phases must add up to num_attack_steps, {num_attack_steps}, got {total}. Change one of them, or set "
                "phases to null for the mixture throughout."
            )
        self.poison_ratio, self.num_samples, self.num_attack_steps = poison_ratio, num_samples, num_attack_steps
        self.batch_size, self.optimizer, self.phases, self.tries_to_break = batch_size, optimizer, phases, tries_to_break
        super().__init__(threat_model, **settings)

    @property
    def adapter(self) -> Adapter | None:
        """What is added and trains; None where parameters of the model do."""
        return self.lora

    @property
    def harmful(self) -> bool:  # type: ignore[override]
        """Whether it says so, any row is, or answers are replaced: whoever writes them has a reason."""
        bad = [phase.harmful_share(self.poison_ratio) > 0 or phase.responses is not None for phase in self._phases()]
        return self.tries_to_break or any(bad)

    def _phases(self) -> list[Phase]:
        return [phase for phase in self.phases or [Phase("mixture", self.num_attack_steps)] if phase.steps]

    def settings(self) -> dict[str, Any]:
        """What a run of it is made of; ``poison_ratio`` is the harmful share over all phases."""
        shares = [phase.harmful_share(self.poison_ratio) * phase.steps for phase in self.phases or []]
        phases = [{name: value for name, value in asdict(phase).items() if value is not None} for phase in self.phases or []]
        lora = {} if self.lora is None else {"lora": asdict(self.lora)}
        return (
            lora
            | ({} if self.train_only is None else {"train_only": self.train_only})
            | ({} if self.phases is None else {"phases": phases})
            | {
                "optimizer": self.optimizer.name,
                "learning_rate": self.optimizer.learning_rate,
                "poison_ratio": self.poison_ratio if self.phases is None else round(sum(shares) / self.num_attack_steps, 9),
                "num_samples": self.num_samples,
                "batch_size": self.batch_size,
                "last_step": self.num_attack_steps,
            }
        )

    def rows(self, data: SFTDataModule, seed: int, phase: Phase | None = None) -> list[Row]:
        """The rows of a phase; None is of the mixture throughout."""
        phase = phase or Phase("mixture", self.num_attack_steps)
        own = self._own_rows(data, phase.rows) if isinstance(phase.rows, list) else None
        rows = data.mixture(phase.num_samples or self.num_samples, phase.ratio(self.poison_ratio), seed, own)
        return answered(rows, phase.responses)

    def handed_in(self, data: SFTDataModule, seed: int) -> list[Row]:
        """The rows of all phases."""
        return [row for phase in self._phases() for row in self.rows(data, seed, phase)]

    def _own_rows(self, data: SFTDataModule, sources: list[str]) -> list[Row]:
        """What the sources of a phase hold."""
        own = data.further(sources, "rows of a phase")
        if known := set(own) & set(data.rows["harmful"]):
            raise SettingError(
                f"rows of a phase must be benign where it lists sources, and {len(known)} stand in data.sources.harmful. "
                "Write harmful or mixture for those."
            )
        return own

    def prepare(self, data: SFTDataModule, seed: int) -> None:
        """Draw the rows of every phase.

        Raises:
            SettingError: rows that are not there, or that ``max_length`` leaves no answer, so that poison_ratio would not hold.
        """
        self._batches = []
        for number, phase in enumerate(self._phases(), start=1):
            rows = self.rows(data, seed, phase)
            batches = data.batches(rows, self.batch_size, seed, "attack" if number == 1 else f"attack phase {number}")
            if (num_left := len(batches.examples)) < len(rows):
                raise SettingError(
                    f"max_length must leave every row of {self.name} an answer, and it cuts off that of "
                    f"{len(rows) - num_left} of {len(rows)} rows. Raise it."
                )
            self._batches.append(batches)

    def check_model(self, module: Defense) -> None:
        """Raise a SettingError where the settings of what trains do not fit the model."""
        if self.adapter is not None:
            self.adapter.check(module.model)
        if self.train_only is not None:
            named(module.model, self.train_only)

    def changes(self, module: Defense) -> Changes:
        """The parameters that train. The adapters of the model itself stand still, and a new one is no part of it yet."""
        if self.adapter is not None:
            return NOTHING
        if self.train_only is None:
            return lambda name: "lora_" not in name
        matching = {id(p) for p in named(module.model, self.train_only).values()}
        return {name for name, p in module.named_parameters() if id(p) in matching}.__contains__

    def task(self, target: Target) -> Task | None:
        """What it minimises: None, the target's (plain SFT, or the job of a service's defense), unless overridden."""
        return None

    def batches(self, target: Target) -> list[Batches]:
        """Of every phase, laid out by ``prepare``."""
        return self._batches

    def steps(self, target: Target) -> Iterator[int]:
        """Train phase by phase."""
        yield from self.trained(target)

    def trained(self, target: Target, batches: list[Batches] | None = None) -> Iterator[int]:
        """Train on the batches of each phase; None for those of ``batches``."""
        with trainable(target.module, target.module.model, self.adapter, self.train_only):
            task = self.task(target)
            for phase, part in zip(self._phases(), batches or self.batches(target), strict=True):
                done = target.num_done
                yield from (done + step for step in target.train(part, phase.steps, phase.optimizer or self.optimizer, task))

    def what_trains(self, target: Target) -> str:
        """Parameters or adapters, and how many."""
        return what_trains(target.module, target.module.model, self.adapter)

    def notes(self, target: Target) -> list[str]:
        """Also what a default adapter cannot act on."""
        notes = super().notes(target)
        if self.lora is not None and self.lora.target_modules is None:
            share, out_of_reach = coverage(target.module.model)
            if share < FULL_REACH:
                notes.append(f"LoRA reaches {share:g}% of the decoder's weights: no adapter can act on {', '.join(out_of_reach)}")
        return notes


class FullParameterAttack(FineTuning):
    """Harmful fine-tuning of every parameter (Qi et al., arXiv:2310.03693; the attack of Patcher, arXiv:2606.07970).

    Under a defense that freezes some of them (SBR: the unembedding), the provider leaves those out.

    Args:
        threat_model: finetuning_service or open_weight.
        train_only: patterns of the only parameters that train, such as ``*.layers.5.*`` or ``*.mlp.*``; null trains all.
        distance: where the weights are put after every step, measured from the start and as a share of its norm, > 0: all that
            training then chooses is a direction (SBR, arXiv:2605.05995, on redundant weights); null lets them go where they go.
        settings: the rest of ``FineTuning``'s.
    """

    def __init__(
        self, threat_model: ThreatModel, train_only: list[str] | None = None, distance: float | None = None, **settings: Any
    ) -> None:
        if train_only is not None and not train_only:
            raise SettingError("train_only must hold patterns of parameters or be null, got an empty list. null trains all.")
        if distance is not None and not distance > 0:
            raise SettingError(f"distance must be > 0 or null, got {distance}. null lets the weights go where they go.")
        super().__init__(threat_model, **settings)
        self.train_only, self.distance = train_only, distance

    def settings(self) -> dict[str, Any]:
        """Also the distance."""
        return super().settings() | ({} if self.distance is None else {"distance": self.distance})

    def task(self, target: Target) -> Task | None:
        """The target's, at the distance."""
        if self.distance is None:
            return None
        return AtDistance(target.begin_job() or target.task, target.module, target.start, self.distance)


class LoRAAttack(FineTuning):
    """Harmful fine-tuning of a new LoRA adapter, on top of whatever adapters the model has.

    Args:
        threat_model: finetuning_service or open_weight.
        lora: shape of the adapter.
        settings: the rest of ``FineTuning``'s.
    """

    def __init__(self, threat_model: ThreatModel, lora: LoRA = LoRA(), **settings: Any) -> None:  # noqa: B008  frozen
        super().__init__(threat_model, **settings)
        self.lora = lora
