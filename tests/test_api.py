import os
import signal
import sys
import warnings
from types import SimpleNamespace

import lightning as L
import pytest
from test_own_metrics import Words
from test_results import ROW, replace
from toy import ROOT, csv_rows

import casehard
from casehard.callbacks.results import Results

TINY = {
    "trainer.accelerator": "cpu",
    "trainer.max_steps": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": False,
    "data.num_samples": 16,
    "data.evaluation.num_evaluated": 2,
    "data.evaluation.max_new_tokens": 4,
}
ATTACK = {
    "class_path": "casehard.LoRAAttack",
    "init_args": {"threat_model": "open_weight", "num_samples": 16, "num_attack_steps": 1, "batch_size": 2, "lora": {"rank": 2}},
}


@pytest.fixture
def tiny(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["notebook", "-f", "kernel.json"])
    return {**TINY, "run.root": str(tmp_path), "model.init_args.checkpoint": checkpoint, "run.wandb": "disabled"}


def process() -> tuple:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return list(sys.argv), dict(os.environ), handlers, list(warnings.filters)


def test_runs_of_one_process_give_their_results_and_leave_nothing_behind(tiny, tmp_path):
    before = process()
    first = casehard.run(
        "fit",
        {"trainer": {"callbacks": [ATTACK]}, "data": {"evaluation": {"metrics": [Words]}}},
        **tiny | {"run.wandb": "offline"},
    )
    second = casehard.run("test", ["attack/none", {"trainer": {"callbacks": [ATTACK]}}], **tiny | {"run.experiment": "again"})
    assert process() == before
    assert sys.modules["wandb"].run is None
    frame = first.frame()
    assert (first.folder, second.folder) == (tmp_path / "casehard/version_0", tmp_path / "again/version_0")
    assert frame.num_attack_steps.tolist() == [0, 1]
    assert frame.words.dtype == float
    assert frame.harmful_score.tolist() == [float(row["harmful_score"]) for row in csv_rows(first.folder / "attacks.csv")]
    assert len(first.answers()) == 2 * 3 * 2
    assert "words" not in second.frame()
    assert "<th>words</th>" in first._repr_html_()
    assert first._repr_html_().index("<td>delivered</td>") < first._repr_html_().index("<td>open_weight</td>")
    assert second.delivered is None
    assert repr(second) == f"2 evaluations of 1 run: {second.folder}"


def test_what_a_user_can_mend_is_an_exception_and_no_exit(tiny, tmp_path, capsys):
    before = process()
    for settings, message in (
        ({"trainer.max_stops": 3}, "max_stops"),
        ({"model": "SBRModul"}, "Did you mean SBRModule"),
        ({"data.poison_ratio": 3}, r"poison_ratio must lie in \[0, 1\], got 3"),
        ({"config": "sbrr"}, "Did you mean sbr"),
        ({"data.judge": L.Trainer}, "lightning.pytorch.trainer.trainer.Trainer"),
        (
            {"data.judge": type("Local", (), {})},
            "a class must stand in a module or a notebook's cell by itself, and test_api.Local does not",
        ),
    ):
        with pytest.raises(casehard.SettingError, match=message):
            casehard.run("fit", **{"config": "sbr"} | tiny | settings)
    with pytest.raises(casehard.SettingError, match="command must be one of fit, validate, test, study, judge, got 'fot'"):
        casehard.run("fot")
    with pytest.raises(casehard.SettingError, match=r"folder must be a run's or a study's, and .*nowhere is none"):
        casehard.read(tmp_path / "nowhere")
    (tmp_path / "broken.yaml").write_text("defenses: {d: {}}\nattacks: {a: {}}\nseeds: [0]\ncommon: {settings: {modl: 3}}")
    with pytest.raises(casehard.SettingError, match=r"this one does not: .*modl.* \(.*modl"):
        casehard.run("study", tmp_path / "broken.yaml", root=tmp_path)
    assert "error:" not in capsys.readouterr().err
    assert process() == before


def test_a_script_makes_one_run_on_several_processes(tiny, monkeypatch):
    shared = SimpleNamespace(folder="nowhere", trainer=SimpleNamespace(world_size=2))
    monkeypatch.setattr("casehard.cli.lightning_cli.train", lambda _: shared)
    monkeypatch.setattr("casehard.cli.api._shared", False)
    with pytest.raises(casehard.SettingError, match=r"folder must be a run's"):
        casehard.run("fit", "sbr", **tiny)
    with pytest.raises(
        casehard.SettingError, match="a script must make at most one run on several processes, and it has made one"
    ):
        casehard.run("fit", "sbr", **tiny)


class Stopped(L.Callback):
    """A user who presses Ctrl-C."""

    def on_train_batch_start(self, *_: object) -> None:
        raise KeyboardInterrupt


def test_an_interrupt_is_one_and_the_next_can_be(tiny):
    before = process()
    with pytest.raises(KeyboardInterrupt):
        casehard.run("fit", "sbr", **tiny, **{"trainer.callbacks": [{"class_path": Stopped}]})
    assert process() == before


def test_a_judged_run_is_read_as_a_run(tmp_path):
    folder, answer = tmp_path / "run", {"kind": "harmful", "number": 0, "prompt": "p", "response": "I cannot."}
    row = replace(ROW, harmful_score=100.0, num_scored=1, num_unscored=0)
    trainer = L.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    results = Results(str(folder))
    results.record(trainer, row, [answer | casehard.Verdict(1.0, False, False)._asdict()])
    assert results.frame().harmful_score.tolist() == [100.0]
    assert "100.0" in results._repr_html_()
    judged = casehard.run("judge", folder, judge="RefusalPhraseJudge")
    assert judged.folder.parent == folder / "judged"
    assert judged.frame().harmful_score.tolist() == [0.0]


def test_a_table_in_a_notebook_is_no_markup(tmp_path):
    results = Results(str(tmp_path / "<b>run"))
    results.rows = [replace(ROW, attack="<script>alert(1)</script>")]
    assert "<script>" not in results._repr_html_()
    assert "<b>run" not in results._repr_html_()


def test_a_run_without_attacks_has_no_rows_and_its_table_says_so(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    found = casehard.read(tmp_path)
    assert len(found.frame()) == 0
    assert "harmful_score" in found.frame()
    assert "No attack was run" in found._repr_html_()
