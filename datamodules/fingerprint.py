"""What rows came from, as a run found it: digests of files and of rows."""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from casehard.datamodules.file_hash import file_sha256
from casehard.datamodules.row import Row
from casehard.datamodules.sources import read_rows, split_source


class Origin(NamedTuple):
    """What rows came from, as a run found it.

    Args:
        role: what the run used them for, such as harmful.
        source: as the run's settings name it.
        num_rows: read from it.
        sha256: of the whole file where the source is one, else of the rows (``digest``).
    """

    role: str
    source: str
    num_rows: int
    sha256: str


def origin(role: str, source: str, rows: Sequence[Row]) -> Origin:
    """Of the ``rows`` that were read from ``source``."""
    path = Path(split_source(source)[0])
    return Origin(role, source, len(rows), file_sha256(path) if path.is_file() else digest(rows))


def present_sha256(source: str) -> str | None:
    """What ``origin`` would say of ``source`` now; None where that cannot be seen here: a hub id, or nothing of this name."""
    name = split_source(source)[0]
    if name and Path(name).is_file():
        return file_sha256(Path(name))
    return _present_digest(source) if name.startswith("sandbox:") or (name and Path(name).is_dir()) else None


@cache
def _present_digest(source: str) -> str:
    return digest(read_rows(source, needs_response=False))


def digest(rows: Sequence[Row]) -> str:
    """SHA-256 of rows, each a line of JSON: the list of its turns, the answer last (empty where there is none)."""
    lines = (json.dumps(row.chat(answered=True), ensure_ascii=False) + "\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
