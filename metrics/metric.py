"""A metric of one's own: a number from the answers of one evaluation, with a column in everything that is written."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import Any

from casehard.metrics.columns import COLUMNS, Answer, Answers, Column
from casehard.metrics.errors import SettingError, raised_by
from casehard.metrics.judges import Verdict
from casehard.metrics.made_with import OWN, MadeWith


class Metric(MadeWith, ABC):
    """A number from all answers of one evaluation. It stands in tables, ``attacks.csv``, reports, cards and loggers.

    One of one's own needs a ``name``, such as ``exact``, and ``of``. What else it says of itself are attributes: ``label`` heads
    its column, by default the name in words; ``meaning`` explains it to the reader of a report; ``higher_is_better`` is the
    direction for the defender, None if it has none; ``low`` and ``high`` are its range, 0 to 100 where left out, which is a
    percentage. Its column bears a short hash of whatever the object was made with that is not the default: values under other
    settings are never averaged.
    """

    name: str
    label: str = ""
    meaning: str = ""
    higher_is_better: bool | None = None
    low: float = 0.0
    high: float = 100.0

    @abstractmethod
    def of(self, answers: Answers) -> float:
        """The value, nan where it was not measured: there may be no answer of the kind that it is of.

        Args:
            answers: of one evaluation, each a dict: ``kind`` (harmful, benign, task), ``prompt``, ``response``; of harmful and
                benign ones the judge's ``score`` (nan where it has none), ``refused``, ``degenerate`` and ``detail``; of a task
                the ``target``; and what ``look`` found.
        """

    def look(self, module: Any, kind: str, rows: Sequence[Any]) -> list[dict[str, Any]]:
        """What it must know of the model that answered, beside the answers: more keys of each one. None unless overridden.

        Called for every kind of prompt on every process with its share of the rows, also with none. ``module.losses(rows)``
        gives what an answer to each row costs the model.

        Args:
            module: the `Defense` that is scored.
            kind: harmful, benign or task.
            rows: whose prompts it was asked.
        """
        return [{} for _ in rows]

    def column(self) -> Column:
        """Its column."""
        name = self.named().replace("@", "_")
        label = self.label or self.name.replace("_", " ").capitalize()
        return Column(
            name,
            partial(_of, self),
            label + name.removeprefix(self.name).replace("_", " @"),
            self.meaning or f"{self.name}, a metric of the user's own",
            self.higher_is_better,
            low=self.low,
            high=self.high,
            class_path=f"{type(self).__module__}.{type(self).__qualname__}",
        )


def _of(metric: Metric, answers: Answers, _: float) -> float:
    return value_of(metric, answers)


def value_of(metric: Metric, answers: Answers) -> float:
    """The metric's value.

    Raises:
        SettingError: the metric raised, or what it returned is no number in its range.
    """
    try:
        found = metric.of(list(answers))
    except Exception as error:
        if type(metric).__module__.partition(".")[0] in OWN:
            raise
        raise raised_by(f"metric {metric.name} must give a number", error) from error
    found = found.item() if hasattr(found, "item") else found  # of numpy or torch
    if not isinstance(found, Real) or isinstance(found, bool):
        got = f"a {type(found).__name__}"
    elif math.isinf(found) or not (math.isnan(found) or metric.low <= float(found) <= metric.high):
        got = f"{float(found):g}"
    else:
        return float(found)
    raise SettingError(
        f"metric {metric.name} must return a number from {metric.low:g} to {metric.high:g}, or nan where nothing was measured, "
        f"and returned {got}. Mend its class, or set its low and high."
    )


def require_metrics(metrics: Sequence[Any], setting: str) -> None:
    """Refuse what cannot be columns beside each other, as far as it can be told without an answer.

    Raises:
        SettingError: no `Metric`; a name that is none, or that another has; a range that is none.
    """
    taken = {column.name for column in COLUMNS}
    for metric in metrics:
        kind = metric if isinstance(metric, type) else type(metric)
        if not isinstance(metric, Metric):
            raise SettingError(f"{setting} must be objects of classes derived from casehard.Metric, got {kind.__name__}.")
        name = getattr(metric, "name", None)
        if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]*", name):
            raise SettingError(
                f"metric {kind.__module__}.{kind.__qualname__} must have a name of small letters, digits and _, which its column "
                f"bears, and has {name!r}. Set its name."
            )
        if not (isinstance(metric.low, Real) and isinstance(metric.high, Real) and metric.low < metric.high):
            raise SettingError(f"metric {name} must have a low below its high, got {metric.low} and {metric.high}.")
        if (column := metric.column().name) in taken:
            raise SettingError(f"{setting} must have names of their own, and two columns are {column}. Rename one of them.")
        taken.add(column)


def try_out(metrics: Sequence[Metric], kinds: Sequence[str]) -> None:
    """Ask every metric for its value of two invented answers of each kind, before anything is trained.

    One that looks at the model is left out: what it would have found is not there.

    Raises:
        SettingError: it raised, or what it returned is no number in its range.
    """
    answers: list[Answer] = []
    for kind in kinds:
        for n, response in enumerate(("Here is how: one, two.", "I cannot help with that.")):
            told = {"target": "I cannot help with that."} if kind == "task" else Verdict(1.0 - n, n == 1, False)._asdict()
            answers.append({"kind": kind, "number": n, "prompt": "How?", "response": response} | told)
    for metric in metrics:
        if type(metric).look is Metric.look:
            value_of(metric, answers)
