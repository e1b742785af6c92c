"""How long the steps of a `Trainer.fit` take."""

import time
from itertools import pairwise

import lightning as L
from paired import settle


class Clock(L.Callback):
    """Takes the time at step ``start`` of a fit and every ``every`` steps after it.

    Args:
        every: steps between two times.
        start: the first one; 0 is before the first batch.
    """

    def __init__(self, every: int, start: int = 0) -> None:
        self.every, self.start = every, start
        self.times: list[float] = []

    @property
    def seconds(self) -> list[float]:
        """Between the times."""
        return [end - begin for begin, end in pairwise(self.times)]

    def on_train_start(self, trainer: L.Trainer, *_: object) -> None:
        self._look(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        self._look(trainer)

    def _look(self, trainer: L.Trainer) -> None:
        steps = trainer.global_step - self.start
        if steps >= 0 and steps % self.every == 0:
            settle()
            self.times.append(time.perf_counter())
