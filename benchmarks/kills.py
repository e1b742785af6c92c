"""Ends fit, test, study, judge and report by kill -9 at random moments, goes on, and compares what is left with undisturbed runs.

    python benchmarks/kills.py [--kills 30] [--seed 0]

Sizes are tiny (random weights). What is compared, bit for bit: the exported weights, attacks.csv but for its seconds,
generations.jsonl, the verdicts of another judge, the report's page but for its seconds and dates.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
SMALL = [
    "--trainer.accelerator=cpu",
    "--run.wandb=disabled",
    "--data.evaluation.num_evaluated=8",
    "--data.evaluation.max_new_tokens=8",
]
SMALL += ["--model.init_args.backbone.random_weights=true", "--trainer.enable_progress_bar=false", "--data.num_samples=64"]
ATTACK = {
    "class_path": "casehard.LoRAAttack",
    "init_args": {
        "threat_model": "finetuning_service",
        "num_samples": 32,
        "num_attack_steps": 8,
        "score_steps": [4, 8],
        "lora": {"rank": 2},
    },
}
SHARE = {"fit": 10, "test": 6, "study": 8, "judge": 3, "report": 3}  # of 30 kills
TEST = ["--config=experiments/sbr.yaml", f"--trainer.callbacks={json.dumps([ATTACK])}"]
FIT = [*TEST, "--trainer.max_steps=-1", "--trainer.max_epochs=2"]


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "casehard", *args]


def environment(folder: Path | None = None) -> dict[str, str]:
    known = {k: v for k, v in os.environ.items() if k != "CASEHARD_RUN_FOLDER"}
    known |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return known | ({"CASEHARD_RUN_FOLDER": str(folder)} if folder else {})


def run(args: list[str], folder: Path | None = None, kill_after: float | None = None) -> float | None:
    """Run to the end, or kill all of its processes after some seconds; the seconds that it took, None if it was killed."""
    began = time.perf_counter()
    with subprocess.Popen(
        args,
        cwd=ROOT,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    ) as process:
        try:
            shown, _ = process.communicate(timeout=kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None
    if process.returncode:
        sys.exit(f"{' '.join(args)}\n{shown[-3000:]}")
    return time.perf_counter() - began


def weights(folder: Path) -> dict[str, str]:
    files = folder.rglob("model.safetensors")
    return {
        f"{file.parent.name}/{name}": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for file in files
        for name, tensor in load_file(file).items()
    }


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "wall_seconds"} for row in csv.DictReader(file)]


def _name(path: Path, folder: Path) -> str:
    """Of a file; a cell's hash is of where its model lies, too, so it is left out."""
    return re.sub(r"-[0-9a-f]{8}/", "/", str(path.relative_to(folder)))


def left(folder: Path) -> dict[str, object]:
    """What a run's or a study's folder holds that a kill must not change."""
    tables = {_name(p, folder): rows(p) for p in sorted(folder.rglob("attacks.csv"))}
    answers = {_name(p, folder): p.read_text() for p in sorted(folder.rglob("generations.jsonl"))}
    return {"rows": tables, "answers": answers, "weights": weights(folder)}


def page(folder: Path) -> str:
    text = (folder / "report.html").read_text()
    text = re.sub(r"data:image/png;base64,[^\"]+", "", text)
    return re.sub(r"[\d.]+ (s|min|h)\b|\d{4}-\d\d-\d\d[T \d:+]*", "", text).replace(str(folder.parent), "")


class Trial:
    """One command, undisturbed and killed."""

    def __init__(self, name: str, scratch: Path) -> None:
        self.name, self.scratch = name, scratch

    def args(self, where: Path) -> list[str]:
        raise NotImplementedError

    def again(self, where: Path) -> list[str]:
        """How to go on; by default as it was begun."""
        return self.args(where)

    def outcome(self, where: Path) -> object:
        return left(where)

    def folder(self, where: Path) -> Path | None:
        return None


class Fit(Trial):
    def args(self, where: Path) -> list[str]:
        return command("fit", *FIT, *SMALL, "--run.checkpoint_steps=2")

    def again(self, where: Path) -> list[str]:
        last = where / "checkpoints/last.ckpt"
        return [*self.args(where), *([f"--ckpt_path={last}"] if last.exists() else [])]

    def folder(self, where: Path) -> Path:
        return where


class Test(Trial):
    def args(self, where: Path) -> list[str]:
        return command("test", *TEST, *SMALL)

    def folder(self, where: Path) -> Path:
        return where


class Study(Trial):
    def args(self, where: Path) -> list[str]:
        file = self.scratch / "kills.yaml"
        small = dict(word.removeprefix("--").split("=") for word in SMALL)
        sbr = {"configs": ["experiments/sbr.yaml"]}
        arms = {"Trained": sbr | {"train": sbr | {"settings": {"trainer.max_steps": 4}}}}
        study = {"defenses": arms, "attacks": {"LoRA": {"settings": {"trainer.callbacks": [ATTACK]}}}, "seeds": [0]}
        file.write_text(json.dumps(study | {"common": {"settings": small}}))
        return command("study", str(file), "--root", str(where), "--parallel", "1")


class Judge(Trial):
    def __init__(self, name: str, scratch: Path, judged: Path) -> None:
        super().__init__(name, scratch)
        self.judged = judged

    def args(self, where: Path) -> list[str]:
        if not (where / "run").exists():
            shutil.copytree(self.judged, where / "run", symlinks=True)
        return command("judge", str(where / "run"), "--judge", "RefusalPhraseJudge")


class Report(Judge):
    def args(self, where: Path) -> list[str]:
        return command("report", str(self.judged), "--out", str(where / "report"))

    def outcome(self, where: Path) -> object:
        return page(where / "report")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(SHARE), choices=list(SHARE))
    settings = parser.parse_args()
    draw = random.Random(settings.seed)
    lost = 0
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        test = Test("test", scratch)
        trials = [Fit("fit", scratch), test, Study("study", scratch)]
        trials += [Judge("judge", scratch, scratch / "test/whole"), Report("report", scratch, scratch / "test/whole")]
        for trial in (trial for trial in trials if trial.name in {"test", *settings.only}):  # judge and report need the test
            whole = scratch / trial.name / "whole"
            whole.mkdir(parents=True)
            seconds = run(trial.args(whole), trial.folder(whole))
            assert seconds is not None
            expected = trial.outcome(whole)
            before = lost
            wanted, killed, runs = round(SHARE[trial.name] * settings.kills / 30), 0, 0
            wanted = wanted if trial.name in settings.only else 0
            while killed < wanted:
                where = scratch / trial.name / f"killed{runs}"
                where.mkdir()
                runs += 1
                args = trial.args(where)
                for _ in range(min(3, wanted - killed)):  # up to three times one run
                    # the first seconds are imports
                    if run(args, trial.folder(where), draw.uniform(min(2.0, 0.5 * seconds), seconds)) is not None:
                        break
                    killed += 1
                    if (where / "done.json").exists():  # it had come to its end
                        break
                    args = trial.again(where)
                if not (where / "done.json").exists():
                    run(args, trial.folder(where))
                if trial.outcome(where) != expected:
                    lost += 1
                    print(f"{trial.name}: {where.name} differs", flush=True)
                    shutil.copytree(where, Path(tempfile.mkdtemp(prefix="differs-")) / trial.name, symlinks=True)
            found = f"{lost - before} differ" if lost > before else "same as undisturbed"
            print(f"{trial.name}: {killed} kills in {runs} runs, {seconds:.0f} s undisturbed; {found}", flush=True)
    sys.exit(f"{lost} runs differ" if lost else None)


if __name__ == "__main__":
    main()
