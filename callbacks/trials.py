"""The trials of a search: Optuna's, in a file that outlives a kill and that several processes may share."""

import fcntl
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from casehard.callbacks.search_space import Choices, MedianPruner, Range
from casehard.datamodules.order import counter_seed
from casehard.records.files import whole_lines

POLL = 1.0  # seconds between two looks at trials that other processes run
CLAIM, JOURNAL, TRIALS = 0, 1, 2  # places of locks


class Given(NamedTuple):
    """A trial that is to be run."""

    number: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Tried:
    """A trial that ended.

    Args:
        number: from 0.
        state: complete, pruned or failed.
        settings: what was tried.
        value: coherent harm when it was last scored.
        excess: how far the metrics lay beyond each bound then, <= 0 within.
        step: at which that was; None where it never was.
        metrics: at that step.
        test: coherent harm on the test prompts, nan where it was not measured.
        cost: passes, tokens trained and tokens forward.
        reason: why it failed, "" where it ran.
    """

    number: int
    state: str
    settings: dict[str, Any]
    value: float = math.nan
    excess: dict[str, float] = field(default_factory=dict)
    step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    test: float = math.nan
    cost: tuple[float, int, int] = (0.0, 0, 0)
    reason: str = ""

    @property
    def within(self) -> bool:
        """Whether it ran to its end and kept all bounds."""
        return self.state == "complete" and all(excess <= 0 for excess in self.excess.values())


class _Locks:
    """Locks between processes, places of one file. One goes with the process that holds it, also when that is killed."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("ab")

    def take(self, place: int, wait: bool = True) -> bool:
        """Lock a place; False where another process has it and it is not waited for."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
        except BlockingIOError:
            return False
        return True

    def leave(self, place: int) -> None:
        """Unlock it."""
        fcntl.lockf(self.file, fcntl.LOCK_UN, 1, place)

    @contextmanager
    def held(self, place: int) -> Iterator[None]:
        """Have a place locked for a block."""
        self.take(place)
        try:
            yield
        finally:
            self.leave(place)

    # ---- as Optuna's journal asks for it

    def acquire(self) -> bool:
        """Before it writes."""
        return self.take(JOURNAL)

    def release(self) -> None:
        """Once it has written."""
        self.leave(JOURNAL)


class Counted(BaseSampler):
    """Draws for every trial by a sampler whose seed is made of the search's and the trial's number.

    What a trial tries so depends on the trials before, and on nothing that happened in a process.
    """

    def __init__(self, kind: type[BaseSampler], seed: int) -> None:
        self.kind, self.seed = kind, seed

    def _of(self, trial: FrozenTrial, setting: str = "") -> BaseSampler:
        return self.kind(seed=counter_seed(self.seed, f"search {setting}", trial.number) % 2**32)  # type: ignore[call-arg]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """As the sampler."""
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """As the sampler: settings that are drawn together."""
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        """As the sampler: a setting by itself."""
        return self._of(trial, param_name).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """As the sampler."""
        self._of(trial).before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """As the sampler."""
        self._of(trial).after_trial(study, trial, state, values)


class Trials:
    """The trials of one search, told apart from others in the same file by ``name``. Of one process: rank 0 has them.

    A trial that a killed process left is taken up again, under its number and with its settings.

    Args:
        path: the file. A file beside it, ``PATH.lock``, holds the locks.
        name: of the search, with all that its trials rest on.
        choices: values of the settings.
        num_trials: how many are run, by all processes together.
        seed: of the sampler.
        sampler: its class's name in ``optuna.samplers``.
        pruner: ends trials early, or None.
    """

    def __init__(
        self, path: Path, name: str, choices: Choices, num_trials: int, seed: int, sampler: str, pruner: MedianPruner | None
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.choices, self.num_trials = choices, num_trials
        self.locks = _Locks(path.with_name(f"{path.name}.lock"))
        with self.locks.held(CLAIM):
            with self.locks.held(JOURNAL):
                _cut_off(path)
            self.storage = JournalStorage(JournalFileBackend(str(path), self.locks))  # type: ignore[arg-type]  # all that it calls
            prune = optuna.pruners.NopPruner() if pruner is None else optuna.pruners.MedianPruner(pruner.startup_trials)
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=name,
                direction="maximize",
                load_if_exists=True,
                sampler=Counted(getattr(optuna.samplers, sampler), seed),
                pruner=prune,
            )
        self.trial: Trial | None = None  # under way

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.locks.file.close()  # and with it all locks

    def _place(self, number: int) -> int:
        """Of a trial's lock."""
        study = self.storage.get_study_id_from_name(self.study.study_name)
        return TRIALS + self.storage.get_trial_id_from_study_id_trial_number(study, number)

    def next(self) -> Given | None:
        """A trial that nobody runs, with its settings; None when all have ended, those of other processes too."""
        while True:
            with self.locks.held(CLAIM):
                running = [trial.number for trial in self.study.get_trials(False, (TrialState.RUNNING,))]
                left = next((number for number in running if self.locks.take(self._place(number), wait=False)), None)
                if left is not None:
                    self.trial = Trial(self.study, self._place(left) - TRIALS)
                elif len(self.study.get_trials(False)) < self.num_trials:
                    self.trial = self.study.ask()
                    self.locks.take(self._place(self.trial.number))
                elif not running:
                    return None
                if self.trial is not None:
                    for name, values in self.choices.items():
                        _suggest(self.trial, name, values)
                    return Given(self.trial.number, self._settings(self.trial.params))
            time.sleep(POLL)

    def keep(self, step: int, value: float, excess: dict[str, float], metrics: dict[str, float]) -> bool:
        """Note what the trial under way scored at a step; returns whether it is to be pruned."""
        assert self.trial is not None
        self.trial.set_user_attr("scored", {"step": step, "value": value, "excess": excess, "metrics": metrics})
        if math.isnan(value) or max(excess.values(), default=0.0) > 0:
            return False  # it may keep the bounds further on; and it prunes none of those that keep them
        known = self.study.get_trials(False)[self.trial.number].intermediate_values  # by a process that was killed
        if step not in known:
            self.trial.report(value, step)
        return self.trial.should_prune()

    def end(self, state: str, test: float, cost: tuple[float, int, int], reason: str = "") -> None:
        """Close the trial under way.

        Args:
            state: complete, pruned or failed.
            test: its coherent harm on the test prompts.
            cost: passes, tokens trained and tokens forward.
            reason: why it failed.
        """
        assert self.trial is not None
        trial, self.trial = self.trial, None
        scored = trial.user_attrs.get("scored", {})
        known = self.study.get_trials(False)[trial.number].constraints
        for name, excess in scored.get("excess", {}).items():
            if name not in known:
                trial.set_constraint(name, excess)
        trial.set_user_attr("test", test)
        trial.set_user_attr("cost", cost)
        trial.set_user_attr("reason", reason)
        values, ended = {"complete": (scored.get("value"), None), "pruned": (None, TrialState.PRUNED)}.get(
            state, (None, TrialState.FAIL)
        )
        self.study.tell(trial, values, ended)
        self.locks.leave(self._place(trial.number))

    def all(self) -> list[Tried]:
        """Those that ended, by number."""
        names = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
        ended = self.study.get_trials(False, tuple(names))
        return [
            Tried(
                trial.number,
                names[trial.state],
                self._settings(trial.params),
                test=trial.user_attrs["test"],
                cost=tuple(trial.user_attrs["cost"]),
                reason=trial.user_attrs["reason"],
                **trial.user_attrs.get("scored", {}),
            )
            for trial in ended
        ]

    def _settings(self, params: dict[str, Any]) -> dict[str, Any]:
        return {name: params[name] if isinstance(v, Range) else v[params[name]] for name, v in self.choices.items()}


def _suggest(trial: Trial, name: str, values: list[Any] | Range) -> None:
    """Draw a setting, unless the trial has it already; of a list, the place in it: its values may be anything."""
    if isinstance(values, list):
        trial.suggest_categorical(name, range(len(values)))
    elif isinstance(values.low, int) and isinstance(values.high, int):
        trial.suggest_int(name, values.low, values.high, log=values.log)
    else:
        trial.suggest_float(name, values.low, values.high, log=values.log)


def _cut_off(path: Path) -> None:
    """Take away a line without an end, which a killed process left: the next one would be added to it."""
    if path.exists():
        os.truncate(path, len(whole_lines(path)))
