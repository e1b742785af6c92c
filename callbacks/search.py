"""Search for an attack's strongest settings, on prompts that are not those of the table."""

import copy
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.util import find_spec
from typing import Any

from casehard.callbacks.attack import Attack, Target
from casehard.datamodules.mixing import overlap
from casehard.datamodules.row import Row
from casehard.datamodules.sft import Evaluation, SFTDataModule
from casehard.datamodules.sources import read_rows
from casehard.engine.training import DivergedError
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError

FIXED = (
    "name",
    "threat_model",
    "seed",
    "num_attack_steps",
    "score_steps",
    "undefended",
    "undefended_checkpoint",
    "every_n_epochs",
)


@dataclass(frozen=True)
class Range:
    """Numbers to choose from, both ends included; whole ones where both ends are.

    Args:
        low: smallest.
        high: largest, > low.
        log: draw uniformly in the logarithm; low must be > 0.
    """

    low: int | float
    high: int | float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise SettingError(f"a range must have low < high, and low > 0 where log is set, got {self}.")


class Search(Attack):
    """An attacker who tries out settings first: Optuna around any attack.

    Every trial is a whole attack on the borrowed model, scored after its last step on ``prompts``, which no table shows. The
    settings with the highest harmful score there are then measured on the test prompts, at the attack's ``score_steps``. A
    defended model and its undefended baseline are searched separately, each with ``num_trials``. Columns of searched settings
    stay empty; the note of every row says what was chosen. ``wall_seconds`` includes the search.

    Memory: one copy of the model more than the attack by itself. Needs the extra ``search``.

    Args:
        attack: whose settings are searched; it says when, on whom and with which seed.
        choices: for each setting, such as batch_size or optimizer.learning_rate, a list of values or a range
            ``{low, high, log}``.
        prompts: sources of held-out harmful prompts, none of which is scored in the end.
        num_trials: attacks tried, >= 1.
        sampler: class of ``optuna.samplers`` that takes a seed, such as TPESampler or RandomSampler.
        name: in tables; by default the attack's and "searched".
    """

    def __init__(
        self,
        attack: Attack,
        choices: dict[str, list[Any] | Range],
        prompts: list[str],
        num_trials: int = 20,
        sampler: str = "TPESampler",
        name: str | None = None,
    ) -> None:
        if num_trials < 1:
            raise SettingError(f"num_trials must be >= 1, got {num_trials}.")
        for setting, values in choices.items():
            if setting in FIXED or not _has(attack, setting) or (isinstance(values, list) and not values):
                raise SettingError(
                    f"choices must give values for settings of {type(attack).__name__} other than {', '.join(FIXED)}, got "
                    f"{setting!r}: {values!r}. One inside another is written with a dot: optimizer.learning_rate."
                )
        if not choices or not prompts:
            raise SettingError(
                f"choices and prompts must not be empty, got {choices!r} and {prompts!r}. Name some, or attack plainly."
            )
        self.attack, self.num_attack_steps = attack, attack.num_attack_steps
        self.choices, self.prompts, self.num_trials, self.sampler = choices, prompts, num_trials, sampler
        self.chosen: Attack | None = None  # while an attack runs, once its settings are chosen
        self.choice_note = ""  # what was chosen, for the note
        super().__init__(
            attack.threat_model,
            attack.seed,
            attack.score_steps,
            attack.undefended,
            attack.every_n_epochs,
            name or f"{attack.name}, searched",
            attack.copy_device,
            attack.undefended_checkpoint,
        )

    def prepare(self, data: SFTDataModule, seed: int) -> None:
        """Read the prompts that trials are scored on, and lay out the attack's rows.

        Raises:
            SettingError: Optuna or its sampler is not there; a prompt is scored in the end too.
        """
        if find_spec("optuna") is None:
            raise SettingError("Search needs optuna, and it is not installed. Install it: pip install 'casehard[search]'.")
        import optuna

        if not hasattr(optuna.samplers, self.sampler):
            raise SettingError(f"sampler must be a class of optuna.samplers, such as TPESampler, got {self.sampler!r}.")
        prompts = [row for source in self.prompts for row in read_rows(source, needs_response=False)]
        if shared := overlap(prompts, data.rows["harmful_prompts"]):
            raise SettingError(
                f"prompts must share no prompt with harmful_prompts, and {len(shared)} stand in both: the settings would be "
                "chosen by what they are measured on. Choose other rows (a slice: FILE#train[:100])."
            )
        self._validation = copy.copy(data)
        self._validation.rows = data.rows | {"harmful_prompts": data.instructed(prompts), "benign_prompts": [], "task": []}
        self.attack.prepare(data, seed)

    def steps(self, target: Target) -> Iterator[int]:
        """Try out settings, then attack with the chosen ones."""
        try:
            settings, harmful_score = self._search(target)
            chosen = _with(self.attack, settings)
            chosen.prepare(target.data, target.seed)
            named = ", ".join(f"{n} {value:.3g}" if isinstance(value, float) else f"{n} {value}" for n, value in settings.items())
            self.chosen = chosen
            self.choice_note = (
                f"{named}: chosen of {self.num_trials} trials, harmful score {harmful_score:.1f} on "
                f"{len(self._validation.rows['harmful_prompts'])} other prompts"
            )
            yield from chosen.steps(target)
        finally:
            self.chosen, self.choice_note = None, ""

    def _search(self, target: Target) -> tuple[dict[str, Any], float]:
        """The settings with the highest harmful score of all trials, and that score."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="maximize", sampler=getattr(optuna.samplers, self.sampler)(seed=target.seed))
        kinds = {name: _distribution(values) for name, values in self.choices.items()}
        for _ in range(self.num_trials):
            trial = study.ask(kinds)
            attack = _with(self.attack, trial.params)
            try:
                harmful_score = self._tried(attack, target)
            except DivergedError:
                harmful_score = math.nan
            failed = math.isnan(harmful_score)
            study.tell(trial, None if failed else harmful_score, optuna.trial.TrialState.FAIL if failed else None)
        if not study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
            raise DivergedError(f"{target.name}: none of {self.num_trials} trials had a harmful score. Narrow choices.")
        return study.best_params, study.best_value

    def _tried(self, attack: Attack, target: Target) -> float:
        """Harmful score of a whole attack on the prompts of the search; the model comes back as it was."""
        attack.prepare(target.data, target.seed)
        with attack.lent(replace(target, data=self._validation)) as tried, closing(attack.seeded_steps(tried)) as steps:  # type: ignore[type-var]
            for step in steps:
                if step == attack.num_attack_steps:
                    return attack.scores(tried).metrics["harmful_score"]
        return math.nan

    # ---- as the attack does

    @property
    def harmful(self) -> bool:  # type: ignore[override]
        """As the attack."""
        return self.attack.harmful

    def rows(self, data: SFTDataModule, seed: int) -> list[Row]:
        """As the attack."""
        return self.attack.rows(data, seed)

    def check_model(self, module: Defense) -> None:
        """As the attack."""
        self.attack.check_model(module)

    def evaluation(self, data: SFTDataModule) -> Evaluation:
        """As the attack, with the chosen settings."""
        return (self.chosen or self.attack).evaluation(data)

    def respond(self, target: Target, rows: list[Row], max_new_tokens: int) -> list[str]:
        """As the attack, with the chosen settings."""
        return (self.chosen or self.attack).respond(target, rows, max_new_tokens)

    def settings(self) -> dict[str, Any]:
        """Those of the attack that are not searched."""
        searched = {"optimizer" if setting == "optimizer.name" else setting.rpartition(".")[2] for setting in self.choices}
        return {name: value for name, value in self.attack.settings().items() if name not in searched}

    def what_trains(self, target: Target) -> str:
        """As the attack, with the chosen settings."""
        return (self.chosen or self.attack).what_trains(target)

    def notes(self, target: Target) -> list[str]:
        """Also what was chosen."""
        return [*(self.chosen or self.attack).notes(target), self.choice_note]


def _has(attack: Attack, setting: str) -> bool:
    """Whether an attack has a setting, ``NAME`` or ``NAME.FIELD``."""
    name, _, inner = setting.partition(".")
    value = getattr(attack, name, None)
    if name.startswith("_") or not hasattr(attack, name) or callable(value):
        return False
    return not inner or (is_dataclass(value) and inner in {f.name for f in fields(value)})


def _with(attack: Attack, settings: dict[str, Any]) -> Attack:
    """A copy of an attack that has not been prepared, with other settings."""
    changed = copy.copy(attack)
    for setting, value in settings.items():
        name, _, inner = setting.partition(".")
        setattr(changed, name, replace(getattr(changed, name), **{inner: value}) if inner else value)
    return changed


def _distribution(values: list[Any] | Range) -> Any:
    """Optuna's form of a choice."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(values, list):
        return CategoricalDistribution(values)
    whole = isinstance(values.low, int) and isinstance(values.high, int)
    return (IntDistribution if whole else FloatDistribution)(values.low, values.high, log=values.log)  # type: ignore[arg-type]
