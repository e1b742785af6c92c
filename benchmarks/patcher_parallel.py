"""Patcher's parallel form on two processes of one thread, beside the sequential form of the same vector age on two threads."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from jsonargparse import CLI
from paired import spread
from tqdm import tqdm

from casehard.records.files import DONE, RUN_FOLDER

ROOT = Path(__file__).parent.parent
FORMS = {
    "parallel": ("1", ["--config", "experiments/cluster/patcher_parallel.yaml"]),
    "sequential": ("2", ["--model.init_args.vector_age=1"]),
    "one_thread": ("1", ["--model.init_args.vector_age=1"]),
}
EVEN = [  # both halves take about as long, and meet where checkpoints are due
    "--model.init_args.num_sft_steps=0",
    "--model.init_args.attacker.num_inner_steps=80",
    "--model.init_args.num_outer_steps=50",
    "--run.checkpoint_steps=100",
    "--trainer.max_steps=600",
]


def fit(*words: str, threads: str) -> None:
    """Run the command line itself, from the repository's root."""
    env = {k: v for k, v in os.environ.items() if k != RUN_FOLDER} | {"OMP_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, "-m", "casehard", "fit", *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def interval(run: Path) -> tuple[float, int]:
    """What the halves do between two exchanges: inner steps, in the mean over the attackers, and passes of the defender."""
    settings = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
    inner = [attacker["num_inner_steps"] for attacker in [settings["attacker"], *(settings["more_attackers"] or [])]]
    steps = settings["attack_every"] or settings["num_outer_steps"] // len(inner)
    return statistics.mean(inner), steps if settings["one_pass_per_row"] else 2 * steps


def main(
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    settings: list[str] = EVEN,
    batch_size: int = 4,
    out: str | None = None,
) -> None:
    """Train `patcher_one_attacker.yaml` in both forms, seed by seed, and print how many times as fast the parallel one is.

    Seconds are those of training, process starts and attacks not counted. The sequential form runs on one thread too: two halves
    that never wait take half of that time. So where two threads are X times as fast as one, no parallel form is more than 2 / X
    times as fast as the sequential one. Attack the models that are left in OUT/{parallel,sequential}/seedN/model to compare how
    hard they are to break.

    Args:
        seeds: one run of each form.
        settings: further words of all command lines; by default twelve intervals in which neither half waits long.
        batch_size: rows of a defender step, and of an inner step.
        out: where the runs go; null throws them away.
    """
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    sizes = [f"--data.batching.batch_size={batch_size}", f"--model.init_args.attacker.batch_size={batch_size}"]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(out or scratch).resolve()
        for seed in tqdm(seeds, "seeds"):
            for form, (threads, own) in FORMS.items():
                run = root / form / f"seed{seed}"
                where = {"root": root, "experiment": form, "version": run.name, "wandb": "disabled"}
                words = [
                    "--config",
                    "experiments/patcher_one_attacker.yaml",
                    *own,
                    "--trainer.callbacks=[]",
                    f"--data.seed={seed}",
                    *sizes,
                ]
                fit(*words, *settings, *(f"--run.{key}={value}" for key, value in where.items()), threads=threads)
                seconds[form].append(json.loads((run / DONE).read_text())["seconds"])
        inner, passes = interval(run)
    parallel, two, one = seconds.values()
    gain = [a / b for a, b in zip(one, two, strict=True)]
    print(f"an interval                    {inner:g} inner steps beside {passes} passes of the defender")
    for form, found in seconds.items():
        print(f"{form:<30} {spread(found, '.0f')} s")
    print(f"sequential over parallel       {spread(b / a for a, b in zip(parallel, two, strict=True))}")
    print(f"two threads over one           {spread(gain)}, so at most {2 / statistics.median(gain):.2f}")


if __name__ == "__main__":
    CLI(main, as_positional=False)
