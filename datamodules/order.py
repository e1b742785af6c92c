"""The order of rows, and every other draw, by counter: pure functions of a seed, a stream's name and a number."""

import hashlib
from functools import lru_cache

import torch

from casehard.metrics.errors import SettingError


def require_seed(seed: int) -> None:
    """Refuse what no generator takes.

    Raises:
        SettingError: it has more than 64 bits.
    """
    if not -(2**63) <= seed < 2**63:
        raise SettingError(f"seed must fit 64 bits, got {seed}.")


def batch_indices(num_rows: int, batch_size: int, seed: int, stream: str, step: int) -> list[int]:
    """Row indices of batch ``step``, from the arguments alone: a run resumes with a step number and nothing else.

    The permutations of epochs 0, 1, 2, ... are concatenated, and batch ``step`` takes the entries from ``step * batch_size`` up
    to ``(step + 1) * batch_size``. A batch may cross epochs, and every epoch has every row.

    Args:
        num_rows: size of the data, >= 1.
        batch_size: rows a batch, >= 1.
        seed: the run's seed.
        stream: name of what draws; streams are independent of each other.
        step: number of the batch, from 0.
    """
    if num_rows < 1:
        raise SettingError(f"num_rows must be >= 1, got {num_rows}. Check that the source holds rows.")
    if batch_size < 1:
        raise SettingError(f"batch_size must be >= 1, got {batch_size}. Give the rows of one batch.")
    entries = (divmod(entry, num_rows) for entry in range(step * batch_size, (step + 1) * batch_size))
    return [permutation(num_rows, seed, stream, epoch)[index] for epoch, index in entries]


@lru_cache(maxsize=16)
def permutation(num_rows: int, seed: int, stream: str, epoch: int = 0) -> tuple[int, ...]:
    """The order of ``num_rows`` rows in one epoch of a stream, the same in every process."""
    generator = torch.Generator().manual_seed(counter_seed(seed, stream, epoch))
    return tuple(torch.randperm(num_rows, generator=generator, device="cpu").tolist())


def uniform(seed: int, stream: str, step: int) -> float:
    """A number from [0, 1), the same in every process, from the arguments alone."""
    generator = torch.Generator().manual_seed(counter_seed(seed, stream, step))
    return torch.rand((), generator=generator, device="cpu").item()


def counter_seed(seed: int, stream: str, number: int) -> int:
    """A seed for draw ``number`` of a stream, from the arguments alone."""
    digest = hashlib.sha256(f"{seed}/{stream}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # to 63 bits: manual_seed takes int64
