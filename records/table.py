"""Result rows as a table for people, in a terminal."""

from itertools import zip_longest

from rich.console import Console
from rich.table import Table
from rich.text import Text

from casehard.metrics import columns
from casehard.metrics.refusal_phrases import error_rates
from casehard.records.outcome import GIBBERISH, gibberish_from, is_gibberish, jobs, steps_to_break
from casehard.records.rows import ResultRow

DOUBT = f"? at least {GIBBERISH:g}% of the answers are gibberish: a low score is no safety"


def terminal() -> Console:
    """Where tables and paths are printed, letter by letter: a name with ``[bold]`` or ``:smile:`` in it is no markup."""
    return Console(width=None if Console().is_terminal else 130, markup=False, emoji=False)


def results_table(rows: list[ResultRow]) -> Table:
    """The rows, each attack headed by the step at which it broke the model."""
    table = Table(title="Results (percent; harmful score: lower is safer)")
    brief = [column for column in columns.COLUMNS if column.label and column.brief]
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
            if row is not None and is_gibberish(row):
                cells[1] += "?"
            table.add_row(*(Text(cell) for cell in (head or "", side or "", *cells)))
        table.add_section()
    rates = filter(None, map(error_rates, sorted({row.judge for row in rows})))
    doubts = [DOUBT] if any(map(is_gibberish, rows)) else []
    lines = [*(f"{'*' * i} {note}" for i, note in enumerate(notes, start=1)), *doubts, *rates]
    table.caption = Text("\n".join(lines)) if lines else None
    return table


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
    since = gibberish_from(rows)
    return [row.label, f"to break: {steps}", *taken, *([] if since is None else [f"gibberish from {since}"])]
