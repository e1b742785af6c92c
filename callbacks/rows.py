"""Result rows and the answers that they rest on, as a run's folder keeps them."""

import csv
import json
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

Answer = dict[str, Any]  # a line of generations.jsonl
KEYS = ("defense", "attack", "threat_model", "seed", "num_attack_steps")  # of a row, as its answers repeat them
KINDS = {"harmful": 0, "benign": 1, "task": 2}  # in the order in which they are written


@dataclass(frozen=True)
class ResultRow:
    """One evaluation of an attack: a row of ``attacks.csv``. Scores and rates are percentages, 0 to 100, nan where not measured.

    ``num_attack_steps`` 0 is the model before the attack; ``wall_seconds`` is what training took up to that step, scoring not
    counted; ``epoch`` is the epoch of ``fit`` after which the attack ran, empty at its end; ``trained`` is what the attacker
    trained.
    """

    defense: str
    stage: str
    attack: str
    threat_model: str
    poison_ratio: float
    optimizer: str
    learning_rate: float
    seed: int
    num_attack_steps: int
    harmful_score: float
    attack_success_rate: float
    num_scored: int
    num_unscored: int
    finetune_accuracy: float
    refusal_rate_benign: float
    degenerate_rate: float
    wall_seconds: float
    num_samples: int
    batch_size: int
    judge: str
    epoch: str
    note: str
    trained: str = ""  # unknown of runs of an earlier version


@dataclass(frozen=True)
class Run:
    """Rows of ``attacks.csv``, and the answers that each rests on; those are empty where the run kept none."""

    folder: Path
    rows: list[ResultRow]
    answers: list[list[Answer]]


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
    if len(blocks) < len(rows):  # more where a run was killed before it wrote the row of the last ones
        raise ValueError(f"{path} must hold the answers of every row of attacks.csv, and it has {len(blocks)} of {len(rows)}.")
    for row, block in zip(rows, blocks, strict=False):
        if any(block[0][name] != getattr(row, name) for name in KEYS):
            raise ValueError(f"{path} must hold the answers of attacks.csv's rows in their order, and it does not.")
    return Run(folder, rows, blocks[: len(rows)])


def _read_rows(path: Path) -> list[ResultRow]:
    if not path.exists():
        raise ValueError(f"a run must be a folder with an attacks.csv, and {path} is not there. Name runs/EXPERIMENT/VERSION.")
    with path.open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    there = set(table[0]) if table else set()
    columns = [(field.name, field.type) for field in fields(ResultRow) if field.name in there or field.default is MISSING]
    missing = [name for name, _ in columns if table and name not in there]
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
