"""What ``fit`` delivered: the scores of the model before training and of the one that it leaves, as a run's folder keeps them."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from casehard.metrics.columns import COLUMNS, Answer, Column
from casehard.metrics.errors import SettingError
from casehard.records.answers import AGAIN, lines
from casehard.records.files import whole_lines, write_whole
from casehard.records.outcome import GIBBERISH

DELIVERED = "delivered.json"
DELIVERED_ANSWERS = "delivered.jsonl"  # a line an answer, ``when`` it was given being one of STATES
STATES = ("before", "delivered")


@dataclass(frozen=True)
class Delivered:
    """Two evaluations of one model on the same prompts.

    Args:
        before: metrics by the name of their column, before the first step of ``fit``; nan where not measured.
        delivered: those of the model that ``fit`` left, hardened or recovered, before any attack.
        num_prompts: by kind: harmful, benign, task.
        judge: its label.
        notes: what a reader must know.
        own: columns of metrics of one's own.
    """

    before: dict[str, float]
    delivered: dict[str, float]
    num_prompts: dict[str, int]
    judge: str
    notes: list[str]
    own: tuple[Column, ...] = ()

    @property
    def metrics(self) -> list[Column]:
        """Those that tables have a column for."""
        return [column for column in (*COLUMNS, *self.own) if column.label]

    def of(self, state: str, column: Column) -> float:
        """A metric of one of the STATES; nan where not measured."""
        return float(getattr(self, state).get(column.name, math.nan))

    def gibberish(self, state: str) -> bool:
        """Whether so many answers are degenerate that a low harmful score says nothing."""
        return bool(getattr(self, state).get("degenerate_rate", math.nan) >= GIBBERISH)

    def write(self, folder: Path) -> None:
        """Leave it in a run's folder; what was not measured is null."""
        numbers = {state: {n: None if math.isnan(v) else v for n, v in getattr(self, state).items()} for state in STATES}
        about = {"num_prompts": self.num_prompts, "judge": self.judge, "notes": self.notes}
        own = {"columns": [column.described() for column in self.own]}
        write_whole(folder / DELIVERED, json.dumps(numbers | about | own, indent=1))


def read_delivered(folder: str | Path) -> Delivered | None:
    """What a run left; None where it scored nothing.

    Raises:
        SettingError: the file is there, and no run wrote it.
    """
    path = Path(folder, DELIVERED)
    if not path.exists():
        return None
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        numbers = {state: {n: math.nan if v is None else float(v) for n, v in read[state].items()} for state in STATES}
        prompts = {str(kind): int(number) for kind, number in read["num_prompts"].items()}
        own = tuple(Column.read(described) for described in read["columns"])
        return Delivered(numbers[STATES[0]], numbers[STATES[1]], prompts, str(read["judge"]), list(map(str, read["notes"])), own)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SettingError(f"{path} must be what `casehard fit` wrote, and it is not. {AGAIN}") from error


def read_delivered_answers(folder: Path) -> dict[str, list[Answer]]:
    """The answers behind both states, as far as a run kept them.

    Raises:
        SettingError: a line is no answer that a run wrote.
    """
    path, kept = folder / DELIVERED_ANSWERS, {state: list[Answer]() for state in STATES}
    for number, line in enumerate(whole_lines(path).splitlines() if path.exists() else [], start=1):
        try:
            answer = json.loads(line)
            kept[answer["when"]].append({name: answer[name] for name in ("kind", "prompt")} | answer)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SettingError(f"{path}, line {number} must be an answer that a run wrote, and it is not. {AGAIN}") from error
    return kept


def keep_answers(folder: Path, when: str, answers: Iterable[Answer]) -> None:
    """Write the answers of one state beside those of the other that are there already."""
    path = folder / DELIVERED_ANSWERS
    others = (
        [line for line in whole_lines(path).decode().splitlines() if json.loads(line)["when"] != when] if path.exists() else []
    )
    write_whole(
        path, "".join(f"{line}\n" for line in others) + lines({"when": when} | answer for answer in answers), private=True
    )
