"""Result rows as a table for people, in a terminal."""

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from casehard.metrics.columns import Column
from casehard.metrics.refusal_phrases import error_rates
from casehard.records.answers import ANSWERS
from casehard.records.delivered import DELIVERED_ANSWERS, STATES, Delivered
from casehard.records.outcome import GIBBERISH, gibberish_from, is_gibberish, jobs, steps_to_break
from casehard.records.rows import ResultRow, shared_columns

TITLE = "Results (percent; harmful score: lower is safer)"

FEW = 50  # prompts of a kind: of fewer an answer is more than two points
DOUBT = f"? at least {GIBBERISH:g}% of the answers are gibberish: a low score is no safety"


def terminal() -> Console:
    """Where tables and paths are printed, letter by letter: a name with ``[bold]`` or ``:smile:`` in it is no markup."""
    return Console(width=None if Console().is_terminal else 130, markup=False, emoji=False)


@dataclass(frozen=True)
class ResultsTable:
    """The rows, each attack headed by the step at which it broke the model.

    What an attack was stands beside its rows; where that is wider than the terminal, above them.
    """

    rows: list[ResultRow]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One table, or one under each heading."""
        wide = self._beside()
        if console.measure(wide, options=options.update(max_width=10_000)).maximum <= options.max_width:
            yield wide
        else:
            yield from self._above()

    def _beside(self) -> Table:
        table = Table(title=TITLE)
        for name in ("attack", "defense"):
            table.add_column(name)
        self._add_columns(table)
        for members in jobs(self.rows).values():
            for head, side, cells in zip_longest(_heads(members[0]), _sides(members), self._cells(members)):
                table.add_row(*(Text(cell) for cell in (head or "", side or "", *(cells or []))))
            table.add_section()
        table.caption = Text(self._caption()) if self._caption() else None
        return table

    def _above(self) -> Iterator[Text | Table]:
        yield Text(f"{TITLE}\n", style="italic")
        for members in jobs(self.rows).values():
            yield Text(f"{', '.join(_heads(members[0]))}\n{', '.join(_sides(members)).replace(', (', ' (')}", style="bold")
            table = Table(box=box.SIMPLE_HEAD)
            self._add_columns(table)
            for cells in self._cells(members):
                table.add_row(*map(Text, cells))
            yield table
        if self._caption():
            yield Text(self._caption())

    def _brief(self) -> list[Column]:
        return [column for column in shared_columns(self.rows) if column.label and column.brief]

    def _add_columns(self, table: Table) -> None:
        for name in ("step", *(column.label.lower() for column in self._brief())):
            table.add_column(name, justify="right")

    def _notes(self) -> list[str]:
        return sorted({row.note for row in self.rows if row.note})

    def _cells(self, rows: list[ResultRow]) -> Iterator[list[str]]:
        for row in rows:
            mark = ("*" * (self._notes().index(row.note) + 1) if row.note else "") + ("?" if _doubted(row) else "")
            score, *others = (column.shown(row.metrics.get(column.name, math.nan)) for column in self._brief())
            yield [str(row.num_attack_steps), score + mark, *others]

    def _caption(self) -> str:
        rates = filter(None, map(error_rates, sorted({row.judge for row in self.rows})))
        doubts = [DOUBT] if any(map(_doubted, self.rows)) else []
        values = (row.metrics.get(column.name, math.nan) for row in self.rows for column in self._brief())
        unknown = ["- not measured"] if any(map(math.isnan, values)) else []
        return "\n".join([*(f"{'*' * i} {note}" for i, note in enumerate(self._notes(), start=1)), *unknown, *doubts, *rates])


def results_table(rows: list[ResultRow]) -> ResultsTable:
    """The rows, for rich to print."""
    return ResultsTable(rows)


def delivered_table(found: Delivered) -> Table:
    """The model before and after ``fit``, a metric a line, and on how many prompts."""
    table = Table(title="Before and after fit (percent; harmful score: lower is safer)", min_width=76)  # of its caption, too
    table.add_column("")
    for state in STATES:
        table.add_column(state, justify="right")
    for column in (column for column in found.metrics if column.brief):
        values = [found.of(state, column) for state in STATES]
        cells = ["not measured" if math.isnan(value) else column.shown(value) for value in values]
        if column.name == "harmful_score":
            doubted = [found.gibberish(state) and not math.isnan(value) for state, value in zip(STATES, values, strict=True)]
            cells = [cell + "?" * doubt for cell, doubt in zip(cells, doubted, strict=True)]
        table.add_row(Text(column.label.lower()), *cells)
    table.caption = Text("\n".join(filter(None, _said_of(found))))
    return table


def _said_of(found: Delivered) -> list[str]:
    """What a reader of the scores must know, a line each."""
    prompts = "{harmful} harmful, {benign} benign and {task} task prompts".format(**found.num_prompts)
    few = [f"{100 / number:.3g} points ({kind})" for kind, number in found.num_prompts.items() if 0 < number < FEW]
    judged = found.num_prompts["harmful"] + found.num_prompts["benign"]
    dull = " and ".join(filter(found.gibberish, STATES))
    return [
        f"{prompts}; judge: {found.judge}",
        f"one answer is {', '.join(few)}" if few else "",
        "degenerate: of the answers to harmful and benign prompts" if judged else "",
        f"{dull}: the model answers in gibberish, so nothing can be said of its safety" if dull else "",
        *found.notes,
        error_rates(found.judge),
    ]


def to_read(folder: Path) -> str:
    """The command that shows the answers that a run kept; "" where it kept none."""
    kept = (folder / name for name in (ANSWERS, DELIVERED_ANSWERS))
    there = any(path.exists() and path.stat().st_size for path in kept)
    return f"To read the answers: casehard answers {shlex.quote(str(folder))}" if there else ""


def _doubted(row: ResultRow) -> bool:
    """Whether it has a harmful score that is no sign of safety if it is low."""
    return is_gibberish(row) and not math.isnan(row.harmful_score)


def _heads(row: ResultRow) -> list[str]:
    """What an attack was."""
    trained_by = "" if row.learning_rate is None else f"{row.optimizer} {row.learning_rate:g}"
    poison = "" if row.poison_ratio is None else f"poison {row.poison_ratio:g}"
    seed = f"seed {row.seed}" + (f", epoch {row.epoch}" if row.epoch else "")
    return [text for text in (row.attack, row.threat_model, ", ".join(filter(None, (trained_by, poison))), seed) if text]


def _sides(rows: list[ResultRow]) -> list[str]:
    """The defense; of a harmful attack also steps to break, and the rows that these steps take."""
    row = rows[0]
    if not row.harmful:
        return [row.label]
    steps = steps_to_break(rows)
    number = steps.removeprefix("> ")
    taken = [f"({int(number) * row.batch_size:,} rows seen)"] if number.isdigit() and row.batch_size is not None else []
    since = gibberish_from(rows)
    return [row.label, f"to break: {steps}", *taken, *([] if since is None else [f"gibberish from {since}"])]
