import hashlib
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import yaml
from submitit.core.utils import UncompletedJobError
from test_results import ROW
from test_results import replace as with_metrics
from toy import ROOT, TINY_STUDY, mark, start_fork_server

from casehard.cli.lightning_cli import resolved
from casehard.cli.run_folder import NAMED
from casehard.datamodules.fingerprint import Origin, origin
from casehard.datamodules.sources import read_rows
from casehard.engine.checkpoint import checkpoint_files
from casehard.evidence.study import devices, run_all, run_cell, run_study
from casehard.evidence.study_plan import Cell, cells, choose, read_cells, read_study
from casehard.evidence.summary import collect
from casehard.records.files import config_hash, named_files
from casehard.records.marker import rests_on
from casehard.records.rows import Run, write_run


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def start(file: Path, root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "casehard", "study", str(file), "--root", str(root), "--parallel", "1"]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


PYTHON = sys.executable
SCRIPT = """#!{python} -S
import json, os, sys, time
from pathlib import Path
from shutil import copytree
here = Path(__file__).parent
named = dict(word[2:].split("=", 1) for word in sys.argv if "=" in word)
folder = Path(named["run.root"], named["run.experiment"], named["run.version"])
with (here / "ran").open("a") as file:
    file.write(folder.name + "\\n")

def leave(left):  # what a run left, as this cell's
    copytree(left, folder, dirs_exist_ok=True)
    index = folder.parent / "cells.json"
    own = [c["config"] for c in json.loads(index.read_text()) if c["folder"] == str(folder)] if index.exists() else []
    marker = json.loads((folder / "done.json").read_text())
    (folder / "done.json").write_text(json.dumps(marker | {{"config": own[0]}} if own else marker))

"""


class Command:
    """``python -m casehard`` of these tests' cells: a script of a few lines instead, which notes what it ran."""

    def __init__(self, folder: Path) -> None:
        self.here, self.path = folder, folder / "command"
        self.left = folder / "left"  # by default the marker of a run

    def does(self, text: str = "leave(here / 'left')") -> "Command":
        self.path.write_text(SCRIPT.format(python=PYTHON) + text)
        self.path.chmod(0o755)
        return self

    def ran(self) -> list[str]:
        """Folders of the cells that ran, without the hashes of their configs."""
        noted = self.here / "ran"
        return [re.sub(r"-[0-9a-f]{8}$", "", line) for line in noted.read_text().splitlines()] if noted.exists() else []


@pytest.fixture
def command(tmp_path, monkeypatch) -> Command:
    (tmp_path / "commands").mkdir()
    command = Command(tmp_path / "commands").does()
    mark(command.left)
    monkeypatch.setattr(sys, "executable", str(command.path))
    return command


def study_of(script: str, file: str, root: str) -> None:
    sys.executable = script
    run_study(resolve, file, root, 1, None, {})


def test_a_study_that_is_killed_goes_on_and_runs_no_cell_twice(tmp_path, command):
    file, root = tmp_path / "tiny.yaml", tmp_path / "runs"
    file.write_text(TINY_STUDY)
    command.does("folder.mkdir()\nwhile not (here / 'go').exists():\n    time.sleep(0.01)\nleave(here / 'left')")
    start_fork_server()
    first, second = (
        get_context("forkserver").Process(target=study_of, args=(str(command.path), str(file), str(root))) for _ in range(2)
    )
    first.start()
    while not command.ran() or not (folders := [path for path in (root / "tiny").iterdir() if path.is_dir()]):
        assert first.is_alive()
        time.sleep(0.01)
    first.kill()  # its cell runs on
    first.join()
    running = folders[0].stat().st_ino
    second.start()
    time.sleep(0.2)
    assert len(command.ran()) == 1  # the cell is waited for, and not begun anew
    (command.here / "go").touch()
    second.join()
    assert second.exitcode == 0
    assert folders[0].stat().st_ino == running
    found = read_cells(root / "tiny")
    assert (
        [cell.name for cell in found]
        == command.ran()
        == ["aligned-train-seed0", "plain-one_step-seed0", "aligned-one_step-seed0"]
    )
    assert all(cell.done for cell in found)
    assert f"--model.init_args.checkpoint={found[0].folder}/model" in found[2].words
    run_study(resolve, str(file), str(root), 1, None, {})
    assert len(command.ran()) == 3  # nothing was left to do


@pytest.mark.slow
def test_a_study_of_real_runs_that_is_killed_goes_on(tmp_path):
    file, root = tmp_path / "tiny.yaml", tmp_path / "runs"
    file.write_text(TINY_STUDY)
    first = start(file, root)
    index = root / "tiny" / "cells.json"
    try:
        while not index.exists() or not (
            folders := [Path(c["folder"]) for c in json.loads(index.read_text()) if Path(c["folder"]).is_dir()]
        ):
            assert first.poll() is None, first.communicate()
            time.sleep(0.05)
    finally:
        os.kill(first.pid, signal.SIGKILL)  # its cell runs on
    first.communicate()
    running = folders[0].stat().st_ino
    shown, errors = start(file, root).communicate(timeout=300)
    assert "3 of 3 cells done" in shown, errors
    assert folders[0].stat().st_ino == running  # it was waited for, not begun anew
    found = [Cell(**c) for c in json.loads(index.read_text())]
    assert [cell.name for cell in found] == ["aligned-train-seed0", "plain-one_step-seed0", "aligned-one_step-seed0"]
    assert all(cell.done for cell in found)
    used = yaml.safe_load(Path(found[2].folder, "config.yaml").read_text())
    assert used["model"]["init_args"]["checkpoint"] == f"{found[0].folder}/model"
    before = {path: path.stat().st_mtime_ns for path in root.rglob("done.json")}
    run_study(resolved, str(file), str(root), None, None, {})
    assert {path: path.stat().st_mtime_ns for path in root.rglob("done.json")} == before  # nothing was left to do


def resolve(words: list[str]) -> str:
    prompts = "sandbox:validation/harmful#train[:2]" if "--prompts=held_out" in words else "sandbox:test/harmful#train[:2]"
    return yaml.safe_dump({"words": words, "data": {"sources": {"harmful_prompts": [prompts]}}})


def with_model(words: list[str]) -> str:
    """As ``resolve``, with the model's class as the config files have it."""
    files = [yaml.safe_load((ROOT / word).read_text()) for word in words if word.startswith("experiments/") and "=" not in word]
    models = [file["model"] for file in files if "model" in file]
    return yaml.safe_dump({"words": words, "model": models[-1]})


def cell(name: str, folder: Path, needs: str | None = None, words: tuple[str, ...] = ()) -> Cell:
    return Cell(name, "d", "a", 0, list(words), str(folder / "study" / name), "hash", needs)


def finish(cell: Cell) -> None:
    mark(Path(cell.folder), config=cell.config)


def test_a_cell_that_fails_is_named_and_so_is_what_needed_it(tmp_path, capsys):
    todo = [cell("train", tmp_path), cell("attack", tmp_path, "train"), cell("other", tmp_path)]
    ran = []

    def run(cell: Cell) -> str | None:
        ran.append(cell.name)
        return "exit status 1: out of memory" if cell.name == "train" else None

    assert run_all(todo, run, 2) == {"train": "exit status 1: out of memory", "attack": "train failed"}
    assert sorted(ran) == ["other", "train"]
    assert "failed: train: exit status 1: out of memory" in capsys.readouterr().err


def test_a_cell_that_raises_is_named_with_its_reason_and_the_others_go_on(tmp_path, command):
    file, root = tmp_path / "three.yaml", tmp_path / "runs"
    file.write_text("defenses: {Trained: {train: {settings: {s: 1}}}, Plain: {}}\nattacks: {a: {}}\nseeds: [0]")
    (training, *_) = cells(read_study(str(file)), root / "three", resolve)
    Path(f"{training.folder}.lock").mkdir(parents=True)  # where a file must be
    why = r"IsADirectoryError: .*Is a directory: '.*trained-train-seed0-.*\.lock'"
    with pytest.raises(SystemExit, match=f"trained-train-seed0: {why}\n  trained-a-seed0: trained-train-seed0 failed") as stop:
        run_study(resolve, str(file), str(root), 1, None, {})
    assert isinstance(stop.value.code, str)  # printed, with exit status 1
    assert command.ran() == ["plain-a-seed0"]


def test_a_job_that_the_cluster_ended_is_named_with_its_reason(tmp_path):
    def ended(_: Cell) -> str | None:
        raise UncompletedJobError("Job 7 has no output, state TIMEOUT")

    assert run_all([cell("a", tmp_path)], ended, 1) == {"a": "UncompletedJobError: Job 7 has no output, state TIMEOUT"}


def test_done_cells_are_left_alone_and_others_wait_for_what_they_need(tmp_path):
    todo = [
        cell("train", tmp_path),
        cell("attack", tmp_path, "train"),
        cell("trained", tmp_path),
        cell("again", tmp_path, "trained"),
    ]
    finish(todo[2])
    ran = []
    assert run_all(todo, lambda cell: ran.append(cell.name), 4) == {}  # type: ignore[func-returns-value]
    assert sorted(ran) == ["again", "attack", "train"]
    assert ran.index("train") < ran.index("attack")


def test_a_cell_that_needs_one_that_failed_before_is_not_waited_for(tmp_path):
    assert run_all([cell("attack", tmp_path, "train")], lambda _: None, 1) == {"attack": "train failed"}


def test_a_cell_that_died_half_way_is_begun_anew_and_a_failing_one_says_why(tmp_path, command):
    broken = cell("broken", tmp_path)
    Path(broken.folder).mkdir(parents=True)
    Path(broken.folder, "attacks.csv").write_text("half")
    command.does("print('error: out of memory')\nsys.exit(2)")
    assert run_cell(broken) == f"exit status 2: error: out of memory ({broken.folder}.log)"
    assert not Path(broken.folder).exists()


@pytest.mark.parametrize("ended", [False, True])
def test_the_trials_of_a_killed_cell_are_kept_and_those_of_one_that_ended_are_not(tmp_path, command, ended):
    some = cell("some", tmp_path)
    trials = Path(f"{some.folder}.trials")  # where a search keeps them by default
    Path(some.folder).mkdir(parents=True)
    trials.write_text("trials")
    if ended:  # it is run again, as another casehard wrote it
        mark(Path(some.folder), config=some.config, versions={"casehard": "99.0"})
    run_cell(some)
    assert command.ran() == ["some"]
    assert trials.exists() != ended


def test_a_marker_of_another_config_does_not_count(tmp_path):
    other = cell("a", tmp_path)
    assert not other.done
    finish(other)
    assert other.done
    mark(Path(other.folder), config="of other settings")
    assert not other.done


@pytest.fixture
def rested(tmp_path) -> Cell:
    """A finished cell, whose marker says what it was made from."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "rubric.txt").write_text("Grade it.")
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text(name)
    some = cell("a", tmp_path)
    finish(some)
    sources = [f"{tmp_path}/rows.jsonl#train[:1]", "sandbox:test/harmful", "some_hub/id", f"{tmp_path}/gone.jsonl"]
    rows = {source: read_rows(source) for source in sources[:2]}
    made = {
        "data": [origin("harmful", source, rows.get(source, []))._asdict() for source in sources],
        "files": {name: checkpoint_files(name) for name in (f"{tmp_path}/model", f"{tmp_path}/rubric.txt", "some_hub/model")},
        "versions": {"casehard": version("casehard")},
    }
    mark(Path(some.folder), config=some.config, **made)
    return some


def ran_again(cell: Cell) -> list[str]:
    ran: list[str] = []
    assert run_all([cell], lambda cell: ran.append(cell.name), 1) == {}  # type: ignore[func-returns-value]
    return ran


@pytest.mark.parametrize("name", ["rows.jsonl", "rubric.txt", "model/config.json", "model/model.safetensors"])
def test_a_cell_whose_files_changed_runs_again_and_says_which(rested, tmp_path, capsys, name):
    assert ran_again(rested) == []
    (tmp_path / name).write_text((tmp_path / name).read_text()[::-1])  # as long as before
    assert ran_again(rested) == ["a"]
    assert re.search(rf"a: {tmp_path}/{name.split('/')[0]}(#train\[:1\])? changed", capsys.readouterr().out)
    shutil.rmtree(tmp_path / "model")
    for gone in ("rows.jsonl", "rubric.txt"):
        (tmp_path / gone).unlink()
    assert ran_again(rested) == []  # nothing shows that it was another


def test_a_cell_whose_files_change_while_it_runs_says_so(rested, tmp_path, command):
    shutil.copytree(rested.folder, command.left, dirs_exist_ok=True)
    (tmp_path / "rows.jsonl").write_text("changed")
    command.does(f"leave(here / 'left')\nPath({str(tmp_path / 'rows.jsonl')!r}).write_text('changed again')")
    assert run_cell(rested) == f"{tmp_path}/rows.jsonl#train[:1] changed while it ran"


def test_a_cell_of_another_casehard_runs_again(rested, monkeypatch, capsys):
    monkeypatch.setattr("casehard.evidence.study_plan.version_of", lambda _: "99.0")
    assert ran_again(rested) == ["a"]
    assert f"a: casehard {version('casehard')} is 99.0 now" in capsys.readouterr().out


def test_other_rows_of_the_sandbox_are_noticed(rested, monkeypatch, capsys):
    monkeypatch.setattr("casehard.datamodules.fingerprint._present_digest", lambda _: "another")
    assert ran_again(rested) == ["a"]
    assert "a: sandbox:test/harmful changed" in capsys.readouterr().out


def test_what_attacks_a_model_that_comes_out_different_runs_again(rested, tmp_path, capsys):
    train, attack = cell("train", tmp_path), replace(rested, needs="train")
    assert attack.done

    def run(cell: Cell) -> None:
        ran.append(cell.name)
        if cell.name == "train":
            finish(cell)
            (tmp_path / "model" / "model.safetensors").write_text("other weights")

    ran: list[str] = []
    run_all([train, attack], run, 2)
    assert ran == ["train", "a"]
    assert f"a: {tmp_path}/model changed" in capsys.readouterr().out


BAD_MARKERS: dict[str, bytes] = {
    "empty": b"", "garbage": b"{", "a list": b"[1]", "a number": b"1", "no text": b"\xff\xfe", "deep": b"[" * 100_000,
    "keys missing": b'{"config": "hash"}', "wrong types": b'{"config": ["hash"]}',
}  # fmt: skip


def spoil(folder: Path, how: str) -> None:
    """Put something else in a marker's place."""
    marker = folder / "done.json"
    if how == "a folder":
        marker.unlink()
        marker.mkdir()
    elif how == "a wrong type":
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"steps": "many"}))
    else:
        marker.write_bytes(BAD_MARKERS[how])


@pytest.mark.parametrize("how", [*BAD_MARKERS, "a folder", "a wrong type"])
def test_a_marker_that_cannot_be_read_counts_as_not_done(tmp_path, how, capsys):
    some = cell("a", tmp_path)
    finish(some)
    assert ran_again(some) == []
    spoil(Path(some.folder), how)
    assert not some.done
    assert ran_again(some) == ["a"]
    assert re.search(r"a: .*study/a/done.json is no marker", capsys.readouterr().out)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"a": 1}', '[{"name": 1}]', "cell", '"cell"', "\ud800", "outside"], ids=lambda text: text or "empty"
)
def test_a_list_of_cells_that_is_none_is_named(tmp_path, text):
    own = asdict(cell("a", tmp_path)) | ({"folder": f"{tmp_path}/study/.."} if text == "outside" else {"seed": "0"})
    text = json.dumps([own]) if text in ("outside", "cell") else text
    (tmp_path / "cells.json").write_text(text, errors="surrogatepass")
    for read in (lambda: read_cells(tmp_path), lambda: collect([tmp_path])):
        with pytest.raises(ValueError, match=r"cells.json must be the list of cells that `casehard study` wrote, and it is not"):
            read()


@pytest.fixture
def own_package(tmp_path, monkeypatch) -> Iterator[Path]:
    """A user's package of a defense and what that imports, which is loaded; in it nothing is installed."""
    package = tmp_path / "a_users_lab"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "penalty.py").write_text("WEIGHT = 1.0\n")
    (package / "defense.py").write_text(
        "from a_users_lab.penalty import WEIGHT\nfrom casehard import Defense\n\n\nclass Near(Defense):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("a_users_lab.defense")
    yield package
    for name in [name for name in sys.modules if name.startswith("a_users_lab")]:
        del sys.modules[name]


def rested_on(started: float = math.inf) -> dict[str, Any]:
    model = {"class_path": "a_users_lab.defense.Near", "init_args": {"checkpoint": "models/sandbox/base"}}
    return rests_on({"model": model, "data": {}, "trainer": {}}, [], NAMED, started)


def test_a_recipe_is_what_a_trained_model_rests_on_and_neither_its_seed_nor_how_it_is_scored():
    def recipe(sha256: str = "a", sources: dict[str, Any] | None = None, **data: Any) -> str:
        read = {"harmful": ["rows.jsonl"], "refusal_texts": ["No."], "task": ["task.jsonl"], "benign_prompts": []}
        settings = {
            "sources": read | (sources or {}),
            "batching": {"batch_size": 8},
            "evaluation": {"num_evaluated": 2},
            "seed": 0,
        }
        model = {"class_path": "casehard.Defense", "init_args": {}}
        origins = [Origin("harmful", "rows.jsonl", 1, sha256)]
        return str(rests_on({"model": model, "data": settings | data, "trainer": {}}, origins, [], math.inf)["recipe"])

    same = [{"seed": 1}, {"evaluation": {"num_evaluated": 9}}, {"judge": "another"}]
    same += [{"sources": {name: ["moved.jsonl"]}} for name in ("harmful", "task", "benign_prompts")]
    assert {recipe(**settings) for settings in same} == {recipe()}
    other = [
        {"sha256": "b"},
        {"batching": {"batch_size": 9}},
        {"train_on": "alignment"},
        {"sources": {"refusal_texts": ["Never."]}},
    ]
    assert len({recipe(), *(recipe(**settings) for settings in other)}) == 5


def test_the_code_of_a_run_is_what_it_loaded_and_did_not_install(own_package):
    code = rested_on()["code"]
    assert {
        "a_users_lab.defense",
        "a_users_lab.penalty",
        "casehard.callbacks.attack",
        "casehard.lightning_modules.defense",
        "casehard",
    } <= set(code)
    assert code["a_users_lab.penalty"] == hashlib.sha256(b"WEIGHT = 1.0\n").hexdigest()
    assert not [name for name in code if name.split(".")[0] in ("torch", "yaml", "json", "evidence", "pytest")]


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("name", ["defense.py", "penalty.py"])
def test_a_cell_whose_users_code_changed_runs_again_and_says_which(own_package, tmp_path, capsys, name, loaded):
    some = cell("a", tmp_path)
    mark(Path(some.folder), config=some.config, **rested_on())
    if not loaded:  # as where the study starts again
        for module in ("a_users_lab.defense", "a_users_lab.penalty"):
            del sys.modules[module]
    assert ran_again(some) == []
    (own_package / name).write_text("WEIGHT = 2.0\n")
    assert ran_again(some) == ["a"]
    assert f"a: {own_package / name} changed" in capsys.readouterr().out


def test_a_cell_whose_casehard_was_edited_runs_again_and_says_where(own_package, tmp_path, monkeypatch, capsys):
    some = cell("a", tmp_path)
    mark(Path(some.folder), config=some.config, **rested_on())
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "callbacks", clone / "casehard/callbacks")
    monkeypatch.setattr("casehard.records.marker.ROOT", clone)
    assert ran_again(some) == []
    with (clone / "casehard/callbacks/attack.py").open("a") as file:
        file.write("# another\n")
    assert ran_again(some) == ["a"]
    assert "a: casehard/callbacks/attack.py changed" in capsys.readouterr().out


def test_code_and_files_that_are_edited_while_a_run_goes_on_do_not_count_as_what_it_ran(own_package, tmp_path):
    some = cell("a", tmp_path)
    edited = (own_package / "penalty.py").stat().st_mtime
    mark(Path(some.folder), config=some.config, **rested_on(started=edited + 1))
    assert some.done
    mark(Path(some.folder), config=some.config, **rested_on(started=edited - 1))
    assert not some.done
    assert re.fullmatch(r".*a_users_lab/\w+.py changed while it ran", some.changed())


@pytest.fixture
def trained(tmp_path) -> Cell:
    """A finished training, and what it exported."""
    some = cell("train", tmp_path)
    (Path(some.folder) / "model").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        Path(some.folder, "model", name).write_text(name)
    finish(some)
    return some


@pytest.mark.parametrize("how", ["other bytes", "gone", "one more", "all gone"])
def test_a_training_whose_model_is_not_what_it_left_trains_again(trained, capsys, how):
    model = Path(trained.folder, "model")
    (model / "README.md").write_text("A card, which nobody loads.")
    assert ran_again(trained) == []
    match how:
        case "other bytes":
            (model / "tokenizer.model").write_text("lengthened")
        case "gone":
            (model / "config.json").unlink()
        case "one more":
            (model / "adapter_config.json").write_text("{}")
        case "all gone":
            shutil.rmtree(model)
    assert not trained.done
    assert ran_again(trained) == ["train"]
    assert f"train: {model} is not what its run left" in capsys.readouterr().out


def test_no_attack_starts_on_a_model_that_its_training_did_not_leave(trained, tmp_path):
    ran = []

    def run(some: Cell) -> None:
        ran.append(some.name)
        Path(trained.folder, "model", "model.safetensors").write_text("spoilt by now")

    trained, before, attack = replace(trained), cell("before", tmp_path), cell("attack", tmp_path, "late")
    late = replace(trained, name="late", needs="before")  # so that its attack waits until all else has run
    assert run_all([late, before, attack], run, 1) == {"attack": f"late: {trained.folder}/model is not what its run left"}
    assert "attack" not in ran


def test_results_that_are_not_what_a_run_left_are_found_again(tmp_path, capsys):
    some = cell("a", tmp_path)
    attacked(some, 0, 10, 20)
    assert some.done
    path = Path(some.folder, "attacks.csv")
    path.write_text(path.read_text().replace("20", "2"))
    assert ran_again(some) == ["a"]
    assert f"a: {path} is not what its run left" in capsys.readouterr().out
    path.unlink()
    assert not some.done


def test_cells_that_changed_while_a_study_ran_are_named_at_its_end(tmp_path, command):
    file, rows = tmp_path / "two.yaml", tmp_path / "rows.jsonl"
    file.write_text("defenses: {d: {}}\nattacks: {a: {}}\nseeds: [0, 1]")
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    mark(command.left, data=[origin("harmful", str(rows), read_rows(str(rows)))._asdict()])
    mark(command.here / "without")
    changed = '{"prompt": "a", "response": "c"}\n'
    command.does(
        f"if 'seed0' in folder.name:\n    leave(here / 'left')\nelse:\n    leave(here / 'without')\n"
        f"    Path({str(rows)!r}).write_text({changed!r})"
    )
    with pytest.raises(SystemExit, match=r"d-a-seed0: .*rows.jsonl changed since it ran"):
        run_study(resolve, str(file), str(tmp_path), 1, None, {})


def test_other_settings_get_another_folder_down_to_what_depends_on_them(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY_STUDY)
    first = cells(read_study(str(file)), tmp_path, resolve)
    file.write_text(TINY_STUDY.replace("trainer.max_steps: 1", "trainer.max_steps: 2"))
    second = cells(read_study(str(file)), tmp_path, resolve)
    assert [a.folder == b.folder for a, b in zip(first, second, strict=True)] == [False, True, False]
    file.write_text(TINY_STUDY)
    assert cells(read_study(str(file)), tmp_path, resolve) == first


def test_a_config_counts_by_its_values_and_not_by_where_the_run_goes():
    assert config_hash("a: 1\nb: [x]\nrun: {root: here}") == config_hash("run: {root: there}\nb: [x]\na: 1")
    assert config_hash("a: 1") != config_hash("a: 2")


def test_the_files_that_a_config_names_are_found_wherever_they_stand_and_whatever_the_setting_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "theirs", "empty"):
        Path(name).mkdir()
    for name in (
        "model/config.json",
        "theirs/tokenizer_config.json",
        "anchors.json",
        "rubric.txt",
        "rows.jsonl",
        "cache",
        "steps.pt",
    ):
        Path(name).touch()
    config = {
        "model": {
            "class_path": "a_users_lab.Nobody_knows_it",
            "init_args": {
                "checkpoint": "model",
                "base": "some_hub/id",
                "anchors": "anchors.json#train[:3]",
                "extra": {"a": ["steps.pt"]},
            },
        },
        "data": {
            "sources": {"benign": ["rows.jsonl"]},
            "judge": {"init_args": {"rubric": "rubric.txt", "cache": "cache", "checkpoint": None}},
        },
        "trainer": {"default_root_dir": "empty", "callbacks": [{"init_args": {"undefended": "theirs"}}, {"checkpoint": "model"}]},
        "run": {"root": "empty", "experiment": "rows.jsonl"},
        "ckpt_path": "steps.pt",
    }
    assert named_files(config) == ["model", "anchors.json", "steps.pt", "rubric.txt", "theirs"]
    assert named_files({"model": {"template": "{prompt} {response}" * 500, "checkpoint": "\0"}}) == []


def test_the_sandbox_study_is_three_by_four_by_three_with_adaptive_attackers_and_every_cell_resolves(tmp_path):
    study = read_study("experiments/studies/sandbox.yaml")
    found = cells(study, tmp_path, with_model)
    assert len([c for c in found if c.attack]) == 36 + 6
    assert {c.defense for c in found if c.attack == "adaptive"} == {"SBR", "Patcher"}
    assert len([c for c in found if not c.attack]) == 6
    assert {c.needs for c in found if c.defense == "SBR"} == {c.needs for c in found if c.defense == "SFT alignment" and c.attack}
    assert len({c.folder for c in found}) == 48
    for some in (found[0], found[3], *found[6:20]):  # each kind of cell, of one seed
        config = yaml.safe_load(resolved(some.words))
        attacks = config["trainer"]["callbacks"]
        assert len(attacks) == ({"SBR": 4, "Patcher": 4}[some.defense] if some.attack == "adaptive" else 1 if some.attack else 0)
        assert config["data"]["seed"] == some.seed


CHOOSING = """
defenses: {Plain: {}, Guarded: {}}
attacks:
  grid:
    settings: {s: 1}
    choices: {slow: {settings: {rate: 1}}, fast: {settings: {rate: 2}}}
  fixed: {}
seeds: [0, 1, 2]
validation: {settings: {prompts: held_out}}
"""


def attacked(cell: Cell, *scores: float) -> None:
    """A finished cell, with these harmful scores at steps 0, 10 and 50."""
    rows = [
        with_metrics(ROW, evaluation=n, num_attack_steps=n, harmful_score=s) for n, s in zip((0, 10, 50), scores, strict=True)
    ]
    write_run(Run(Path(cell.folder), rows, []), answers=False)
    finish(cell)


def test_the_attacker_is_reported_with_what_does_best_on_validation_prompts(tmp_path):
    file = tmp_path / "choosing.yaml"
    file.write_text(CHOOSING)
    study = read_study(str(file))
    first = cells(study, tmp_path / "study", resolve)
    tried = [cell for cell in first if cell.tries]
    assert len(tried) == 2 * 2 * 3
    assert all("--prompts=held_out" in cell.words for cell in tried)
    assert {cell.attack for cell in first if not cell.tries} == {"fixed"}  # what is reported of the other is not known yet
    assert choose(first) == {}
    sooner = {("Plain", "slow"): [[0, 0, 90], [0, 60, 90], [0, 60, 90]], ("Plain", "fast"): [[0, 60, 90], [0, 0, 99], [0, 0, 99]]}
    higher = {("Guarded", "slow"): [[0, 1, 2]] * 3, ("Guarded", "fast"): [[0, 0, 3]] * 3}
    for cell in tried:
        attacked(cell, *(sooner | higher)[cell.defense, cell.tries][cell.seed])
    assert choose(first) == {("Plain", "grid"): "slow", ("Guarded", "grid"): "fast"}
    second = cells(study, tmp_path / "study", resolve, choose(first))
    reported = {(c.defense, c.seed): c for c in second if c.attack == "grid" and not c.tries}
    assert len(reported) == 6
    assert "--rate=1" in reported["Plain", 0].words
    assert "--rate=2" in reported["Guarded", 0].words
    assert not [c for c in reported.values() if "--prompts=held_out" in c.words]
    assert all(cell in second for cell in first)
    shutil.rmtree(tried[0].folder)
    assert choose(first) == {("Guarded", "grid"): "fast"}


def test_a_study_tries_then_reports_and_its_report_shows_no_trial(tmp_path, command, capsys):
    file = tmp_path / "choosing.yaml"
    file.write_text(CHOOSING.replace("seeds: [0, 1, 2]", "seeds: [0]"))
    for name, end in (("fast", 60), ("other", 40)):
        attacked(replace(cell("a", tmp_path), folder=str(command.here / name)), 0, 30, end)
    command.does("leave(here / ('fast' if '--rate=2' in sys.argv else 'other'))")
    run_study(resolve, str(file), str(tmp_path), None, None, {})
    ran = command.ran()
    assert sorted(ran[-2:]) == ["guarded-grid-fast-seed0", "plain-grid-fast-seed0"]
    assert len(ran) == len(set(ran)) == 2 * (2 + 1 + 1)
    assert "grid, on Plain: fast, chosen on validation prompts" in capsys.readouterr().out
    run_study(resolve, str(file), str(tmp_path), None, None, {})
    assert command.ran() == ran  # nothing is run twice
    shown = collect([tmp_path / "choosing"])
    assert {(one.defense, one.attack) for one in shown} == {(d, a) for d in ("Plain", "Guarded") for a in ("grid", "fixed")}
    assert len(shown) == 4


def test_prompts_that_are_reported_on_may_not_choose(tmp_path):
    file = tmp_path / "chosen.yaml"
    text = Path("experiments/studies/sandbox_chosen.yaml").read_text()
    file.write_text(text.replace("sandbox:validation/harmful", "sandbox:test/harmful#train[:7]"))
    with pytest.raises(
        ValueError, match="validation must hold other prompts than those that are reported on, and 7 stand in both"
    ):
        run_study(resolved, str(file), str(tmp_path), None, None, {})
    assert list(tmp_path.iterdir()) == [file]


def test_settings_of_a_study_count_before_files_and_later_parts_before_earlier_ones(tmp_path):
    rows = [f"{ROOT / 'tests' / name}.json" for name in ("refusals", "other")]
    given = {
        "common": {"configs": ["data/sandbox_sentiment"], "settings": {"data.sources.task": rows[:1]}},
        "defenses": {
            "files": {"configs": ["sft_alignment", "data/other_wordings"]},
            "settings": {"configs": ["sft_alignment"], "settings": {"data.sources.task": rows[1:]}},
        },
        "attacks": {"none": {"configs": ["attack/none"], "settings": {"data.evaluation.num_evaluated": 7}}},
        "seeds": [0],
        "adaptive": False,
    }
    file = tmp_path / "order.yaml"

    def found() -> dict[str, Any]:
        file.write_text(yaml.safe_dump(given, sort_keys=False))
        return {cell.defense: yaml.safe_load(resolved(cell.words)) for cell in cells(read_study(str(file)), tmp_path, resolve)}

    configs = found()
    assert configs["files"]["data"]["sources"]["task"] == rows[:1]  # which a defense's file sets, too, and comes after
    assert configs["settings"]["data"]["sources"]["task"] == rows[1:]
    assert configs["files"]["data"]["evaluation"]["num_evaluated"] == 7
    given["common"].pop("settings")
    words = yaml.safe_load((ROOT / "experiments/data/other_wordings.yaml").read_text())["data"]["sources"]["task"]
    assert found()["files"]["data"]["sources"]["task"] == words  # not common's file


def test_the_study_that_chooses_resolves_to_its_learning_rates_and_prompts(tmp_path):
    found = cells(read_study("experiments/studies/sandbox_chosen.yaml"), tmp_path, resolve)
    assert len(found) == 2 * 3 * 3
    for cell, rate in zip(found[:3], (1e-4, 2e-4, 5e-4), strict=True):
        config = yaml.safe_load(resolved(cell.words))
        assert config["trainer"]["callbacks"][0]["init_args"]["optimizer"]["learning_rate"] == rate
        assert config["data"]["sources"]["harmful_prompts"] == ["sandbox:validation/harmful"]


def test_a_cell_that_cannot_work_stops_the_study_before_it_runs(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY_STUDY.replace("data.evaluation.num_evaluated", "data.number_evaluated"))
    with pytest.raises(ValueError, match="every cell must be a command that works, and this one does not: fit"):
        run_study(resolved, str(file), str(tmp_path), None, None, {})
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defenses: {}\nattacks: {a: {}}\nseeds: [0]", "defenses must be at least one, each with a name of its own, got none"),
        ("defenses: {d: {}}\nattacks: {a b: {}, A-B: {}}\nseeds: [0]", "attacks must be at least one, each with a name of its own, got a b, A-B"),
        ("defenses: {d: {}}\nattacks: {a: {}}\nseeds: []", "seeds must be at least one, each with a name of its own, got none"),
        ("defenses: {d: {trains: 1}}\nattacks: {a: {}}\nseeds: [0]", r"defenses\.d must hold configs, settings, train alone, got 'trains'\. Settings of the runs stand under settings\."),
        ("defenses: {d: {}}\nattacks: {a: {choices: {x y: {}, X-Y: {}}}}\nseeds: [0]", "choices must be at least one, each with a name of its own, got x y, X-Y"),
        ("seeds: [0]", "must be YAML that describes a study .*, but .*attacks"),
        ("[]", "must be YAML that describes a study"),
        ("defenses: [", "must be YAML that describes a study by defenses, attacks and seeds, but while parsing"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_study_is_told_so(tmp_path, text, message):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_study(str(tmp_path / "study.yaml"))


def test_parallel_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="parallel must be >= 1 or null, got 0"):
        run_study(resolve, "x.yaml", str(tmp_path), 0, None, {})


def test_cells_are_shared_out_over_the_cuda_devices_that_are_visible(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices() == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert devices() == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]


@pytest.mark.parametrize(
    ("parallel", "cluster", "num_devices", "own", "threads"),
    [
        (2, None, 0, None, "1"),
        (2, None, 0, "4", "4"),
        (1, None, 0, None, None),
        (2, None, 2, None, None),
        (None, "debug", 0, None, None),
    ],
)
def test_cells_get_a_thread_each_only_where_they_share_the_cores(
    tmp_path, monkeypatch, command, parallel, cluster, num_devices, own, threads
):
    file = tmp_path / "one.yaml"
    file.write_text("defenses: {d: {}}\nattacks: {a: {}}\nseeds: [0, 1]")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_devices)
    command.does("print(os.environ.get('OMP_NUM_THREADS'))\nsys.exit(1)")
    with pytest.raises(SystemExit) as stop:
        run_study(resolve, str(file), str(tmp_path), parallel, cluster, {})
    assert re.findall(r"d-a-seed.: exit status 1: (\S+)", str(stop.value.code)) == [str(threads)] * 2


def test_a_cell_that_fails_in_a_job_says_why(tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text("defenses: {d: {}}\nattacks: {a: {}}\nseeds: [0]")
    (only,) = cells(read_study(str(file)), tmp_path / "one", resolve)
    Path(f"{only.folder}.lock").mkdir(parents=True)  # where a file must be
    with pytest.raises(SystemExit, match=r"d-a-seed0: FailedJobError(.|\n)*IsADirectoryError: .*d-a-seed0-.*\.lock"):
        run_study(resolve, str(file), str(tmp_path), None, "local", {"timeout_min": 2})
    assert list((tmp_path / "one" / "jobs").glob("*_result.pkl"))


def test_a_cell_that_a_job_ran_is_done(tmp_path, command):
    file = tmp_path / "one.yaml"
    file.write_text("defenses: {d: {}}\nattacks: {a: {}}\nseeds: [0]")
    for _ in range(2):  # a done one is left alone
        run_study(resolve, str(file), str(tmp_path), None, "debug", {})
    assert command.ran() == ["d-a-seed0"]
