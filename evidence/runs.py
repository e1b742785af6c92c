"""Where a finished run keeps what, and how it is called in public."""

import hashlib
import json
import math
import re
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import yaml

from casehard.records.rows import ResultRow

JUDGED = "judged"  # folder in a run's, with a run of the same answers for every other judge
TEXTS = ("anchors", "refusal_texts", "extra_phrases")  # settings whose lists are texts: in some languages without any space


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
        ValueError: it left something else.
    """
    path = own_file(folder, "config.yaml")
    if not path.exists():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} must be a run's settings in YAML, and it cannot be read as such.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a run's settings in YAML, and it is a {type(found).__name__}.")
    return found


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

    Paths are shown by their last part, addresses and texts are left out; of a list of texts its number and a hash are shown. A
    text is known by the setting that holds it, and by its white space or its {prompt} wherever it stands.

    Args:
        value: a config or any part of it.
        runs: folder of the runs of one experiment; paths in it are shown from its name on.
    """
    if isinstance(value, dict):
        return {name: _count(own) if _texts(name, own) else public(own, runs) for name, own in value.items()}
    if isinstance(value, list):
        return [public(own, runs) for own in value]
    if not isinstance(value, str):
        return value
    if re.search(r"\s|\{(forbidden_)?prompt\}", value):
        return "(a text)"
    if "://" in value:
        return "(an address)"
    path = PurePath(value)
    if runs is not None and path.is_relative_to(runs):
        return str(path.relative_to(runs.parent))
    return path.name if path.is_absolute() or value.startswith("~") or ".." in path.parts else value


def _texts(name: str, value: Any) -> bool:
    """Whether a setting is a list of texts; where it is no list it names a source of them."""
    return name in TEXTS and isinstance(value, list)


def _count(texts: list[str]) -> str:
    sha256 = hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode()).hexdigest()
    return f"({len(texts)} text{'s' * (len(texts) != 1)}, SHA-256 {sha256[:12]})"


def published(settings: Any, runs: PurePath | None = None) -> str:
    """The ``public`` of settings, as YAML."""
    return yaml.safe_dump(public(settings, runs), sort_keys=False)


def unscored_bounds(row: ResultRow) -> tuple[float, float]:
    """The harmful score if all unscored answers were safe, and if all were harmful; nan where there was none to score."""
    total = row.harmful_score * row.num_scored if row.num_scored else 0.0
    seen = row.num_scored + row.num_unscored or math.nan
    return total / seen, (total + 100 * row.num_unscored) / seen
