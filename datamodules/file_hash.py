"""SHA-256 of a file; imports nothing else, so that whatever only compares files does not wait for the reader of rows."""

import hashlib
from functools import cache
from pathlib import Path


def file_sha256(path: Path) -> str:
    """Of a file's bytes, which are read once for as long as its size and time of change stay."""
    return _file_sha256(path.absolute(), path.stat().st_size, path.stat().st_mtime_ns)


@cache
def _file_sha256(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
