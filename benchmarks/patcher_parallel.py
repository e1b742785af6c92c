"""Patcher's parallel form on two processes of one thread, beside the sequential form of the same vector age on two threads."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from jsonargparse import CLI
from paired import spread
from tqdm import tqdm

from callbacks.results import DONE, RUN_FOLDER

ROOT = Path(__file__).parent.parent
FORMS = {
    "parallel": ("1", ["--config", "experiments/cluster/patcher_parallel.yaml"]),
    "sequential": ("2", ["--model.init_args.vector_age=1"]),
}


def fit(*words: str, threads: str) -> None:
    """Run the command line itself, from the repository's root."""
    env = {k: v for k, v in os.environ.items() if k != RUN_FOLDER} | {"OMP_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, "casehard.py", "fit", *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def main(seeds: list[int] = [0, 1, 2], settings: list[str] = [], out: str | None = None) -> None:  # noqa: B006
    """Train `experiments/patcher.yaml` in both forms, seed by seed, and print how many times as fast the parallel one is.

    Seconds are those of training, process starts and attacks not counted. Attack the models that are left in
    OUT/{parallel,sequential}/seedN/model to compare how hard they are to break.

    Args:
        seeds: one pair of runs each.
        settings: further words of both command lines, such as --trainer.max_steps=320.
        out: where the runs go; null throws them away.
    """
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(out or scratch).resolve()
        for seed in tqdm(seeds, "seeds"):
            for form, (threads, own) in FORMS.items():
                where = {"root": root, "experiment": form, "version": f"seed{seed}", "wandb": "disabled"}
                words = ["--config", "experiments/patcher.yaml", *own, "--trainer.callbacks=[]", f"--data.seed={seed}", *settings]
                fit(*words, *(f"--run.{key}={value}" for key, value in where.items()), threads=threads)
                marker = json.loads(Path(root, form, f"seed{seed}", DONE).read_text())
                seconds[form].append(marker["seconds"])
    for form, found in seconds.items():
        print(f"{form:<30} {spread(found, '.0f')} s")
    print(f"sequential over parallel       {spread(b / a for a, b in zip(*seconds.values(), strict=True))}")


if __name__ == "__main__":
    CLI(main, as_positional=False)
