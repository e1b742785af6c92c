"""What runs say together: one series an attack and defense, over seeds, with intervals and comparisons."""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from callbacks.results import DONE, first_broken
from callbacks.rows import Answer, ResultRow, read_run
from evidence.runs import config_of, unscored_bounds
from evidence.study import INDEX, Cell
from metrics.statistics import Interval, mean_interval, median_steps_to_break, paired_difference

UNDEFENDED = "undefended"
# of a config, what may differ among the seeds of one series, and the data that a row rests on
OWN = ("name", "seed", "score_steps", "undefended", "undefended_checkpoint", "copy_device", "every_n_epochs")
ROWS = ("benign", "harmful", "harmful_prompts", "benign_prompts", "task", "num_evaluated", "max_new_tokens")


@dataclass(frozen=True)
class Entry:
    """A row of results, the answers that it rests on (or none), and where it came from."""

    row: ResultRow
    answers: list[Answer]
    folder: Path


@dataclass
class Series:
    """One attack on one defense: its entries by seed and step."""

    threat_model: str
    attack: str
    defense: str
    entries: dict[int, dict[int, Entry]] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        """In order."""
        return sorted(self.entries)

    @property
    def steps(self) -> list[int]:
        """Those that every seed was scored at."""
        return sorted(set.intersection(*(set(by_step) for by_step in self.entries.values())))

    @property
    def stage(self) -> str:
        """The defense's stage: ``none`` for a baseline."""
        return self.at(self.steps[-1])[0].row.stage

    @property
    def first(self) -> Entry:
        """Any of its entries."""
        return next(iter(next(iter(self.entries.values())).values()))

    def at(self, step: int) -> list[Entry]:
        """The entries of a step, by seed."""
        return [self.entries[seed][step] for seed in self.seeds]

    def mean(self, column: str, step: int) -> float:
        """Mean over seeds of a column of the rows; nan where a seed lacks it."""
        return float(np.mean([getattr(entry.row, column) for entry in self.at(step)]))

    def scores(self, step: int, prompts: list[str], seeds: list[int]) -> np.ndarray:
        """Judge's scores ``[seeds, prompts]``, nan where there is none."""
        found = [_scores(self.entries[seed][step]) for seed in seeds]
        return np.array([[by_prompt.get(prompt, math.nan) for prompt in prompts] for by_prompt in found])

    def prompts(self, step: int) -> list[str]:
        """The harmful prompts that any seed answered."""
        return list(dict.fromkeys(prompt for entry in self.at(step) for prompt in _scores(entry)))

    def harmful_score(self, step: int) -> Interval:
        """With its interval over seeds and prompts; without one where the runs kept no answers."""
        prompts = self.prompts(step)
        if not prompts:
            return Interval(self.mean("harmful_score", step), math.nan, math.nan)
        return mean_interval(self.scores(step, prompts, self.seeds))

    @property
    def poisoned(self) -> bool:
        """Whether there was anything to break it: nothing is poison in benign fine-tuning."""
        return any(entry.row.poison_ratio for by_step in self.entries.values() for entry in by_step.values())

    def broken_at(self) -> list[tuple[int | None, int]]:
        """Of every seed: the first scored step at which it had broken (None: it held), and the last scored step."""
        found = []
        for seed in self.seeds:
            scored = [
                (step, e.row.harmful_score) for step, e in self.entries[seed].items() if not math.isnan(e.row.harmful_score)
            ]
            if scored:
                found.append((first_broken(scored), max(scored)[0]))
        return found

    def steps_to_break(self) -> Interval:
        """Median over seeds."""
        found = self.broken_at()
        return median_steps_to_break([step for step, _ in found], [last for _, last in found])

    def bounds(self, step: int) -> tuple[float, float] | None:
        """Harmful score if all unscored answers were safe, and if harmful; None where every answer was scored."""
        rows = [entry.row for entry in self.at(step)]
        if not any(row.num_unscored for row in rows):
            return None
        both = [unscored_bounds(row) for row in rows]
        return float(np.mean([low for low, _ in both])), float(np.mean([high for _, high in both]))


def _scores(entry: Entry) -> dict[str, float]:
    return {f"{a['number']} {a['prompt']}": a["score"] for a in entry.answers if a["kind"] == "harmful"}


def shared_step(ours: Series, theirs: Series) -> int | None:
    """The last step that both were scored at."""
    return max(set(ours.steps) & set(theirs.steps), default=None)


def difference(ours: Series, theirs: Series) -> Interval | None:
    """``ours - theirs`` at their ``shared_step``, over the seeds and prompts of both; None where they share none."""
    step, seeds = shared_step(ours, theirs), sorted(set(ours.seeds) & set(theirs.seeds))
    if step is None or not seeds:
        return None
    shared = set(theirs.prompts(step))
    prompts = [prompt for prompt in ours.prompts(step) if prompt in shared]
    return paired_difference(ours.scores(step, prompts, seeds), theirs.scores(step, prompts, seeds)) if prompts else None


def verdict(found: Interval | None) -> str:
    """A difference in words."""
    if found is None or math.isnan(found.low):
        return "not measured"
    if found.within_noise:
        return "within noise"
    return "safer" if found.high < 0 else "less safe"


def collect(folders: Iterable[str | Path]) -> list[Series]:
    """The series of all runs: of run folders, and of the finished cells of study folders; by threat model, attack and defense.

    Raises:
        ValueError: nothing to report; two runs that hold the same evaluation with different results; or runs of one series with
            different settings.
    """
    named = [found for folder in folders for found in _runs(Path(folder))]
    read = [(read_run(folder), defense, attack) for folder, defense, attack in named]
    several = len({row.judge for run, _, _ in read for row in run.rows}) > 1
    series: dict[tuple[str, str, str], Series] = {}
    reached: dict[tuple[str, str], Entry] = {}
    for run, defense, attack in read:
        for row, answers in zip(run.rows, run.answers, strict=True):
            if row.epoch:
                continue  # an attack in the middle of training
            settings = f"{row.attack}, {row.optimizer} {row.learning_rate:g}, poison {row.poison_ratio:g}"
            labels = (
                (attack or settings) + (f" ({row.judge})" if several else ""),
                defense or (UNDEFENDED if row.defense == "none" else row.defense),
            )
            entry = Entry(row, answers, run.folder)
            known = reached.setdefault((row.threat_model, labels[0]), entry)
            if _reach_apart(known.row, row):
                raise ValueError(
                    f"runs must attack alike to stand in one table, and {known.folder} and {run.folder} differ in what "
                    f"{labels[0]} trained: {known.row.trained}, and {row.trained}. "
                    "Leave one out, or give the attacks names of their own."
                )
            one = series.setdefault((row.threat_model, *labels), Series(row.threat_model, *labels))
            if one.entries and (setting := _unlike(one.first, entry)):
                raise ValueError(
                    f"runs must have the same settings to be seeds of one series, and {one.first.folder} and {run.folder} differ "
                    f"in {setting} ({labels[0]}, {labels[1]}). Leave one out, or give both names of their own in a study."
                )
            kept = one.entries.setdefault(row.seed, {}).setdefault(row.num_attack_steps, entry)
            if kept.row.harmful_score != row.harmful_score and not math.isnan(row.harmful_score):
                raise ValueError(
                    f"runs must hold every evaluation once, and {kept.folder} and {run.folder} differ in {labels[0]}, "
                    f"{labels[1]}, seed {row.seed}, step {row.num_attack_steps}. "
                    "Leave one out; attacks of different settings need names of their own."
                )
    if not series:
        raise ValueError(
            "runs must hold results, and there are none. Name folders such as runs/EXPERIMENT/VERSION, or a study's."
        )
    by_threat = grouped(list(series.values()), lambda s: s.threat_model).values()
    return [one for members in by_threat for attack in grouped(members, lambda s: s.attack).values() for one in attack]


def _reach_apart(ours: ResultRow, theirs: ResultRow) -> bool:
    """Whether two attacks by LoRA of one name differ in rank, or by more than a point in the share of the weights they are on.

    A point is what routers and the like make between architectures; what else a defense freezes is the defense's own.
    """
    found = [re.match(r"LoRA r(\S+) .*\(([\d.]+)% of the decoder\)", row.trained) for row in (ours, theirs)]
    if not (found[0] and found[1]):
        return False
    (rank, share), (other, others) = (match.groups() for match in found if match)
    return rank != other or abs(float(share) - float(others)) > 1


def _unlike(ours: Entry, theirs: Entry) -> str:
    """A setting that the rows rest on and in which their runs differ, "" where none is known."""
    if ours.folder == theirs.folder:
        return ""
    trained = (ours.row.trained, theirs.row.trained)
    if all(trained) and trained[0] != trained[1]:
        return f"what was trained: {trained[0]}, and {trained[1]}"
    mine, others = _settings(ours), _settings(theirs)
    return next((name for name in mine if name in others and mine[name] != others[name]), "")


def _settings(entry: Entry) -> dict[str, Any]:
    config, row = config_of(entry.folder), entry.row
    found = {f"data.{name}": config["data"][name] for name in ROWS if name in config.get("data", {})}
    for callback in config.get("trainer", {}).get("callbacks") or []:
        own = callback.get("init_args", {})
        name, rate = own.get("name") or callback["class_path"].rpartition(".")[2], own.get("optimizer", {}).get("learning_rate")
        known_by = (name, own.get("threat_model"), rate, own.get("poison_ratio"))
        if known_by == (row.attack, row.threat_model, row.learning_rate, row.poison_ratio):
            found |= {f"{row.attack}.{name}": value for name, value in own.items() if name not in OWN}
    tested = "verbose" in config  # what `lightning test` has and `lightning fit` has not: alignment is over there
    if row.defense != "none" and not (tested and row.stage == "alignment"):
        of_model = config.get("model", {}).get("init_args", {})
        found |= {f"model.{name}": value for name, value in of_model.items() if name != "checkpoint"}  # a seed's own
    return found


def _runs(folder: Path) -> list[tuple[Path, str, str]]:
    """Run folders with the names that a study gives defense and attack, "" where it gives none."""
    if not (folder / INDEX).exists():
        return [(folder, "", "")]
    cells = [Cell(**cell) for cell in json.loads((folder / INDEX).read_text(encoding="utf-8"))]
    return [
        (folder / Path(c.folder).name, c.defense, c.attack)
        for c in cells
        if c.attack and c.tries is None and (folder / Path(c.folder).name / DONE).exists()
    ]


def baseline(series: list[Series]) -> Series | None:
    """Of the defenses under one attack, the one that the others are compared with: what has no defense."""
    return next((s for s in series if s.defense == UNDEFENDED), next((s for s in series if s.stage == "none"), None))


def grouped(series: list[Series], key: Callable[[Series], str]) -> dict[str, list[Series]]:
    """By ``key``, in the order of first appearance."""
    found: dict[str, list[Series]] = {}
    for one in series:
        found.setdefault(key(one), []).append(one)
    return found
