"""``casehard card``: what an exported model was made from, and how hard it was to break, beside its weights."""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml
from huggingface_hub import DatasetCard, ModelCard, ModelCardData, RepoCard
from jinja2 import Environment, FileSystemLoader

from callbacks.results import DONE, write_whole
from evidence import plots
from evidence.report import COLUMNS, THREATS, measured, number
from evidence.runs import config_of, own_file, public, published
from evidence.summary import UNDEFENDED, Series, baseline, collect, grouped
from metrics import error_rates

OWN_LICENCE = "apache-2.0"  # casehard's, and so its sandbox's
PICTURE = "attack_curves.png"
LIMITS = {
    "none": "This is supervised fine-tuning and no defense: it is not expected to hold against harmful fine-tuning.",
    "alignment": "Its safety is in the weights, trained to outlast attackers like the one in the settings below. An attack takes "
    "longer and is not impossible: one with other settings, more rows or more steps may break it sooner than the tables say.",
    "finetuning": "**No protection of open weights.** The defense acts only while a provider trains under its loss; who holds "
    "these weights leaves it out. In the model's own run, jobs at a service start from the base, as a service's jobs do.",
    "post_finetuning": "**No protection of open weights.** The defense repairs a model after a provider has fine-tuned it; who "
    "holds these weights leaves it out.",
}
COLUMNS_SHOWN = ("Before", "Harmful score", "Steps to break", "Accuracy", "Benign refused", "Degenerate")


def write_card(run: str, tests: list[str]) -> Path:
    """Write ``model/README.md`` and its picture into the folder of ``run``; returns the card.

    Args:
        run: folder of a finished ``fit`` that exported its model.
        tests: folders of more runs that attacked this model, such as the cells of a study; also RUN/judged/JUDGE.

    Raises:
        ValueError: ``run`` is no such folder, or a test attacked another model.
    """
    folder = Path(run)
    marker, model = _finished(folder), folder / "model"
    own = [folder] if (folder / "attacks.csv").exists() else []
    folders = own + [_tested(Path(test), model) for test in tests]
    series = collect(folders)
    _draw(series, model / PICTURE)
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True).get_template("card.md.j2")
    text = template.render(marker=marker, picture=PICTURE, **_made(folder, folders), **_shown(series, marker["stage"]))
    write_whole(model / "README.md", str(ModelCard(text)))
    return model / "README.md"


def _draw(series: list[Series], path: Path) -> None:
    attacks = grouped(series, lambda s: f"{s.threat_model} {s.attack}")
    figure = plots.curves(list(attacks.values()), plots.styles(series))
    figure.savefig(path, dpi=144)
    plt.close(figure)


def _made(run: Path, folders: list[Path]) -> dict[str, Any]:
    """What the card says of how the model came about, and of the rows of all runs."""
    config = config_of(run)
    base, data = config["model"]["init_args"]["checkpoint"], config["data"]
    licence = licence_of(ModelCard, base)
    origins = {tuple(found.values()): found for folder in [run, *folders] for found in _marker(folder)["data"]}
    metadata = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["casehard", "harmful-fine-tuning"],
        base_model=None if _local(base) else base,
    )
    mixture = f"benign and harmful rows, poison ratio {data['poison_ratio']}"
    return {
        "card_data": metadata.to_yaml(),
        "base": public(base),
        "licence": licence,
        "trained_on": mixture if data["train_on"] == "mixture" else "refusals and alignment_benign",
        "sources": [o | {"source": public(o["source"]), "licence": _data_licence(o["source"])} for o in origins.values()],
        "settings": published(config["model"]["init_args"]),
        "attack_settings": [published(config_of(folder)["trainer"]["callbacks"]) for folder in folders],
    }


def _shown(series: list[Series], stage: str) -> dict[str, Any]:
    """What the card says of what was measured, and was not."""
    by_threat = grouped(series, lambda s: s.threat_model)
    entries = [entry for one in series for by_step in one.entries.values() for entry in by_step.values()]
    return {
        "limit": LIMITS[stage],
        "judges": sorted({entry.row.judge for entry in entries}),
        "error_rates": [rates for rates in map(error_rates, sorted({entry.row.judge for entry in entries})) if rates],
        "before": _before(series, stage),
        "threats": [(*THREATS[name], _rows(members)) for name, members in by_threat.items()],
        "unmeasured": [title for name, (title, _) in THREATS.items() if name not in by_threat],
        "columns": COLUMNS_SHOWN,
    }


def _finished(run: Path) -> dict[str, Any]:
    for path in (run / "model", run / DONE):
        if not path.exists():
            raise ValueError(
                f"run must be the folder of a fit that came to its end and exported its model, and {path} is not there. "
                "Name runs/EXPERIMENT/VERSION; go on from its last checkpoint if it was cut off."
            )
    return _marker(run)


def _marker(folder: Path) -> dict[str, Any]:
    """What a run noted at its end."""
    path = own_file(folder, DONE)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "data" not in found:
        raise ValueError(f"{path} must say what data the run read, and it does not: another version of casehard made it.")
    return found


def _tested(test: Path, model: Path) -> Path:
    checkpoint = config_of(test)["model"]["init_args"]["checkpoint"] if config_of(test) else "nothing"
    if Path(checkpoint).resolve() != model.resolve() and model.parent not in test.parents:
        raise ValueError(f"tests must be runs that attacked {model}, and {test} attacked {checkpoint}. Leave it out.")
    return test


def _local(source: str) -> bool:
    """Whether a checkpoint or a source of rows is no hub id."""
    return Path(source).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)


def licence_of(card: type[RepoCard], source: str) -> str:
    """What the card of a hub id, or the README.md in a folder or beside a file, says; ``unknown`` where there is none."""
    path = Path(source)
    try:
        found = card.load(path / "README.md" if path.is_dir() else path.parent / "README.md" if path.exists() else source)
    except (OSError, ValueError, yaml.YAMLError):  # no card, no such id, no network
        return "unknown"
    return getattr(found.data, "license", None) or "unknown"


def _data_licence(source: str) -> str:
    name = source.partition("#")[0]
    if not name:  # rows that stand in the settings
        return "unknown"
    if name.startswith("sandbox:"):
        return OWN_LICENCE
    return licence_of(DatasetCard, name if Path(name).exists() else name.partition(":")[0])


def _before(series: list[Series], stage: str) -> dict[str, str] | None:
    """The model itself, before any attack; None where every attack that ran began at another one."""
    own = [s for s in series if s.defense != UNDEFENDED] or series
    one = next((s for s in own if 0 in s.steps and (s.threat_model == "open_weight" or stage != "finetuning")), None)
    if one is None:
        return None
    names = {"harmful_score": "harmful score", "finetune_accuracy": "accuracy on the benign task"}
    names |= {"refusal_rate_benign": "benign requests refused", "degenerate_rate": "degenerate answers"}
    return {shown: number(one.mean(column, 0)) for column, shown in names.items()}


def _rows(series: list[Series]) -> list[list[str]]:
    """A threat model's table: attack, defense, steps, and the report's cells."""
    rows = []
    for attack, members in grouped(series, lambda s: s.attack).items():
        for one in members:
            cells = dict(zip(COLUMNS, measured(one, baseline(members)), strict=True))
            shown = [" ".join(filter(None, cells[name])) for name in COLUMNS_SHOWN]
            rows.append([attack, one.defense, str(one.steps[-1]), *shown])
    return rows
