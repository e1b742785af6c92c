"""``casehard study``: defenses x attacks x seeds, each a process of its own, side by side, once and for all."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm

from callbacks.results import DONE, RUN_FOLDER, config_hash, write_whole

ROOT = Path(__file__).parent.parent
INDEX = "cells.json"  # in the study's folder: which runs are its cells


@dataclass(frozen=True)
class Part:
    """Part of a command line.

    Args:
        configs: experiment files and overlays.
        settings: single settings by their dotted names, such as data.num_evaluated.
    """

    configs: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def words(self) -> list[str]:
        """As the command line has them."""
        values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in self.settings.items()}
        return [*(word for c in self.configs for word in ("--config", c)), *(f"--{k}={v}" for k, v in values.items())]


@dataclass(frozen=True)
class Arm(Part):
    """A defense.

    Args:
        configs: of the runs that attack it: its experiment file, and overlays.
        settings: of the runs that attack it.
        train: ``fit`` this first, once a seed, and attack the model that it exports; null attacks the checkpoint of configs.
    """

    train: Part | None = None


@dataclass(frozen=True)
class Study:
    """Every attack on every defense with every seed.

    Args:
        defenses: by name.
        attacks: overlays that set trainer.callbacks, by name.
        seeds: of the data, the attack and its adapters.
        common: of every run.
    """

    defenses: dict[str, Arm]
    attacks: dict[str, Part]
    seeds: list[int]
    common: Part = field(default_factory=Part)


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

    @property
    def done(self) -> bool:
        """Whether it ran to its end with this very config: only then a run leaves the marker."""
        marker = Path(self.folder, DONE)
        return marker.exists() and json.loads(marker.read_text())["config"] == self.config


Resolve = Callable[[list[str]], str]  # a command line's config, resolved, as YAML
RunCell = Callable[[Cell], str | None]  # None, or why it failed


def read_study(path: str) -> Study:
    """The study that a YAML file describes, whose names are those of the classes above.

    Raises:
        ValueError: it describes none.
    """
    try:
        study = _study(**yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must be YAML that describes a study by defenses, attacks and seeds, but {' '.join(str(error).split())}."
        ) from error
    for what, names in (("defenses", study.defenses), ("attacks", study.attacks), ("seeds", study.seeds)):
        slugs = {slug(str(name)) for name in names}
        if not names or len(slugs) != len(names):
            raise ValueError(
                f"{what} must be at least one, each with a name of its own, got {', '.join(map(str, names)) or 'none'}."
            )
    return study


def _study(
    defenses: dict[str, Any], attacks: dict[str, Any], seeds: list[int], common: dict[str, Any] | None = None
) -> Study:  # jsonargparse would make the callbacks that settings name
    arms = {name: Arm(**(arm | {"train": Part(**arm["train"])} if arm.get("train") else arm)) for name, arm in defenses.items()}
    return Study(arms, {name: Part(**part) for name, part in attacks.items()}, list(seeds), Part(**(common or {})))


def slug(name: str) -> str:
    """``name`` as part of a folder's name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def cells(study: Study, folder: Path, resolve: Resolve) -> list[Cell]:
    """Every run of the study, those first that others need. A folder bears its config's hash: other settings, another run."""
    found: list[Cell] = []

    def add(defense: str, attack: str, seed: int, words: list[str], needs: Cell | None = None) -> Cell:
        words = [*words, f"--data.seed={seed}", f"--seed_everything={seed}"]
        name = f"{slug(defense)}-{slug(attack) if attack else 'train'}-seed{seed}"
        config = config_hash(resolve(words))
        own = str(folder / f"{name}-{config[:8]}")
        found.append(Cell(name, defense, attack, seed, words, own, config, needs.name if needs else None))
        return found[-1]

    trained: dict[tuple[str, int], Cell] = {}
    for name, arm in study.defenses.items():
        for seed in study.seeds if arm.train else ():
            assert arm.train is not None
            words = ["fit", *study.common.words(), *arm.train.words(), "--trainer.callbacks=[]"]
            trained[name, seed] = add(name, "", seed, words)
    for seed in study.seeds:
        for name, arm in study.defenses.items():
            needs = trained.get((name, seed))
            model = [f"--model.init_args.checkpoint={needs.folder}/model"] if needs else []
            for attack, overlay in study.attacks.items():
                words = ["test", *study.common.words(), *arm.words(), *overlay.words(), *model]
                add(name, attack, seed, words, needs)
    return found


# ---- running


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold ``path`` locked. The lock goes with the descriptor: a cell that got it holds it on, even when the study is killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def placed(cell: Cell) -> dict[str, str]:
    """Where a cell's run goes, and its place on W&B: a group for each defense and attack, in it the seeds."""
    folder = Path(cell.folder)
    study, attack = folder.parent.name, cell.attack or "training"
    tags = [study, cell.defense, attack, f"seed {cell.seed}"]
    return {
        "root": str(folder.parent.parent),
        "experiment": study,
        "version": folder.name,
        "group": f"{study}/{cell.defense}/{attack}",
        "tags": json.dumps([tag[:64] for tag in tags]),  # W&B takes no longer ones
    }


def run_cell(cell: Cell, environment: dict[str, str] | None = None) -> str | None:
    """Run a cell unless it is done: None if it is then, else what its log says last.

    A cell of a study that was killed may be running still; it is waited for, and not run twice.
    """
    folder = Path(cell.folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock")) as lock:
        if cell.done:
            return None
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left; a done one with other settings has another folder
        command = [sys.executable, str(ROOT / "casehard.py"), *cell.words, *(f"--run.{k}={v}" for k, v in placed(cell).items())]
        env = {k: v for k, v in os.environ.items() if k != RUN_FOLDER} | {"OMP_NUM_THREADS": "1"} | (environment or {})
        log = folder.with_name(f"{folder.name}.log")
        with log.open("w") as output:
            code = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, pass_fds=[lock], check=False
            ).returncode
        if code == 0 and cell.done:
            return None
    lines = log.read_text(errors="replace").splitlines()
    return f"exit status {code}: {next((line for line in reversed(lines) if line.strip()), 'no output')} ({log})"


def devices() -> list[dict[str, str]]:
    """Where cells may run side by side, as environment variables: a CUDA device each, or a core each."""
    if number := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return [{"CUDA_VISIBLE_DEVICES": name} for name in (visible.split(",") if visible else map(str, range(number)))]
    return [{} for _ in range(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)]


def _local(parallel: int | None) -> tuple[RunCell, int]:
    places = devices()
    number = parallel or len(places)
    free: SimpleQueue[dict[str, str]] = SimpleQueue()
    for n in range(number):
        free.put(places[n % len(places)])

    def run(cell: Cell) -> str | None:
        place = free.get()
        try:
            return run_cell(cell, place)
        finally:
            free.put(place)

    return run, number


def _on_cluster(
    name: str, settings: dict[str, Any], folder: Path, parallel: int | None
) -> tuple[Callable[[Cell], str | None], int]:
    from submitit import AutoExecutor  # an extra

    executor = AutoExecutor(folder=folder / "jobs", cluster=None if name == "auto" else name)
    executor.update_parameters(**settings)
    return lambda cell: executor.submit(run_cell, cell).result(), parallel or 256


def run_all(todo: list[Cell], run: RunCell, parallel: int) -> dict[str, str]:
    """Run ``todo``, a cell after the one that it needs; why each failed that did."""
    failed: dict[str, str] = {}
    finished = {cell.name for cell in todo if cell.done}
    waiting = [cell for cell in todo if cell.name not in finished]
    running: dict[Future[str | None], Cell] = {}
    with (
        ThreadPoolExecutor(parallel) as pool,
        tqdm(total=len(todo), initial=len(finished), desc="cells") as bar,
    ):
        while waiting or running:
            for cell in [cell for cell in waiting if cell.needs in failed]:
                failed[cell.name] = f"{cell.needs} failed"
                waiting.remove(cell)
                bar.update()
            for cell in [cell for cell in waiting if cell.needs is None or cell.needs in finished]:
                running[pool.submit(run, cell)] = cell
                waiting.remove(cell)
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                cell = running.pop(future)
                if why := future.result():
                    failed[cell.name] = why
                    bar.write(f"failed: {cell.name}: {why}", file=sys.stderr)
                else:
                    finished.add(cell.name)
                bar.update()
                bar.set_postfix(failed=len(failed))
    return failed


def run_study(
    resolve: Resolve, file: str, root: str, parallel: int | None, cluster: str | None, cluster_settings: dict[str, Any]
) -> None:
    """Run a study file; see ``casehard study``.

    Raises:
        SystemExit: a cell failed.
    """
    if parallel is not None and parallel < 1:
        raise ValueError(f"parallel must be >= 1 or null, got {parallel}.")
    folder = Path(root, Path(file).stem)
    found = cells(read_study(file), folder, resolve)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / INDEX, json.dumps([asdict(cell) for cell in found], indent=1))
    run, number = _on_cluster(cluster, cluster_settings, folder, parallel) if cluster else _local(parallel)
    failed = run_all(found, run, number)
    print(f"{len(found) - len(failed)} of {len(found)} cells done: {folder}")
    if failed:
        sys.exit("error: failed:\n" + "\n".join(f"  {name}: {why}" for name, why in failed.items()))
