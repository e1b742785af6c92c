"""What a search tries: settings of an attack by dotted names, the values to choose from, and what no trial may cost."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from jsonargparse import ArgumentParser

from casehard.callbacks.attack import Attack
from casehard.metrics.errors import SettingError
from casehard.records.trials import in_words

FIXED = (
    "name",
    "threat_model",
    "seed",
    "num_attack_steps",
    "score_steps",
    "undefended",
    "undefended_checkpoint",
    "every_n_epochs",
    "phases",
    "num_phases",
    "num_selection_steps",
)  # of any attack, also of one that follows another: they say when it is scored, and what it is


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


Choices = dict[str, list[Any] | Range]


@dataclass(frozen=True)
class Bound:
    """Where a metric must lie, both ends included.

    Args:
        low: least value; null for none.
        high: greatest; null for none.
    """

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        ends = [end for end in (self.low, self.high) if end is not None]
        if not ends or ends != sorted(ends) or any(map(math.isnan, ends)):
            raise SettingError(f"a bound must have low or high, and low <= high where it has both, got {self}.")

    def excess(self, value: float) -> float:
        """How far ``value`` lies beyond, <= 0 within; infinite where it was not measured."""
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        return math.inf if math.isnan(value) else max(low - value, value - high)


@dataclass(frozen=True)
class MedianPruner:
    """Ends a trial that does less harm at a scored step than the median of the trials before did there.

    Args:
        startup_trials: that run to their end first, >= 1.
    """

    startup_trials: int = 5

    def __post_init__(self) -> None:
        if self.startup_trials < 1:
            raise SettingError(f"startup_trials must be >= 1, got {self.startup_trials}. A pruner of null prunes nothing.")


def arguments(kind: type[Attack]) -> list[str]:
    """Names of all that a class of attacks is made with, by itself and by the classes it comes from, as a config names them."""
    added = ArgumentParser().add_class_arguments(kind, fail_untyped=False)
    return list(dict.fromkeys(name.partition(".")[0] for name in added))


def has_setting(owner: Any, setting: str) -> bool:
    """Whether an attack has a setting that may be searched, ``NAME``, ``NAME.FIELD``, and so on inwards."""
    name, _, inner = setting.partition(".")
    if isinstance(owner, Attack):
        known = name in arguments(type(owner)) and name in vars(owner) and name not in FIXED
    else:
        known = is_dataclass(owner) and name in {field.name for field in fields(owner)}
    return known and (not inner or has_setting(getattr(owner, name), inner))


def with_settings(attack: Attack, settings: dict[str, Any]) -> Attack:
    """The attack made anew with other settings, not prepared.

    A copy stands in where not all that it was made with can be told from it. A setting that is made of several takes a mapping of
    those that change: ``{"lora": {"rank": 4}}``.
    """
    kind, known, names = type(attack), vars(attack), arguments(type(attack))
    own = {name: known[name] for name in names if name in known}
    changed = dict(own)
    for setting, value in settings.items():
        name, _, inner = setting.partition(".")
        changed[name] = _changed(changed[name], inner, value)
    if len(own) == len(names) and all(known.get(name) == value for name, value in vars(kind(**own)).items()):
        return kind(**changed)
    other = copy.copy(attack)
    vars(other).update(changed)
    return other


def _changed(before: Any, setting: str, value: Any) -> Any:
    """``before`` with another value of ``setting``, "" being the whole of it."""
    if setting and isinstance(before, Attack):
        return with_settings(before, {setting: value})
    if setting:
        name, _, inner = setting.partition(".")
        return replace(before, **{name: _changed(getattr(before, name), inner, value)})
    several = is_dataclass(before) and not isinstance(before, type) and isinstance(value, dict)
    return replace(before, **value) if several else value


def to_check(choices: Choices) -> list[dict[str, Any]]:
    """Settings that between them have every value of a list and both ends of a range: the first of each, then one other."""
    ends = {setting: values if isinstance(values, list) else [values.low, values.high] for setting, values in choices.items()}
    first = {setting: values[0] for setting, values in ends.items()}
    return [first, *(first | {setting: value} for setting, values in ends.items() for value in values[1:])]


def searched(choices: Choices) -> Iterator[str]:
    """Names of all settings that choices set: of a value made of several, which sets some, of those."""
    for setting, values in choices.items():
        for value in values if isinstance(values, list) else [None]:
            several = [field.name for field in fields(value)] if is_dataclass(value) else value if isinstance(value, dict) else []
            yield from [f"{setting}.{name}" for name in several] or [setting]


def without(settings: dict[str, Any], setting: str) -> dict[str, Any]:
    """An attack's ``settings()`` without a setting, wherever it stands there: by itself, or within the one that it is part of."""
    name, _, inner = setting.partition(".")
    column = settings.get(name)
    if isinstance(column, dict) and inner:
        return settings | {name: without(column, inner)}
    if inner and setting != "optimizer.name":  # whose column bears the optimizer's name
        kept = settings if name == "optimizer" else without(settings, name)
        return without(kept, inner)
    return {n: value for n, value in settings.items() if n != name}


@contextmanager
def required(attack: Attack, settings: dict[str, Any]) -> Iterator[None]:
    """Says which settings an attack cannot take, where a block shows that it cannot.

    Raises:
        SettingError: the block raised what wrong settings do.
    """
    try:
        yield
    except (ValueError, TypeError, AttributeError) as error:
        raise SettingError(
            f"choices must be settings that {type(attack).__name__} can take, got {in_words(settings)}: {error}"
        ) from error
