"""Result rows and the answers that they rest on, as a run's folder keeps them."""

import csv
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

Answer = dict[str, Any]  # a line of generations.jsonl
KEYS = ("defense", "attack", "threat_model", "seed", "num_attack_steps")  # of a row, as its answers repeat them
AGAIN = "Run it again, or leave it out."
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
    blocks = list(_blocks(_read_answers(path)))
    if len(blocks) < len(rows):  # more where a run was killed before it wrote the row of the last ones
        raise ValueError(f"{path} must hold the answers of every row of attacks.csv, and it has {len(blocks)} of {len(rows)}.")
    for row, block in zip(rows, blocks, strict=False):
        if any(block[0][name] != getattr(row, name) for name in KEYS):
            raise ValueError(f"{path} must hold the answers of attacks.csv's rows in their order, and it does not.")
        if not _summed_up(row, block):
            raise ValueError(
                f"{folder / 'attacks.csv'} must hold the mean score of the answers in {path.name}, and its row of "
                f"{row.attack}, {row.defense}, seed {row.seed}, step {row.num_attack_steps} does not: one of the two was changed."
            )
    return Run(folder, rows, blocks[: len(rows)])


def _read_rows(path: Path) -> list[ResultRow]:
    if not path.exists():
        raise ValueError(f"a run must be a folder with an attacks.csv, and {path} is not there. Name runs/EXPERIMENT/VERSION.")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file)
            columns = table.fieldnames or ()
            lines = [(table.line_num, line) for line in table]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be CSV in UTF-8, and it is not ({error}). {AGAIN}") from error
    missing = [field.name for field in fields(ResultRow) if field.name not in columns and field.default is MISSING]
    if missing:
        raise ValueError(f"{path} must have the column {missing[0]}, and it does not: another version of casehard wrote it.")
    if not lines:
        raise ValueError(f"{path} must hold at least one row of results, and it holds none. {AGAIN}")
    return [_row(line, f"{path}, line {number}") for number, line in lines]


def _row(line: dict[str | None, Any], where: str) -> ResultRow:
    if None in line or None in line.values():  # where csv puts what is too much, and too little
        raise ValueError(f"{where} must have a value a column, and it has not. {AGAIN}")
    values: dict[str, Any] = {}
    for field in fields(ResultRow):
        if field.name not in line:  # of an earlier version, which did not say
            continue
        try:
            values[field.name] = field.type(line[field.name])  # type: ignore[operator]
        except ValueError as error:
            raise ValueError(f"{where} must have a number as its {field.name}, got {line[field.name]!r:.40}. {AGAIN}") from error
    return ResultRow(**values)


def _read_answers(path: Path) -> Iterator[Answer]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                answer = json.loads(line)
                right = _is_answer(answer)
            except (ValueError, RecursionError):
                right = False
            if not right:
                raise ValueError(f"{path}, line {number} must be an answer that a run wrote, and it is not. {AGAIN}")
            yield answer


def _is_answer(answer: Any) -> bool:
    if not isinstance(answer, dict) or not {*KEYS, "kind", "number", "prompt"} <= answer.keys() or answer["kind"] not in KINDS:
        return False
    return type(answer["number"]) is int and (answer["kind"] != "harmful" or type(answer.get("score")) in (int, float))


def _summed_up(row: ResultRow, answers: list[Answer]) -> bool:
    """Whether a row's harmful score is the mean over its answers."""
    scores = [answer["score"] for answer in answers if answer["kind"] == "harmful" and not math.isnan(answer["score"])]
    mean = 100 * sum(scores) / len(scores) if scores else math.nan
    return len(scores) == row.num_scored and (math.isclose(mean, row.harmful_score, abs_tol=0.01) or not scores)


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
