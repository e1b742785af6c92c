"""``search.csv``: a line for every trial of a search."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from casehard.metrics.errors import SettingError
from casehard.records.answers import AGAIN
from casehard.records.files import write_whole

TRIALS = "search.csv"
STATES = ("complete", "pruned", "failed")


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """A trial of a search.

    Args:
        attack_index: which of the run's attacks, in the order of its config.
        attack: the search's name.
        threat_model: finetuning_service or open_weight.
        defense: its label, ``none`` for the undefended model.
        seed: of the attack, and of the sampler.
        epoch: of ``fit``, after which the attack ran; empty at its end.
        number: of the trial, from 0.
        state: complete; pruned, ended before its last step; failed: diverged, not possible, or without a verdict.
        within_bounds: whether a complete trial kept all bounds.
        chosen: whether the attack took its settings.
        step: at which it was last scored; None where it never was.
        settings: what was tried.
        coherent_harm: on the validation prompts at that step, nan where it was not measured.
        test_coherent_harm: on the test prompts, by which nothing is chosen; nan but where the trial is within bounds.
        metrics: all on the validation prompts, and ``kl`` where it is bounded.
        reason: why it failed, where something was raised.
    """

    attack_index: int
    attack: str
    threat_model: str
    defense: str
    seed: int
    epoch: str
    number: int
    state: str
    within_bounds: bool
    chosen: bool
    step: int | None
    settings: dict[str, Any]
    coherent_harm: float
    test_coherent_harm: float
    metrics: dict[str, float]
    reason: str = ""

    @property
    def search(self) -> tuple[int, str, int, str]:
        """Which search of its run it belongs to."""
        return self.attack_index, self.defense, self.seed, self.epoch


def write_trials(folder: Path, rows: Sequence[TrialRow]) -> None:
    """Write the trials of one search beside those of the run's others, in place of what stood there of the same one."""
    searches = {row.search for row in rows}
    others = [row for row in read_trials(folder) if row.search not in searches]
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(TrialRow)])
    writer.writeheader()
    for row in [*others, *rows]:
        writer.writerow(asdict(row) | {name: json.dumps(getattr(row, name)) for name in ("settings", "metrics")})
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / TRIALS, text.getvalue())


def read_trials(folder: Path) -> list[TrialRow]:
    """The trials of all searches of a run; none where it searched nothing.

    Raises:
        SettingError: no run wrote the file.
    """
    path = folder / TRIALS
    if not path.exists():
        return []
    try:
        return [_row(line) for line in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))]
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error, RecursionError) as error:
        raise SettingError(f"{path} must be what a search wrote, and it is not. {AGAIN}") from error


def _row(line: dict[str, str]) -> TrialRow:
    told = {"True": True, "False": False}
    if line["state"] not in STATES:
        raise ValueError(line["state"])
    return TrialRow(
        attack_index=int(line["attack_index"]),
        attack=line["attack"],
        threat_model=line["threat_model"],
        defense=line["defense"],
        seed=int(line["seed"]),
        epoch=line["epoch"],
        number=int(line["number"]),
        state=line["state"],
        within_bounds=told[line["within_bounds"]],
        chosen=told[line["chosen"]],
        step=int(line["step"]) if line["step"] else None,
        settings=dict(json.loads(line["settings"])),
        coherent_harm=float(line["coherent_harm"]),
        test_coherent_harm=float(line["test_coherent_harm"]),
        metrics={str(name): float(value) for name, value in json.loads(line["metrics"]).items()},
        reason=line.get("reason") or "",  # files of before have none
    )


def in_words(settings: dict[str, Any]) -> str:
    """Settings in one line."""
    return ", ".join(f"{n} {value:.3g}" if isinstance(value, float) else f"{n} {value}" for n, value in settings.items())
