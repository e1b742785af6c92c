"""``casehard study``: the cells of a study, each a process of its own, side by side, once and for all."""

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tqdm.auto import tqdm

from casehard.evidence.study_plan import (
    INDEX,
    Cell,
    Chosen,
    Resolve,
    cells,
    check_held_out,
    choose,
    once,
    read_study,
)
from casehard.metrics.errors import SettingError
from casehard.metrics.names import visible
from casehard.records.files import RUN_FOLDER, write_whole
from casehard.records.table import terminal

RunCell = Callable[[Cell], str | None]  # None, or why it failed


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


def _path_flag() -> list[str]:
    """Cells look for modules where the study does: ``-m`` alone would put the working directory first, and what lies there."""
    return [] if {"", os.getcwd()} & set(sys.path) else ["-P"]


def run_cell(cell: Cell, environment: dict[str, str] | None = None) -> str | None:
    """Run a cell unless it is done: None if it is then, else what its log says last.

    A cell of a study that was killed may be running still; it is waited for, and not run twice.
    """
    folder = Path(cell.folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock")) as lock:
        if cell.done:
            return None
        if cell.marker() is not None:  # it came to its end, and what it rested on has changed since: a search begins anew
            folder.with_name(f"{folder.name}.trials").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left; a done one with other settings has another folder
        command = [
            sys.executable,
            *_path_flag(),
            "-m",
            "casehard",
            *cell.words,
            *(f"--run.{k}={v}" for k, v in placed(cell).items()),
        ]
        env = {k: v for k, v in os.environ.items() if k != RUN_FOLDER} | (environment or {})
        log = folder.with_name(f"{folder.name}.log")
        with log.open("w") as output:
            code = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, pass_fds=[lock], check=False
            ).returncode
        if code == 0 and cell.done:
            return None
        if code == 0 and (what := cell.changed()):
            return what if what.endswith(" while it ran") else f"{what} while it ran"
    lines = log.read_text(errors="replace").splitlines()
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    return f"{_how_it_ended(code)}: {visible(last)} ({log})"


def _how_it_ended(code: int) -> str:
    """An exit status of a process, in words where a signal ended it."""
    if code >= 0:
        return f"exit status {code}"
    why = ", as a system does that runs out of memory" if code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{why}; its log ends"


def _num_cuda_devices() -> int:
    import torch

    return torch.cuda.device_count()


def devices() -> list[dict[str, str]]:
    """Where cells may run side by side, as environment variables: a CUDA device each, or a core each."""
    if number := _num_cuda_devices():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return [{"CUDA_VISIBLE_DEVICES": name} for name in (visible.split(",") if visible else map(str, range(number)))]
    return [{} for _ in range(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)]


def _local(parallel: int | None) -> tuple[RunCell, int]:
    places = devices()
    number = parallel or len(places)
    share_cores = number > 1 and not _num_cuda_devices() and "OMP_NUM_THREADS" not in os.environ
    threads = {"OMP_NUM_THREADS": "1"} if share_cores else {}  # by default each cell would take a thread a core
    free: SimpleQueue[dict[str, str]] = SimpleQueue()
    for n in range(number):
        free.put(threads | places[n % len(places)])

    def run(cell: Cell) -> str | None:
        variables = free.get()
        try:
            return run_cell(cell, variables)
        finally:
            free.put(variables)

    return run, number


def _on_cluster(
    name: str, settings: dict[str, Any], folder: Path, parallel: int | None
) -> tuple[Callable[[Cell], str | None], int]:
    from submitit import AutoExecutor  # an extra

    executor = AutoExecutor(folder=folder / "jobs", cluster=None if name == "auto" else name)
    executor.update_parameters(**settings)
    return lambda cell: executor.submit(run_cell, cell).result(), parallel or 256


def _why(future: Future[str | None]) -> str | None:
    """Why a cell failed, also where it raised: a job that ran out of time or was cancelled, or a full disk."""
    error = future.exception()
    return future.result() if error is None else f"{type(error).__name__}: {error}"


def run_all(todo: list[Cell], run: RunCell, parallel: int) -> dict[str, str]:
    """Run ``todo``, a cell after the one that it needs; why each failed that did."""
    failed: dict[str, str] = {}
    done = {cell.name for cell in todo if cell.done}
    finished = {cell.name for cell in todo if {cell.name, cell.needs or cell.name} <= done}  # not before what it needs
    waiting = [cell for cell in todo if cell.name not in finished]
    by_name = {cell.name: cell for cell in todo}
    known = {None, *by_name}  # without those that failed in an earlier call
    running: dict[Future[str | None], Cell] = {}
    with (
        ThreadPoolExecutor(parallel) as pool,
        tqdm(total=len(todo), initial=len(finished), desc="cells") as bar,
    ):
        while waiting or running:
            for cell in [cell for cell in waiting if cell.needs in failed or cell.needs not in known]:
                failed[cell.name] = f"{cell.needs} failed"
                waiting.remove(cell)
                bar.update()
            for cell in [cell for cell in waiting if cell.needs is None or cell.needs in finished]:
                waiting.remove(cell)
                if cell.needs and (what := by_name[cell.needs].changed()):  # no attack on what its training did not leave
                    failed[cell.name] = f"{cell.needs}: {what}"
                    bar.update()
                    continue
                if what := cell.changed():
                    bar.write(f"{cell.name}: {what}")
                running[pool.submit(run, cell)] = cell
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                cell = running.pop(future)
                if why := _why(future):
                    failed[cell.name] = why
                    bar.write(f"failed: {cell.name}: {why}", file=sys.stderr)
                else:
                    finished.add(cell.name)
                bar.update()
                bar.set_postfix(failed=len(failed))
    return failed


def print_results(folder: Path) -> None:
    """What stands of a study, also where cells failed."""
    from casehard.evidence.summary import collect, reported  # with numpy
    from casehard.evidence.tables import closing_table

    if not any(cell.attack and not why for cell, _, why in reported(folder)):
        return
    console = terminal()
    try:
        console.print(closing_table(collect([folder])), width=min(80, console.width))
    except SettingError as error:  # results that stand in no one table: the study itself came to its end
        print(f"No table: {error}")
        return
    print(f"A page on them: casehard report {shlex.quote(str(folder))}")


def run_study(
    resolve: Resolve, file: str, root: str, parallel: int | None, cluster: str | None, cluster_settings: dict[str, Any]
) -> Path:
    """Run a study file; see ``casehard study``. Returns the study's folder.

    Raises:
        SystemExit: a cell failed.
    """
    if parallel is not None and parallel < 1:
        raise SettingError(f"parallel must be >= 1 or null, got {parallel}.")
    folder, study, resolve = Path(root, Path(file).stem), read_study(file), once(resolve)
    check_held_out(study, resolve)
    planned = cells(study, folder, resolve)
    folder.mkdir(parents=True, exist_ok=True)
    run, number = _on_cluster(cluster, cluster_settings, folder, parallel) if cluster else _local(parallel)
    chosen: Chosen | None = None
    failed: dict[str, str] = {}
    while chosen != (now := choose(planned)):  # all but what was not chosen yet, then that
        chosen, planned = now, cells(study, folder, resolve, now)
        write_whole(folder / INDEX, json.dumps([asdict(cell) for cell in planned], indent=1))
        failed |= run_all([cell for cell in planned if cell.name not in failed], run, number)
    failed |= {cell.name: f"{what} since it ran" for cell in planned if cell.name not in failed and (what := cell.changed())}
    for (defense, attack), choice in chosen.items():
        print(f"{attack}, on {defense}: {choice}, chosen on validation prompts")
    print_results(folder)
    print(f"{len(planned) - len(failed)} of {len(planned)} cells done: {folder}")
    if failed:
        sys.exit("error: failed:\n" + "\n".join(f"  {name}: {why}" for name, why in failed.items()))
    return folder
