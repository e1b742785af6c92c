"""What ``fit`` delivered, as tables have it: the model before training and the one that was left, before any attack."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from casehard.evidence.tables import number
from casehard.metrics.columns import Column
from casehard.records.delivered import STATES, read_delivered
from casehard.records.published import home, run_name


def delivered_rows(folders: Iterable[Path]) -> tuple[list[str], list[dict[str, Any]]]:
    """Of the runs that scored what they delivered, the columns and two rows a run: where it is, which model, and the values."""
    runs = list(dict.fromkeys(map(home, folders)))
    found = [(folder, delivered) for folder in runs if (delivered := read_delivered(folder))]
    metrics: dict[str, Column] = {column.label: column for _, one in found for column in one.metrics if column.brief}
    rows = [
        {
            "folder": folder,
            "run": run_name(folder),
            "state": state,
            "dull": delivered.gibberish(state),
            "values": [number(delivered.of(state, column), column) for column in metrics.values()],
            "prompts": delivered.num_prompts.get("harmful", 0),
            "judge": delivered.judge,
            "notes": delivered.notes,
        }
        for folder, delivered in found
        for state in STATES
    ]
    return list(metrics), rows
