"""Result rows for a notebook: a data frame, and a table that is shown by itself."""

import html
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from casehard.metrics.columns import COLUMNS, Answer
from casehard.records.delivered import STATES, Delivered
from casehard.records.rows import ResultRow, header, shared_columns

if TYPE_CHECKING:
    from pandas import DataFrame


def frame(rows: Sequence[ResultRow], beside: Sequence[dict[str, Any]] = ()) -> "DataFrame":
    """A line an evaluation, with the columns of ``attacks.csv``; metrics that a row does not have are nan.

    Args:
        rows: in their order.
        beside: what stands in front of each, by column.
    """
    from pandas import DataFrame  # which most commands do without

    own = tuple(column for column in shared_columns(rows) if column.class_path)
    cells = [row.measured_by(own).cells() for row in rows]
    return DataFrame(
        [more | line for more, line in zip(beside or [{}] * len(rows), cells, strict=True)], columns=None if rows else header()
    )


def answers_frame(answers: Iterable[Answer]) -> "DataFrame":
    """A line an answer."""
    from pandas import DataFrame

    return DataFrame(list(answers))


def as_html(rows: Sequence[ResultRow], title: str, delivered: Delivered | None = None) -> str:
    """The tables that a notebook shows: what the terminal's have, a line an evaluation; first what ``fit`` delivered."""
    from pandas import DataFrame

    brief = [column for column in shared_columns(rows) if column.label and column.brief]
    heads = {"attack": "attack", "threat_model": "threat model", "label": "defense", "seed": "seed", "num_attack_steps": "step"}
    lines = [
        {head: getattr(row, name) for name, head in heads.items()}
        | {c.label.lower(): c.shown(row.metrics.get(c.name, math.nan)) for c in brief}
        for row in rows
    ]
    tables = [DataFrame(lines).to_html(index=False, escape=True) if rows else "<p>No attack was run.</p>"]
    if delivered is not None:
        shown = [column for column in (*COLUMNS, *delivered.own) if column.label and column.brief]
        states = {state: getattr(delivered, state) for state in STATES}
        both = [
            {"model": state} | {c.label.lower(): c.shown(values.get(c.name, math.nan)) for c in shown}
            for state, values in states.items()
        ]
        tables.insert(0, DataFrame(both).to_html(index=False, escape=True))
    return "\n".join([f"<p>{html.escape(title)}</p>", *tables])
