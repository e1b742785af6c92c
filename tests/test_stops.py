"""Runs that are stopped, that go on, and that fail before they begin."""

import re
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from jsonargparse import Namespace
from lightning.pytorch.utilities.exceptions import SIGTERMException
from test_cli import TINY, Call
from toy import ROOT, csv_rows

import casehard
from casehard.cli.lightning_cli import Cli
from casehard.metrics.errors import SettingError
from casehard.records.files import RUN_FOLDER

ATTACK = """
    - class_path: casehard.LoRAAttack
      init_args: {threat_model: open_weight, num_samples: 16, num_attack_steps: 2, lora: {rank: 2}, score_steps: [1, 2]}
"""


class Stopper(L.Callback):
    """Ends a run as Ctrl-C or SIGTERM would, at a step of training, or after so many scorings of an attack."""

    signal: str | None = None
    at_step, at_row = 0, 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.signal and trainer.global_step == self.at_step:
            self.stop()

    def stop(self) -> None:
        raise KeyboardInterrupt if self.signal == "SIGINT" else SIGTERMException(143)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Says where the next run is stopped; after the test signals are as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(name: str | None, at_step: int = 0, at_row: int = 0) -> None:
        for setting, value in (("signal", name), ("at_step", at_step), ("at_row", at_row)):
            monkeypatch.setattr(Stopper, setting, value)

    record = casehard.Results.record

    def recorded(self: Any, *args: Any) -> None:
        record(self, *args)
        if Stopper.signal and len(self.rows) == Stopper.at_row:
            Stopper().stop()

    monkeypatch.setattr(casehard.Results, "record", recorded)
    yield stop
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    config = tmp_path / "stop.yaml"
    config.write_text("trainer:\n  callbacks:\n    - class_path: test_stops.Stopper" + ATTACK)
    run = [
        "--run.root",
        str(tmp_path / "runs"),
        "--run.checkpoint_steps",
        "1",
        "--run.export",
        "false",
        *TINY,
        "--trainer.max_steps",
        "4",
    ]
    return ["fit", "--config", "sbr", "--config", str(config), *run]


def printed(call: Call, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    """What a run that is stopped prints, and how it ends."""
    with pytest.raises(SystemExit) as stop:
        casehard.main(list(words))
    shown = capsys.readouterr()
    return shown.out, f"{shown.err.splitlines()[-1]} {stop.value.code}"


def test_a_stopped_run_goes_on_in_its_folder_by_the_line_that_it_prints(call, line, stopped, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["casehard"])
    folder = tmp_path / "runs/sbr/version_0"
    stopped("SIGINT", at_step=2)
    shown, end = printed(call, capsys, *line)
    assert end == "stopped by Ctrl-C, after 2 steps of training 130"
    command = shlex.split(re.search("To go on from step 1 of 2 done: (.*)", shown)[1])  # type: ignore[index]
    assert command == ["casehard", *line, "--ckpt_path", str(folder / "checkpoints/last.ckpt")]

    stopped("SIGTERM", at_row=2)  # in the attack
    shown, end = printed(call, capsys, *command[1:])
    assert end == "stopped by SIGTERM, after 4 steps of training 143"
    assert "to break" in shown  # the rows that were found
    assert shlex.split(re.search("To go on from step 4 of 4 done: (.*)", shown)[1]) == command  # type: ignore[index]

    stopped(None)
    call(*line, "--ckpt_path", "last")
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]
    assert (folder / "done.json").exists()
    assert [row["num_attack_steps"] for row in csv_rows(folder / "attacks.csv")] == ["0", "1", "2"]
    curves = [row["step"] for name in ("metrics_1", "metrics_2", "metrics") for row in csv_rows(folder / f"{name}.csv") if name]
    assert curves
    assert "`last` finds none" in call(*line, "--ckpt_path", "last", fails=True)  # it has ended
    call(
        *line, "--ckpt_path", str(folder / "checkpoints/last.ckpt"), "--trainer.max_steps", "5"
    )  # a finished one trains on elsewhere
    assert (folder.parent / "version_1/done.json").exists()


def test_an_end_that_lies_behind_is_refused_before_anything_is_changed():
    def check(max_epochs: int | None, epoch: int = 38) -> None:
        config = Namespace(trainer=Namespace(max_epochs=max_epochs))
        Cli._check_epochs(SimpleNamespace(subcommand="fit"), config, {"epoch": epoch})

    with pytest.raises(SettingError, match=r"trainer\.max_epochs must be .* its checkpoint is of epoch 38, and it is 3\. Give"):
        check(3)
    for end in (None, -1, 38, 120):
        check(end)


def test_an_unfinished_run_goes_on_elsewhere_where_a_version_says_so(call, line, stopped, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["casehard"])
    stopped("SIGINT", at_step=2)
    line = [*line[:3], "--config", "experiments/attack/none.yaml", "--trainer.callbacks", "test_stops.Stopper", *line[5:]]
    shown, _ = printed(call, capsys, *line, "--run.version", "first")
    assert "Nothing was attacked" not in shown
    stopped(None)
    checkpoint = str(tmp_path / "runs/sbr/first/checkpoints/last.ckpt")
    call(*line, "--ckpt_path", checkpoint, "--run.version", "second")
    casehard.main([*line, "--ckpt_path", "last", "--run.version", "first"])
    folder = tmp_path / "runs/sbr/first"
    assert f"goes on in {folder} from step 1; earlier curves are metrics_1.csv\n" in capsys.readouterr().err
    assert all((tmp_path / "runs/sbr" / name / "done.json").exists() for name in ("first", "second"))


@pytest.mark.parametrize(("command", "words"), [("fit", "`last` finds none"), ("test", "and it is `last`, by which fit goes on")])
def test_last_without_a_run_to_go_on_with_is_one_sentence(call, tmp_path, command, words):
    error = call(command, "--config", "sbr", "--ckpt_path", "last", "--run.root", str(tmp_path), *TINY, fails=True)
    assert "error: ckpt_path must be a " in error
    assert words in error
    assert not list(tmp_path.iterdir())


class Failing(casehard.Defense):
    """Of an author whose model does not load."""

    def configure_model(self) -> None:
        raise KeyError("a bug")


FAILED = [
    ["--data.num_samples", "100000000"],
    ["--trainer.accelerator", "gpu"],
    [
        "--config",
        "{trainer: {callbacks: [{class_path: casehard.LoRAAttack, init_args: {threat_model: open_weight, num_samples: 99999}}]}}",
    ],
    ["--run.wandb", "offline", "--data.num_samples", "100000000"],
]


@pytest.mark.parametrize("args", FAILED)
def test_a_start_that_fails_leaves_no_folder(call, tmp_path, args):
    call("fit", "--config", "sbr", "--run.root", str(tmp_path), *TINY, *args, fails=True)
    assert not list(tmp_path.glob("sbr/*"))


def test_a_start_that_fails_by_a_bug_leaves_none_either_and_takes_no_folder_of_others(call, tmp_path, monkeypatch):
    with pytest.raises(KeyError, match="a bug"):
        call("fit", "--model", "test_stops.Failing", "--run.root", str(tmp_path), *TINY)
    assert not list(tmp_path.glob("casehard/*"))
    monkeypatch.setenv(RUN_FOLDER, str(tmp_path / "given"))
    (tmp_path / "given").mkdir()
    with pytest.raises(KeyError, match="a bug"):
        call("fit", "--model", "test_stops.Failing", *TINY)
    assert (tmp_path / "given").is_dir()


@pytest.mark.parametrize("kept", ["metrics.csv", "attacks.csv", "checkpoints/x.ckpt", "notes.txt"])
def test_what_holds_more_than_a_start_leaves_is_never_dropped(tmp_path, kept):
    from casehard.cli.run_folder import drop_failed_start

    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run" / kept).write_text("work")
    drop_failed_start(tmp_path / "run")
    assert (tmp_path / "run" / kept).exists()


def test_two_numbers_of_gpus_are_refused(call, tmp_path):
    sizes = ["--config", "experiments/cluster/fsdp2.yaml", "--trainer.devices", "4", "--run.root", str(tmp_path), *TINY]
    error = call("fit", "--config", "patcher", *sizes, fails=True)
    assert (
        "data_parallel_size x tensor_parallel_size must be devices x num_nodes, the number of processes, and 2 x 1 is not 4 x 1"
        in error
    )
