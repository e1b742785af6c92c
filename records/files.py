"""A run's folder: its conventions, and how files in it are written and told apart."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import yaml

from casehard.shipped import shipped

RUN_FOLDER = "CASEHARD_RUN_FOLDER"  # how the processes that Lightning's launcher starts learn of the first one's folder
DONE = "done.json"  # left by a run that came to its end: its config's hash, what its training took, and what it was made from
FILES = ("checkpoint", "undefended_checkpoint", "tokenizer", "anchors", "rubric", "template")  # settings that may name one


def named_files(config: Any) -> list[str]:
    """Files and folders of this machine that a config names for models, judges and defenses (``FILES``), wherever that stands.

    The data's sources of rows are not among them: a run notes those as its origins.
    """
    if isinstance(config, list):
        return [name for part in config for name in named_files(part)]
    found = [name for part in config.values() for name in named_files(part)] if isinstance(config, dict) else []
    values = [config.get(key) for key in FILES] if isinstance(config, dict) else []
    names = [value.partition("#")[0] for value in values if isinstance(value, str)]
    return list(
        dict.fromkeys([*(name for name in names if os.path.exists(shipped(name))), *found])
    )  # a text may be too long for a Path


def config_hash(text: str) -> str:
    """SHA-256 of a resolved config in YAML, whatever the order of its keys; where the run goes (``run``) does not count."""
    config = {name: value for name, value in yaml.safe_load(text).items() if name != "run"}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write ``path`` so that it is there whole or as it was: to a file beside it, to the disk, then in one move.

    Raises:
        OSError: naming ``path``, e.g. when the disk is full; what was there stays.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, f"{path} could not be written ({error.strerror}); what it held before is unharmed") from error
