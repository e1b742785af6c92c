"""The journey of somebody with a package of their own, from the templates to a report; none of it is in casehard's folder."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from toy import ROOT

import casehard
from casehard.cli.listing import listed
from casehard.cli.signatures import folder_of
from casehard.evidence.report import write_report
from casehard.evidence.study_plan import read_cells

NAMES = {"defense": "StayClose", "attack": "LastLayer", "judge": "LengthJudge", "metric": "StartsRight"}
PATHS = {what: f"mylab.my_{what}.{name}" for what, name in NAMES.items()}
TINY = {
    "trainer.accelerator": "cpu",
    "trainer.log_every_n_steps": 1,
    "trainer.max_steps": 1,
    "trainer.enable_progress_bar": False,
    "run.wandb": "disabled",
}
STUDY = """
defenses:
  Ours: {settings: {model.class_path: mylab.my_defense.StayClose, model.init_args.weight: 0.5}}
attacks:
  Last layer: {}
seeds: [0]
common: {configs: [mine.yaml], settings: COMMON}
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory, checkpoint):
    """Their folder: a package made of the templates, beside a folder ``metrics`` of theirs, which casehard must leave alone.

    What was imported stays imported, as long as its classes are there.
    """
    folder = tmp_path_factory.mktemp("lab")
    (folder / "mylab").mkdir()
    (folder / "metrics").mkdir()
    (folder / "metrics/__init__.py").write_text("raise RuntimeError('not casehard's')")
    (folder / "mylab/__init__.py").touch()
    for what in NAMES:
        shutil.copy(ROOT / f"cli/templates/{what}.py", folder / f"mylab/my_{what}.py")
    attack = {"class_path": PATHS["attack"], "init_args": {"num_attack_steps": 1, "batch_size": 2}}
    threats = ("open_weight", "finetuning_service")
    config = {
        "model": {"class_path": PATHS["defense"], "init_args": {"checkpoint": checkpoint}},
        "data": {
            "judge": {"class_path": PATHS["judge"]},
            "num_samples": 16,
            "evaluation": {"metrics": [PATHS["metric"]], "num_evaluated": 2, "max_new_tokens": 4},
        },
        "trainer": {"callbacks": [{**attack, "init_args": attack["init_args"] | {"threat_model": t}} for t in threats]},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    (folder / "mine_study.yaml").write_text(STUDY.replace("COMMON", json.dumps(TINY)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.delitem(sys.modules, "metrics", raising=False)  # the repository's own room, which other tests may see so
        folder_of.cache_clear()
        yield folder
    folder_of.cache_clear()


@pytest.fixture(scope="module")
def fitted(lab):
    return casehard.run("fit", "mine.yaml", **TINY)


def test_their_defense_attack_judge_and_metric_run_as_the_templates_are(lab, fitted):
    rows = fitted.frame()
    assert fitted.folder == Path("runs/mine/version_0")
    assert list(rows.threat_model) == ["open_weight"] * 2 + ["finetuning_service"] * 4
    assert list(dict.fromkeys(rows.defense)) == ["StayClose", "none"]
    assert set(rows.judge) == {"length"}
    assert rows.starts_right.between(0, 100).all()
    assert (fitted.folder / "model/model.safetensors").exists()
    assert "metrics" not in sys.modules


def test_their_package_is_listed_without_a_word_of_it(lab):
    text = listed(["defenses", "attacks", "judges", "metrics"], "mylab")
    assert (
        "  mylab.my_defense.StayClose  (finetuning | mylab | mylab.my_defense.StayClose)\n      L2-SP (arXiv:1802.01483)" in text
    )
    for what in ("attack", "judge", "metric"):
        assert f"  {PATHS[what]}  (" in text


def test_their_judge_with_other_settings_is_another_judge(lab, fitted):
    strict, mild = (casehard.run("judge", fitted.folder, judge=PATHS["judge"], **{"judge.min_words": n}) for n in (1, 500))
    labels = [set(found.frame().judge) for found in (strict, mild)]
    assert labels[0] != labels[1]
    assert strict.folder != mild.folder
    page = write_report([str(strict.folder), str(mild.folder)], "report_of_judges", "Two").read_text()
    assert all(f"({label})" in page for one in labels for label in one)  # two series, never one mean


def test_their_study_runs_once_and_again_when_their_code_changed(lab, monkeypatch, capsys):
    monkeypatch.setattr("casehard.cli.run_folder.STARTED", float("inf"))  # here the process is older than their files
    calls = []

    def in_process(command, **_):
        """A cell without a process of its own, which costs five seconds."""
        calls.append(command[3])
        if len(calls) > 1:
            return SimpleNamespace(returncode=1)
        casehard.run(*command[3:4], **dict(word.removeprefix("--").split("=", 1) for word in _joined(command[4:])))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("casehard.evidence.study.subprocess", SimpleNamespace(run=in_process, STDOUT=None, DEVNULL=None))
    found = casehard.run("study", "mine_study.yaml", parallel=1)
    assert found.frame().attack_name.unique().tolist() == ["Last layer"]
    assert found.frame().defense_name.unique().tolist() == ["Ours"]
    casehard.run("study", "mine_study.yaml", parallel=1)
    assert len(calls) == 1
    page = write_report([str(found.folder)], "report", "Ours").read_text()
    assert "Starts right" in page
    assert "Last layer" in page
    source = lab / "mylab/my_defense.py"
    source.write_text(source.read_text().replace("alpha=2 *", "alpha=3 *"))
    (cell,) = read_cells(found.folder)
    assert cell.changed() == f"{source} changed"
    capsys.readouterr()
    with pytest.raises(casehard.SettingError, match="exit status 1"):
        casehard.run("study", "mine_study.yaml", parallel=1)
    assert calls == ["test", "test"]
    assert f"{cell.name}: {source} changed" in " ".join(capsys.readouterr())


def _joined(words):
    """``--config NAME`` as one word."""
    pairs = iter(words)
    return [f"{word}={next(pairs)}" if word == "--config" else word for word in pairs]
