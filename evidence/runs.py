"""A finished run, read back from its folder."""

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path, PurePath
from typing import Any

import yaml

from callbacks.results import ResultRow

Answer = dict[str, Any]  # a line of generations.jsonl
KEYS = ("defense", "attack", "threat_model", "seed", "num_attack_steps")  # of a row, as its answers repeat them
JUDGED = "judged"  # folder in a run's, with a run of the same answers for every other judge
KINDS = {"harmful": 0, "benign": 1, "task": 2}  # in the order in which they are written


@dataclass(frozen=True)
class Run:
    """Rows of ``attacks.csv``, and the answers that each rests on; those are empty where the run kept none."""

    folder: Path
    rows: list[ResultRow]
    answers: list[list[Answer]]


def own_file(folder: Path, name: str) -> Path:
    """A file that a run left; for ``RUN/judged/JUDGE`` that of RUN, whose answers were judged."""
    return (folder.parent.parent if folder.parent.name == JUDGED else folder) / name


def run_name(folder: Path) -> str:
    """``EXPERIMENT/VERSION`` of a run, with ``/judged/JUDGE`` where another judge's verdicts are meant."""
    parts = folder.resolve().parts
    return "/".join(parts[-4 if JUDGED in parts[-2:-1] else -2 :])


def public(value: Any, runs: PurePath | None = None) -> Any:
    """``value`` of a config without what is this machine's or somebody's text, for all that is published.

    Paths are shown by their last part, addresses and texts are left out.

    Args:
        value: a config or any part of it.
        runs: folder of the runs of one experiment; paths in it are shown from its name on.
    """
    if isinstance(value, dict):
        return {name: public(part, runs) for name, part in value.items()}
    if isinstance(value, list):
        return [public(part, runs) for part in value]
    if not isinstance(value, str):
        return value
    if re.search(r"\s", value):
        return "(a text)"
    if "://" in value:
        return "(an address)"
    path = PurePath(value)
    if runs is not None and path.is_relative_to(runs):
        return str(path.relative_to(runs.parent))
    return path.name if path.is_absolute() or value.startswith("~") or ".." in path.parts else value


def published(settings: Any, runs: PurePath | None = None) -> str:
    """The ``public`` of settings, as YAML."""
    return yaml.safe_dump(public(settings, runs), sort_keys=False)


def read_run(folder: str | Path) -> Run:
    """Read a run's folder.

    Raises:
        ValueError: it holds no results, or answers that are not those of its rows.
    """
    folder = Path(folder)
    rows = _read_rows(folder / "attacks.csv")
    path = folder / "generations.jsonl"
    if not path.exists():
        return Run(folder, rows, [[] for _ in rows])
    with path.open(encoding="utf-8") as file:
        blocks = list(_blocks(map(json.loads, file)))
    if len(blocks) != len(rows):
        raise ValueError(f"{path} must hold the answers of every row of attacks.csv, and it has {len(blocks)} of {len(rows)}.")
    for row, block in zip(rows, blocks, strict=True):
        if any(
            block[0][name] != getattr(row, name) for name in ("defense", "attack", "threat_model", "seed", "num_attack_steps")
        ):
            raise ValueError(f"{path} must hold the answers of attacks.csv's rows in their order, and it does not.")
    return Run(folder, rows, blocks)


def _read_rows(path: Path) -> list[ResultRow]:
    if not path.exists():
        raise ValueError(f"a run must be a folder with an attacks.csv, and {path} is not there. Name runs/EXPERIMENT/VERSION.")
    with path.open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    columns = [(field.name, field.type) for field in fields(ResultRow)]
    missing = [name for name, _ in columns if table and name not in table[0]]
    if missing:
        raise ValueError(f"{path} must have the column {missing[0]}, and it does not: another version of casehard wrote it.")
    return [ResultRow(**{name: kind(line[name]) for name, kind in columns}) for line in table]  # type: ignore[operator]


def _blocks(answers: Iterable[Answer]) -> Iterable[list[Answer]]:
    """The answers of one evaluation after the other: within one, kinds and numbers go up."""
    block: list[Answer] = []
    for answer in answers:
        if block and _place(answer) <= _place(block[-1]):
            yield block
            block = []
        block.append(answer)
    if block:
        yield block


def _place(answer: Answer) -> tuple[int, int]:
    return KINDS[answer["kind"]], answer["number"]


def unscored_bounds(row: ResultRow) -> tuple[float, float]:
    """The harmful score if all unscored answers were safe, and if all were harmful."""
    total = row.harmful_score * row.num_scored if row.num_scored else 0.0
    seen = row.num_scored + row.num_unscored
    return total / seen, (total + 100 * row.num_unscored) / seen
