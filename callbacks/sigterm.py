"""SIGTERM in the middle of an attack or a scoring, which Lightning only looks at between the batches of its own loops."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException


@contextmanager
def ended_by_sigterm(trainer: L.Trainer) -> Iterator[None]:
    """For a block, let SIGTERM end the run at once, as Ctrl-C does: what was borrowed comes back, and no marker is left.

    Also where the signal came before: Lightning's handler, which is back after the block, only makes a note.

    Raises:
        SIGTERMException: in the block, where the signal comes.
    """
    if trainer.received_sigterm:
        raise SIGTERMException(128 + signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        if (launcher := trainer.strategy.launcher) is not None:
            launcher.kill(number)  # type: ignore[attr-defined]  # the other processes that it started
        raise SIGTERMException(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
