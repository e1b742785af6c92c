"""`benchmarks/study_beside.py`: cells are those of `casehard study`, the important ones come first, and it ends in time."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml
from toy import ROOT, TINY_STUDY

from casehard.cli.lightning_cli import resolved
from casehard.evidence.study_plan import Cell, cells, read_study

STUDY = yaml.safe_load(TINY_STUDY) | {"seeds": [0, 1]}
STUDY["defenses"]["Broken"] = {
    "configs": ["experiments/sft_alignment.yaml"],
    "train": {
        "configs": ["experiments/patcher.yaml"],
        "settings": {"data.sources.alignment_harmful": [], "trainer.max_steps": 1},
    },
}


@pytest.fixture
def beside(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import study_beside

    return study_beside


def test_cells_are_those_of_the_study_and_one_that_fails_costs_only_what_needs_it(tmp_path, monkeypatch):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(STUDY))
    script = [sys.executable, str(ROOT / "benchmarks/study_beside.py"), "--studies", f"[{file}]", "--seeds", "[0]"]
    places = ["--seconds", "200", "--processes", "2", "--root", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    ran = subprocess.run([*script, *places], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    ended = {Path(folder).name[:-9]: how for folder, how in json.loads((tmp_path / "out/ended.json").read_text()).items()}
    why = ended.pop("broken-train-seed0")
    assert why.startswith("failed: SettingError: data.sources.alignment_harmful must name harmful rows")
    assert (ran.returncode, ended.pop("broken-one_step-seed0")) == (1, "not begun")
    assert ended == dict.fromkeys(["plain-one_step-seed0", "aligned-train-seed0", "aligned-one_step-seed0"], "done")

    monkeypatch.chdir(ROOT)
    study = cells(read_study(str(file)), tmp_path / "runs/tiny", resolved)
    assert {cell.name for cell in study if cell.done} == {*ended}

    with tarfile.open(tmp_path / "out/results.tar.gz") as archive:
        names = archive.getnames()
    assert sum(name.endswith("attacks.csv") for name in names) == 2
    assert not any("generations" in name or "/model/" in name for name in names)


def cell(folder: Path, name: str, needs: str | None = None) -> Cell:
    return Cell(name, "defense", "attack" if needs else "", 0, ["test"], str(folder / "study" / name), "hash", needs)


def test_a_training_is_as_important_as_what_needs_it(beside, tmp_path):
    trainings = [cell(tmp_path, "a"), cell(tmp_path, "b")]
    attacks = [cell(tmp_path, "a-slow", "a"), cell(tmp_path, "a-fast", "a"), cell(tmp_path, "b-fast", "b")]
    other_study = cell(tmp_path / "other", "a")
    ordered = beside.by_importance([*trainings, *attacks, other_study], ["b-fast", "a-fast"])
    assert [each.name for each in ordered] == ["b", "b-fast", "a", "a-fast", "a", "a-slow"]
    assert ordered[4] is other_study


def stub(pipe, threads):
    os.setsid()
    while True:
        words, _ = pipe.recv()
        if "--run.version=killed" in words:
            os._exit(1)
        if "--run.version=endless" in words:
            time.sleep(600)
        pipe.send(("", ""))


def test_it_ends_in_time_and_a_killed_worker_costs_its_cell_alone(beside, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(beside, "work", stub)
    (tmp_path / "study").mkdir()
    names = ["killed", "endless", "first", "second"]
    planned = [cell(tmp_path, name) for name in names] + [cell(tmp_path, "after", "endless")]
    pool, begun = beside.workers(3), time.monotonic()
    everyone = list(pool)
    try:
        ended = beside.run(planned, pool, begun + 4)
    finally:
        for worker in everyone:
            worker.kill()
    assert 4 <= time.monotonic() - begun < 30
    how = {Path(folder).name: why for folder, why in ended.items()}
    assert how == {
        "killed": "failed: its process was killed", "endless": "cut off", "first": "done", "second": "done", "after": "not begun"
    }  # fmt: skip
    assert "endless: cut off" in capsys.readouterr().out
    assert not any(worker.process.is_alive() for worker in everyone)
