import csv
import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy import ROOT

import casehard

TINY = [
    "--trainer.accelerator", "cpu", "--trainer.max_steps", "2", "--run.wandb", "disabled", "--data.num_samples", "16",
    "--data.num_evaluated", "4", "--data.max_new_tokens", "4", "--trainer.enable_progress_bar", "false",
]  # fmt: skip
ONE_ATTACK = """
trainer:
  callbacks:
    - class_path: callbacks.LoRAAttack
      init_args: {threat_model: finetuning_service, num_samples: 16, num_attack_steps: 2, lora: {rank: 2}}
"""


def run(*args: str, cwd: Path = ROOT, fails: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as its user runs it."""
    env = {k: v for k, v in os.environ.items() if k != casehard.RUN_FOLDER} | environment
    command = [sys.executable, str(ROOT / "casehard.py"), *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300, env=env, check=False)
    assert (done.returncode != 0) == fails, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run of sbr.yaml with one attack."""
    root = tmp_path_factory.mktemp("runs")
    attack = root / "attack.yaml"
    attack.write_text(ONE_ATTACK)
    done = run("fit", "--config", "experiments/sbr.yaml", "--config", str(attack), "--run.root", str(root), *TINY)
    assert "undefended" in done.stdout
    folder = root / "sbr" / "version_0"
    assert f"Run folder: {folder}" in done.stdout
    return folder


def test_run_leaves_its_folder_whole(finished):
    assert {"config.yaml", "metrics.csv", "attacks.csv", "generations.jsonl", "model", "checkpoints"} <= {
        p.name for p in finished.iterdir()
    }
    rows = list(csv.DictReader((finished / "attacks.csv").open()))
    assert [(r["defense"], r["num_attack_steps"]) for r in rows] == [("none", "0"), ("none", "2"), ("SBR", "0"), ("SBR", "2")]
    assert "train/anchor_drift" in (finished / "metrics.csv").read_text().splitlines()[0]
    assert not list(finished.rglob("*.partial"))


def test_exported_model_can_be_tested_and_validated(finished):
    model = ["--model.init_args.checkpoint", str(finished / "model"), "--run.root", str(finished.parent.parent)]
    evaluate = finished.parent / "evaluate.yaml"
    evaluate.write_text("trainer: {limit_val_batches: 1, callbacks: [{class_path: callbacks.Evaluate}]}")
    small = [
        "--run.wandb",
        "disabled",
        "--data.num_evaluated",
        "4",
        "--data.max_new_tokens",
        "4",
        "--trainer.enable_progress_bar",
        "false",
    ]
    done = run("validate", "--config", "experiments/sbr.yaml", "--config", str(evaluate), *model, *small)
    assert "val/harmful_score" in done.stdout
    attack = finished.parent / "attack.yaml"
    attack.write_text(ONE_ATTACK)
    done = run("test", "--config", "experiments/sbr.yaml", "--config", str(attack), *model, *small)
    assert "undefended" in done.stdout
    assert "SBR" in done.stdout


def test_printed_config_resolves_to_itself(tmp_path):
    first = run("fit", "--config", "experiments/sbr.yaml", "--print_config").stdout
    again = tmp_path / "again.yaml"
    again.write_text(first)
    assert yaml.safe_load(run("fit", "--config", str(again), "--print_config").stdout) == yaml.safe_load(first)


def test_a_taken_run_folder_is_refused(finished):
    root = str(finished.parent.parent)
    done = run("fit", "--config", "experiments/sbr.yaml", "--run.root", root, "--run.version", "version_0", *TINY, fails=True)
    assert "the run folder must be new, and" in done.stderr
    assert "Choose another run.version" in done.stderr


def test_runs_that_start_together_get_folders_of_their_own(tmp_path):
    folders = [casehard.claim_run_folder(str(tmp_path), "sbr", None) for _ in range(3)]
    assert [f.name for f in folders] == ["version_0", "version_1", "version_2"]


def test_misspelt_key_in_yaml_stops_the_run_with_its_name(tmp_path):
    config = tmp_path / "misspelt.yaml"
    config.write_text("model: {init_args: {anchor_wieght: 3}}")
    done = run("fit", "--config", "experiments/sbr.yaml", "--config", str(config), fails=True)
    assert "anchor_wieght" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.init_args.anchors", "[]"], "anchors must name at least one harmful prompt, got []"),
        (["--model.init_args.anchor_weight", "-1"], "anchor_weight must be >= 0, got -1.0"),
        (["--data.poison_ratio", "1.2"], "poison_ratio must lie in [0, 1], got 1.2"),
        (["--data.benign", "[nowhere.jsonl]"], "'nowhere.jsonl' must name rows, but neither a file, a folder nor a reachable hub id"),
        (["--data.num_samples", "1000000"], "num_samples 1000000 at poison_ratio 0.1 must find 100000 harmful rows, got"),
        (["--data.max_length", "3"], "max_length must leave room for an answer, got 3, which cuts off every one of"),
        (["--model.init_args.checkpoint", "./nowhere"], "there is no folder './nowhere'"),
        (["--model.init_args.lora.target_modules", "[q_proj, x_proj]"], "target_modules must name linear layers of the model, and it has no"),
        (["--data.refusals", "[sandbox:test/harmful]"], "harmful_prompts must share no prompt with refusals, and 4 of 4 stand in both"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_sentence_without_a_traceback(tmp_path, args, message):
    tiny = [a for a in TINY if a not in ("--data.num_samples", "16")]
    done = run("fit", "--config", "experiments/sbr.yaml", "--run.root", str(tmp_path), *tiny, *args, fails=True)
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def experiment_files() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "experiments").rglob("*.yaml"))


@pytest.mark.parametrize("file", experiment_files())
def test_every_experiment_file_is_dry_run(file):
    folder = Path(file).parent.name
    configs = ["experiments/sbr.yaml", file] if folder in ("scale", "data", "attack") else [file]
    resolved = yaml.safe_load(run("fit", *(a for c in configs for a in ("--config", c)), "--print_config").stdout)
    assert resolved["model"]["class_path"].endswith(("SBRModule", "Defense"))


def merged(files: list[str]) -> Any:
    return yaml.safe_load(run("fit", *(a for f in files for a in ("--config", f)), "--print_config").stdout)


def test_order_of_overlays_does_not_matter():
    files = ["experiments/sbr.yaml", "experiments/scale/smollm2_135m.yaml", "experiments/data/sst2_beavertails.yaml"]
    first, *others = (merged(list(order)) for order in permutations(files))
    assert all(other == first for other in others)


def test_two_processes_give_one_set_of_rows_and_the_scores_of_one(tmp_path):
    attack = tmp_path / "attack.yaml"
    attack.write_text(ONE_ATTACK)
    found = []
    for name, extra in (("one", []), ("two", ["--trainer.devices", "2", "--trainer.strategy", "ddp"])):
        shared = [
            "--config",
            "experiments/sbr.yaml",
            "--config",
            str(attack),
            "--run.root",
            str(tmp_path),
            "--run.experiment",
            name,
        ]
        run("test", *shared, "--data.num_evaluated", "7", *TINY[:2], *TINY[4:6], "--data.max_new_tokens", "40", *extra)
        found.append(list(csv.DictReader((tmp_path / name / "version_0" / "attacks.csv").open())))
    one, two = found
    assert len(one) == len(two) == 4
    assert [(r["defense"], r["num_attack_steps"]) for r in one] == [(r["defense"], r["num_attack_steps"]) for r in two]
    for name in ("harmful_score", "num_scored", "finetune_accuracy", "refusal_rate_benign"):
        assert one[0][name] == two[0][name]  # the same weights: nothing was trained yet
        assert one[2][name] == two[2][name]


def test_sandbox_command_prints_rows_of_every_split():
    shown = run("sandbox", "--num_rows", "1").stdout
    for split in ("pretrain", "defender", "attacker", "validation", "test"):
        assert f"sandbox:{split}/harmful" in shown
    assert run("sandbox", "--help").stdout.count("--") > 3


def test_help_explains_the_settings():
    shown = run("fit", "--model.help", "SBRModule").stdout
    assert "regularisation strength" in shown
