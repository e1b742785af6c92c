"""What runs say together: one series an attack and defense, over seeds, with intervals and comparisons."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from casehard.evidence.study_plan import INDEX, Cell, read_cells
from casehard.metrics.errors import SettingError
from casehard.metrics.statistics import Interval, Ratio, mean_interval, median_steps_to_break, paired_difference, paired_ratio
from casehard.records.answers import Answer
from casehard.records.delivered import DELIVERED
from casehard.records.marker import OWN as CODE
from casehard.records.marker import SCORED, TRAINER, Marker, changed_results, read_marker
from casehard.records.outcome import GIBBERISH, gibberish_from, held, unscored_bounds
from casehard.records.published import JUDGED, config_of, home, part, public, run_name
from casehard.records.rows import NONE, ROWS, UNDEFENDED, ResultRow, acts_at_a_service, read_own_columns, read_rows, read_run

# of the data, what every row rests on, and what none does
ROLES = ("benign", "harmful", *SCORED)
DATA = (*(f"sources.{role}" for role in ROLES), "evaluation.num_evaluated", "evaluation.max_new_tokens", "batching.max_length")
NO_DATA = ("seed", "judge", "evaluation.metrics", "evaluation.generation_batch_size", "allow_overlap")
OWN_JUDGES = ("casehard.",)  # whose labels tell their settings


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
    named: bool = False  # by a study
    entries: dict[int, dict[int, Entry]] = field(default_factory=dict)
    control: "Series | None" = None  # of the same defense, the attack without tampering that scores highest

    @property
    def seeds(self) -> list[int]:
        """In order."""
        return sorted(self.entries)

    @property
    def steps(self) -> list[int]:
        """Those that every seed was scored at."""
        return sorted(set.intersection(*(set(by_step) for by_step in self.entries.values())))

    @property
    def tampers(self) -> bool:
        """Whether the attack changes anything, or only asks in another way and so is of step 0 alone."""
        return any(row.num_attack_steps for row in self.rows)

    @property
    def stage(self) -> str:
        """The defense's stage: ``none`` for a baseline."""
        return self.at(self.steps[-1])[0].row.stage

    @property
    def rows(self) -> list[ResultRow]:
        """Of all its entries."""
        return [entry.row for by_step in self.entries.values() for entry in by_step.values()]

    @property
    def first(self) -> Entry:
        """Any of its entries."""
        return next(iter(next(iter(self.entries.values())).values()))

    def at(self, step: int) -> list[Entry]:
        """The entries of a step, by seed."""
        return [self.entries[seed][step] for seed in self.seeds]

    def mean(self, column: str, step: int) -> float:
        """Mean over seeds of a column of the rows; nan where a seed lacks it."""
        return float(np.mean([getattr(entry.row, column, math.nan) for entry in self.at(step)]))

    def scores(self, step: int, prompts: list[str], seeds: list[int]) -> np.ndarray:
        """Judge's scores ``[seeds, prompts]``, nan where there is none."""
        by_seed = [_scores(self.entries[seed][step]) for seed in seeds]
        return np.array([[by_prompt.get(prompt, math.nan) for prompt in prompts] for by_prompt in by_seed])

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
    def harmful(self) -> bool:
        """Whether the attack tries to break the model: benign fine-tuning does not."""
        return any(entry.row.harmful for by_step in self.entries.values() for entry in by_step.values())

    def rows_of(self, seed: int) -> list[ResultRow]:
        """Of a seed, by step."""
        return [entry.row for _, entry in sorted(self.entries[seed].items())]

    def held(self, seed: int) -> tuple[float, float]:
        """Up to which step a seed surely held, and by which it had broken: ``records.outcome.held``."""
        return held(self.rows_of(seed))

    @property
    def scored(self) -> list[int]:
        """The seeds of which anything is known: the judge scored one of their evaluations."""
        return [seed for seed in self.seeds if any(not math.isnan(row.harmful_score) for row in self.rows_of(seed))]

    def coherent_harm(self, step: int) -> float:
        """The harmful score with every degenerate answer taken for harmless, in percent; nan where a run is older than that."""
        return self.mean("coherent_harm", step)

    def gibberish(self, step: int) -> float:
        """Share of degenerate answers at a step, in percent: the highest of any seed."""
        return max((rate for e in self.at(step) if not math.isnan(rate := e.row.degenerate_rate)), default=math.nan)

    def speaks(self, step: int) -> bool:
        """Whether a low harmful score says something at a step: no seed answers in gibberish there."""
        return not self.gibberish(step) >= GIBBERISH

    def gibberish_of(self, seed: int) -> int | None:
        """First step at which a seed answers in gibberish, None where it does not, or broke."""
        return gibberish_from(self.rows_of(seed))

    def gibberish_from(self) -> int | None:
        """First step at which a seed that never broke answers in gibberish."""
        return min((step for seed in self.seeds if (step := self.gibberish_of(seed)) is not None), default=None)

    def steps_to_break(self) -> Interval:
        """Median over seeds; one that answered in gibberish before it broke is known to have held up to there only."""
        ends = [(last, broken) for last, broken in map(self.held, self.scored) if last >= 0 or math.isfinite(broken)]
        return median_steps_to_break(
            [None if math.isinf(broken) else broken for _, broken in ends],
            [last if math.isinf(broken) else broken for last, broken in ends],
        )

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


def verdict(gap: Interval | None, ours: bool = True, theirs: bool = True) -> str:
    """A difference in words.

    Args:
        gap: of two defenses; below 0 the first is safer.
        ours: whether the first one's answers say anything (``Series.speaks``).
        theirs: the same of the second.
    """
    if gap is None or math.isnan(gap.low):
        return "not measured"
    if gap.within_noise:
        return "within noise"
    better = "safer" if gap.high < 0 else "less safe"
    return better if (ours if gap.high < 0 else theirs) else "no verdict"


def lasting(ours: Series, theirs: Series) -> tuple[Ratio, int] | None:
    """How many times as long as the other one takes to break, and over how many seeds; None where no seed of both was scored."""
    shared = sorted(set(ours.scored) & set(theirs.scored))
    return (paired_ratio([*map(ours.held, shared)], [*map(theirs.held, shared)]), len(shared)) if shared else None


def collect(folders: Iterable[str | Path]) -> list[Series]:
    """The series of all runs: of run folders, and of the finished cells of study folders; by threat model, attack and defense.

    A run that was not attacked and scored the model that it delivered has none.

    Raises:
        SettingError: nothing to report; two runs that hold the same evaluation with different results; or runs of one series with
            different settings.
    """
    paths = [Path(folder) for folder in folders]
    named = [run for path in paths for run in _runs(path)]
    read = [(read_run(folder), defense, attack) for folder, defense, attack in named]
    entries = [
        (Entry(row, answers, run.folder), defense, attack)
        for run, defense, attack in read
        for row, answers in zip(run.rows, run.answers, strict=True)
        if not row.epoch  # an attack in the middle of training
    ]
    several = len({entry.row.judge for entry, _, _ in entries}) > 1
    attacks_of: dict[
        str, dict[tuple[str, str], str]
    ] = {}  # by a study's name for them: their keys, and what they call themselves
    for entry, _, attack in entries:
        attacks_of.setdefault(attack, {})[_key(entry.row)] = entry.row.attack
    several_in = {attack for attack, own in attacks_of.items() if len(own) > 1}
    names = _names([entry.row for entry, _, attack in entries if not attack or attack in several_in])
    both = {(entry.folder, entry.row.attack_index) for entry, _, _ in entries if not entry.row.undefended}
    series: dict[tuple[str, str, str], Series] = {}
    reached: dict[tuple[str, str], Entry] = {}
    for entry, defense, attack in entries:
        row = entry.row
        called = attack or names[_key(row)]
        if attack in several_in and attack:  # told apart by their own names, and where these are alike by more
            alone = list(attacks_of[attack].values()).count(row.attack) == 1
            called += f": {row.attack if alone else names[_key(row)]}"
        beside = row.undefended and (entry.folder, row.attack_index) in both  # the baseline of a defense that has a study's name
        labels = called + (f" ({row.judge})" if several else ""), UNDEFENDED if beside else defense or row.label
        known = reached.setdefault((row.threat_model, labels[0]), entry)
        if _reach_apart(known.row, row):
            raise SettingError(
                f"runs must attack alike to stand in one table, and {known.folder} and {entry.folder} differ in what "
                f"{labels[0]} trained: {known.row.trained}, and {row.trained}. "
                "Leave one out, or give the attacks names of their own."
            )
        member = series.setdefault((row.threat_model, *labels), Series(row.threat_model, *labels, named=bool(attack)))
        if member.entries and (setting := _unlike(member.first, entry)):
            raise SettingError(
                f"runs must have the same settings to be seeds of one series, and {member.first.folder} and {entry.folder} "
                f"differ in {setting} ({labels[0]}, {labels[1]}). Leave one out, or give both names of their own in a study."
            )
        kept = member.entries.setdefault(row.seed, {}).setdefault(row.num_attack_steps, entry)
        if kept.row.harmful_score != row.harmful_score and not math.isnan(row.harmful_score):
            raise SettingError(
                f"runs must hold every evaluation once, and {kept.folder} and {entry.folder} differ in {labels[0]}, "
                f"{labels[1]}, seed {row.seed}, step {row.num_attack_steps}. "
                "Leave one out; attacks of different settings need names of their own."
            )
    for member in series.values():
        if not member.steps:
            raise SettingError(
                f"runs must share a scored step to be seeds of one series, and those of {member.attack}, {member.defense} share "
                "none. Leave one out."
            )
    if not series and not any(map(_only_delivered, paths)):
        raise SettingError(
            "runs must hold results, and there are none. Name folders such as runs/EXPERIMENT/VERSION, or a study's."
        )
    for members in grouped(list(series.values()), lambda s: s.defense).values():
        controls = [s for s in members if not s.tampers and not math.isnan(s.harmful_score(0).estimate)]
        worst = max(controls, key=lambda s: s.harmful_score(0).estimate, default=None)
        for member in members:
            member.control = worst
    by_threat = grouped(list(series.values()), lambda s: s.threat_model).values()
    return [member for members in by_threat for attack in grouped(members, lambda s: s.attack).values() for member in attack]


def _key(row: ResultRow) -> tuple[str, str]:
    """What makes an attack another one where no study names it: how it is called, and the settings that have no column."""
    return f"{row.threat_model} {_told_by(row)}", json.dumps(row.settings, sort_keys=True)


def _told_by(row: ResultRow) -> str:
    by = None if row.learning_rate is None else f"{row.optimizer} {row.learning_rate:g}"
    poison = None if row.poison_ratio is None else f"poison {row.poison_ratio:g}"
    return ", ".join(filter(None, (row.attack, by, poison)))


def _names(rows: list[ResultRow]) -> dict[tuple[str, str], str]:
    """Names of attacks by their ``_key``; those that would be called alike also bear the settings in which they differ."""
    alike: dict[tuple[str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault((row.threat_model, _told_by(row)), {})[_key(row)] = _flat(public(row.settings))
    names: dict[tuple[str, str], str] = {}
    for (_, name), attacks in alike.items():
        settings = dict.fromkeys(setting for attack in attacks.values() for setting in attack)
        apart = [setting for setting in settings if len({str(attack.get(setting)) for attack in attacks.values()}) > 1]
        for key, attack in attacks.items():
            names[key] = ", ".join([name, *(f"{setting} {attack[setting]}" for setting in apart if setting in attack)])
    return names


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings within settings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def unlike(ours: Series, theirs: Series) -> str:
    """What two defenses under one attack rest on and is not the same, so that they are not compared; "" where nothing is known.

    That is the data that both are measured by and attacked with; where no study names the attack, also the attack's settings. A
    study may choose those against each defense.
    """
    mine, others = _settings(ours.first), _settings(theirs.first)
    wanted = {f"data.{name}" for name in DATA} | {f"rows of {role}" for role in ROLES} | {"trainer.precision"}
    attack = () if ours.named else (f"{ours.first.row.attack}.",)
    shared = [name for name in mine if name in others and (name in wanted or name.startswith(attack))]
    return next((name for name in shared if mine[name] != others[name]), "")


def _reach_apart(ours: ResultRow, theirs: ResultRow) -> bool:
    """Whether two attacks by LoRA of one name differ in rank, or by more than a point in the share of the weights they are on.

    A point is what routers and the like make between architectures; what else a defense freezes is the defense's own.
    """
    matches = [re.match(r"LoRA r(\S+) .*\(([\d.]+)% of the decoder\)", row.trained) for row in (ours, theirs)]
    if not (matches[0] and matches[1]):
        return False
    (rank, share), (other, others) = (match.groups() for match in matches if match)
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
    """By name, what a row rests on as far as its run says so: settings, and hashes of rows and checkpoints."""
    config, row, marker = config_of(entry.folder), entry.row, marker_of(entry.folder) or {}
    model, data, trainer = part(config, "model", "init_args"), _dotted(part(config, "data")), part(config, "trainer")
    made_by = marker.get("made_by", {})
    rests_on = {f"data.{name}": data[name] for name in DATA if name in data}
    rests_on |= _hashed(marker, ROLES) | {"trainer.precision": part(trainer).get("precision")}
    rests_on |= {f"{row.attack}.{name}": value for name, value in row.how().items()}
    rests_on |= {f"the class of metric {column.name}": column.class_path for column in row.own}
    undefended = _attack_config(config, row).get("undefended_checkpoint")
    judge = part(data, "judge") or {}
    if entry.folder.parent.name != JUDGED and not str(judge.get("class_path", "")).startswith(OWN_JUDGES):
        rests_on["data.judge"] = judge  # a run's own, of a class that labels told nothing of before
    of_model = row.defense == marker.get("defense", "" if row.undefended else row.defense) and not (row.undefended and undefended)
    tested = marker.get("command") == "test"  # alignment is over there
    if of_model and not (tested and row.stage in ("alignment", NONE)):
        rests_on |= {f"model.{name}": value for name, value in model.items() if name != "checkpoint"}  # a seed's own
        rests_on |= {f"data.{name}": value for name, value in data.items() if name not in (*NO_DATA, *DATA)}
        rests_on |= _hashed(marker, {o["role"] for o in marker.get("data", [])} - set(ROLES))
        rests_on |= {f"trainer.{name}": trainer[name] for name in TRAINER if name in trainer and not tested}
    checkpoint = model.get("checkpoint") if of_model or not undefended else undefended
    at_service = row.threat_model == "finetuning_service" and acts_at_a_service(row.stage)
    trained = of_model and marker.get("command") == "fit" and not at_service  # a service's job begins at the checkpoint
    if attacked := marker.get("recipe") if trained else made_by.get(checkpoint):
        rests_on["the attacked model"] = attacked
    return rests_on


def _attack_config(config: dict[str, Any], row: ResultRow) -> dict[str, Any]:
    """The config of the attack that a row is of; empty where it is not to be found."""
    callbacks = [c for c in part(config, "trainer", "callbacks") or [] if "threat_model" in part(c, "init_args")]
    if row.attack_index >= len(callbacks):
        return {}
    attack = callbacks[row.attack_index]
    settings: dict[str, Any] = part(attack, "init_args")
    name = settings.get("name") or str(part(attack, "class_path")).rpartition(".")[2]
    return settings if name == row.attack else {}


def _dotted(data: dict[str, Any]) -> dict[str, Any]:
    """Settings of the data by their names within it, such as ``batching.max_length``; the judge is one setting."""
    groups = {name: value for name, value in data.items() if isinstance(value, dict) and name != "judge"}
    dotted = {f"{group}.{name}": value for group, settings in groups.items() for name, value in settings.items()}
    return {name: value for name, value in data.items() if name not in groups} | dotted


def _hashed(marker: Marker, roles: Iterable[str]) -> dict[str, Any]:
    """Hashes of the rows of some roles: a source may hold others than before under the same name."""
    origins = marker.get("data", [])
    return {
        f"rows of {role}": hashes for role in sorted(roles) if (hashes := [o["sha256"] for o in origins if o["role"] == role])
    }


def marker_of(folder: Path) -> Marker | None:
    """The marker of a run, also where another judge's verdicts on it are meant."""
    return read_marker(home(folder))


def _runs(folder: Path) -> list[tuple[Path, str, str]]:
    """Run folders with the names that a study gives defense and attack, "" where it gives none."""
    if (folder / INDEX).exists():
        return [(path, cell.defense, cell.attack) for cell, path, why in reported(folder) if cell.attack and not why]
    if (marker := read_marker(folder)) and (what := next(changed_results(marker, folder), "")):
        raise SettingError(f"runs must hold the results that they came to, and {what}. Run it again, or leave it out.")
    return [] if _only_delivered(folder) else [(folder, "", "")]


def _only_delivered(folder: Path) -> bool:
    """Whether a run attacked nothing, and scored the model that it left."""
    return not (folder / ROWS).exists() and (folder / DELIVERED).exists()


def reported(study: Path) -> Iterator[tuple[Cell, Path, str]]:
    """Trainings, and cells that are to be reported, each with its folder and why it is left out, "" if it is not."""
    for cell in read_cells(study):
        folder = study / Path(cell.folder).name
        if cell.tries is None:
            marker = read_marker(folder)
            if marker is None or marker["config"] != cell.config:
                yield cell, folder, "it has not come to its end"
            elif cell.attack and not (folder / ROWS).exists():
                yield cell, folder, "it has no results"
            else:
                yield cell, folder, next(changed_results(marker, folder), "")


def run_folders(folders: Iterable[str | Path]) -> list[Path]:
    """Run folders, and the finished trainings and cells of study folders."""
    given = map(Path, folders)
    return [path for f in given for path in ([p for _, p, why in reported(f) if not why] if (f / INDEX).exists() else [f])]


def left_out(folders: Iterable[str | Path]) -> list[tuple[str, str]]:
    """What is not reported on, by name, with the reason: cells of studies, and attacks in the middle of a training."""
    paths = [Path(folder) for folder in folders]
    studies = [path for path in paths if (path / INDEX).exists()]
    cells = [(f"{study.resolve().name}/{cell.name}", why) for study in studies for cell, _, why in reported(study) if why]
    early = {path: _num_early(path) for path in run_folders(paths)}
    return cells + [
        (run_name(path), f"{number} evaluation{'s' * (number != 1)} of attacks in the middle of its training")
        for path, number in early.items()
        if number
    ]


def _num_early(folder: Path) -> int:
    """Evaluations of a run from before its end."""
    rows = read_rows(folder / ROWS, read_own_columns(folder)) if (folder / ROWS).exists() else []
    return sum(bool(row.epoch) for row in rows)


def differences(series: list[Series]) -> list[str]:
    """In sentences, what a whole report's runs were made by that is not the same for all: casehard, packages, code."""
    folders = dict.fromkeys(
        entry.folder for member in series for by_step in member.entries.values() for entry in by_step.values()
    )
    markers = [marker for folder in folders if (marker := marker_of(folder))]
    notes = []
    if len(markers) < len(folders):
        notes.append(
            f"Not come to their end: {len(folders) - len(markers)} of {len(folders)} run{'s' * (len(folders) != 1)}, which say "
            "nothing of what they were made from."
        )
    notes += [
        f"Not every seed of {member.defense} under {member.attack} was scored at the same steps: its row is of step "
        f"{member.steps[-1]}, and one seed went to {max(map(max, member.entries.values()))}."
        for member in series
        if any(max(by_step) > member.steps[-1] for by_step in member.entries.values())
    ]
    for name in dict.fromkeys(name for marker in markers for name in marker["versions"]):
        versions = sorted({marker["versions"].get(name, "unknown") for marker in markers})
        if len(versions) > 1:
            notes.append(f"They were not all made by the same {name}: {', '.join(versions)}.")
    modules = dict.fromkeys(name for marker in markers for name in marker["code"])
    edited = [m for m in modules if len({marker["code"][m] for marker in markers if m in marker["code"]}) > 1]
    for whose, names in (
        ("casehard's", [m for m in edited if _casehards(m)]),
        ("a user's", [m for m in edited if not _casehards(m)]),
    ):
        if names:
            notes.append(f"They were not all made by the same code: of {whose} modules {', '.join(names)} changed in between.")
    return notes


def _casehards(module: str) -> bool:
    return module.partition(".")[0] in CODE


def baseline(series: list[Series]) -> Series | None:
    """Of the defenses under one attack, the one that the others are compared with: what has no defense."""
    return next((s for s in series if s.defense == UNDEFENDED), next((s for s in series if s.stage == NONE), None))


def grouped(series: list[Series], key: Callable[[Series], str]) -> dict[str, list[Series]]:
    """By ``key``, in the order of first appearance."""
    groups: dict[str, list[Series]] = {}
    for member in series:
        groups.setdefault(key(member), []).append(member)
    return groups
