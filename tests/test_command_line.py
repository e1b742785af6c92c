"""The commands, their names and helps, and what they say."""

import logging
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser
from toy import ROOT

import casehard
from casehard.cli.help import USELESS, class_help, public
from casehard.cli.lightning_cli import Cli
from casehard.cli.machine import LIGHTNING, is_news
from casehard.cli.main import OTHERS, TRAINING
from casehard.shipped import experiment
from casehard.version import revision, version_of

# ---- commands


@pytest.mark.parametrize(("args", "guess"), [([], ""), (["foo"], ""), (["fti"], " Did you mean fit?")])
def test_a_line_without_a_command_lists_them_all_and_guesses(call, args, guess):
    error = call(*args, fails=True)
    for name, what in (TRAINING | OTHERS).items():
        assert f"  {name} " in error
        assert what in error
    last, status = error.splitlines()[-2:]
    assert last.startswith("error: the first word must be a command, and ")
    assert (last.partition(".")[2], status) == (guess, "2")


def test_version_and_revision_are_those_of_the_checkout(call, tmp_path):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert revision().removesuffix("-dirty") == head[:12]
    assert call("--version") == f"casehard 0.1.0, git revision {revision()}\n"
    assert revision(tmp_path) == "unknown"


def test_a_checkout_that_is_not_installed_knows_its_version(call, monkeypatch):
    def version(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr("casehard.version.version", version)
    assert call("--version") == f"casehard 0.1.0, git revision {revision()}\n"
    with pytest.raises(PackageNotFoundError, match="torch"):
        version_of("torch")


# ---- names


def test_an_experiment_is_the_users_own_file_or_one_that_comes_with_casehard(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = {ROOT / "experiments/sbr.yaml"}
    assert {Path(experiment(name)).resolve() for name in ("sbr", "sbr.yaml", "experiments/sbr", "experiments/sbr.yaml")} == ours
    assert Path(experiment("attack/quantised")).resolve() == ROOT / "experiments/attack/quantised.yaml"
    assert Path(experiment("sandbox", "experiments/studies")).resolve() == ROOT / "experiments/studies/sandbox.yaml"
    Path("experiments").mkdir()
    for own in ("experiments/sbr.yaml", "sbr.yaml", "sbr"):  # each before those above it
        Path(own).write_text("{}")
        assert experiment("sbr") == own


@pytest.mark.parametrize(
    ("name", "guess"), [("sbrr", "sbr"), ("experiments/sbrr.yaml", "sbr"), ("quantised", "attack/quantised"), ("xyz", "")]
)
def test_a_name_of_nothing_is_refused_with_those_near_it(call, name, guess):
    error = call("fit", "--config", name, fails=True)
    assert f"error: {name!r} must be a file or the name of one of casehard's own under experiments/, and it is neither." in error
    assert ("Did you mean " in error) == bool(guess)
    assert f"Did you mean {guess}? " in error or not guess


@pytest.mark.parametrize(
    ("name", "now"),
    [
        ("lightning_modules.SBRModule", "casehard.SBRModule"),
        ("lightning_modules.sbr.SBRModule", "casehard.SBRModule"),
        ("lightning_modules.engine.Optimizer", "casehard.Optimizer"),
        ("callbacks.LoRAAttack", "casehard.LoRAAttack"),
        ("callbacks.attacks.LoRAAttack", "casehard.LoRAAttack"),
        ("callbacks.fine_tuning.FineTuning", "casehard.callbacks.fine_tuning.FineTuning"),
        ("metrics.RefusalPhraseJudge", "casehard.RefusalPhraseJudge"),
        ("datamodules.SFTDataModule", "casehard.SFTDataModule"),
    ],
)
def test_classes_go_by_the_names_of_earlier_versions(name, now):
    from casehard.cli.yaml_texts import loaded

    assert loaded(f"{{model: [{{class_path: {name}}}]}}") == {"model": [{"class_path": now}]}


def test_a_class_of_the_users_own_room_is_theirs(tmp_path, monkeypatch):
    from casehard.cli.yaml_texts import as_class

    (tmp_path / "metrics.py").write_text("class RefusalPhraseJudge: pass")
    monkeypatch.syspath_prepend(tmp_path)
    for module in [name for name in sys.modules if name.partition(".")[0] == "metrics"]:
        monkeypatch.delitem(sys.modules, module)
    assert as_class("metrics.RefusalPhraseJudge") == "metrics.RefusalPhraseJudge"
    assert as_class("metrics.RubricJudge") == "casehard.RubricJudge"  # which theirs has not
    assert as_class("metrics.csv") == "metrics.csv"


@pytest.mark.parametrize("words", [["--model", "lightning_modules.SBRModule"], ["--model=lightning_modules.sbr.SBRModule"]])
def test_a_class_of_an_earlier_name_may_stand_on_the_line_too(call, words):
    assert yaml.safe_load(call("fit", *words, "--print_config"))["model"]["class_path"] == "casehard.SBRModule"


# ---- texts


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data:\n  num_samples: 8\n  num_samples: 9\n",
            "a key must stand once, and 'num_samples' stands in line 2 and in line 3",
        ),
        (BOMB, "a config must hold at most 1,000,000 values, and with its aliases written out this one holds more."),
        ("[" * 100_000, "a config must be at most 100 levels deep, and line 1 is deeper."),
    ],
)
def test_a_text_that_means_something_else_is_refused(call, tmp_path, text, message):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    assert f"error: own.yaml: {message}" in call("fit", "--config", str(file), fails=True)


def test_an_earlier_config_with_the_settings_that_never_had_a_use_is_read(call):
    text = "{optimizer: null, lr_scheduler: null, trainer: {max_steps: 7}}"
    assert yaml.safe_load(call("fit", "--config", text, "--print_config"))["trainer"]["max_steps"] == 7
    assert "unrecognized arguments: --optimizer Adam" in call("fit", "--optimizer", "Adam", fails=True)


@pytest.mark.parametrize("text", ["{data: {num_samplse: 3}}", "{model: {init_args: {chekpoint: x}}}"])
def test_a_mistake_names_the_help_of_its_command(call, text):
    assert call("fit", "--config", text, fails=True).startswith("casehard fit --help lists the settings.\nerror: ")


# ---- help


class Parsers(Exception):  # noqa: N818  no error: Lightning offers no other way to stop
    """Those of the commands that train."""


class Parsing(Cli):
    def parse_arguments(self, parser: Any, args: Any) -> None:
        raise Parsers({name: self.parser_of(name) for name in TRAINING})


@pytest.fixture(scope="module")
def parsers() -> dict[str, Any]:
    with pytest.raises(Parsers) as found:
        Parsing([])
    return found.value.args[0]


def options(text: str) -> set[str]:
    """The settings that a help lists, but for heads of groups and classes."""
    return set(re.findall(r"^  (?:-c, )?(--[\w.]+\w)(?= |$)", text, re.MULTILINE))


def words(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


@pytest.mark.parametrize("command", list(TRAINING))
def test_help_lists_every_setting_that_the_parser_takes_with_what_its_docstring_says(call, parsers, command):
    shown = call(command, "--help")
    actions = {name: action for action in parsers[command]._actions for name in action.option_strings if name.startswith("--")}
    taken = {name for name in actions if not name.endswith((".help", "+", "--help")) and "_" not in actions[name].dest[:1]}
    groups = {"--trainer", "--data", "--run", "--data.sources", "--data.evaluation", "--data.batching"}
    useless = {f"--trainer.{name}" for name in USELESS}
    assert useless < taken
    assert options(shown) == {
        *taken - groups - useless - {"--weights_only"},
        *(o for o in options(shown) if o.startswith("--model.init_args.")),
    }
    flat = words(shown)
    for name in sorted(o for o in options(shown) if o.startswith(("--run.", "--data."))):
        assert words(actions[name].help or "") in flat
    order = [shown.index(f"\n{part}") for part in ("what runs", "run:", "model:", "data:", "trainer.callbacks:", "trainer:")]
    assert order == sorted(order)
    listing = shown[shown.index("\ntrainer.callbacks:") : shown.index("\ntrainer:")].splitlines()
    assert len(listing) <= 4 * len(public("Callback"))  # a sentence on each
    assert len(shown.splitlines()) - len(listing) < 350  # half of what jsonargparse prints


@pytest.mark.parametrize("name", sorted({**public("Defense"), **public("Callback"), **public("Judge")}))
def test_help_of_a_class_lists_what_its_parser_takes(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(casehard, name), fail_untyped=False, sub_configs=True)
    taken = {action.dest for action in parser._actions} - {"help"}
    shown = class_help(name)
    assert shown is not None
    listed = set(re.findall(r"^  ([a-z][\w.]*)(?: |$|\.\*)", shown.partition("settings (init_args):")[2], re.MULTILINE))
    assert {setting for setting in listed if "." not in setting} == {setting.partition(".")[0] for setting in taken}


def test_help_of_classes_says_what_they_take(call):
    assert "regularisation strength" in call("fit", "--model.help", "SBRModule")
    attack = call("fit", "--trainer.callbacks.help=casehard.LoRAAttack")
    assert "adapter.\n" in attack
    assert "optimizer.learning_rate" in attack
    assert "settings see" not in attack
    judge = call("judge", "--help")
    assert all(f"  {name} " in judge for name in public("Judge"))
    assert "concurrency" in call("judge", "--judge.help", "RubricJudge")


@pytest.mark.parametrize("args", [["fit", "--help"], ["judge", "--help"], ["fit", "--model.help", "SBRModule"]])
def test_help_needs_no_torch(args):
    run = (
        f"import sys, time\nfrom casehard.cli.main import main\nmain({args})\nprint(time.process_time(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, torch = done.stdout.split()[-2:]
    assert torch == "False"
    assert float(seconds) < 2


# ---- what a start prints


def test_a_start_says_what_runs_and_where(call, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run = ["--run.root", str(tmp_path), "--run.wandb", "disabled", "--trainer.accelerator", "cpu"]
    first, second, *_ = call("fit", "--config", "sbr", *run, "--data.num_samples", "100000000", fails=True).splitlines()
    assert first == "casehard fit: reading the settings, and what they need"
    assert second == f"casehard fit: SBRModule from models/sandbox/aligned, in {tmp_path}/sbr/version_0"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_start_says_at_once_what_goes_on_where_somebody_looks(call, monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    error = call("fit", "--config", "sbrr", fails=True)
    assert error.startswith("casehard fit: reading the settings, and what they need\n" if is_terminal else "error: ")


@pytest.mark.parametrize(
    ("level", "file", "kept"),
    [
        (logging.INFO, f"{LIGHTNING}/pytorch/trainer/setup.py", False),
        (logging.WARNING, f"{LIGHTNING}/pytorch/trainer/setup.py", True),
        (logging.INFO, str(ROOT / "engine/adapters.py"), True),
    ],
)
def test_of_what_lightning_says_warnings_are_kept(level, file, kept):
    assert is_news(logging.LogRecord("lightning.pytorch", level, file, 1, "", (), None)) == kept


def test_whoever_stops_reading_sees_no_traceback():
    line = f"{sys.executable} -m casehard fit --help | head -n 1"
    done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout.split()[:3], done.stderr) == (["usage:", "casehard", "fit"], "")
