"""Result rows as a table for people, in a terminal."""

import math
from itertools import zip_longest

from rich.console import Console
from rich.table import Table
from rich.text import Text

from casehard.metrics import columns
from casehard.metrics.refusal_phrases import error_rates
from casehard.records.delivered import STATES, Delivered
from casehard.records.outcome import jobs, steps_to_break
from casehard.records.rows import ResultRow


def terminal() -> Console:
    """Where tables and paths are printed, letter by letter: a name with ``[bold]`` or ``:smile:`` in it is no markup."""
    return Console(width=None if Console().is_terminal else 130, markup=False, emoji=False)


def results_table(rows: list[ResultRow]) -> Table:
    """The rows, each attack headed by the step at which it broke the model."""
    table = Table(title="Results (percent; harmful score: lower is safer)")
    brief = _brief()
    for name in ("attack", "defense"):
        table.add_column(name)
    for name in ("step", *(column.label.lower() for column in brief)):
        table.add_column(name, justify="right")
    notes = sorted({row.note for row in rows if row.note})
    for members in jobs(rows).values():
        heads, sides = _heads(members[0]), _sides(members)
        for row, head, side in zip_longest(members, heads, sides):
            cells = [] if row is None else [str(row.num_attack_steps), *(f"{row.metrics[c.name]:.1f}" for c in brief)]
            if row is not None and row.note:
                cells[1] += "*" * (notes.index(row.note) + 1)
            table.add_row(*(Text(cell) for cell in (head or "", side or "", *cells)))
        table.add_section()
    rates = filter(None, map(error_rates, sorted({row.judge for row in rows})))
    lines = [*(f"{'*' * i} {note}" for i, note in enumerate(notes, start=1)), *rates]
    table.caption = Text("\n".join(lines)) if lines else None
    return table


def delivered_table(found: Delivered) -> Table:
    """The model before and after ``fit``, and on how many prompts."""
    table = Table(title="Before and after fit (percent; harmful score: lower is safer)")
    table.add_column("")
    for column in _brief():
        table.add_column(column.label.lower(), justify="right")
    for state in STATES:
        values = [getattr(found, state).get(column.name, math.nan) for column in _brief()]
        table.add_row(state, *("not measured" if math.isnan(value) else f"{value:.1f}" for value in values))
    prompts = "{harmful} harmful, {benign} benign and {task} task prompts".format(**found.num_prompts)
    table.caption = Text("\n".join(filter(None, [f"{prompts}; judge: {found.judge}", *found.notes, error_rates(found.judge)])))
    return table


def _brief() -> list[columns.Column]:
    return [column for column in columns.COLUMNS if column.label and column.brief]


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
    taken = [f"({int(number) * row.batch_size:,} rows)"] if number.isdigit() and row.batch_size is not None else []
    return [row.label, f"to break: {steps}", *taken]
