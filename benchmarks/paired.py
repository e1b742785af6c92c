"""Two ways to do one thing, timed side by side: on a shared machine only their ratio means something."""

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from tqdm import tqdm


def settle() -> None:
    """Wait for what is queued on an accelerator."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def seconds(action: Callable[[], object]) -> float:
    """How long ``action`` takes, what it has queued on an accelerator included."""
    settle()
    start = time.perf_counter()
    action()
    settle()
    return time.perf_counter() - start


def paired(
    first: Callable[[], object], second: Callable[[], object], num_pairs: int, num_warmup: int, name: str
) -> list[tuple[float, float]]:
    """Seconds of each, A B A B, over ``num_pairs`` pairs after ``num_warmup`` that do not count."""
    pairs = [(seconds(first), seconds(second)) for _ in tqdm(range(num_warmup + num_pairs), desc=name, leave=False)]
    return pairs[num_warmup:]


def spread(values: Iterable[float], form: str = ".2f") -> str:
    """Median, and the least and the most."""
    values = list(values)
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
