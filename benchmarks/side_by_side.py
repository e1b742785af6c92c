"""Runs of `casehard fit` beside each other on one device, each in a process forked from this one, which has all imported."""

import csv
import multiprocessing as mp
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from casehard.cli.lightning_cli import train

SCORES = {"harmful_score": "harmful", "finetune_accuracy": "accuracy", "refusal_rate_benign": "refused"}
QUIET = ("--run.wandb=disabled", "--run.generations=false", "--trainer.enable_progress_bar=false")


def _fit(words: list[str], log: str, threads: int) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(threads)
    train(["fit", *words])


def fits(runs: Mapping[str, list[str]], folder: Path, look: Callable[[dict[str, int | None]], None]) -> dict[str, str]:
    """Run them all, and look at what they have left so far twice a second.

    Nothing here may have used a CUDA device before: a forked process could not.

    Args:
        runs: words of the command line by name.
        folder: for what they print, ``NAME.log``.
        look: gets the exit status of every run, None while it goes on.

    Returns:
        The last line of each run that failed.
    """
    threads = max(1, torch.get_num_threads() // len(runs))
    processes = {
        name: mp.get_context("fork").Process(target=_fit, args=([*words, *QUIET], str(folder / f"{name}.log"), threads))
        for name, words in runs.items()
    }
    for process in processes.values():
        process.start()
    while any(process.is_alive() for process in processes.values()):
        look({name: process.exitcode for name, process in processes.items()})
        time.sleep(0.5)
    look({name: process.exitcode for name, process in processes.items()})
    failed = [name for name, process in processes.items() if process.exitcode]
    logs = {name: (folder / f"{name}.log").read_text(encoding="utf-8").strip() for name in failed}
    return {name: f"ended with {processes[name].exitcode}: {log.rpartition(chr(10))[2][:300]}" for name, log in logs.items()}


def attacked(run: Path) -> list[dict[str, str | float]]:
    """The scores of a run's attacks so far, a dict for every step that was scored."""
    if not (run / "attacks.csv").exists():
        return []
    with (run / "attacks.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [
        {"threat_model": row["threat_model"], "defense": row["defense"], "step": int(row["num_attack_steps"])}
        | {name: float(row[column] or "nan") for column, name in SCORES.items()}
        for row in rows
    ]
