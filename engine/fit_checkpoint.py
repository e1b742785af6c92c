"""Checkpoints of ``fit``: what they say beside their weights, read without running anything that stands in them."""

import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from casehard.metrics.errors import SettingError

FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
SHARDED_NOTES, SHARDED_INDEX = "meta.pt", ".metadata"  # in the folder of a sharded checkpoint
HARMLESS = {  # all that torch writes into the index
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}

_VERSION = re.compile(r"\d+\.\d+")


class _Index(pickle.Unpickler):
    """Reads the index of a sharded checkpoint, which torch unpickles, and refuses what it would run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in HARMLESS or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


@contextmanager
def numbers_only() -> Iterator[None]:
    """For a block, torch loads numbers and no code, whatever it is asked: it unpickles the small parts of sharded checkpoints."""
    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        yield
    finally:
        os.environ.pop(FORCED)
        if before is not None:
            os.environ[FORCED] = before


def read_notes(path: str | Path, to_train: bool = False) -> dict[str, Any]:
    """What a checkpoint of ``fit`` holds; its tensors are mapped from the disk, so that none is read before it is used.

    Args:
        path: a file, or the folder of a sharded one.
        to_train: whether training is to go on from it.

    Raises:
        SettingError: nothing of this machine, or no such checkpoint.
    """
    where = Path(path)
    if not (where.is_file() or where.is_dir()):  # a pipe would be waited for
        raise SettingError(
            f"ckpt_path must be a checkpoint of `fit` on this machine, and there is none at {str(path)!r}. "
            "Name RUN/checkpoints/last.ckpt; one that is elsewhere must be fetched first."
        )
    file = where / SHARDED_NOTES if where.is_dir() else where
    try:
        if where.is_dir():
            with (where / SHARDED_INDEX).open("rb") as index:
                _Index(index).load()
        notes = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever broken bytes lead to
        raise _unreadable(where, type(error).__name__) from error
    if not isinstance(notes, dict) or not _VERSION.match(str(notes.get("pytorch-lightning_version"))):
        raise _unreadable(where, "it is something else")
    if where.is_file() and not isinstance(notes.get("state_dict"), dict):
        raise _unreadable(where, "it has no weights")
    if where.is_file() and to_train and not {"optimizer_states", "loops"} <= notes.keys():
        raise _unreadable(where, "it has weights alone, from which no training goes on: `test` takes it")
    return notes


def require_unharmed(path: str | Path) -> None:
    """Read a checkpoint of one file to its end and compare the checksums in it, which torch writes and does not look at.

    Raises:
        SettingError: a bit is another than was written.
    """
    where = Path(path)
    if not where.is_file():
        return
    try:
        with zipfile.ZipFile(where) as parts:
            damaged = parts.testzip()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise _unreadable(where, type(error).__name__) from error
    if damaged is not None:
        raise _unreadable(where, f"{damaged} in it is not what was written")


def _unreadable(path: Path, why: str) -> SettingError:
    return SettingError(
        f"ckpt_path must be a whole checkpoint of `fit` that holds numbers and no code, and {str(path)!r} is none ({why}). "
        "Name another, such as an earlier one of that run."
    )
