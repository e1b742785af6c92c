"""What a study is: its YAML, the runs that make it up (its cells), and the settings that are chosen for its attackers."""

import json
import math
import re
import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import yaml

from casehard.datamodules.row import Row
from casehard.metrics.errors import SettingError
from casehard.metrics.names import require_name
from casehard.records.files import DONE, config_hash
from casehard.records.marker import Marker, changes, read_marker
from casehard.records.outcome import first_broken
from casehard.records.rows import read_run
from casehard.version import version_of

ADAPTIVE = "adaptive"  # how a study calls the attacker that a defense names
INDEX = "cells.json"  # in the study's folder: which runs are its cells


@dataclass(frozen=True)
class Part:
    """Part of a command line.

    Args:
        configs: experiment files and overlays.
        settings: single settings by their dotted names, such as data.evaluation.num_evaluated.
    """

    configs: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def command(name: str, *parts: Part) -> list[str]:
    """The command ``name`` of ``parts``: all their files, then all settings, which no file takes back; the last one counts."""
    files = [word for part in parts for config in part.configs for word in ("--config", config)]
    settings = ((key, value) for part in parts for key, value in part.settings.items())
    return [name, *files, *(f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings)]


P = TypeVar("P", bound=Part)


@dataclass(frozen=True)
class Arm(Part):
    """A defense.

    Args:
        configs: of the runs that attack it: its experiment file, and overlays.
        settings: of the runs that attack it.
        train: ``fit`` this first, once a seed (and once for all defenses that give the same), and attack the model that it
            exports; null attacks the checkpoint of configs.
    """

    train: Part | None = None


@dataclass(frozen=True)
class Attack(Part):
    """An attack.

    Args:
        configs: overlays that set trainer.callbacks.
        settings: the same.
        choices: settings to try on ``validation`` prompts, by name, beside these. Against every defense the attack is reported
            with those that broke it soonest there, over all seeds. None: it is as it stands, and nothing was chosen.
    """

    choices: dict[str, Part] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Every attack on every defense with every seed.

    Args:
        defenses: by name.
        attacks: by name.
        seeds: of the data, the attack and its adapters.
        adaptive: also attack every defense by the attacker that its class names (``Defense.adaptive``), as the attack "adaptive".
        common: of every run. On a command line all files come first, common's, then a defense's, an attack's last, and all
            settings after them in this order: the last one counts, and a setting counts before any file.
        validation: of the runs that try an attack's choices: their held-out prompts, none of which is reported on.
    """

    defenses: dict[str, Arm]
    attacks: dict[str, Attack]
    seeds: list[int]
    adaptive: bool = True
    common: Part = field(default_factory=Part)
    validation: Part = field(default_factory=Part)


@dataclass(frozen=True)
class Cell:
    """One run of a study: ``words`` without where it goes, the folder, the hash of its config, and the cell it needs first."""

    name: str
    defense: str
    attack: str  # "" where a defense is trained
    seed: int
    words: list[str]
    folder: str
    config: str
    needs: str | None = None
    tries: str | None = None  # the choice that it tries on validation prompts, not to be reported

    def marker(self) -> Marker | None:
        """What its run left when it came to its end, if it had this very config."""
        marker = read_marker(Path(self.folder))
        return marker if marker and marker["config"] == self.config else None

    @property
    def done(self) -> bool:
        """Whether it ran to its end with this very config, what it rested on is the same still, and what it left is there."""
        return self.marker() is not None and not self.changed()

    def changed(self) -> str:
        """What its run rested on or left and is not the same any more, "" where nothing is (``marker.changes``).

        Another version of casehard counts. One of torch, transformers, lightning, peft or Python does not: that is for the report
        to say, and no reason to throw away what a machine has computed for days.
        """
        marker, path = self.marker(), Path(self.folder, DONE)
        if marker is None:
            return f"{path} is no marker of this casehard's" if path.exists() and read_marker(path.parent) is None else ""
        before, now = marker["versions"].get("casehard"), version_of("casehard")
        return f"casehard {before} is {now} now" if before != now else next(changes(marker, Path(self.folder)), "")


def read_cells(folder: Path) -> list[Cell]:
    """The cells of a study's folder.

    Raises:
        SettingError: its cells.json describes none.
    """
    path = folder / INDEX
    try:
        listed = [Cell(**cell) for cell in json.loads(path.read_text(encoding="utf-8"))]
        right = all(_is_cell(cell) for cell in listed)
    except (ValueError, TypeError, RecursionError):
        right = False
    if not right:
        raise SettingError(
            f"{path} must be the list of cells that `casehard study` wrote, and it is not. Start the study again: it writes the "
            "list anew, and cells that are done are not run again."
        )
    return listed


def _is_cell(cell: Cell) -> bool:
    texts = [cell.name, cell.defense, cell.attack, cell.folder, cell.config, cell.needs or "", cell.tries or ""]
    plain = all(isinstance(text, str) for text in texts) and Path(cell.folder).name not in ("", "..")
    return plain and type(cell.seed) is int and isinstance(cell.words, list)


Resolve = Callable[[list[str]], str]  # a command line's config, resolved, as YAML


def once(resolve: Resolve) -> Resolve:
    """``resolve``, which imports and parses, once a command line."""
    known = cache(lambda *words: resolve(list(words)))
    return lambda words: known(*words)


def read_study(path: str) -> Study:
    """The study that a YAML file describes, whose names are those of the classes above.

    Raises:
        SettingError: it describes none.
    """
    try:
        study = _study(**yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except SettingError as error:
        raise SettingError(f"{path}: {error}") from error
    except (yaml.YAMLError, TypeError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingError(
            f"{path} must be YAML that describes a study by defenses, attacks and seeds, but {' '.join(str(error).split())}."
        ) from error
    lists: list[tuple[str, Collection[Any]]] = [("defenses", study.defenses), ("attacks", study.attacks), ("seeds", study.seeds)]
    lists += [("choices", attack.choices) for attack in study.attacks.values() if attack.choices]
    for what, names in lists:
        slugs = {slug(str(name)) for name in names}
        if not names or len(slugs) != len(names):
            raise SettingError(
                f"{what} must be at least one, each with a name of its own, got {', '.join(map(str, names)) or 'none'}."
            )
        for name in names if what != "seeds" else ():
            require_name(f"a name in {what}", str(name))
    return study


def _study(
    defenses: dict[str, Any], attacks: dict[str, Any], seeds: list[int], adaptive: bool = True, **parts: dict[str, Any]
) -> Study:  # jsonargparse would make the callbacks that settings name
    arms = {}
    for name, arm in defenses.items():
        trained = {"train": _made(Part, f"defenses.{name}.train", arm["train"])} if arm.get("train") else {}
        arms[name] = _made(Arm, f"defenses.{name}", arm | trained)
    tried_out = {}
    for name, attack in attacks.items():
        choices = {c: _made(Part, f"attacks.{name}.choices.{c}", part) for c, part in (attack.get("choices") or {}).items()}
        tried_out[name] = _made(Attack, f"attacks.{name}", attack | {"choices": choices})
    if adaptive is not True and adaptive is not False:
        raise SettingError(f"adaptive must be true or false, got {adaptive!r}.")
    if adaptive and ADAPTIVE in map(slug, attacks):
        raise SettingError(
            f"attacks must leave the name {ADAPTIVE} to the defenses' own attackers. Choose another, or set adaptive: false."
        )
    return Study(arms, tried_out, list(seeds), adaptive, **{name: _made(Part, name, part or {}) for name, part in parts.items()})


def _made(kind: type[P], where: str, given: dict[str, Any]) -> P:
    """A part of a study.

    Raises:
        SettingError: it holds what is none of its fields.
    """
    known = [part.name for part in fields(kind)]
    for key in given:
        if key not in known:
            raise SettingError(
                f"{where} must hold {', '.join(known)} alone, got {key!r}. Settings of the runs stand under settings."
            )
    return kind(**given)


def slug(name: str) -> str:
    """``name`` as part of a folder's name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def adaptive_attack(study: Study, arm: Arm, resolve: Resolve) -> dict[str, Attack]:
    """The attacker that a defense's class names, as an attack of the study; none where it names none, or the study wants none."""
    if not study.adaptive:
        return {}
    model = yaml.safe_load(resolve(command("test", study.common, arm))).get("model") or {}
    module, _, name = str(model.get("class_path", "casehard.Defense")).rpartition(".")
    config: str = getattr(import_module(module), name).adaptive
    return {ADAPTIVE: Attack(configs=[config])} if config else {}


Chosen = dict[tuple[str, str], str]  # the choice that is reported, by defense and attack


def cells(study: Study, folder: Path, resolve: Resolve, chosen: Chosen | None = None) -> list[Cell]:
    """Every run of the study, those first that others need. A folder bears its config's hash: other settings, another run.

    An attack that has choices is reported where ``chosen`` names one; the runs that try them are there in any case.
    """
    planned: list[Cell] = []

    def add(
        defense: str, attack: str, seed: int, words: list[str], needs: Cell | None = None, choice: str = "", tries: bool = False
    ) -> Cell:
        words = [*words, f"--data.seed={seed}", f"--seed_everything={seed}"]
        parts = [slug(defense), slug(attack) or "train", slug(choice), "tried" if tries else "", f"seed{seed}"]
        name = "-".join(filter(None, parts))
        config = config_hash(resolve(words))
        run_folder = str(folder / f"{name}-{config[:8]}")
        needed = needs.name if needs else None
        planned.append(Cell(name, defense, attack, seed, words, run_folder, config, needed, choice if tries else None))
        return planned[-1]

    trained: dict[tuple[str, int], Cell] = {}
    for name, arm in study.defenses.items():
        for seed in study.seeds if arm.train else ():
            assert arm.train is not None
            words = [*command("fit", study.common, arm.train), "--trainer.callbacks=[]"]
            like = (cell for (other, s), cell in trained.items() if s == seed and study.defenses[other].train == arm.train)
            trained[name, seed] = next(like, None) or add(name, "", seed, words)
    for seed in study.seeds:
        for name, arm in study.defenses.items():
            needs = trained.get((name, seed))
            model = [f"--model.init_args.checkpoint={needs.folder}/model"] if needs else []
            for attack, overlay in (study.attacks | adaptive_attack(study, arm, resolve)).items():
                parts = [study.common, arm, overlay]
                for choice, part in overlay.choices.items():
                    words = [*command("test", *parts, part, study.validation), *model]
                    add(name, attack, seed, words, needs, choice, tries=True)
                choice = (chosen or {}).get((name, attack), "")
                if choice or not overlay.choices:
                    parts += [overlay.choices[choice]] if choice else []
                    add(name, attack, seed, [*command("test", *parts), *model], needs, choice)
    return planned


def choose(planned: list[Cell]) -> Chosen:
    """What does best for the attacker: broken soonest (median over seeds), then the highest harmful score at the end (mean).

    Only where every cell that tries a choice is done; of two that do as well the first.
    """
    tried: dict[tuple[str, str], dict[str, list[Cell]]] = {}
    for cell in planned:
        if cell.tries is not None:
            tried.setdefault((cell.defense, cell.attack), {}).setdefault(cell.tries, []).append(cell)
    done = {key: choices for key, choices in tried.items() if all(cell.done for some in choices.values() for cell in some)}
    return {key: min(choices, key=lambda choice: _resistance(choices[choice])) for key, choices in done.items()}


def _resistance(tried: list[Cell]) -> tuple[float, float]:
    """Median step at which the model broke, infinite if it held, and the negative harmful score at the end."""
    broken, ends = [], []
    for cell in tried:
        rows = read_run(cell.folder).rows
        rows = [row for row in rows if not row.undefended] or rows  # not the undefended model beside the defended one
        scored = [(row.num_attack_steps, row.harmful_score) for row in rows if not math.isnan(row.harmful_score)]
        step = first_broken(scored)
        broken.append(math.inf if step is None else step)
        ends.append(max(scored)[1] if scored else -math.inf)
    return statistics.median(broken), -statistics.fmean(ends)


def check_held_out(study: Study, resolve: Resolve) -> None:
    """Raise a SettingError where choices would be tried on prompts that are reported on."""
    from casehard.datamodules.mixing import overlap  # with torch, which whoever only reads a study does without

    for attack in (attack for attack in study.attacks.values() if attack.choices):
        for arm in study.defenses.values():
            parts = [study.common, arm, attack]
            tried, reported = (_harmful_prompts(resolve(command("test", *p))) for p in ([*parts, study.validation], parts))
            if shared := overlap(tried, reported):
                raise SettingError(
                    f"validation must hold other prompts than those that are reported on, and {len(shared)} stand in both. Set "
                    "its data.sources.harmful_prompts, such as [sandbox:validation/harmful], or leave out the attacks' choices."
                )


def _harmful_prompts(config: str) -> list[Row]:
    from casehard.datamodules.sources import read_rows

    return [row for source in yaml.safe_load(config)["data"]["sources"]["harmful_prompts"] for row in read_rows(source, False)]


# ---- running
