"""Result rows for a notebook: a data frame, and a table that is shown by itself."""

import html
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from casehard.metrics.columns import Answer
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


def as_html(rows: Sequence[ResultRow], title: str) -> str:
    """The table that a notebook shows: what the terminal's has, a line an evaluation."""
    from pandas import DataFrame

    brief = [column for column in shared_columns(rows) if column.label and column.brief]
    heads = {"attack": "attack", "threat_model": "threat model", "label": "defense", "seed": "seed", "num_attack_steps": "step"}
    lines = [
        {head: getattr(row, name) for name, head in heads.items()}
        | {c.label.lower(): c.shown(row.metrics.get(c.name, math.nan)) for c in brief}
        for row in rows
    ]
    table = DataFrame(lines).to_html(index=False, escape=True) if rows else "<p>No attack was run.</p>"
    return f"<p>{html.escape(title)}</p>\n{table}"
