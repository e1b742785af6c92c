"""Processes of a run end with the one that started them; an orphan would wait for the others until a time-out of half an hour."""

import ctypes
import os
import signal
import sys
import threading
import time

DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


def end_with_parent() -> None:
    """End this process as soon as its parent has, unless it is the first one of a run on its machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return
    parent = os.getppid()
    if sys.platform == "linux":  # by the kernel, also while C code waits for the others and no thread of Python gets its turn
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
