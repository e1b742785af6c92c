"""``casehard dashboard``: a saved W&B workspace with a panel for every key that runs logged, made with W&B's own library."""

import csv
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casehard.evidence.private import as_sent, refusals_of_wandb
from casehard.evidence.study_plan import INDEX, read_cells
from casehard.metrics import columns
from casehard.metrics.columns import Column
from casehard.metrics.errors import SettingError, needs
from casehard.records.published import config_of, part
from casehard.records.rows import read_own_columns

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

AXES = ("epoch", "step", "attack_step")  # what everything else is drawn against
JOB = re.compile(r"(?P<job>attack/(?P<attack>.+)-(?P<threat>finetuning_service|open_weight)-[^/-]+)/(?P<metric>[^/]+)")
DELIVERED = "delivered/"  # the model that training left
NAME = "Name folders such as runs/EXPERIMENT/VERSION, or a study's."
HELD = {"steps_held": "steps held (at least, where not broken)", "broken": "broken (1) or held (0)"}


def _outcomes(own: Iterable[Column] = ()) -> dict[str, str]:
    """What an attack came to (``records.outcome.outcome``), as far as it gets a bar, and what the bar is called."""
    barred = [column for column in (*columns.COLUMNS, *own) if column.logged and column.label and column.brief]
    return HELD | {column.name: f"{column.label.lower()} at the end" for column in barred}


@dataclass(frozen=True)
class Logged:
    """What runs logged: keys, tables of generations, the runs' W&B groups, and whether those are a study's, so of seeds alone.

    ``own`` are the columns of metrics of their users' own.
    """

    keys: list[str]
    tables: list[str]
    groups: list[str]
    study: bool
    own: tuple[Column, ...] = ()

    def attacks(self) -> dict[str, dict[str, list[Any]]]:
        """Keys by attack and metric: defenses meet under the same attacker."""
        keys_of: dict[str, dict[str, list[Any]]] = {}
        for match in filter(None, map(JOB.fullmatch, self.keys)):
            metrics = keys_of.setdefault(f"{match['attack']}, {match['threat']}", {})
            metrics.setdefault(match["metric"], []).append(match[0])
        return keys_of


def _jobs(keys: Iterable[str]) -> list[str]:
    """``attack/<job>`` of the keys of attacks."""
    return sorted({match["job"] for match in filter(None, map(JOB.fullmatch, keys))})


def read_logged(runs: list[str]) -> Logged:
    """Read the keys that runs logged from ``metrics.csv``, and their groups from ``config.yaml``.

    Raises:
        SettingError: there is nothing to read.
    """
    keys: set[str] = set()
    tables: set[str] = set()
    groups: set[str] = set()
    own: dict[str, Column] = {}
    for folder in (folder for run in runs for folder in _folders(Path(run))):
        keys_of_run = _columns(folder / "metrics.csv") - set(AXES)
        settings = part(config_of(folder), "run")
        keys |= keys_of_run
        own |= {column.name: column for column in read_own_columns(folder)}
        groups.add(str(part(settings, "group") or folder.resolve().parent.name))
        if part(settings, "wandb_generations"):
            tables |= {job.replace("attack", "generations", 1) for job in _jobs(keys_of_run)}
    if not keys:
        raise SettingError(f"runs must have logged something, and {', '.join(runs)} did not. {NAME}")
    return Logged(
        sorted(keys), sorted(tables), sorted(groups), any((Path(run) / INDEX).exists() for run in runs), tuple(own.values())
    )


def _columns(path: Path) -> set[str]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return set(next(csv.reader(file), []))
    except (csv.Error, UnicodeDecodeError) as error:
        raise SettingError(f"{path} must be CSV in UTF-8, and it is not ({error}).") from error


def _folders(run: Path) -> list[Path]:
    """The run's own, or those of a study's cells as far as they have run."""
    if (run / INDEX).exists():
        folders = (run / Path(cell.folder).name for cell in read_cells(run))
        return [folder for folder in folders if (folder / "metrics.csv").exists()]
    if not (run / "metrics.csv").exists():
        raise SettingError(f"a run must be a folder with a metrics.csv, and {run} has none. {NAME}")
    return [run]


def workspace(logged: Logged, project: str, entity: str, title: str) -> "Workspace":
    """The workspace for what runs logged."""
    from wandb_workspaces import workspaces as ws

    group = ws.Metric("Group")
    return ws.Workspace(
        entity=entity,
        project=project,
        name=title,
        sections=[section for section in _sections(logged) if section.panels],
        settings=ws.WorkspaceSettings(max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=ws.And(group.isin(logged.groups)),
            groupby=[group] if logged.study else [],
            pinned_columns=[f"summary:{job}/steps_to_break" for job in _jobs(logged.keys)],
        ),
    )


def _ranges(own: Iterable[Column]) -> dict[str, tuple[float | None, float | None]]:
    """Of the axis of every metric, in the order in which they are shown; open where a metric has no bound."""

    def bounds(column: Column) -> tuple[float | None, float | None]:
        low, high = (bound if math.isfinite(bound) else None for bound in (column.low, column.high))
        return (low, None) if column.kind is int else (low, high)

    return {column.name: bounds(column) for column in (*columns.COLUMNS, *own) if column.logged}


def _sections(logged: Logged) -> "Iterator[Section]":
    from wandb_workspaces.reports.v2 import BarPlot, LinePlot, WeavePanelSummaryTable
    from wandb_workspaces.workspaces import Section

    attacks = logged.attacks()
    panels: list[Any] = []
    for attack, metrics in attacks.items():
        jobs = _jobs(key for keys in metrics.values() for key in keys)
        said = _outcomes(logged.own)
        panels += [BarPlot(title=f"{attack}: {text}", metrics=[f"{job}/{n}" for job in jobs]) for n, text in said.items()]
    yield Section(name="Outcome", panels=panels, is_open=True)
    ranges = _ranges(logged.own)
    for attack, metrics in attacks.items():
        panels = [
            LinePlot(title=name.replace("_", " "), x="attack_step", y=keys, range_y=ranges[name])
            for name, keys in sorted(metrics.items(), key=lambda item: list(ranges).index(item[0]))
        ]
        yield Section(name=attack, panels=panels, is_open=True)
    delivered = [key for key in logged.keys if key.startswith("delivered/") and not key.endswith("_before")]
    panels = [BarPlot(title=f"{key.replace('_', ' ')}, and before", metrics=[f"{key}_before", key]) for key in delivered]
    yield Section(name="delivered", panels=panels, is_open=True)
    for stage in ("train", "val", "test"):
        names = [key.removeprefix(f"{stage}/") for key in logged.keys if key.startswith(f"{stage}/")]
        panels = [LinePlot(title=name.replace("_", " "), x="trainer/global_step", y=[f"{stage}/{name}"]) for name in names]
        yield Section(name=stage, panels=panels, is_open=True)
    delivered = [key for key in logged.keys if key.startswith(DELIVERED)]
    ends = [key for key in delivered if not key.endswith("_before")]
    panels = [
        BarPlot(title=end.removeprefix(DELIVERED).replace("_", " "), metrics=[*sorted({end, f"{end}_before"} & set(delivered))])
        for end in ends
    ]
    yield Section(name="delivered: before and after training", panels=panels, is_open=True)
    panels = [WeavePanelSummaryTable(table_name=table) for table in logged.tables]
    yield Section(name="generations", panels=panels, is_open=True)


def make_dashboard(runs: list[str], project: str, entity: str | None, title: str, dry_run: bool) -> str:
    """Save a workspace for ``runs`` and say where it is, or, with ``dry_run``, what would be saved.

    Raises:
        SettingError: the runs logged nothing, W&B's library is not there, or W&B does not take the workspace.
    """
    logged = read_logged(runs)
    needs("casehard dashboard", "wandb_workspaces", "dashboard")
    if dry_run:
        return as_sent(workspace(logged, project, entity or "", title))
    return f"Dashboard: {_save(logged, project, entity, title)}"


def _save(logged: Logged, project: str, entity: str | None, title: str) -> str:
    import wandb

    try:
        wandb.setup(wandb.Settings(x_graphql_retry_max=1))  # more would last past the timeout, which hides why
        api = wandb.Api(timeout=10)  # without a key or a network it fails here, and soon
        owner = entity or api.default_entity or ""
        url: str = workspace(logged, project, owner, title).save().url
    except refusals_of_wandb() as error:
        raise SettingError(
            f"W&B must take the workspace for project {project}, and it did not ({' '.join(str(error).split())}). Check "
            "the network, WANDB_API_KEY (or `wandb login`) and that --entity may write there; --dry_run true needs none of these."
        ) from error
    return url
