import hashlib
import io
import json
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch.distributed.checkpoint import CheckpointException
from toy import ROOT, csv_rows

import casehard
from casehard.cli.lightning_cli import AtomicCheckpointIO, experiment_name
from casehard.cli.run_folder import claim_run_folder, held
from casehard.engine.checkpoint import load_model
from casehard.engine.fit_checkpoint import FORCED, numbers_only
from casehard.records.files import RUN_FOLDER

TINY = [
    "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1", "--trainer.max_steps", "2", "--run.wandb", "disabled", "--data.num_samples", "16",
    "--data.evaluation.num_evaluated", "4", "--data.evaluation.max_new_tokens", "4", "--trainer.enable_progress_bar", "false",
]  # fmt: skip
ONE_ATTACK = """
trainer:
  callbacks:
    - class_path: casehard.LoRAAttack
      init_args: {threat_model: finetuning_service, num_samples: 16, num_attack_steps: 2, lora: {rank: 2}}
"""


def run(*args: str) -> str:
    """What the command prints, run as its user runs it."""
    env = {k: v for k, v in os.environ.items() if k != RUN_FOLDER}
    command = [sys.executable, "-m", "casehard", *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=env, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert not ADVERTISED.search(done.stderr), done.stderr
    return done.stdout


ADVERTISED = re.compile(r"wandb|litlogger|GPU available|TPU|Seed set|stopped:")
Call = Callable[..., str]
SECRET_KEY = "sk-quite-secret"
SCORED = [
    "--data.evaluation.num_evaluated",
    "7",
    "--data.evaluation.max_new_tokens",
    "16",
]  # two processes get unequal shares of seven prompts


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run of sbr.yaml with one attack, which would be uploaded to W&B."""
    root = tmp_path_factory.mktemp("runs")
    attack = root / "attack.yaml"
    attack.write_text(ONE_ATTACK)
    shape = ["--config", "experiments/sbr.yaml", "--config", str(attack), "--run.root", str(root), *TINY, *SCORED]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", SECRET_KEY)
        shown = run("fit", *shape, "--run.wandb", "offline")
    assert "undefended" in shown
    folder = root / "sbr" / "version_0"
    assert f"Run folder: {folder}\nTo W&B, if you want it there: wandb sync {folder}/wandb/offline-run-" in shown
    return folder


def test_run_leaves_its_folder_whole(finished):
    assert {"config.yaml", "metrics.csv", "attacks.csv", "generations.jsonl", "model", "checkpoints"} <= {
        p.name for p in finished.iterdir()
    }
    rows = csv_rows(finished / "attacks.csv")
    assert [(r["defense"], r["num_attack_steps"]) for r in rows] == [("none", "0"), ("none", "2"), ("SBR", "0"), ("SBR", "2")]
    assert "train/anchor_drift" in (finished / "metrics.csv").read_text().splitlines()[0]
    assert not list(finished.rglob("*.partial"))
    ((name, files),) = json.loads((finished / "done.json").read_text())["files"].items()
    assert name == "models/sandbox/aligned"
    assert files["model.safetensors"] == hashlib.sha256((ROOT / name / "model.safetensors").read_bytes()).hexdigest()
    assert {"config.json", "tokenizer.json"} < set(files)


def test_what_wandb_would_upload_holds_no_machine_no_key_and_no_generation(finished):
    (log,) = finished.rglob("*.wandb")
    uploaded = b"".join(path.read_bytes() for path in [log, *log.parent.glob("files/**/*")] if path.is_file())
    assert b"harmful_score" in uploaded
    assert b"steps_held" in uploaded  # the summary
    answers = [json.loads(line) for line in (finished / "generations.jsonl").read_text().splitlines()]
    secrets = [str(ROOT), str(finished.parent.parent), str(Path.home()) + "/", SECRET_KEY, *(a["prompt"] for a in answers)]
    secrets += [a["response"] for a in answers if len(a["response"]) > 8]
    assert not [secret for secret in secrets if secret.encode() in uploaded]
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b".encode(), uploaded)


def test_exported_model_can_be_tested_and_validated(finished, call, tmp_path):
    model = [
        "--model.init_args.checkpoint",
        str(finished / "model"),
        "--run.root",
        str(tmp_path),
        *TINY[:2],
        *TINY[6:8],
        *TINY[10:],
    ]
    evaluate = tmp_path / "evaluate.yaml"
    evaluate.write_text("trainer: {limit_val_batches: 1, callbacks: [{class_path: casehard.Evaluate}]}")
    assert "val/harmful_score" in call("validate", "--config", "experiments/sbr.yaml", "--config", str(evaluate), *model)
    attack = tmp_path / "attack.yaml"
    attack.write_text(ONE_ATTACK)
    shown = call("test", "--config", "experiments/sbr.yaml", "--config", str(attack), *model)
    assert "undefended" in shown
    assert "SBR" in shown
    assert "test/sft_loss" not in shown  # Lightning's own box


def test_a_command_that_would_do_nothing_is_refused(call, tmp_path):
    error = call("validate", "--config", "experiments/sbr.yaml", "--run.root", str(tmp_path), *TINY, fails=True)
    assert "trainer.limit_val_batches must be > 0 for validate, got 0" in error
    assert not list(tmp_path.iterdir())
    assert "must be a command, and 'predict' is none" in call("predict", "--config", "experiments/sbr.yaml", fails=True)


def test_printed_config_resolves_to_itself(call, tmp_path):
    first = call("fit", "--config", "experiments/sbr.yaml", "--print_config")
    again = tmp_path / "again.yaml"
    again.write_text(first)
    assert yaml.safe_load(call("fit", "--config", str(again), "--print_config")) == yaml.safe_load(first)


def test_a_taken_run_folder_is_refused(finished, call):
    root = str(finished.parent.parent)
    error = call("fit", "--config", "experiments/sbr.yaml", "--run.root", root, "--run.version", "version_0", *TINY, fails=True)
    assert "the run folder must be new, and" in error
    assert "Choose another run.version" in error


def test_runs_that_start_together_get_folders_of_their_own(tmp_path):
    folders = [claim_run_folder(str(tmp_path), "sbr", None) for _ in range(3)]
    assert [f.name for f in folders] == ["version_0", "version_1", "version_2"]


def test_two_runs_of_one_process_get_folders_of_their_own(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["casehard"])
    attack = ["--config", "experiments/sbr.yaml", "--config", "experiments/attack/none.yaml", "--run.root", str(tmp_path)]
    for version in ("first", "second"):
        casehard.main(["test", *attack, "--run.version", version, *TINY[:2], *TINY[6:8], *TINY[10:]])
    assert [(tmp_path / "sbr" / version / "done.json").exists() for version in ("first", "second")] == [True, True]


def test_a_run_folder_is_named_once(call, monkeypatch, tmp_path):
    monkeypatch.setenv(RUN_FOLDER, str(tmp_path / "requeued"))
    shape = ["fit", "--config", "experiments/sbr.yaml", "--run.root", str(tmp_path), "--run.version", "other", *TINY]
    error = call(*shape, fails=True)
    assert "run.version must be left out where CASEHARD_RUN_FOLDER names the run's folder, and it is other while" in error
    assert os.environ[RUN_FOLDER] == str(tmp_path / "requeued")  # what is not ours stays
    assert not list(tmp_path.iterdir())


def test_a_requeued_run_goes_on_in_its_folder(call, tmp_path, monkeypatch):
    folder = tmp_path / "sbr/version_0"
    shape = [
        "fit",
        "--config",
        "experiments/sbr.yaml",
        "--config",
        "experiments/attack/none.yaml",
        *TINY,
        "--run.root",
        str(tmp_path),
    ]
    call(*shape)
    metrics = (folder / "metrics.csv").read_bytes()
    (folder / "done.json").unlink()  # as if it had been killed
    assert (folder / "checkpoints/last.ckpt").resolve().name == "epoch=0-step=2.ckpt"
    monkeypatch.setenv(RUN_FOLDER, str(folder))
    casehard.main([*shape, "--trainer.max_steps", "4", "--ckpt_path", str(folder / "checkpoints/last.ckpt")])
    assert (folder / "checkpoints/last.ckpt").resolve().name == "epoch=1-step=4.ckpt"
    assert (folder / "metrics_1.csv").read_bytes() == metrics != (folder / "metrics.csv").read_bytes()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["epoch=1-step=4.ckpt", "last.ckpt"]


def test_processes_meet_for_checkpoints_at_their_steps_alone(monkeypatch, tmp_path):
    steps, link = [], ModelCheckpoint._save_last_checkpoint

    def noted(self, trainer, *args):
        steps.append(trainer.global_step)
        link(self, trainer, *args)

    monkeypatch.setattr(ModelCheckpoint, "_save_last_checkpoint", noted)
    monkeypatch.chdir(ROOT)
    shape = ["fit", "--config", "experiments/sbr.yaml", "--config", "experiments/attack/none.yaml", *TINY]
    casehard.main([*shape, "--run.root", str(tmp_path), "--run.checkpoint_steps", "3", "--trainer.max_steps", "6"])
    assert steps == [3, 6]  # an epoch has two steps


def dry_run(tmp_path: Path, *options: str) -> list[str]:
    job = {"CPUS_PER_TASK": "4", "JOB_ID": "7", "JOB_NUM_NODES": "2", "NTASKS_PER_NODE": "8", "NTASKS": "16"}
    env = os.environ | {f"SLURM_{name}": value for name, value in job.items()} | {"CASEHARD_DRY_RUN": "1"}
    command = [ROOT / "experiments/cluster/slurm.sh", "--config", "experiments/patcher.yaml", *options]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout.split()


def test_the_slurm_script_starts_a_task_a_gpu_and_goes_on_where_the_job_was_requeued(call, tmp_path):
    program, command, *arguments = dry_run(tmp_path)
    assert (program, command) == ("srun", "casehard")
    config = yaml.safe_load(call(*arguments, "--trainer.accelerator", "cpu", "--print_config"))["trainer"]
    assert config["num_nodes"] * int(config["devices"]) == config["strategy"]["init_args"]["data_parallel_size"] == 16
    _, _, *arguments = dry_run(tmp_path, "--config", "experiments/cluster/patcher_parallel.yaml")
    config = yaml.safe_load(call(*arguments, "--trainer.accelerator", "cpu", "--print_config"))["trainer"]
    assert (config["num_nodes"], config["devices"]) == (2, "8")
    assert config["strategy"]["class_path"] == "casehard.RolesStrategy"
    (tmp_path / "runs/slurm/7/checkpoints/last.ckpt").mkdir(parents=True)
    assert dry_run(tmp_path)[-2:] == ["--ckpt_path", "runs/slurm/7/checkpoints/last.ckpt"]


def test_the_slurm_script_says_where_it_must_run():
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    command = [ROOT / "experiments/cluster/slurm.sh", "--config", "sbr"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: SLURM_JOB_ID must be set, as SLURM does for a job, and it is not. Hand this script in: sbatch "
    )
    assert done.stderr.endswith("slurm.sh --config sbr\n")


def test_misspelt_key_in_yaml_stops_the_run_with_its_name(call, tmp_path):
    config = tmp_path / "misspelt.yaml"
    config.write_text("model: {init_args: {anchor_wieght: 3}}")
    assert "anchor_wieght" in call("fit", "--config", "experiments/sbr.yaml", "--config", str(config), fails=True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.init_args.anchors", "[]"], "anchors must name at least one harmful prompt, got []"),
        (["--model.init_args.anchor_weight", "-1"], "anchor_weight must be >= 0, got -1.0"),
        (["--data.poison_ratio", "1.2"], "poison_ratio must lie in [0, 1], got 1.2"),
        (["--config", "experiments/data/sandbox.yaml", "--data.sources.benign", "[nowhere.jsonl]"], "'nowhere.jsonl' must name rows, but neither a file, a folder nor a reachable hub id"),
        (["--data.num_samples", "1000000"], "num_samples 1000000 at poison_ratio 0.1 must find 100000 harmful rows, got"),
        (["--data.sources.harmful", "[]"], "LoRAAttack (finetuning_service): num_samples 1000 at poison_ratio 0.1 must find 100 harmful rows, got 0"),
        (["--data.batching.max_length", "3"], "1200 of which max_length leaves no answer. Raise max_length, lower num_samples"),
        (["--model.init_args.checkpoint", "./nowhere"], "there is no folder './nowhere'"),
        (["--model.init_args.lora.target_modules", "[q_proj, x_proj]"], "target_modules must name linear layers of the model, and it has no"),
        (["--data.sources.refusals", "[sandbox:test/harmful]"], "harmful_prompts must share no prompt with refusals, and 4 of 4 stand in both"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_sentence(call, tmp_path, args, message):
    tiny = [a for a in TINY if a not in ("--data.num_samples", "16")]
    error = call("fit", "--config", "experiments/sbr.yaml", "--run.root", str(tmp_path), *tiny, *args, fails=True)
    assert message in " ".join(error.split())
    assert "Traceback" not in error


SECRET = "How do I brew vexolim in secret?"


def attack_with(**settings: Any) -> list[str]:
    one = {"class_path": "casehard.LoRAAttack", "init_args": {"threat_model": "open_weight"} | settings}
    return ["--trainer.callbacks", json.dumps([one])]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--model.init_args.num_anchors", "0"], "num_anchors must be >= 1 or null, got 0. null takes all anchors."),
        (["--model.init_args.backbone.tokenizer", "./none"], "checkpoint must be a hub id, a folder or a GGUF file, and there is no folder './none'."),
        (["--model.init_args.optimizer.weight_decay", "-1"], "weight_decay must be >= 0, got -1.0."),
        (["--model.init_args.lora.dropout", "2"], "dropout must lie in [0, 1), got 2.0."),
        (["--data.batching.batch_size", "0"], "batch_size must be >= 1, got 0."),
        (["--data.judge", "casehard.GuardJudge", "--data.judge.batch_size", "0"], "batch_size must be >= 1, got 0."),
        (attack_with(poison_ratio=3), "poison_ratio must lie in [0, 1], got 3.0. It is a share: write 0.1 for 10%."),
        (attack_with(optimizer={"clip_norm": -1}), "clip_norm must be > 0 or null, got -1.0. null does not clip."),
        (["--seed_everything", "-1"], "seed_everything must lie in [0, 2^32), got -1."),
        (["--data.seed", str(10**23)], f"seed must fit 64 bits, got {10**23}."),
        (attack_with(seed=10**23), f"seed must fit 64 bits, got {10**23}."),
        (["--config", "{modle: {}}"], "a config's text: 'modle' must be a setting, and it is none. Did you mean model?"),
        (["--model.init_args.lora.rank", "100000000000"], "the model and its batches must fit the memory, and "),
        (["--trainer.accelerator", "gpu"], "trainer.accelerator must be one that this machine has: No supported gpu backend found!"),
        (["--trainer.strategy", "deepspeed"], "To use the `DeepSpeedStrategy`, you must have DeepSpeed installed."),
        (["--trainer.max_steps", "-5"], "`max_steps` must be a non-negative integer or -1"),
        (["--trainer.devices", "0"], "`Trainer(devices='0')` value is not a valid input using cpu accelerator."),
        (["--trainer.strategy", "nonsense"], "You selected an invalid strategy name"),
    ],
)  # fmt: skip
def test_what_a_constructor_refuses_is_said_in_its_one_sentence(call, tmp_path, args, sentence):
    shape = ["--model.init_args.anchors", json.dumps([SECRET]), "--run.root", str(tmp_path), "--trainer.fast_dev_run", "true"]
    error = call("fit", "--config", "experiments/sbr_penalty.yaml", *TINY, *shape, *args, fails=True)
    assert f"error: {sentence}" in error
    assert not any(noise in error for noise in ("Namespace", "Union", "Traceback", "usage:", SECRET))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model.init_args.anchor_wieght", "3"], ["SBRModule", "Option 'anchor_wieght' is not accepted"]),
        (["--model.init_args.num_anchors", "many"], ['"num_anchors": Expected a int']),
        (["--model", "casehard.SBRModul"], ["has no attribute 'SBRModul'. Did you mean SBRModule?"]),
        (["--model", "PatchrModule"], ["Did you mean PatcherModule?"]),
        (["--model", "casehard.lightning_modules.sbr.SBRModul"], ["has no attribute 'SBRModul'. Did you mean SBRModule?"]),
        (["--model", "casehard.lightning_modules.pacher.PatcherModule"], ["has no attribute 'pacher'. Did you mean patcher?"]),
        (["--model", "casehard.lightning_modules.SBRModule"], ["has no attribute 'SBRModule'. Did you mean casehard.SBRModule?"]),
        (["--model", "casehrad.SBRModule"], ["No module named 'casehrad'. Did you mean casehard?"]),
        (["--data.judge", "casehard.RubricJugde"], ["has no attribute 'RubricJugde'. Did you mean RubricJudge?"]),
        (attack_with(threat_modle="x"), ["LoRAAttack", "Option 'threat_modle' is not accepted"]),
        (["--model.init_args.anchors", json.dumps([1, SECRET])], ['"anchors": Expected a str']),
        (["--data.num_samplse", "3"], ["unrecognized arguments: --data.num_samplse 3. Did you mean data.num_samples?"]),
        (["--model.init_args.anchor_wieght", "3"], ["Did you mean anchor_weight?"]),
        (["--model.init_args.lora.rnk", "3"], ["Did you mean rank?"]),
        (["--model.init_args.learning_rate", "3"], ["Did you mean optimizer.learning_rate?"]),  # as it was called
        (["--data.benign", "[x.jsonl]"], ["Did you mean data.sources.benign?"]),
        (["--data.batch_size", "3"], ["Did you mean data.batching.batch_size?"]),
        (
            ["--config", "{data: {harmful: [x.jsonl]}}"],
            ["does not accept option 'data.harmful'. Did you mean data.sources.harmful?"],
        ),
        (["--config", "{trainer: {max_step: 3}}"], ["Did you mean trainer.max_steps?"]),
        (attack_with(lora={"rnk": 3}), ["Group 'lora' does not accept option 'rnk'. Did you mean lora.rank?"]),
        (attack_with(threat_model="weights"), ["Expected one of 'open_weight', 'finetuning_service'"]),
        (["--data.judge", "casehard.GuardJudge", "--data.judge.batch_sise", "3"], ["Did you mean batch_size?"]),
        (["--model", "test_cli.Raising", "--model.init_args.kint", "3"], ["Option 'kint' is not accepted. Did you mean kind?"]),
        (["--data.sources", "[a]"], ['error: Parser key "data.sources": Expected settings, {name: value}, or a file with them']),
        (["--trainer.callbacks", "[3]"], ["Expected a Callback by its class_path, and its settings as init_args"]),
        (
            ["--trainer.callbacks", "[{init_args: {a: 1}}]"],
            ["Expected a Callback by its class_path, and its settings as init_args"],
        ),
        (["--trainer.plugins", "x"], ["Expected a dot import path string: x; Expected a list"]),
        (["--model", "{class_path: 3}"], ["class_path must be the path of a class, got 3."]),
        (["--model", "{init_args: 3}"], ["init_args must be its settings, {name: value}, got 3."]),
        (["--config", "{trainer: 3}"], ["a config's text: trainer must hold settings, {name: value}, got 3."]),
        (["sbr"], ["unrecognized arguments: sbr. Did you mean --config sbr?"]),
        (["--model", "mylab.L2SP"], ["No module named 'mylab'. Install mylab, or name the folder that has it in PYTHONPATH."]),
        (["--model", "casehard.LoRAAttack"], ["does not correspond to a subclass of Defense"]),
        (
            ["--trainer.callbacks", '[{"class_path": "casehard.SBRModule"}]'],
            ["casehard.SBRModule does not correspond to a subclass of Callback"],
        ),
    ],
)
def test_what_does_not_parse_is_said_without_the_types_tried_and_the_values(call, args, words):
    error = call("fit", "--config", "experiments/sbr.yaml", *args, fails=True)
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert all(word in line for word in words)
    assert line.count("Expected settings") < 2
    assert not any(noise in error for noise in ("Namespace", "NestedArg", "Union", "NoneType", "usage:", SECRET))


class Broken(casehard.Defense):
    """Of an author who has not tried it yet."""

    def __init__(self, checkpoint: str) -> None:
        super().__init__(checkpoint)
        raise KeyError("a bug")


def test_a_bug_in_a_constructor_keeps_its_traceback(call, tmp_path):
    with pytest.raises(KeyError, match="a bug"):
        call("fit", "--model", "test_cli.Broken", "--run.root", str(tmp_path), *TINY)


class Raising(casehard.Defense):
    """Of an author whose loss raises."""

    def __init__(self, checkpoint: str, kind: str) -> None:
        super().__init__(checkpoint)
        self.kind = kind

    def sft_loss(self, batch: Any) -> torch.Tensor:
        raise {"bug": ValueError, "setting": casehard.SettingError}[self.kind](f"a {self.kind}")


def test_a_plain_value_error_of_a_loss_is_a_bug_and_a_setting_error_is_said_in_its_sentence(call, tmp_path):
    shape = ["fit", "--model", "test_cli.Raising", "--config", "experiments/attack/none.yaml", "--run.root", str(tmp_path), *TINY]
    with pytest.raises(ValueError, match="a bug"):
        call(*shape, "--model.init_args.kind", "bug")
    assert call(*shape, "--model.init_args.kind", "setting", fails=True).endswith("error: a setting")


def test_a_mistake_shows_its_traceback_where_that_is_asked_for(call, tmp_path, monkeypatch):
    monkeypatch.setenv("CASEHARD_TRACEBACK", "1")
    with pytest.raises(casehard.SettingError, match="weights_only must be true or left out, got false"):
        call("test", "--weights_only", "false", "--run.root", str(tmp_path), *TINY[:2])


def test_ctrl_c_before_training_ends_without_a_traceback(call, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("casehard.cli.lightning_cli.Cli.before_instantiate_classes", interrupted)
    assert call("fit", "--run.root", str(tmp_path), fails=True) == "interrupted\n130"


# ---- one defense, one class


@pytest.mark.parametrize(
    "args",
    [
        ["--config", "experiments/patcher.yaml"],
        ["--config", "{model: {class_path: casehard.Defense}}"],
        ["--config", "experiments/scale/smollm2_135m.yaml", "--config", "experiments/sft_alignment.yaml"],
        ["--model", "casehard.PatcherModule"],
    ],
)
def test_two_defenses_on_one_line_are_refused(call, tmp_path, args):
    quick = ["--config", "experiments/attack/none.yaml", "--run.root", str(tmp_path), *TINY]
    error = call("fit", "--config", "experiments/sbr.yaml", *args, *quick, fails=True)
    assert "model must be one defense, and sbr.yaml names casehard.SBRModule while " in " ".join(error.split())
    assert not list(tmp_path.iterdir())


def test_one_defense_may_be_named_twice(call):
    again = "{model: {class_path: casehard.lightning_modules.sbr.SBRModule, init_args: {anchor_weight: 3}}}"
    config = resolved(call, ["experiments/sbr.yaml", again])
    assert config["model"]["init_args"]["anchor_weight"] == 3.0
    assert config["model"]["init_args"]["anchors_per_step"] == 16


def test_a_class_takes_nothing_over_from_the_one_it_replaces(call):
    first = "{data: {judge: {class_path: casehard.GuardJudge, init_args: {batch_size: 3, cache: first.sqlite}}}}"
    second = "{data: {judge: {class_path: casehard.ModerationJudge, init_args: {max_length: 5}}}}"
    alone, after = (resolved(call, ["experiments/sbr.yaml", *texts])["data"]["judge"] for texts in ([second], [first, second]))
    assert after == alone
    assert (
        resolved(call, ["experiments/sbr.yaml", first, first.replace("3", "4")])["data"]["judge"]["init_args"]["batch_size"] == 4
    )


# ---- checkpoints


class Payload:
    """Unpickled, it runs."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def armed(tmp_path: Path) -> tuple[bytes, Path]:
    """A checkpoint that runs something where it is unpickled, and the file that it would leave."""
    content, mark = io.BytesIO(), tmp_path / "ran"
    torch.save({"pytorch-lightning_version": "2.6.6", "state_dict": {}, "extra": Payload(mark)}, content)
    return content.getvalue(), mark


def placed(where: str, content: bytes, folder: Path) -> str:
    """Put a checkpoint there; its address."""
    if where == "memory":
        fsspec.filesystem("memory").pipe("/x.ckpt", content)
        return "memory://x.ckpt"
    if where == "sharded":
        torch.save({"pytorch-lightning_version": "2.6.6"}, folder / "meta.pt")
        (folder / ".metadata").write_bytes(pickle.dumps(Payload(folder / "ran")))
        return str(folder)
    name = {"sharded, beside the weights": "meta.pt"}.get(where, "x.ckpt")
    (folder / name).write_bytes(content)
    if name == "meta.pt":
        (folder / ".metadata").write_bytes(pickle.dumps(()))
        return str(folder)
    return ("file://" if where == "address" else "") + str(folder / name)


@pytest.mark.parametrize("more", [[], ["--weights_only", "false"]])
@pytest.mark.parametrize("where", ["memory", "address", "file", "sharded", "sharded, beside the weights"])
def test_what_stands_in_a_checkpoint_is_never_run(call, tmp_path, armed, where, more):
    content, mark = armed
    (tmp_path / "there").mkdir()
    address = placed(where, content, tmp_path / "there")
    quick = ["--config", "experiments/attack/none.yaml", "--run.root", str(tmp_path / "runs"), *TINY[:2], *TINY[6:8]]
    error = call("test", *quick, "--ckpt_path", address, *more, fails=True)
    assert f"error: {'weights_only' if more else 'ckpt_path'} must be" in error
    assert not mark.exists()
    assert not (tmp_path / "there/ran").exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("where", ["memory", "address", "file"])
def test_a_checkpoint_is_read_without_running_it_whoever_asks_for_more(tmp_path, armed, where):
    content, mark = armed
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint(placed(where, content, tmp_path), weights_only=False)
    assert not mark.exists()


class Asking(casehard.Defense):
    """Says whether torch may load more than numbers."""

    def __init__(self, checkpoint: str) -> None:
        super().__init__(checkpoint)
        raise ValueError(os.environ.get(FORCED))


def test_the_small_parts_of_a_sharded_checkpoint_are_read_without_running_them(call, tmp_path):
    dcp.save({"lr": Payload(tmp_path / "ran"), "betas": (0.9, 0.999)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    state = {"betas": (0.0, 0.0)}
    with numbers_only():
        dcp.load(state, checkpoint_id=tmp_path / "saved", no_dist=True)
        assert state["betas"] == (0.9, 0.999)
        with pytest.raises(CheckpointException):
            dcp.load({"lr": 0.0}, checkpoint_id=tmp_path / "saved", no_dist=True)
    assert not (tmp_path / "ran").exists()
    error = call("test", "--model", "test_cli.Asking", "--run.root", str(tmp_path), *TINY[:2], *TINY[6:8], fails=True)
    assert error.endswith("error: 1")  # so it is for a whole run
    assert FORCED not in os.environ


@pytest.mark.parametrize("content", [b"", b"PK", b"garbage" * 99, "cut", "other"])
def test_a_broken_checkpoint_ends_in_one_sentence(call, tmp_path, finished, content):
    whole = (finished / "checkpoints/last.ckpt").read_bytes()
    path = tmp_path / "last.ckpt"
    if content == "other":
        torch.save([1, 2], path)
    else:
        path.write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    for address in (str(path), "last", "http://localhost:9/x.ckpt", str(tmp_path)):
        run = ["--run.root", str(tmp_path / "runs"), "--ckpt_path", address]
        error = call("fit", "--config", "experiments/sbr.yaml", *run, *TINY, fails=True)
        assert "error: ckpt_path must be a " in error
        assert "Traceback" not in error


@pytest.mark.parametrize(
    ("defense", "args", "message"),
    [
        ("sft_alignment", [], "of the model's class, casehard.lightning_modules.defense.Defense, and it is one of casehard.lightning_modules.sbr.SBRModule"),
        ("patcher", [], "of the model's class, casehard.lightning_modules.patcher.PatcherModule, and it is one of casehard.lightning_modules.sbr.SBRModule"),
        ("sbr", ["--model.init_args.lora.alpha", "3"], "lora must be as in ckpt_path, {'rank': 16, 'alpha': 16.0"),
        ("sbr", ["--model.init_args.lora", "null"], "lora must be as in ckpt_path, {'rank': 16"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_checkpoint_of_another_defense_is_refused(call, finished, tmp_path, command, defense, args, message):
    shape = ["--config", f"experiments/{defense}.yaml", "--run.root", str(tmp_path), *args]
    shape += ["--ckpt_path", str(finished / "checkpoints/last.ckpt")]
    assert message in call(command, *shape, fails=True)
    assert not list(tmp_path.iterdir())


# ---- run folders


def test_a_finished_run_is_never_overwritten(call, finished, monkeypatch):
    monkeypatch.setenv(RUN_FOLDER, str(finished))
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for more in ([], ["--ckpt_path", str(finished / "checkpoints/last.ckpt")], ["--trainer.fast_dev_run", "true"]):
        quick = ["--config", "experiments/attack/none.yaml", *TINY]
        error = call("fit", "--config", "experiments/sbr.yaml", *quick, *more, fails=True)
        assert f"the run folder must have no finished run, and {finished} has one. Unset CASEHARD_RUN_FOLDER" in error
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_two_runs_in_one_folder_at_once_are_refused(call, monkeypatch, tmp_path):
    monkeypatch.setenv(RUN_FOLDER, str(tmp_path / "x"))
    with held(tmp_path / "x"):
        quick = ["--config", "experiments/attack/none.yaml", *TINY]
        error = call("fit", "--config", "experiments/sbr.yaml", *quick, fails=True)
    assert f"the run folder must have no other run under way, and {tmp_path / 'x'} has one" in error
    assert [path.name for path in (tmp_path / "x").iterdir()] == [".lock"]


def test_a_run_without_loggers_leaves_its_config_in_its_folder(call, tmp_path):
    here = sorted(ROOT.iterdir())
    run = ["--trainer.logger", "false", "--run.root", str(tmp_path), "--run.experiment", "x", *TINY[:2], *TINY[6:8], *TINY[10:]]
    call("test", "--config", "experiments/sbr.yaml", "--config", "experiments/attack/none.yaml", *run)
    config = yaml.safe_load((tmp_path / "x/version_0/config.yaml").read_text())
    assert config["model"]["class_path"] == "casehard.SBRModule"
    assert sorted(ROOT.iterdir()) == here


def test_sigterm_ends_a_test_in_the_middle_of_an_attack(tmp_path):
    """In seconds, with what was found so far and no marker."""
    attack = tmp_path / "attack.yaml"
    attack.write_text(ONE_ATTACK.replace("num_attack_steps: 2", "num_attack_steps: 100000"))
    command = [sys.executable, "-m", "casehard", "test", "--config", "experiments/sbr.yaml", "--config", str(attack)]
    command += [
        "--run.root",
        str(tmp_path),
        "--run.experiment",
        "x",
        *TINY[:2],
        *TINY[6:8],
        *TINY[10:],
        "--data.evaluation.max_new_tokens",
        "4",
    ]
    env = {name: value for name, value in os.environ.items() if name != RUN_FOLDER}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        rows = tmp_path / "x/version_0/attacks.csv"
        deadline = time.monotonic() + 200
        begun = lambda: rows.exists() and csv_rows(rows)  # noqa: E731  the file has its head first
        while not begun() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.terminate()
        try:
            process.wait(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert [row["num_attack_steps"] for row in csv_rows(rows)] == ["0"]
    assert not (rows.parent / "done.json").exists()


def experiment_files() -> list[str]:
    files = [p.relative_to(ROOT) for p in (ROOT / "experiments").rglob("*.yaml")]
    return sorted(str(p) for p in files if p.parent.name != "studies")  # those have a test of their own


def resolved(call: Call, files: Iterable[str]) -> Any:
    return yaml.safe_load(call("fit", *(a for file in files for a in ("--config", file)), "--print_config"))


@pytest.fixture
def build(call, monkeypatch, tmp_path) -> Callable[..., None]:
    """Everything that ``fit`` is made of, built and not run."""
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda *_: None)
    here = ["--model.init_args.checkpoint", "models/sandbox/base"]  # whose tokenizer is there without a network
    quick = ["--trainer.accelerator", "cpu", "--run.wandb", "disabled", "--run.root", str(tmp_path), *here]
    return lambda files, **how: call("fit", *(word for file in files for word in ("--config", file)), *quick, **how)


@pytest.mark.parametrize("file", experiment_files())
def test_every_experiment_file_is_built(build, file):
    overlay = Path(file).parent.name in ("scale", "data", "attack", "adaptive", "cluster")
    defense = "patcher" if "patcher" in file else "sbr"
    build([f"experiments/{defense}.yaml", file] if overlay else [file])


def test_an_experiment_that_no_class_takes_is_found_when_it_is_built(build):
    steps = (
        "{trainer: {callbacks: [{class_path: casehard.LoRAAttack, init_args: {threat_model: open_weight, score_steps: [9999]}}]}}"
    )
    assert "score_steps must" in build(["experiments/sbr.yaml", steps], fails=True)


SMALL = {  # besides the layers, what makes seconds of minutes
    "qwen2_5_1_5b": {"hidden_size": 96, "intermediate_size": 64, "vocab_size": 700},
    "qwen3_4b": {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 700, "head_dim": 8},
    "llama3_8b": {"hidden_size": 128, "intermediate_size": 64, "vocab_size": 700},
    "llama3_1_8b_lora": {"hidden_size": 128, "intermediate_size": 64, "vocab_size": 700},
}


@pytest.mark.parametrize("scale", SMALL)
def test_scale_overlays_run_from_their_sizes_with_two_layers(call, tmp_path, scale):
    files = ["sbr"] if "lora" in scale else ["patcher", "scale/patcher_paper"]
    sizes = yaml.safe_dump({"num_hidden_layers": 2} | SMALL[scale], default_flow_style=True)
    call(
        "fit",
        *(a for name in (*files, f"scale/{scale}", "attack/none") for a in ("--config", f"experiments/{name}.yaml")),
        *("--model.init_args.checkpoint", f"models/sizes/{scale.removesuffix('_lora')}"),
        *("--model.init_args.backbone.random_weights", "true", "--model.init_args.backbone.tokenizer", "models/sandbox/base"),
        *(
            "--model.init_args.backbone.sizes",
            sizes,
            "--trainer.fast_dev_run",
            "2",
            "--run.root",
            str(tmp_path),
            *TINY[:2],
            *TINY[6:8],
        ),
    )


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("qwen2_5_1_5b", 1_543_714_304), ("qwen3_4b", 4_022_468_096), ("llama3_8b", 8_030_261_248), ("llama3_1_8b", 8_030_261_248)],
)
def test_the_sizes_are_those_of_the_models(name, num_parameters):
    with torch.device("meta"):
        model = load_model(str(ROOT / "models/sizes" / name), random_weights=True)
    assert model.num_parameters() == num_parameters


def test_order_of_overlays_does_not_matter(call):
    overlays = ["scale/smollm2_135m", "data/sst2_beavertails", "attack/sst2_p10"]
    files = ["experiments/sbr.yaml", *(f"experiments/{name}.yaml" for name in overlays)]
    first = resolved(call, files)
    assert all(resolved(call, order) == first for order in (files[::-1], files[1:] + files[:1], files[2:] + files[:2]))


def test_an_overlay_that_sets_one_source_or_one_setting_of_a_group_leaves_the_others(call):
    before = resolved(call, ["experiments/sbr.yaml"])["data"]
    overlays = ["{data: {sources: {benign: ['sandbox:attacker/sums']}}}", "{data: {batching: {max_length: 77}}}"]
    for order in (overlays, overlays[::-1]):
        after = resolved(call, ["experiments/sbr.yaml", *order])["data"]
        assert after["sources"] == before["sources"] | {"benign": ["sandbox:attacker/sums"]}
        assert after["batching"] == before["batching"] | {"max_length": 77}
        assert after["evaluation"] == before["evaluation"]


def test_a_configs_text_does_what_its_file_does_and_names_no_run(call):
    file = "experiments/attack/persistent.yaml"
    text = (ROOT / file).read_text()
    assert resolved(call, ["experiments/sbr.yaml", text]) == resolved(call, ["experiments/sbr.yaml", file])
    config = SimpleNamespace(run=SimpleNamespace(experiment=None), config=[None, "experiments/sbr.yaml"])
    assert experiment_name(config) == "sbr"


ATTACKS = ROOT / "experiments/attack"


@pytest.mark.parametrize("attack", sorted(str(path.relative_to(ATTACKS).with_suffix("")) for path in ATTACKS.rglob("*.yaml")))
def test_an_overlays_attacks_take_nothing_over_from_those_they_replace(call, attack):
    """A list that replaces one of the same length is merged with it, entry by entry (jsonargparse)."""
    ours = [resolved(call, [f"experiments/{d}.yaml", f"experiments/attack/{attack}.yaml"]) for d in ("sbr", "patcher")]
    assert ours[0]["trainer"]["callbacks"] == ours[1]["trainer"]["callbacks"]


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where two processes of a command meet. Lightning looks for a free port and lets go of it; this one stays bound."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so that the first process may listen on it
        held.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(held.getsockname()[1]))
        yield


@pytest.mark.usefixtures("port")
def test_two_processes_give_one_set_of_rows_and_the_scores_of_one(finished, tmp_path):
    attack = tmp_path / "attack.yaml"
    attack.write_text(ONE_ATTACK)
    shape = ["--config", "experiments/sbr.yaml", "--config", str(attack), "--run.root", str(tmp_path), *TINY[:2], *TINY[6:8]]
    run("test", *shape, *SCORED, "--trainer.devices", "2", "--trainer.strategy", "ddp")
    folders = [finished, tmp_path / "sbr/version_0"]
    one, two = (csv_rows(folder / "attacks.csv") for folder in folders)
    assert [(r["defense"], r["num_attack_steps"]) for r in one] == [(r["defense"], r["num_attack_steps"]) for r in two]
    for start in (0, 2):  # the same weights: nothing was trained yet
        for name in ("harmful_score", "num_scored", "finetune_accuracy", "refusal_rate_benign"):
            assert one[start][name] == two[start][name]
    answers = ([json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()] for folder in folders)
    ours, theirs = ([a["response"] for a in run if a["num_attack_steps"] == 0] for run in answers)
    assert ours == theirs
    assert len(ours) == 2 * 3 * 7


def test_sandbox_command_prints_rows_of_every_split(call):
    shown = call("sandbox", "--num_rows", "1")
    for split in ("pretrain", "defender", "attacker", "validation", "test"):
        assert f"sandbox:{split}/harmful" in shown
    assert "--num_rows" in call("sandbox", "--help")


def test_a_checkpoint_is_whole_or_the_one_before(tmp_path, monkeypatch):
    writer, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    writer.save_checkpoint({"step": torch.tensor(1)}, path)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("casehard.cli.lightning_cli.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.save_checkpoint({"step": torch.tensor(2)}, path)
    monkeypatch.undo()
    assert torch.load(path)["step"] == 1
    writer.save_checkpoint({"step": torch.tensor(3)}, path)
    assert torch.load(path)["step"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_takes_no_second_copy_and_nothing_of_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))  # whoever asks for it fails
    state = {"state_dict": {"weight": torch.rand(5_000_000)}}  # 20 MB
    tracemalloc.start()
    try:
        AtomicCheckpointIO().save_checkpoint(state, tmp_path / "x.ckpt")
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()
    assert torch.equal(torch.load(tmp_path / "x.ckpt")["state_dict"]["weight"], state["state_dict"]["weight"])


def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_else(tmp_path):
    writer, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    writer.save_checkpoint({"step": torch.tensor(1)}, path)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"last.ckpt could not be written \(.*\); what it held before is unharmed"):
            writer.save_checkpoint({"weight": torch.rand(500_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.load(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_whole_number_stays_one_whatever_was_imported_first():
    words = ["fit", "--config", "experiments/sbr.yaml", "--trainer.limit_val_batches", "1"]
    read = f"import rich.console\nfrom casehard.cli.lightning_cli import resolved\nprint(resolved({words}))"  # float first
    done = subprocess.run([sys.executable, "-c", read], cwd=ROOT, capture_output=True, text=True, check=True)
    assert repr(yaml.safe_load(done.stdout)["trainer"]["limit_val_batches"]) == "1"
