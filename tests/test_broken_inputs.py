"""What is damaged, foreign or misspelt ends in one sentence that names the file or the setting, wherever it is read."""

import json
import math
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from test_cli import TINY
from test_results import ROW
from toy import toy_data, toy_trainer

from casehard import Backbone, Defense, FullParameterAttack, RubricJudge
from casehard.callbacks.scoring import Evaluate
from casehard.datamodules.sources import read_rows
from casehard.engine.checkpoint import num_positions
from casehard.engine.fit_checkpoint import read_notes, require_unharmed
from casehard.evidence.study import _how_it_ended
from casehard.evidence.study_plan import read_study
from casehard.metrics.errors import SettingError
from casehard.records.answers import KEYS, read_answers
from casehard.records.published import config_of
from casehard.records.rows import Run, append_row, write_run

# ---- checkpoints of fit


@pytest.fixture(scope="module")
def saved(tmp_path_factory, checkpoint) -> Path:
    """A checkpoint of ``fit``."""
    trainer = toy_trainer(tmp_path_factory.mktemp("fit"), max_steps=1, enable_checkpointing=True)
    trainer.fit(Defense(checkpoint), toy_data())
    path = Path(trainer.default_root_dir, "last.ckpt")
    trainer.save_checkpoint(path)
    return path


def changed(saved: Path, folder: Path, **parts) -> Path:
    """The checkpoint with other parts; None takes one out."""
    notes = torch.load(saved, weights_only=True) | parts
    torch.save({name: value for name, value in notes.items() if value is not None}, folder / "other.ckpt")
    return folder / "other.ckpt"


def test_a_bit_that_flipped_in_a_checkpoint_is_noticed(saved, tmp_path):
    require_unharmed(saved)
    harmed = tmp_path / "last.ckpt"
    content = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as parts:
        largest = max(parts.infolist(), key=lambda part: part.file_size)
    content[largest.header_offset + 1000] ^= 1
    harmed.write_bytes(content)
    assert read_notes(harmed)  # torch takes it
    with pytest.raises(SettingError, match=r"ckpt_path must be a whole checkpoint .* in it is not what was written\)"):
        require_unharmed(harmed)
    require_unharmed(tmp_path)  # a sharded one has no checksums


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"state_dict": None}, "it has no weights"),
        ({"state_dict": [1]}, "it has no weights"),
        ({"pytorch-lightning_version": "zzz"}, "it is something else"),
        ({"optimizer_states": None}, "it has weights alone, from which no training goes on: `test` takes it"),
        ({"loops": None}, "it has weights alone, from which no training goes on: `test` takes it"),
    ],
)
def test_a_checkpoint_that_lacks_what_is_needed_is_refused(saved, tmp_path, parts, why):
    path = changed(saved, tmp_path, **parts)
    with pytest.raises(SettingError, match="ckpt_path must be a whole checkpoint of `fit`") as refused:
        read_notes(path, to_train=True)
    assert why in str(refused.value)
    if "`test`" in why:
        assert read_notes(path)


def test_a_pipe_is_no_checkpoint_to_wait_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SettingError, match="ckpt_path must be a checkpoint of `fit` on this machine"):
        read_notes(tmp_path / "pipe")


def test_a_checkpoint_of_another_architecture_is_refused_in_a_sentence(saved, checkpoint, tmp_path):
    path = changed(saved, tmp_path, state_dict={"model.lm_head.weight": torch.zeros(3)})
    trainer = toy_trainer(tmp_path, max_steps=2, enable_checkpointing=True)
    with pytest.raises(
        SettingError, match=r"ckpt_path must hold weights of the model of checkpoint .* differ in name or shape, such as"
    ):
        trainer.fit(Defense(checkpoint), toy_data(), ckpt_path=path)


# ---- models


@pytest.mark.parametrize("text", ["[1]", "{}", '{"model_type": "nosuch"}', "3"])
def test_a_config_of_no_model_is_refused_before_weights_are_read(checkpoint, tmp_path, text):
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model/config.json").write_text(text)
    with pytest.raises(SettingError, match="must be one that transformers can read"):
        num_positions(str(tmp_path / "model"))
    if text in ("[1]", "3"):
        with pytest.raises(SettingError, match="must be one that transformers can read"):
            Defense(str(tmp_path / "model"))


def test_a_backend_that_is_not_there_is_refused():
    with pytest.raises(SettingError, match=r"compile_backend must be null or one of .*inductor.*, got 'nosuch'"):
        Backbone(compile_backend="nosuch")
    assert Backbone(compile_backend="inductor")


# ---- rows


def test_capital_letters_and_a_hash_in_a_files_name_are_no_hindrance(tmp_path):
    line = json.dumps({"prompt": "a", "response": "b"}) + "\n"
    for name in ("ROWS.JSONL", "a#b.jsonl"):
        (tmp_path / name).write_text(2 * line)
        assert len(read_rows(str(tmp_path / name))) == 2
        assert len(read_rows(f"{tmp_path / name}#train[:1]")) == 1
    (tmp_path / "rows.jsonl.gz").write_bytes(b"x")
    with pytest.raises(SettingError, match=r"rows.jsonl.gz must end in .json, .*, got .gz. Convert, unpack or rename it"):
        read_rows(str(tmp_path / "rows.jsonl.gz"))


def test_nothing_to_score_on_is_refused_before_anything_is_trained(checkpoint, tmp_path):
    nothing = {"harmful_prompts": [], "benign_prompts": [], "task": []}
    attack = FullParameterAttack("open_weight", num_samples=8, num_attack_steps=1, batch_size=4)
    for callback in (attack, Evaluate()):
        with pytest.raises(SettingError, match=r"data.sources must name prompts to score a model on, .* got none"):
            toy_trainer(tmp_path, callbacks=[callback]).fit(Defense(checkpoint), toy_data(**nothing))


# ---- settings


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"trainer: {max_steps: 1}\n# caf\xe9\n", "config.yaml, line 2 must be UTF-8 text, got the byte 0xe9"),
        ("trainer: {}\n".encode("utf-16"), "config.yaml, line 1 must be UTF-8 text, got the byte 0xff"),
        (b"- a\n", "config.yaml must hold settings by their names, in YAML, and it holds a list"),
        (b"\n", "config.yaml must hold settings by their names, in YAML, and it holds nothing"),
        (b"modle: {}\n", "config.yaml: 'modle' must be a setting, and it is none. Did you mean model?"),
        (b"data: {sources: {benin: {}}}\n", "there is no data.sources.benin."),
        (b"trainer: {calbacks: {}}\n", "there is no trainer.calbacks."),
    ],
)
def test_a_config_that_is_none_is_named(call, tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    assert message in call("fit", "--config", "experiments/sbr.yaml", "--config", str(path), *TINY, fails=True)
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("project", ["a/b", "x" * 200])
def test_what_wandb_does_not_take_is_said_in_a_sentence(call, tmp_path, monkeypatch, project):
    shape = ["--run.root", str(tmp_path), *TINY, "--run.wandb", "offline", "--run.project", project]
    error = call("fit", "--config", "experiments/sbr.yaml", *shape, fails=True)
    assert "run.tags must be such that W&B takes the run, and it says: Invalid project name" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("key", ["sk-quite-secret", "hf_abcDEF123", "A" * 40, "AKIA0123456789ABCDEF"])
def test_a_key_in_the_place_of_its_variables_name_is_not_shown(key):
    with pytest.raises(SettingError, match="api_key_env must name an environment variable") as refused:
        RubricJudge("model", "http://localhost:9/v1", api_key_env=key)
    assert key not in str(refused.value)


def test_a_study_that_is_no_text_is_named(tmp_path):
    (tmp_path / "study.yaml").write_bytes(b"\xe9")
    with pytest.raises(SettingError, match=r"study\.yaml must be YAML that describes a study"):
        read_study(str(tmp_path / "study.yaml"))


# ---- what runs left


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("- 1", "it is a list"),
        ("data: 3", "data in it is a int"),
        ("model: x", "model in it is a str"),
        ("{x: [", "it cannot be read"),
    ],
)
def test_settings_of_a_run_that_are_none_are_named(tmp_path, text, why):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SettingError, match=rf"config.yaml must be a run's settings in YAML, and {why}"):
        config_of(tmp_path)


WHOLE = dict.fromkeys(KEYS, "x") | {"evaluation": 1, "seed": 0, "num_attack_steps": 0, "number": 0, "kind": "harmful"}
WHOLE |= {"prompt": "p", "response": "r", "score": 0.5, "refused": False, "degenerate": False, "detail": ""}


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": 3},
        {"response": None},
        {"score": math.inf},
        {"score": 2},
        {"refused": "no"},
        {"messages": [3]},
        {"messages": "x"},
    ],
    ids=str,
)
def test_an_answer_that_no_run_wrote_is_named_by_its_line(tmp_path, wrong):
    path = tmp_path / "generations.jsonl"
    path.write_text("".join(json.dumps(answer) + "\n" for answer in (WHOLE, WHOLE | {"score": math.nan}, WHOLE | wrong)))
    with pytest.raises(SettingError, match=r"generations.jsonl, line 3 must be an answer that a run wrote"):
        read_answers(path)


def test_answers_are_for_their_owner_alone(tmp_path):
    answer = {name: value for name, value in WHOLE.items() if name not in KEYS}
    write_run(Run(tmp_path, [], []))
    append_row(tmp_path, ROW, [answer])
    assert (tmp_path / "generations.jsonl").stat().st_mode & 0o077 == 0


def test_a_cell_that_was_killed_says_by_what():
    assert _how_it_ended(2) == "exit status 2"
    assert _how_it_ended(-9) == "killed by SIGKILL, as a system does that runs out of memory; its log ends"
    assert _how_it_ended(-15) == "killed by SIGTERM; its log ends"
