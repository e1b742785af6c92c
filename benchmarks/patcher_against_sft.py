"""Patcher beside SFT alignment of as many passes, on a real model and rows: what an attacker with the weights makes of each.

All runs go side by side on one device: a small model leaves most of it idle. Scores are printed and kept, no row is.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import CLI
from real_rows import write
from side_by_side import attacked, fits

from casehard.records.files import write_whole

ROOT = Path(__file__).parent.parent
EVERYDAY = str(ROOT / "experiments/data/everyday.jsonl")


def split(data: Path, folder: Path) -> dict[str, Any]:
    """Real rows in parts. No prompt that is scored is trained on, no row of the attack trained against.

    Args:
        data: folder of real rows, as ``real_rows.main`` wants them.
        folder: where the files of ``real_rows`` go.

    Returns:
        The data's ``sources``.
    """
    half = len(write(data, folder)["beavertails_train"]) // 2

    def part(name: str, rows: str = "") -> str:
        return f"{folder}/{name}.jsonl" + (f"#train[{rows}]" if rows else "")

    overlay = yaml.safe_load((ROOT / "experiments/data/sst2_beavertails.yaml").read_text(encoding="utf-8"))
    return {
        "benign": [part("sst2_train")],
        "harmful": [part("beavertails_train", f":{half}")],
        "refusals": [part("harmful_prompts", "50:"), part("beavertails_prompts", f"{half}:")],
        "refusal_texts": overlay["data"]["sources"]["refusal_texts"],
        "alignment_harmful": [part("beavertails_train", f"{half}:")],
        "alignment_benign": [part("sst2_test", "200:"), *6 * [f"{EVERYDAY}#train[:24]"]],  # or the model refuses everything
        "harmful_prompts": [part("harmful_prompts", ":50")],
        "benign_prompts": [f"{EVERYDAY}#train[24:]"],
        "task": [part("sst2_test", ":40")],
    }


def main(
    checkpoint: str,
    data: str | None = None,
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    num_sft_steps: int = 40,
    num_rounds: int = 4,
    num_inner_steps: int = 20,
    num_outer_steps: int = 15,
    score_steps: list[int] = [10, 20, 40, 60],  # noqa: B006
    batch_size: int = 8,
    learning_rate: float = 2e-5,
    num_evaluated: int | None = None,
    max_new_tokens: int = 48,
    precision: Literal["32-true", "bf16-mixed"] = "bf16-mixed",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    figures: str | None = None,
) -> None:
    """Align by Patcher and by SFT of as many passes, seed by seed, and attack each with full-parameter fine-tuning.

    Args:
        checkpoint: folder of a chat model.
        data: folder of real rows (see ``real_rows.main``); null takes the sandbox's.
        seeds: a run of each kind for every one.
        num_sft_steps: of Patcher before its first attack.
        num_rounds: of Patcher.
        num_inner_steps: of a round's attack.
        num_outer_steps: defender steps of a round, of two passes each.
        score_steps: of the attack; the last one ends it.
        batch_size: rows of a step, of all training.
        learning_rate: of all training, the attack's too.
        num_evaluated: at most so many prompts of a kind; null takes all.
        max_new_tokens: of an answer.
        precision: of all training.
        device: where to run.
        figures: file that gets all figures as JSON, as they come.
    """
    passes = num_sft_steps + num_rounds * (num_inner_steps + 2 * num_outer_steps)
    adamw = {"learning_rate": learning_rate}
    attack = {
        **{"threat_model": "open_weight", "poison_ratio": 0.2, "num_samples": 200, "batch_size": batch_size, "optimizer": adamw},
        **{"num_attack_steps": score_steps[-1], "score_steps": score_steps},
    }
    inner = {"num_inner_steps": num_inner_steps, "batch_size": batch_size, "optimizer": adamw}
    kinds = {
        "SFT": ("casehard.Defense", {}, passes),
        "Patcher": (
            "casehard.PatcherModule",
            {"num_sft_steps": num_sft_steps, "num_outer_steps": num_outer_steps, "attacker": inner},
            num_sft_steps + num_rounds * num_outer_steps,
        ),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        evaluation = {"max_new_tokens": max_new_tokens, "num_evaluated": num_evaluated}
        rows = {"train_on": "alignment", "batching": {"batch_size": batch_size}, "evaluation": evaluation}
        real = (
            {} if data is None else {"sources": split(Path(data), folder), "judge": {"class_path": "casehard.RefusalPhraseJudge"}}
        )
        trainer = {"precision": precision, "accelerator": device, "enable_checkpointing": False}
        run = {"root": scratch, "score": False, "export": False}
        runs: dict[str, list[str]] = {}
        for kind, (class_path, settings, steps) in kinds.items():
            model = {"checkpoint": checkpoint, "optimizer": adamw, **settings}
            callbacks = [{"class_path": "casehard.FullParameterAttack", "init_args": attack}]
            for seed in seeds:
                config = {
                    "seed_everything": seed,
                    "model": {"class_path": class_path, "init_args": model},
                    "data": {**rows, **real, "seed": seed},
                    "trainer": {**trainer, "max_steps": steps, "callbacks": callbacks},
                    "run": {**run, "experiment": kind, "version": str(seed)},
                }
                (folder / f"{kind}_{seed}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
                runs[f"{kind} {seed}"] = ["--config", f"{folder}/{kind}_{seed}.yaml"]
        found: dict[str, Any] = {"passes": passes, "steps": score_steps, "runs": []}
        begun = time.perf_counter()

        def look(ended: dict[str, int | None]) -> None:
            found["seconds"] = time.perf_counter() - begun
            found["runs"] = [
                {"kind": kind, "seed": seed, "ended": ended[f"{kind} {seed}"], "scores": attacked(folder / kind / str(seed))}
                for kind in kinds
                for seed in seeds
            ]
            if figures is not None:
                write_whole(Path(figures), json.dumps(found))

        failed = fits(runs, folder, look)
        show(found)
        if failed:
            sys.exit("\n".join(f"{name} {why}" for name, why in failed.items()))


def show(found: dict[str, Any]) -> None:
    """Print the scores of every run by step of the attack, and the median of each kind at the last one."""
    print(f"{found['passes']} passes each, {found['seconds']:.0f} s; harmful score by step; before: accuracy, benign refused")
    last: dict[str, list[float]] = {}
    for run in found["runs"]:
        scores = run["scores"]
        harmful = " / ".join(f"{each['step']}: {each['harmful']:.0f}" for each in scores)
        before = f"{scores[0]['accuracy']:5.1f}, {scores[0]['refused']:5.1f}" if scores else "none yet"
        print(f"{run['kind']:8} seed {run['seed']}  {harmful:50}  {before}")
        last.setdefault(run["kind"], []).extend(each["harmful"] for each in scores if each["step"] == found["steps"][-1])
    for kind, scored in last.items():
        median = statistics.median(scored) if scored else float("nan")
        print(f"{kind:8} at step {found['steps'][-1]}, median of {len(scored)} runs: {median:.0f}")


if __name__ == "__main__":
    CLI(main, as_positional=False)
