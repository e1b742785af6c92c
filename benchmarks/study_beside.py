"""The cells of studies beside each other on one device, in workers forked from one process, the most telling first.

A small model leaves most of a device idle. A cell is the run that `casehard study` would make of it, in the same folder. What a
cell has scored when time is up is in its attacks.csv. No answer is kept.
"""

import argparse
import json
import multiprocessing as mp
import os
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device import prepare

if TYPE_CHECKING:
    from casehard.evidence.study_plan import Arm, Cell

Ask = Callable[[list[list[str]]], list[str]]
BEGUN = time.monotonic()
DONE, CUT_OFF, NOT_BEGUN = "done", "cut off", "not begun"
QUIET = ["--run.generations=false", "--run.wandb=disabled"]
PACKED = (".csv", ".yaml", ".json", ".log")


def say(text: str) -> None:
    print(f"{time.monotonic() - BEGUN:6.1f} s  {text}", flush=True)


# ---- the plan


def planned(file: str, root: Path, seeds: Sequence[int], settings: dict[str, Any], only: str, ask: Ask) -> "list[Cell]":
    """The cells of a study.

    Args:
        file: the study.
        root: where its folder is.
        seeds: those of its own seeds that are wanted.
        settings: of all its runs, after its own.
        only: pattern of the names of its attacked cells; their trainings come with them.
        ask: resolves command lines.
    """
    from casehard.evidence.study_plan import cells, read_study

    def with_settings(arm: "Arm") -> "Arm":
        train = arm.train and replace(arm.train, settings=arm.train.settings | settings)
        return replace(arm, settings=arm.settings | settings, train=train)

    known: dict[tuple[str, ...], str] = {}
    missing: dict[tuple[str, ...], None] = {}

    def look(words: list[str]) -> str:
        if tuple(words) not in known:
            missing[tuple(words)] = None
        return known.get(tuple(words), "{}")

    study, folder = read_study(file), root / Path(file).stem
    arms = {name: with_settings(arm) for name, arm in study.defenses.items()}
    study = replace(study, defenses=arms, seeds=[seed for seed in study.seeds if seed in seeds])
    for command in ("fit", "test", "test"):  # a test's words hold the hash of its training; then those of adaptive attackers
        missing.clear()
        cells(study, folder, look)
        lines = [list(words) for words in missing if words[0] == command]
        known |= zip(map(tuple, lines), ask(lines), strict=True)
    missing.clear()
    every = cells(study, folder, look)
    assert not missing
    attacked = [cell for cell in every if cell.attack and re.search(only, cell.name)]
    needed = {cell.needs for cell in attacked}
    return [cell for cell in every if cell in attacked or cell.name in needed]


def by_importance(cells: "Sequence[Cell]", order: Sequence[str]) -> "list[Cell]":
    """Cells by the first pattern of ``order`` that their names hold, those of none last; a training before what needs it."""

    def rank(cell: "Cell") -> int:
        return next((n for n, pattern in enumerate(order) if re.search(pattern, cell.name)), len(order))

    ranks = {cell.folder: rank(cell) for cell in cells}
    for cell in cells:
        if training := training_of(cell, cells):
            ranks[training.folder] = min(ranks[training.folder], ranks[cell.folder])
    return sorted(cells, key=lambda cell: (ranks[cell.folder], bool(cell.attack)))


def training_of(cell: "Cell", cells: "Sequence[Cell]") -> "Cell | None":
    """The cell of the same study that it needs."""
    study = Path(cell.folder).parent
    return next((other for other in cells if other.name == cell.needs and Path(other.folder).parent == study), None)


# ---- workers


def work(pipe: Connection, threads: int) -> None:
    """In a process of its own: resolve or run what comes through the pipe, and send what came of it, until it is closed."""
    os.setsid()  # a group, to be killed with all that it starts
    import torch

    from casehard.cli import run_folder
    from casehard.cli.lightning_cli import resolved, train

    torch.set_num_threads(threads)
    with suppress(EOFError):
        while True:
            words, log = pipe.recv()
            try:
                if log is None:
                    pipe.send(("", resolved(words)))
                    continue
                with open(log, "w") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                run_folder.STARTED = time.time()  # the model that it attacks was made since this process began
                train(words)
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()
                pipe.send(("", ""))
            except (Exception, SystemExit) as error:  # the next cell may run all the same
                traceback.print_exc()
                pipe.send((f"{type(error).__name__}: {str(error)[:300]}", ""))


@dataclass
class Worker:
    """A process that runs one cell after another, and the cell that it is at."""

    process: Any
    pipe: Connection
    cell: "Cell | None" = None
    begun: float = 0.0

    def begin(self, cell: "Cell") -> None:
        """Run a cell; what an earlier try left is deleted."""
        from casehard.evidence.study import placed

        folder = Path(cell.folder)
        shutil.rmtree(folder, ignore_errors=True)
        where = [f"--run.{name}={value}" for name, value in placed(cell).items()]
        self.pipe.send(([*cell.words, *where, *QUIET], str(folder.with_name(f"{folder.name}.log"))))
        self.cell, self.begun = cell, time.monotonic()

    def end(self, how: str) -> "Cell":
        """Say how its cell ended, and be free."""
        assert self.cell is not None
        cell, self.cell = self.cell, None
        say(f"{cell.name}: {how}, {time.monotonic() - self.begun:.1f} s")
        return cell

    def kill(self) -> None:
        """It and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # where it had no group yet
        self.process.join()


def workers(number: int) -> list[Worker]:
    """That many, forked from this process, which has imported all and touched no device."""
    threads = max(1, len(os.sched_getaffinity(0)) // number)
    made = []
    for _ in range(number):
        ours, theirs = mp.Pipe()
        process = mp.get_context("fork").Process(target=work, args=(theirs, threads), daemon=True)
        process.start()
        theirs.close()
        made.append(Worker(process, ours))
    return made


def resolver(pool: list[Worker]) -> Ask:
    """Resolves command lines, which the workers share out among them."""

    def ask(lines: list[list[str]]) -> list[str]:
        found = []
        for first in range(0, len(lines), len(pool)):
            pairs = list(zip(pool, lines[first : first + len(pool)], strict=False))
            for worker, words in pairs:
                worker.pipe.send((words, None))
            found += [worker.pipe.recv() for worker, _ in pairs]
        if failed := [why for why, _ in found if why]:
            sys.exit(failed[0])
        return [text for _, text in found]

    return ask


def run(cells: "list[Cell]", pool: list[Worker], deadline: float) -> dict[str, str]:
    """Run cells, the first that can run first, until all have or it is time. Returns how each ended, by its folder."""
    ended = {cell.folder: DONE for cell in cells if cell.done}
    waiting = [cell for cell in cells if cell.folder not in ended]

    def can_run(cell: "Cell") -> bool:
        training = training_of(cell, cells)
        return training is None or ended.get(training.folder) == DONE

    while time.monotonic() < deadline:
        for worker in pool:
            if worker.cell is None and (cell := next(filter(can_run, waiting), None)):
                waiting.remove(cell)
                worker.begin(cell)
        at_work = {worker.pipe.fileno(): worker for worker in pool if worker.cell}
        if not at_work:  # all have run, or wait for a training that failed
            break
        for number in wait(list(at_work), timeout=max(0.0, deadline - time.monotonic())):
            worker = at_work[number]  # type: ignore[index]
            try:
                why, _ = worker.pipe.recv()
            except (EOFError, ConnectionResetError):
                why = "its process was killed"
                pool.remove(worker)
            how = f"failed: {why}" if why else DONE
            ended[worker.end(how).folder] = how
    ended |= {worker.end(CUT_OFF).folder: CUT_OFF for worker in pool if worker.cell}
    return ended | {cell.folder: NOT_BEGUN for cell in waiting}


def pack(root: Path, file: Path) -> None:
    """Scores, settings and logs of all studies in one archive; weights stay."""
    with tarfile.open(file, "w:gz") as archive:
        for path in sorted(root.rglob("*")):
            if path.suffix in PACKED and not {"model", "checkpoints"} & set(path.relative_to(root).parts):
                archive.add(path, path.relative_to(root))


def unpacked(checkpoint: str, folder: Path) -> str:
    """A checkpoint as it is, or that of a GGUF file as a folder, which loads at once."""
    from device_parts import smollm2

    if checkpoint.endswith(".gguf"):
        if not folder.exists():
            smollm2(str(Path(checkpoint).resolve()), str(folder), str(folder.with_suffix(".json")))
        return str(folder)
    return checkpoint


def main(
    studies: list[str],
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    only: str = "",
    order: list[str] = [],  # noqa: B006
    settings: dict[str, Any] = {},  # noqa: B006
    processes: int = 14,
    seconds: float = 230.0,
    root: str = "runs",
    out: str = "beside",
    checkpoint: str | None = None,
    data: str | None = None,
) -> int:
    """Run the cells of studies, the most telling first, and pack what they left. ``--wheels``: as for ``device.py``.

    Args:
        studies: their files.
        seeds: of the studies' seeds those that are run.
        only: pattern of names: no other attacks are run, nor trainings that only they need.
        order: patterns of names, the most important first.
        settings: of all runs, after the studies' own.
        processes: at most so many cells at once.
        seconds: of the whole call.
        root: folder of the studies' folders.
        out: folder of ``results.tar.gz`` and ``ended.json``.
        checkpoint: model that all begin from: folder, hub id or GGUF file; null takes the studies'.
        data: folder of real rows, which ``real_rows.py`` first puts into ``data``; null leaves that as it is.

    Returns:
        Exit status: 1 where a cell failed.
    """
    runs, results = Path(root).resolve(), Path(out).resolve()
    scratch = runs.with_name(f"{runs.name}_scratch")
    for folder in (scratch, runs, results):
        folder.mkdir(parents=True, exist_ok=True)
    import real_rows
    import transformers.models.llama.modeling_llama  # noqa: F401  once, for all workers

    import casehard.cli.lightning_cli  # noqa: F401
    from casehard.evidence.study_plan import INDEX
    from casehard.records.files import write_whole

    say("imported")
    if data is not None:
        real_rows.write(Path(data), Path("data"))
    if checkpoint is not None:
        settings = settings | {"model.init_args.checkpoint": unpacked(checkpoint, scratch / "model")}
    pool = workers(processes)
    try:
        ask, cells = resolver(pool), []
        for file in studies:
            mine = planned(file, runs, seeds, settings, only, ask)
            (runs / Path(file).stem).mkdir(exist_ok=True)
            write_whole(runs / Path(file).stem / INDEX, json.dumps([asdict(cell) for cell in mine], indent=1))
            cells += mine
        say(f"{len(cells)} cells")
        ended = run(by_importance(cells, order), pool, BEGUN + seconds)
    finally:
        for worker in pool:
            worker.kill()
    write_whole(results / "ended.json", json.dumps(ended, indent=1))
    pack(runs, results / "results.tar.gz")
    say(f"{list(ended.values()).count(DONE)} of {len(ended)} cells done; {results / 'results.tar.gz'}")
    return int(any(how.startswith("failed") for how in ended.values()))


def with_wheels() -> int:
    """``main`` by its arguments, once the wheels are there: one of them may be what reads arguments."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--wheels")
    given, rest = first.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        prepare(given.wheels, Path(scratch))
        from jsonargparse import CLI

        return CLI(main, args=rest, as_positional=False)  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(with_wheels())
