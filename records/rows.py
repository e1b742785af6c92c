"""Result rows, and with their answers the runs that a folder keeps."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from casehard.metrics import columns
from casehard.metrics.columns import Answer, Column, summarise
from casehard.metrics.errors import SettingError
from casehard.metrics.names import seen
from casehard.records.answers import AGAIN, ANSWERS, KEYS, lines, read_answers
from casehard.records.files import append_whole, whole_lines, write_whole

ROWS = "attacks.csv"
OWN_COLUMNS = "columns.json"  # what metrics of one's own say of their columns: whoever reads a run needs none of their classes
UNDEFENDED = "undefended"  # what people read where a row's defense is NONE
NONE = "none"  # as a row's defense and stage: plain fine-tuning


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One evaluation of an attack: a row of ``attacks.csv``. Its metrics (``metrics.columns``) can be read as attributes.

    Args:
        evaluation: its number, unique in a run; every line of its answers repeats it.
        attack_index: which of the run's attacks, in the order of its config.
        defense: its label, ``none`` for the undefended model.
        stage: of the defense: ``none``, or its stages joined by +.
        attack: its name.
        threat_model: finetuning_service or open_weight.
        harmful: whether the attack tries to break the model: benign fine-tuning does not, unless it is an attack's control.
        poison_ratio: harmful share of the rows of a fine-tuning attack; None here and in the next four if it is none.
        optimizer: of a fine-tuning attack, "" if it is none.
        learning_rate: of a fine-tuning attack.
        num_samples: rows of a fine-tuning attack.
        batch_size: rows a step of a fine-tuning attack.
        seed: of the attack.
        num_attack_steps: 0 is the model before the attack.
        metrics: by the name of their column; percentages are 0 to 100, nan where not measured.
        wall_seconds: what training took up to that step, scoring not counted.
        passes: forward and backward passes, over a batch each, that the attacker made up to that step; a forward pass alone
            counts a third. None in these three where a run is older than they are.
        tokens_trained: of these passes, over all processes; without padding.
        tokens_forward: that went through a forward pass alone: read, or generated.
        judge: its label.
        epoch: of ``fit``, after which the attack ran; empty at its end.
        note: what a reader must know.
        trained: what the attacker trained.
        settings: what else tells attacks apart.
        own: the columns of metrics of one's own, beside those of ``metrics.columns``.
    """

    evaluation: int = 0
    attack_index: int = 0
    defense: str
    stage: str
    attack: str
    threat_model: str
    harmful: bool = True
    poison_ratio: float | None = None
    optimizer: str = ""
    learning_rate: float | None = None
    num_samples: int | None = None
    batch_size: int | None = None
    seed: int
    num_attack_steps: int
    metrics: dict[str, float]
    wall_seconds: float
    passes: float | None = None
    tokens_trained: int | None = None
    tokens_forward: int | None = None
    judge: str
    epoch: str = ""
    note: str = ""
    trained: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    own: tuple[Column, ...] = ()

    def __getattr__(self, name: str) -> Any:
        """A metric, by the name of its column."""
        try:
            return vars(self)["metrics"][name]
        except KeyError as error:
            raise AttributeError(f"a row has no column {name}") from error

    @property
    def columns(self) -> tuple[Column, ...]:
        """Of its metrics."""
        return (*columns.COLUMNS, *self.own)

    def measured_by(self, own: tuple[Column, ...]) -> Self:
        """The row in a table with these columns of one's own, nan where it was not measured by one."""
        kept = {c.name: self.metrics[c.name] for c in columns.COLUMNS}
        return replace(self, own=own, metrics=kept | {c.name: self.metrics.get(c.name, math.nan) for c in own})

    @property
    def undefended(self) -> bool:
        """Whether the row is of plain fine-tuning."""
        return self.defense == NONE

    @property
    def label(self) -> str:
        """The defense as people read it."""
        return defense_label(self.defense)

    def how(self) -> dict[str, Any]:
        """What the attack was, by name: the columns of fine-tuning, and ``settings``."""
        return {name: value for name in FINE_TUNING if (value := getattr(self, name)) not in (None, "")} | self.settings

    def cells(self) -> dict[str, Any]:
        """By column of ``attacks.csv``."""
        cells_by_name: dict[str, Any] = {}
        for name, value in ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "own"):
            cells_by_name |= dict(value) if name == "metrics" else {name: value}
        return cells_by_name | {"settings": json.dumps(self.settings, sort_keys=True, ensure_ascii=False)}


def shared_columns(rows: Iterable[ResultRow]) -> list[Column]:
    """The columns of the metrics of rows that stand in one table."""
    return list(dict.fromkeys((*columns.COLUMNS, *(column for row in rows for column in row.own))))


LATER = ("passes", "tokens_trained", "tokens_forward", "coherent_harm")  # columns that runs of before do not have
FINE_TUNING = ("poison_ratio", "optimizer", "learning_rate", "num_samples", "batch_size")


def as_columns(settings: dict[str, Any]) -> dict[str, Any]:
    """An attack's settings as arguments of a row: what has a column of its own, and the rest as ``settings``."""
    rest = {name: value for name, value in settings.items() if name not in FINE_TUNING}
    return {name: settings[name] for name in FINE_TUNING if name in settings} | {"settings": rest}


def acts_at_a_service(stage: str) -> bool:
    """Whether a defense of these stages does something while or after a service fine-tunes."""
    return bool({"finetuning", "post_finetuning"} & set(stage.split("+")))


def defense_label(defense: str) -> str:
    """A defense as people read it."""
    return UNDEFENDED if defense == NONE else defense


def header(own: Sequence[Column] = ()) -> list[str]:
    """The columns of ``attacks.csv``, with those of metrics of one's ``own``.

    Raises:
        SettingError: two have one name.
    """
    metrics = [column.name for column in (*columns.COLUMNS, *own)]
    names = [metrics if f.name == "metrics" else [f.name] for f in fields(ResultRow) if f.name != "own"]
    flat = [name for part in names for name in part]
    if twice := next((name for name in flat if flat.count(name) > 1), None):
        raise SettingError(f"a metric must have a name that no other column of {ROWS} has, and one is {twice}. Rename it.")
    return flat


def table(rows: Iterable[ResultRow], own: Sequence[Column] = (), head: bool = True) -> str:
    """Rows as they stand in ``attacks.csv``, with its header or without; all have the columns ``own``."""
    text = io.StringIO()
    writer = csv.DictWriter(text, header(own))
    if head:
        writer.writeheader()
    writer.writerows(row.cells() for row in rows)
    return text.getvalue()


@dataclass(frozen=True)
class Run:
    """Rows of ``attacks.csv``, and the answers that each rests on; those are empty where the run kept none.

    ``own`` are the columns of the rows' metrics of one's own.
    """

    folder: Path
    rows: list[ResultRow]
    answers: list[list[Answer]]
    own: tuple[Column, ...] = ()


def write_run(run: Run, answers: bool = True) -> None:
    """Write a run's results whole, in place of what its folder holds: rows first, so that a kill leaves none without answers."""
    run.folder.mkdir(parents=True, exist_ok=True)
    if run.own or (run.folder / OWN_COLUMNS).exists():
        write_whole(run.folder / OWN_COLUMNS, json.dumps([column.described() for column in run.own], indent=1))
    write_whole(run.folder / ROWS, table(run.rows, run.own))
    if answers:
        write_whole(run.folder / ANSWERS, lines(answer for block in run.answers for answer in block), private=True)


def append_row(folder: Path, row: ResultRow, answers: list[Answer] | None) -> None:
    """Add one evaluation to a run's results: its answers first, so that no row lacks them, whenever the run is killed.

    ``answers`` None: the run keeps none.
    """
    if answers is not None:
        key = {name: getattr(row, name) for name in KEYS}
        append_whole(folder / ANSWERS, lines(key | answer for answer in answers), private=True)
    append_whole(folder / ROWS, table([row], row.own, head=False))


def read_run(folder: str | Path, may_be_empty: bool = False) -> Run:
    """Read a run's folder. What a kill cut off is left out: a line without end, answers without their row.

    Args:
        folder: of the run.
        may_be_empty: whether it is a run, too, before its first evaluation.

    Raises:
        SettingError: it holds no results, or answers that are not those of its rows.
    """
    folder = Path(folder)
    own = read_own_columns(folder)
    rows = read_rows(folder / ROWS, own)
    if not rows and not may_be_empty:
        raise SettingError(f"{folder / ROWS} must hold at least one row of results, and it holds none. {AGAIN}")
    path = folder / ANSWERS
    if not path.exists():
        return Run(folder, rows, [[] for _ in rows], own)
    answers = read_answers(path)
    missing = [row for row in rows if row.num_scored + row.num_unscored and row.evaluation not in answers]
    if missing:
        there = len(rows) - len(missing)
        raise SettingError(f"{path} must hold the answers of every row of {ROWS}, and it has {there} of {len(rows)}. {AGAIN}")
    for row in rows:
        kept = answers.get(row.evaluation, [])
        if any(answer[name] != getattr(row, name) for answer in kept for name in KEYS):
            raise SettingError(
                f"{path} must hold the answers of {ROWS}'s rows, and those of evaluation {row.evaluation} are of another. {AGAIN}"
            )
        if not _summed_up(row, kept):
            raise SettingError(
                f"{folder / ROWS} must hold the mean score of the answers in {path.name}, and its row of "
                f"{row.attack}, {row.defense}, seed {row.seed}, step {row.num_attack_steps} does not: one of the two was changed."
            )
    return Run(folder, rows, [answers.get(row.evaluation, []) for row in rows], own)


def read_own_columns(folder: Path) -> tuple[Column, ...]:
    """The columns of the metrics of one's own that a run has, as it described them.

    Raises:
        SettingError: its file describes none.
    """
    path = folder / OWN_COLUMNS
    if not path.exists():
        return ()
    try:
        return tuple(map(Column.read, json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise SettingError(f"{path} must describe the columns of a run's metrics, and it does not. {AGAIN}") from error


def read_rows(path: Path, own: tuple[Column, ...]) -> list[ResultRow]:
    """The rows of an ``attacks.csv``, whose metrics of one's own have the columns ``own``.

    Raises:
        SettingError: it is no such file.
    """
    if (path.parent / "config.yaml").exists() and not path.exists():
        raise SettingError(
            f"a run must have results to be read, and {path.parent} has none yet. Wait for its end, or go on with it."
        )
    if not path.exists():
        raise SettingError(f"a run must be a folder with an {ROWS}, and {path} is not there. Name runs/EXPERIMENT/VERSION.")
    try:
        reader = csv.DictReader(io.StringIO(whole_lines(path).decode(), newline=""))
        names = reader.fieldnames or ()
        numbered = [(reader.line_num, line) for line in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise SettingError(f"{path} must be CSV in UTF-8, and it is not ({error}). {AGAIN}") from error
    for name in header(own):
        if name not in names and name not in LATER:
            raise SettingError(
                f"{path} must have the column {name}, and it does not: another version of casehard wrote it. {AGAIN}"
            )
    rows = [_row(line, f"{path}, line {number}", own) for number, line in numbered]
    if len({row.evaluation for row in rows}) < len(rows):
        raise SettingError(f"{path} must give every evaluation a number of its own, and it does not. {AGAIN}")
    return rows


def _row(line: dict[str | None, Any], where: str, own: tuple[Column, ...]) -> ResultRow:
    if None in line or None in line.values():  # where csv puts what is too much, and too little
        raise SettingError(f"{where} must have a value a column, and it has not. {AGAIN}")
    kinds: dict[str, Any] = {f.name: f.type for f in fields(ResultRow) if f.name not in ("metrics", "own")}
    kinds |= {column.name: column.kind for column in (*columns.COLUMNS, *own)}
    values: dict[str, Any] = {}
    for name, kind in kinds.items():
        what, read = CELLS[kind]
        try:
            values[name] = read(line.get(name, "nan" if kind is float else "") if name in LATER else line[name])
        except (ValueError, KeyError, RecursionError) as error:
            raise SettingError(f"{where} must have {what} as its {name}, got {line[name]!r:.40}. {AGAIN}") from error
    return ResultRow(metrics={c.name: values.pop(c.name) for c in (*columns.COLUMNS, *own)}, own=own, **values)


CELLS: dict[Any, tuple[str, Callable[[str], Any]]] = {  # by a column's type, what its cells hold and how they are read
    str: ("one line of letters that can be seen", seen),
    int: ("a number", int),
    float: ("a number", float),
    int | None: ("a number", lambda text: int(text) if text else None),
    float | None: ("a number", lambda text: float(text) if text else None),
    bool: ("True or False", lambda text: {"True": True, "False": False}[text]),
    dict[str, Any]: ("JSON", json.loads),
}


def _summed_up(row: ResultRow, answers: list[Answer]) -> bool:
    """Whether a row says of its answers to harmful prompts what they add up to."""
    metrics = summarise([answer for answer in answers if answer["kind"] == "harmful"])
    same = math.isclose(metrics["harmful_score"], row.harmful_score, abs_tol=0.01) or math.isnan(metrics["harmful_score"])
    return same and metrics["num_scored"] == row.num_scored
