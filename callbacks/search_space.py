"""What a search tries: settings of an attack by dotted names, the values to choose from, and what no trial may cost."""

import copy
import math
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from casehard.callbacks.attack import Attack
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


def has_setting(owner: Any, setting: str) -> bool:
    """Whether an attack has a setting, ``NAME``, ``NAME.FIELD``, and so on inwards."""
    name, _, inner = setting.partition(".")
    if isinstance(owner, Attack):
        known = not name.startswith("_") and hasattr(owner, name) and not callable(getattr(owner, name))
    else:
        known = is_dataclass(owner) and name in {field.name for field in fields(owner)}
    return known and (not inner or has_setting(getattr(owner, name), inner))


def with_settings(attack: Attack, settings: dict[str, Any]) -> Attack:
    """A copy of an attack that has not been prepared, with other settings.

    A setting that is made of several takes a mapping of those that change: ``{"lora": {"rank": 4}}``.
    """
    changed = copy.copy(attack)
    for setting, value in settings.items():
        name, _, inner = setting.partition(".")
        setattr(changed, name, _changed(getattr(changed, name), inner, value))
    return changed


def _changed(before: Any, setting: str, value: Any) -> Any:
    """``before`` with another value of ``setting``, "" being the whole of it."""
    if setting:
        name, _, inner = setting.partition(".")
        return replace(before, **{name: _changed(getattr(before, name), inner, value)})
    several = is_dataclass(before) and not isinstance(before, type) and isinstance(value, dict)
    return replace(before, **value) if several else value
