"""Which rows a run sees, and in which order: pure functions of their arguments, the global RNG untouched."""

import hashlib
from collections.abc import Callable, Iterable
from decimal import ROUND_HALF_UP, Decimal
from functools import lru_cache
from itertools import islice
from typing import TypeVar

import torch

from casehard.datamodules.rows import Row

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
        raise ValueError(f"poison_ratio must lie in [0, 1], got {poison_ratio}. It is a share: write 0.1 for 10%.")
    if num_samples < 1:
        raise ValueError(f"num_samples must be >= 1, got {num_samples}. Give the size of the whole fine-tuning set.")
    num_harmful = int((Decimal(str(poison_ratio)) * num_samples).to_integral_value(ROUND_HALF_UP))
    drawn: list[T] = []
    for kind, rows, wanted in (("harmful", harmful, num_harmful), ("benign", benign, num_samples - num_harmful)):
        found = list(islice((rows[i] for i in permutation(len(rows), seed, kind) if fits(rows[i])), wanted)) if wanted else []
        if wanted > len(found):
            cut = len(rows) - len(found)
            short, way = (f", {cut} of which max_length leaves no answer", "Raise max_length, lower") if cut else ("", "Lower")
            raise ValueError(
                f"num_samples {num_samples} at poison_ratio {poison_ratio} must find {wanted} {kind} rows, "
                f"got {len(rows)}{short}. "
                f"{way} num_samples, {'lower' if kind == 'harmful' else 'raise'} poison_ratio, or give more {kind} rows."
            )
        drawn += found
    return [drawn[i] for i in permutation(num_samples, seed, "order")]


def batch_indices(num_rows: int, batch_size: int, seed: int, stream: str, step: int) -> list[int]:
    """Row indices of batch ``step``, from the arguments alone, so that a run resumes with a step number and nothing else.

    The permutations of epochs 0, 1, 2, ... stand end to end, and batch ``step`` takes the places from ``step * batch_size`` up
    to ``(step + 1) * batch_size``. A batch may thus cross epochs, and no row is left out of any.

    Args:
        num_rows: size of the data, >= 1.
        batch_size: rows a batch, >= 1.
        seed: the run's seed.
        stream: name of who draws; streams are independent of each other.
        step: number of the batch, from 0.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows must be >= 1, got {num_rows}. Check that the source holds rows.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}. Give the rows of one batch.")
    places = (divmod(place, num_rows) for place in range(step * batch_size, (step + 1) * batch_size))
    return [permutation(num_rows, seed, stream, epoch)[index] for epoch, index in places]


@lru_cache(maxsize=16)
def permutation(num_rows: int, seed: int, stream: str, epoch: int = 0) -> tuple[int, ...]:
    """The order of ``num_rows`` rows in one epoch of a stream, the same in every process."""
    generator = torch.Generator().manual_seed(counter_seed(seed, stream, epoch))
    return tuple(torch.randperm(num_rows, generator=generator).tolist())


def uniform(seed: int, stream: str, step: int) -> float:
    """A number from [0, 1), the same in every process, from the arguments alone."""
    return torch.rand((), generator=torch.Generator().manual_seed(counter_seed(seed, stream, step))).item()


def counter_seed(seed: int, stream: str, number: int) -> int:
    """A seed for draw ``number`` of a stream, from the arguments alone."""
    digest = hashlib.sha256(f"{seed}/{stream}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # to 63 bits: manual_seed takes int64


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
