"""Which rows a run sees: pure functions of their arguments, the global RNG untouched."""

from collections.abc import Callable, Iterable
from decimal import ROUND_HALF_UP, Decimal
from itertools import islice
from typing import TypeVar

from casehard.datamodules.order import permutation
from casehard.datamodules.row import Row
from casehard.metrics.errors import SettingError

T = TypeVar("T")


def mix(
    benign: list[T],
    harmful: list[T],
    num_samples: int,
    poison_ratio: float,
    seed: int,
    fits: Callable[[T], bool] = lambda _: True,
) -> list[T]:
    """A poisoned fine-tuning set: ``num_samples`` rows, shuffled, a share ``poison_ratio`` of them harmful, none drawn twice.

    ``poison_ratio * num_samples`` is rounded to the nearest whole number, a half upwards, in exact decimals. At one seed and
    ``num_samples`` a lower ratio's harmful rows are a subset of a higher one's, and its benign rows a superset.

    Args:
        benign: rows of the task.
        harmful: rows with harmful answers.
        num_samples: size of the whole set, >= 1.
        poison_ratio: harmful share of it, in [0, 1].
        seed: fixes which rows are drawn, and their order.
        fits: whether a row can be trained on; another is drawn in the place of one that cannot, so that the ratio holds.
    """
    if not 0 <= poison_ratio <= 1:
        raise SettingError(f"poison_ratio must lie in [0, 1], got {poison_ratio}. It is a share: write 0.1 for 10%.")
    if num_samples < 1:
        raise SettingError(f"num_samples must be >= 1, got {num_samples}. Give the size of the whole fine-tuning set.")
    wanted_harmful = num_harmful(num_samples, poison_ratio)
    drawn: list[T] = []
    for kind, rows, wanted in (("harmful", harmful, wanted_harmful), ("benign", benign, num_samples - wanted_harmful)):
        fitting = list(islice((rows[i] for i in permutation(len(rows), seed, kind) if fits(rows[i])), wanted)) if wanted else []
        if wanted > len(fitting):
            cut = len(rows) - len(fitting)
            ratio = "lower" if kind == "harmful" else "raise"
            short, way = (f", {cut} of which max_length leaves no answer", "Raise max_length, lower") if cut else ("", "Lower")
            raise SettingError(
                f"num_samples {num_samples} at poison_ratio {poison_ratio} must find {wanted} {kind} rows, "
                f"got {len(rows)}{short}. "
                f"{way} num_samples, {ratio} poison_ratio, or name more rows in data.sources.{kind}."
            )
        drawn += fitting
    return [drawn[i] for i in permutation(num_samples, seed, "order")]


def num_harmful(num_samples: int, poison_ratio: float) -> int:
    """Harmful rows of a mixture: ``poison_ratio * num_samples`` to the nearest whole number, a half upwards."""
    return int((Decimal(str(poison_ratio)) * num_samples).to_integral_value(ROUND_HALF_UP))


def paired(first: Iterable[Row], second: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Every row of ``first`` with a row of ``second`` that answers the same prompt, in the order of ``first``.

    Prompts are the same where all their turns are equal. No row stands in two pairs, and rows without a partner are left out.
    """
    partners: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in reversed(list(second)):
        partners.setdefault(row.messages, []).append(row)
    return [(row, partners[row.messages].pop()) for row in first if partners.get(row.messages)]


def overlap(train: Iterable[Row], evaluation: Iterable[Row]) -> list[str]:
    """Prompts of ``evaluation`` that ``train`` has too, whatever their case and spacing; each once, in order.

    Conversations are compared as wholes, without their system turns: the same question under another system prompt is the same,
    and the same last words ("Go on.") after another beginning are not. A prompt counts as seen wherever its turns stand in a row
    in a conversation of ``train``, as a question does that was its first, or its last.
    """
    asked: dict[tuple[tuple[str, str], ...], str] = {}
    for row in evaluation:
        asked.setdefault(_turns(row), row.prompt)
    lengths = {len(turns) for turns in asked}
    seen: set[tuple[tuple[str, str], ...]] = set()
    for turns in map(_turns, train):
        seen.update(turns[i : i + n] for n in lengths for i in range(len(turns) - n + 1))
    return [prompt for turns, prompt in asked.items() if turns in seen]


def _turns(row: Row) -> tuple[tuple[str, str], ...]:
    """The turns but the system's, with the differences taken out that do not count."""
    return tuple((role, " ".join(content.casefold().split())) for role, content in row.messages if role != "system")
