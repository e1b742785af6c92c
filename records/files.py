"""A run's folder: its conventions, and how files in it are written and told apart."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import yaml

from casehard.shipped import shipped

RUN_FOLDER = "CASEHARD_RUN_FOLDER"  # how the processes that Lightning's launcher starts learn of the first one's folder
DONE = "done.json"  # left by a run that came to its end: its config's hash, what its training took, and what it was made from
WRITTEN = ("cache", "storage")  # how settings are called that name a file which the run itself writes


def named_files(config: dict[str, Any]) -> list[str]:
    """Files and checkpoints of this machine that a run rests on: every text of its model, data and trainer that names one.

    So a new setting that names a file needs no entry anywhere; a file that is named in vain costs a hash. ``data.sources``
    are left out: a run notes those as its origins. So is what a run writes: a setting called ``cache`` or ``storage``.
    """
    data = {name: value for name, value in (config.get("data") or {}).items() if name != "sources"}
    texts = [text.partition("#")[0] for text in _texts([config.get("model"), data, config.get("trainer")])]
    return [text for text in dict.fromkeys(texts) if _is_input(text)]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        yield from _texts([part for name, part in value.items() if name not in WRITTEN])


def _is_input(text: str) -> bool:
    """Whether a text names a file, or a folder with a model's, a tokenizer's or an adapter's config."""
    path = shipped(text)
    return os.path.isfile(path) or (os.path.isdir(path) and any(Path(path).glob("*config.json")))


def config_hash(text: str) -> str:
    """SHA-256 of a resolved config in YAML, whatever the order of its keys; where the run goes (``run``) does not count."""
    config = {name: value for name, value in yaml.safe_load(text).items() if name != "run"}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _for_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def write_whole(path: Path, text: str, private: bool = False) -> None:
    """Write ``path`` so that it is there whole or as it was: to a file beside it, to the disk, then in one move.

    Args:
        path: the file.
        text: all of it.
        private: only its owner may read it.

    Raises:
        OSError: naming ``path``, e.g. when the disk is full; what was there stays.
    """

    def write(file: IO[bytes]) -> None:
        file.write(text.encode())

    write_whole_bytes(path, write, private)


def write_whole_bytes(path: Path, write: Callable[[IO[bytes]], Any], private: bool = False) -> None:
    """``write_whole`` of what ``write`` puts into an open file, such as ``torch.save``.

    Raises:
        OSError: see there.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # of a run that was killed, with a mode of its own
        with open(partial, "wb", opener=_for_owner if private else None) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch hides the first behind the second
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise _not_written(path, cause) from error
        raise


def append_whole(path: Path, text: str, private: bool = False) -> None:
    """Add ``text`` to the end of ``path``, on the disk when this returns; a kill in between leaves at most a line without end.

    Raises:
        OSError: naming ``path``, e.g. when the disk is full; what was there stays.
    """
    before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab", opener=_for_owner if private else None) as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, before)
        raise _not_written(path, error) from error


def whole_lines(path: Path) -> bytes:
    """What ``path`` holds up to its last end of a line: a line without one was cut off while it was written."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _not_written(path: Path, error: OSError) -> OSError:
    return OSError(error.errno, f"{path} could not be written ({error.strerror}); what it held before is unharmed")
