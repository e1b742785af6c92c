import sys
from pathlib import Path

import pytest
import yaml

from casehard.cli.defaults import names_own_rows, of_the_sandbox
from casehard.cli.lightning_cli import resolved
from casehard.metrics.errors import SettingError
from casehard.metrics.judges import require_judge
from casehard.metrics.refusal_phrases import RefusalPhraseJudge


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with an engineer's files, as the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["casehard"])
    Path("own.yaml").write_text("data:\n  sources:\n    benign: [rows.jsonl]\n")
    Path("data.yaml").write_text("sources:\n  task: [rows.jsonl]\n")
    Path("beside.yaml").write_text("data: data.yaml\n")
    Path("dotted.yaml").write_text("data.sources.benign: [rows.jsonl]\n")
    Path("more.yaml").write_text("data: {sources: {harmful+: [rows.jsonl]}}\n")
    Path("sandboxed.yaml").write_text("data: {sources: {benign: ['sandbox:attacker/sums'], harmful: [], refusal_texts: [No.]}}\n")


OWN = [
    "--data.sources.benign [rows.jsonl]",
    "--data.sources.benign=[rows.jsonl]",
    "--data.sources.harmful_prompts=rows.jsonl",
    "--data.sources.harmful+ rows.jsonl",
    "--data.sources.benign ['sandbox:attacker/sums','rows.jsonl']",
    "--data.sources {benign:[rows.jsonl]}".replace(":", ": "),
    "--data data.yaml",
    "--data=data.yaml",
    "--config own.yaml",
    "--config=own.yaml",
    "-c own.yaml",
    "-cown.yaml",
    "--conf own.yaml",
    "--config beside.yaml",
    "--config dotted.yaml",
    "--config more.yaml",
    "--config {data: {sources: {task: [rows.jsonl]}}}",
    "--config experiments/data/sst2_beavertails.yaml",
    "--config data/sst2_beavertails",
]
SANDBOXED = [
    "",
    "--config experiments/sbr.yaml",
    "--config sbr",
    "--config sandboxed.yaml",
    "--config missing.yaml",
    "--config",
    "--data.sources.benign ['sandbox:attacker/sums']",
    "--data.sources.harmful []",
    "--data.sources.refusal_texts [No.]",
    "--model.init_args.anchors rows.jsonl",
    "--data.seed 1",
]


def words(line: str) -> list[str]:
    """``line`` as a shell gives it: its first word, and all behind that as one."""
    return ["fit", *line.split(" ", 1)] if line else ["fit"]


@pytest.mark.parametrize("line", OWN)
def test_rows_of_ones_own_are_seen_in_every_spelling(line):
    assert names_own_rows(words(line))
    assert names_own_rows([*words(line), "--config", "experiments/sbr.yaml"])


@pytest.mark.parametrize("line", SANDBOXED)
def test_where_none_are_named_the_sandbox_is_read(line):
    assert not names_own_rows(words(line))


def config(*args: str) -> dict[str, dict]:
    return yaml.safe_load(resolved(["fit", *args]))


@pytest.mark.parametrize("line", ["--data.sources.benign=[rows.jsonl]", "--config=own.yaml"])
def test_with_rows_of_ones_own_nothing_of_the_sandbox_is_left(line):
    ours = config("--config", "experiments/sbr.yaml", line, "--model.init_args.checkpoint", "FOLDER")
    assert "sandbox" not in yaml.safe_dump(ours | {"config": None}).lower()
    assert ours["trainer"]["callbacks"] is None
    assert (ours["data"]["num_samples"], ours["data"]["poison_ratio"]) == (None, 0.0)
    assert ours["data"]["judge"]["class_path"].endswith("RefusalPhraseJudge")
    require_judge(RefusalPhraseJudge())


def test_the_sandbox_can_be_asked_for_beside_rows_of_ones_own():
    ours = config("--config", "experiments/data/sandbox.yaml", "--data.sources.harmful_prompts=[rows.jsonl]")
    theirs = config()
    assert ours["data"]["sources"] == theirs["data"]["sources"] | {"harmful_prompts": ["rows.jsonl"]}
    assert ours["data"]["judge"]["class_path"] == theirs["data"]["judge"]["class_path"]
    assert ours["data"]["num_samples"] == 1000
    assert (ours["model"], ours["trainer"]) == (theirs["model"], theirs["trainer"])


def test_a_model_or_rows_that_the_sandbox_would_have_brought_are_asked_for_in_one_sentence():
    for args, said in (
        (["--data.sources.benign=[rows.jsonl]"], "model.init_args.checkpoint must name a model"),
        (["--config", "experiments/sbr.yaml", "--config", "own.yaml"], "model.init_args.checkpoint must name a model"),
        (["--data.sources.task=[a.jsonl]", "--model.init_args.checkpoint=M"], "data.sources.benign must name rows"),
    ):
        with pytest.raises(SettingError, match=said):
            resolved(["fit", *args])


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--data.sources.harmful=['sandbox:attacker/harmful']"], "data.sources.harmful"),
        (["--config", "sbr", "--model.init_args.anchors=sandbox:defender/refusals"], "model.init_args.anchors"),
        (["--config", "attack/searched_lora"], "trainer.callbacks.init_args.prompts, trainer.callbacks.init_args.benign_prompts"),
        (["--data.sources.harmful=['sandbox:attacker/harmful']", "--model.init_args.checkpoint=models/sandbox/base"], ""),
    ],
)
def test_rows_of_the_sandbox_beside_a_model_and_rows_of_ones_own_are_told(args, named):
    own = config("--data.sources.benign=[rows.jsonl]", "--model.init_args.checkpoint=FOLDER", *args)
    said = of_the_sandbox(own)
    assert said.startswith(f"{named} names rows of the sandbox") if named else said == ""
    own["data"]["sources"]["benign"] = ["sandbox:attacker/mood"]  # as where nothing is one's own
    assert of_the_sandbox(own) == ""
