"""Somebody else's program: run with variables of its own, ended with all that it started, and what it made of a model."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from casehard.engine.checkpoint import load_model, load_tokenizer
from casehard.engine.training import DivergedError

PASSED = (  # variables that a program gets of ours: no keys, nothing of Python's paths, nothing of a launcher of ranks
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "TMPDIR", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "HF_HOME",
    "HF_HUB_CACHE", "HF_HUB_OFFLINE", "SSL_CERT_FILE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
)  # fmt: skip
TURN = 10.0  # seconds between two calls of ``meanwhile``
LAST = 3  # lines of a log that are shown
NARROW = (torch.bfloat16, torch.float16)  # what a program may write weights in that it did not change


class CommandError(DivergedError):
    """A command left no attacked model: an error, and of a search a failed trial. It is never a model that held."""


class Ended(NamedTuple):
    """How a program ended: its exit status (None where it ran out of time), its seconds, and the end of what it wrote."""

    status: int | None
    seconds: float
    said: str


def variables(own: Mapping[str, str]) -> dict[str, str]:
    """The environment of a program: ``PASSED`` of ours, and ``own``."""
    return {name: os.environ[name] for name in PASSED if name in os.environ} | dict(own)


def run_command(
    words: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    timeout_s: float,
    meanwhile: Callable[[], object] = lambda: None,
    text: str = "",
) -> Ended:
    """Run a program without a shell. Its whole process group is killed when it ends, when this block does, and with this process.

    Args:
        words: of the command.
        folder: where it runs; its output goes to ``log.txt`` there.
        environment: all of its variables.
        timeout_s: seconds that it may take.
        meanwhile: called every ``TURN`` seconds.
        text: what it reads on its standard input, which ends there.
    """
    started, log = time.monotonic(), folder / "log.txt"
    with log.open("wb") as out, TemporaryFile() as asked:
        asked.write(text.encode())
        asked.seek(0)
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=environment,
            stdin=asked,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with _killed_at_the_end(process):
            while process.returncode is None and (left := timeout_s - (time.monotonic() - started)) > 0:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(min(left, TURN))
                meanwhile()
            status = process.returncode
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return Ended(status, time.monotonic() - started, " / ".join(lines[-LAST:]) or "nothing")


@contextmanager
def _killed_at_the_end(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill a process and its group when the block ends, and when this process does, be it by kill -9: a pipe closes then."""
    words, nothing = ["sh", "-c", 'read _; kill -s KILL -- "-$1"', "sh", str(process.pid)], subprocess.DEVNULL
    try:
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=nothing, stderr=nothing, start_new_session=True) as watch:
            try:
                yield
            finally:
                watch.kill()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def changed_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """What a program made of ``model``, read as anybody would: a whole model, an adapter or a GGUF file.

    Raises:
        CommandError: it is none, of other shapes or another vocabulary, or its weights are as they were; says what must be.
    """
    try:
        left = load_model(str(folder), model.dtype)
        theirs = load_tokenizer(str(folder)).get_vocab() if any(folder.glob("tokenizer*")) else tokenizer.get_vocab()
    except (OSError, ValueError) as error:
        raise CommandError(f"leave a model, and there is none: {error}") from error
    ours, new = model.state_dict(), left.state_dict()
    if unlike := {(name, w.shape) for name, w in ours.items()} ^ {(name, w.shape) for name, w in new.items()}:
        raise CommandError(f"leave a model of the same shapes, and {min(name for name, _ in unlike)} is not as it was")
    if theirs != tokenizer.get_vocab():
        raise CommandError("leave a model of the same vocabulary, and its tokenizer has other tokens")
    for dtype in (model.dtype, *NARROW):
        if all(torch.equal(w.cpu().to(dtype).to(model.dtype), new[name]) for name, w in ours.items()):
            raise CommandError("change weights, and all are as they were")
    return left
