"""Where a finished run keeps what, how it is called in public, and what of its settings may be printed."""

import hashlib
import json
import re
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import yaml

from casehard.metrics.errors import SettingError

PARTS = ("model", "data", "trainer", "run")  # of a config
JUDGED = "judged"  # folder in a run's, with a run of the same answers for every other judge
NAMES = re.compile(r"(?=.*[_*/#\d]|.*\w[.:]\w)[\w.*?:/#\[\]@+=~-]+", re.ASCII)  # identifiers, patterns, paths: no words of prose


def home(folder: Path) -> Path:
    """A run's folder; for ``RUN/judged/JUDGE`` that of RUN, whose answers were judged."""
    return folder.parent.parent if folder.parent.name == JUDGED else folder


def own_file(folder: Path, name: str) -> Path:
    """A file that a run left, in its ``home``."""
    return home(folder) / name


@cache
def config_of(folder: Path) -> dict[str, Any]:
    """A run's config, empty where it left none.

    Raises:
        SettingError: it left something else.
    """
    path = own_file(folder, "config.yaml")
    if not path.exists():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SettingError(f"{path} must be a run's settings in YAML, and it cannot be read as such.") from error
    if not isinstance(config, dict):
        raise SettingError(f"{path} must be a run's settings in YAML, and it is a {type(config).__name__}.")
    if wrong := [name for name in PARTS if not isinstance(config.get(name) or {}, dict)]:
        raise SettingError(
            f"{path} must be a run's settings in YAML, and {wrong[0]} in it is a {type(config[wrong[0]]).__name__}."
        )
    return config


def part(config: Any, *names: str) -> Any:
    """What stands at ``names`` in a config, one within the other; an empty dict where that is not there."""
    for name in names:
        config = config.get(name) if isinstance(config, dict) else None
    return {} if config is None else config


def clean(text: str) -> str:
    """``text`` in one line, without what is not seen or turns the rest around: names and sources are anybody's."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def run_name(folder: Path) -> str:
    """``EXPERIMENT/VERSION`` of a run, with ``/judged/JUDGE`` where another judge's verdicts are meant."""
    parts = folder.resolve().parts
    return "/".join(parts[-4 if JUDGED in parts[-2:-1] else -2 :])


def public(value: Any, runs: PurePath | None = None) -> Any:
    """``value`` of a config without what is this machine's or somebody's text, for all that is published.

    Paths are shown by their last part, addresses and texts are left out. A text is known by its white space, its {prompt} or a
    letter that is not ASCII. A list of texts may hold prompts of one word: its number and a hash are shown, unless every one of
    them reads as an identifier, a pattern or a path.

    Args:
        value: a config or any part of it.
        runs: folder of the runs of one experiment; paths in it are shown from its name on.
    """
    if isinstance(value, dict):
        return {name: public(part, runs) for name, part in value.items()}
    if isinstance(value, list):
        texts = [part for part in value if isinstance(part, str)]
        if not all(NAMES.fullmatch(text) for text in texts):
            return _count(value)
        return [public(part, runs) for part in value]
    if not isinstance(value, str):
        return value
    if "://" in value and not re.search(r"\s", value):
        return "(an address)"
    if not value.isascii() or re.search(r"\s|\{(forbidden_)?prompt\}", value):
        return "(a text)"
    path = PurePath(value)
    if runs is not None and path.is_relative_to(runs):
        return str(path.relative_to(runs.parent))
    return path.name if path.is_absolute() or value.startswith("~") or ".." in path.parts else value


def _count(texts: list[Any]) -> str:
    sha256 = hashlib.sha256(json.dumps(texts, ensure_ascii=False, default=str).encode()).hexdigest()
    return f"({len(texts)} text{'s' * (len(texts) != 1)}, SHA-256 {sha256[:12]})"


def published(settings: Any, runs: PurePath | None = None) -> str:
    """The ``public`` of settings, as YAML."""
    return yaml.safe_dump(public(settings, runs), sort_keys=False)
