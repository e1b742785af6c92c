"""``casehard card``: what an exported model was made from, and how hard it was to break, beside its weights."""

import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml
from huggingface_hub import DatasetCard, ModelCard, ModelCardData, RepoCard
from jinja2 import Environment, FileSystemLoader

from casehard.evidence import plots
from casehard.evidence.delivered import delivered_rows
from casehard.evidence.markdown import Markdown, code, escaped, fenced
from casehard.evidence.report import THREATS
from casehard.evidence.summary import Series, baseline, collect, grouped
from casehard.evidence.tables import columns, measured, number, shown_metrics
from casehard.metrics.columns import Column
from casehard.metrics.errors import SettingError
from casehard.metrics.refusal_phrases import error_rates
from casehard.records.files import DONE, write_whole
from casehard.records.marker import MODEL, Marker, changed_outcome, export_files, read_marker
from casehard.records.published import config_of, home, part, public, published
from casehard.records.rows import NONE, ROWS, UNDEFENDED, acts_at_a_service

OWN_LICENCE = "apache-2.0"  # casehard's, and so its sandbox's
PLAIN = re.compile(r"[A-Za-z0-9][\w.+-]{0,49}", re.ASCII)  # a licence's identifier
ITS_CARD = "see its own card"
PICTURE = "attack_curves.png"
LIMITS = {  # by stage
    NONE: "This is supervised fine-tuning and no defense: it is not expected to hold against harmful fine-tuning.",
    "alignment": "Its safety is in the weights, trained to outlast attackers like the one in the settings below. An attack takes "
    "longer and is not impossible: one with other settings, more rows or more steps may break it sooner than the tables say.",
    "finetuning": "**No protection of open weights.** The defense acts only while a provider trains under its loss; who holds "
    "these weights leaves it out. In the model's own run, jobs at a service start from the base, as a service's jobs do.",
    "post_finetuning": "**No protection of open weights.** The defense repairs a model after a provider has fine-tuned it; who "
    "holds these weights leaves it out.",
}


def _columns(metrics: list[Column]) -> list[str]:
    """Those of a report's columns that a card has room for."""
    score, *others = [column.label for column in metrics if column.brief]
    return ["Before", score, "Steps to break", *others]


def write_card(run: str, tests: list[str]) -> Path:
    """Write ``model/README.md`` and its picture into the folder of ``run``; returns the card.

    Args:
        run: folder of a finished ``fit`` that exported its model.
        tests: folders of more runs that attacked this model, such as the cells of a study; also RUN/judged/JUDGE.

    Raises:
        SettingError: ``run`` is no such folder, or a test attacked another model.
    """
    folder = Path(run)
    marker, model = _finished(folder), folder / MODEL
    attacked_here = [folder] if (folder / ROWS).exists() else []
    folders = attacked_here + [_tested(Path(test), folder, marker) for test in tests]
    series = collect(folders or [folder])
    if series:
        _draw(series, model / PICTURE)
    places = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=places, trim_blocks=True, finalize=escaped).get_template("card.md.j2")
    text = template.render(
        marker=marker, picture=Markdown(PICTURE), **_made(folder, folders), **_shown(folder, series, marker["stage"])
    )
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
    model, data = part(config, "model", "init_args"), part(config, "data")
    base, licence = str(part(model, "checkpoint")), licence_of(ModelCard, str(part(model, "checkpoint")))
    origins = {tuple(origin.values()): origin for folder in [run, *folders] for origin in _marker(folder)["data"]}
    metadata = ModelCardData(
        license=licence if PLAIN.fullmatch(licence) else "other",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["casehard", "harmful-fine-tuning"],
        base_model=None if _local(base) else base,
    )
    mixture = f"benign and harmful rows, poison ratio {part(data, 'poison_ratio')}"
    attacks = [part(config_of(folder), "trainer", "callbacks") for folder in folders]
    return {
        "card_data": Markdown(yaml.safe_dump(metadata.to_dict(), sort_keys=False).strip()),
        "base": public(base),
        "base_code": code(public(base)),
        "licence": licence,
        "trained_on": mixture if part(data, "train_on") == "mixture" else "refusals and alignment_benign",
        "sources": [_source(origin) for origin in origins.values()],
        "settings": fenced(published(model)),
        "attack_settings": [fenced(published(attack)) for attack in attacks],
    }


def _source(origin: dict[str, Any]) -> dict[str, Any]:
    name = origin["source"]
    return origin | {
        "source": code(public(name)) if name else "",
        "licence": _data_licence(name),
        "sha256": code(origin["sha256"]),
    }


def _shown(run: Path, series: list[Series], stage: str) -> dict[str, Any]:
    """What the card says of what was measured, and was not."""
    by_threat, metrics = grouped(series, lambda s: s.threat_model), shown_metrics(series)
    entries = [entry for member in series for by_step in member.entries.values() for entry in by_step.values()]
    delivered = delivered_rows([run])
    judges = sorted({entry.row.judge for entry in entries} | {row["judge"] for row in delivered[1]})
    return {
        "limit": Markdown("\n\n".join(LIMITS[part] for part in stage.split("+"))),
        "judges": judges,
        "error_rates": [rates for rates in map(error_rates, judges) if rates],
        "before": _before(series, stage),
        "delivered": delivered,
        "threats": [(*THREATS[name], _rows(members, metrics)) for name, members in by_threat.items()],
        "unmeasured": [title for name, (title, _) in THREATS.items() if name not in by_threat],
        "columns": _columns(metrics),
    }


def _finished(run: Path) -> Marker:
    """The marker of a run that exported its model, which is what it left."""
    for path in (run / MODEL, run / DONE):
        if not path.exists():
            raise SettingError(
                f"run must be the folder of a fit that came to its end and exported its model, and {path} is not there. "
                "Name runs/EXPERIMENT/VERSION; go on from its last checkpoint if it was cut off."
            )
    marker = _marker(run)
    if not part(config_of(run), "model", "init_args", "checkpoint"):
        raise SettingError(
            f"run must have left its settings in {run / 'config.yaml'}, and they are not there: nobody knows what the model "
            "was made from. Run it again with a logger (trainer.logger), which writes them."
        )
    if what := next(changed_outcome(marker, run), ""):
        raise SettingError(f"run must hold the model and the results that it came to, and {what}. Run it again.")
    return marker


def _marker(folder: Path) -> Marker:
    """What a run noted at its end."""
    marker, path = read_marker(home(folder)), home(folder) / DONE
    if marker is None or not set(marker["stage"].split("+")) <= set(LIMITS):
        raise SettingError(
            f"{path} must say how the run was made and what it read, and it does not: the run is not at its end, or another "
            "version of casehard made it. Run it again, or leave it out."
        )
    return marker


def _tested(test: Path, run: Path, marker: Marker) -> Path:
    """The folder of a run that attacked the model of ``run`` as it is."""
    model, checkpoint = run / MODEL, part(config_of(test), "model", "init_args", "checkpoint") or "nothing"
    if run in test.parents:
        return test  # another judge's verdicts on its own answers
    if Path(str(checkpoint)).resolve() != model.resolve():
        raise SettingError(f"tests must be runs that attacked {model}, and {test} attacked {checkpoint}. Leave it out.")
    attacked, exported = _marker(test)["files"].get(checkpoint, {}), export_files(run)
    if not attacked or any(exported.get(name) != sha256 for name, sha256 in attacked.items()):
        raise SettingError(
            f"tests must be runs that attacked {model} as it is, and {test} attacked one of other files. Leave it out."
        )
    return test


def _local(source: str) -> bool:
    """Whether a checkpoint or a source of rows is no hub id."""
    return Path(source).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)


def licence_of(card: type[RepoCard], source: str) -> str:
    """What the card of a hub id, or the README.md in a folder or beside a file, says; ``unknown`` where there is none.

    Only a licence's identifier is repeated: the card is somebody else's text.
    """
    path = Path(source)
    try:
        their_card = card.load(path / "README.md" if path.is_dir() else path.parent / "README.md" if path.exists() else source)
    except (OSError, ValueError, yaml.YAMLError):  # no card, no such id, no network
        return "unknown"
    license = getattr(their_card.data, "license", None)
    names: list[Any] = license if isinstance(license, list) else [license]
    if not any(names):
        return "unknown"
    return ", ".join(names) if all(isinstance(name, str) and PLAIN.fullmatch(name) for name in names) else ITS_CARD


def _data_licence(source: str) -> str:
    name = source.partition("#")[0]
    if not name:  # rows that stand in the settings
        return "unknown"
    if name.startswith("sandbox:"):
        return OWN_LICENCE
    return licence_of(DatasetCard, name if Path(name).exists() else name.partition(":")[0])


def _before(series: list[Series], stage: str) -> dict[str, str] | None:
    """The model itself, before any attack; None where every attack that ran began at another one."""
    defended = [s for s in series if s.defense != UNDEFENDED] or series
    member = next(
        (s for s in defended if s.tampers and 0 in s.steps and (s.threat_model == "open_weight" or not acts_at_a_service(stage))),
        None,
    )
    if member is None:
        return None
    score, *others = [column for column in shown_metrics(series) if column.brief]
    doubt = "" if member.speaks(0) else " (gibberish: a low score is no safety)"
    return {score.label: number(member.mean(score.name, 0)) + doubt} | {
        column.label: number(member.mean(column.name, 0), column) for column in others
    }


def _rows(series: list[Series], metrics: list[Column]) -> list[list[str]]:
    """A threat model's table: attack, defense, steps, and the report's cells."""
    rows = []
    for attack, members in grouped(series, lambda s: s.attack).items():
        for member in members:
            cells: dict[str, tuple[str, ...]] = dict(
                zip(columns(metrics), measured(member, baseline(members), metrics), strict=True)
            )
            texts = [" ".join(filter(None, cells[name])) for name in _columns(metrics)]
            rows.append([attack, member.defense, str(member.steps[-1]), *texts])
    return rows
