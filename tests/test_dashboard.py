import json
import math
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import wandb
from toy import ROOT
from wandb.proto import wandb_internal_pb2

import casehard
from casehard.evidence.dashboard import AXES, make_dashboard
from casehard.evidence.study import placed
from casehard.evidence.study_plan import INDEX, Cell
from casehard.records.outcome import held, outcome
from casehard.records.rows import read_run

TINY = [
    "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1", "--data.evaluation.num_evaluated", "2", "--data.evaluation.max_new_tokens", "2",
    "--trainer.enable_progress_bar", "false",
]  # fmt: skip
FIT = [
    "--trainer.max_steps", "3", "--trainer.limit_val_batches", "1", "--data.num_samples", "16", "--trainer.enable_checkpointing", "false",
    "--run.export", "false",
]  # fmt: skip
ATTACKS = """
trainer:
  callbacks:
    - {class_path: casehard.Evaluate}
    - class_path: casehard.LoRAAttack
      init_args: &job {threat_model: finetuning_service, num_samples: 16, num_attack_steps: 2, lora: {rank: 2}, score_steps: [1, 2]}
    - class_path: casehard.LoRAAttack
      init_args: {<<: *job, num_attack_steps: 1, score_steps: [1], optimizer: {learning_rate: 3.0e-4}}
    - class_path: casehard.LoRAAttack
      init_args: {<<: *job, name: Benign, poison_ratio: 0.0}
"""
PATCHER = ["attacker.num_inner_steps=1", "num_outer_steps=5", "num_sft_steps=1"]
CELL = Cell("a-b-seed3", 'SBR: "one" anchor', "LoRA, at a service", 3, [], "", "hash")  # names that are hard to quote


class Uploaded(NamedTuple):
    """What W&B would upload: keys over time, the summary, and the run itself."""

    history: set[str]
    summary: dict[str, Any]
    run: Any


def uploaded(folder: Path) -> Uploaded:
    """Read W&B's own file, which is a log in LevelDB's format."""
    (path,) = folder.rglob("*.wandb")
    data, at, record = path.read_bytes(), 7, b""
    found = Uploaded(set(), {}, None)
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # no header fits into this block
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            read, record = wandb_internal_pb2.Record.FromString(record), b""
            found.history.update(item.key or item.nested_key[0] for item in read.history.item)
            found.summary.update((i.key or i.nested_key[0], json.loads(i.value_json)) for i in read.summary.update)
            found = found._replace(run=read.run) if read.HasField("run") else found
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a small run of each defense, and of a study's cell that sent its generations."""
    root = tmp_path_factory.mktemp("runs")
    (root / "attacks.yaml").write_text(ATTACKS)
    words = {
        "sft_alignment": ["fit", *FIT],
        "sbr": ["fit", *FIT],
        "patcher": ["fit", *FIT, *(f"--model.init_args.{setting}" for setting in PATCHER)],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["casehard"])

        def run(command: str, experiment: str, *args: str) -> None:
            files = (f"experiments/{experiment}.yaml", str(root / "attacks.yaml"))
            casehard.main([command, *(w for f in files for w in ("--config", f)), "--run.root", str(root), *TINY, *args])
            wandb.finish()

        for name, args in words.items():
            run(args[0], name, *args[1:])
        cells = [replace(CELL, folder=str(root / "study" / name)) for name in ("cell", "not_yet")]
        place = [f"--run.{name}={value}" for name, value in placed(cells[0]).items()]
        run("test", "sbr", *place, "--run.wandb_generations", "true")
    (root / "study" / INDEX).write_text(json.dumps([asdict(cell) for cell in cells]))
    return {name: root / name / "version_0" for name in words} | {"study": root / "study"}


def dry_run(*folders: Path) -> Any:
    return json.loads(make_dashboard([str(f) for f in folders], "casehard", None, "A title", dry_run=True))["spec"]["section"]


def panels(section: Any, kind: str) -> list[Any]:
    return [p["config"] for s in section["panelBankConfig"]["sections"] for p in s["panels"] if p["viewType"] == kind]


def test_every_logged_key_has_a_panel_and_every_panel_keys_that_were_logged(runs):
    sent = [uploaded(folder) for folder in runs.values()]
    section = dry_run(*runs.values())
    lines = panels(section, "Run History Line Plot")
    shown = {key for line in lines for key in line["metrics"]}
    history = {key for found in sent for key in found.history if not key.startswith("_")}
    summary = {key for found in sent for key in found.summary}
    tables = {key for key in history if key.startswith("generations/")}
    bars = {key for bar in panels(section, "Bar Chart") for key in bar["metrics"]}
    delivered = {key for key in bars if key.startswith("delivered/")}
    assert {"delivered/harmful_score", "delivered/harmful_score_before"} <= delivered
    assert shown | delivered == history - tables - set(AXES) - {"trainer/global_step"}
    assert {line["xAxis"] for line in lines} <= history
    columns = {name.removeprefix("summary:") for name in section["runSets"][0]["runFeed"]["columnPinned"]} - {"run:displayName"}
    assert bars | columns <= summary
    assert {key for key in summary if key.startswith("attack/")} - shown <= bars | columns
    assert tables
    assert all(f'"{table}"' in json.dumps(panels(section, "Weave")) for table in tables)
    assert {
        "train/anchor_drift",
        "train/attack_vector_norm",
        "train/finetuning_loss",
        "val/harmful_score",
        "test/sft_loss",
    } <= shown


def test_the_summary_holds_what_every_attack_came_to(runs):
    folder = runs["sbr"]
    rows = read_run(folder).rows
    starts = [n for n, row in enumerate(rows) if row.num_attack_steps == 0]
    blocks = [rows[start:end] for start, end in zip(starts, [*starts[1:], len(rows)], strict=True)]
    jobs = [
        f"{name}-finetuning_service-{defense}" for name in ("LoRAAttack", "LoRAAttack_2", "Benign") for defense in ("none", "SBR")
    ]
    assert len(blocks) == len(jobs)  # each undefended and defended; two of one name
    found = uploaded(folder).summary
    for job, block in zip(jobs, blocks, strict=True):
        expected = {name: None if math.isnan(value) else value for name, value in outcome(block).items()}  # JSON has no nan
        assert {name: found[f"attack/{job}/{name}"] for name in expected} == expected
        assert (expected["steps_held"] is None) == (block[0].poison_ratio == 0 or held(block)[0] < 0)  # gibberish from the start


def test_a_studys_runs_are_in_a_group_for_each_defense_and_attack_with_its_seeds(runs):
    run = uploaded(runs["study"]).run
    group = 'study/SBR: "one" anchor/LoRA, at a service'
    assert (run.run_group, run.job_type) == (group, "test")
    assert list(run.tags) == ["study", CELL.defense, CELL.attack, "seed 3"]
    (runset,) = dry_run(runs["study"])["runSets"]
    assert [key["name"] for key in runset["grouping"]] == ["group"]
    (runset_of_one,) = dry_run(runs["sbr"])["runSets"]
    assert runset_of_one["grouping"] == []  # its runs differ in more than their seed
    assert [group in json.dumps(r["filters"]).replace('\\"', '"') for r in (runset, runset_of_one)] == [True, False]
    assert uploaded(runs["sbr"]).run.run_group == "sbr"


def test_generations_are_sent_only_when_asked_for(runs):
    assert not any(key.startswith("generations/") for key in uploaded(runs["sbr"]).history)
    assert not list(runs["sbr"].rglob("*.table.json"))
    tables = [json.loads(path.read_text()) for path in runs["study"].rglob("*.table.json")]
    (generations,) = runs["study"].rglob("generations.jsonl")
    kept = [json.loads(line) for line in generations.read_text().splitlines()]
    sent = [dict(zip(table["columns"], line, strict=True)) for table in tables for line in table["data"]]
    assert sorted((a["attack_step"], a["prompt"], a["response"]) for a in sent) == sorted(
        (a["num_attack_steps"], a["prompt"], a["response"]) for a in kept
    )


class Server(ThreadingHTTPServer):
    """Stands in for W&B's: keeps the workspaces that are saved, or refuses them."""

    def __init__(self, refuses: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.refuses, self.saved = refuses, []


class Answer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"] or 0))
        query = json.loads(asked) if asked else {"query": ""}
        reply: Any = {"data": {"viewer": {"id": "1", "entity": "team", "username": "me", "flags": "{}", "teams": {"edges": []}}}}
        if "upsertView" in query["query"]:
            self.server.saved.append(query["variables"])
            reply = {"data": {"upsertView": {"view": {"id": "1", "name": "nw-abc-v"}, "inserted": True}}}
            reply = {"errors": [{"message": "permission denied"}]} if self.server.refuses else reply
        text = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def account(tmp_path, monkeypatch) -> Iterator[Callable[..., None]]:
    """W&B as somebody knows it who has no key, or these settings."""

    def become(**settings: str) -> None:
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in ({"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")} | settings).items():
            monkeypatch.setenv(name, value)
        wandb.teardown()

    yield become
    monkeypatch.undo()
    wandb.teardown()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def test_what_is_saved_is_what_a_dry_run_shows(runs, server, account, capsys):
    account(WANDB_API_KEY="a" * 40, WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}")
    casehard.main(["dashboard", str(runs["study"]), str(runs["sbr"]), "--title", "A title", "--project", "p"])
    assert f"Dashboard: http://127.0.0.1:{server.server_port}/team/p?nw=abc" in capsys.readouterr().out
    (view,) = server.saved
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("team", "p", "A title")
    ours, theirs = dry_run(runs["study"], runs["sbr"]), json.loads(view["spec"])["section"]
    assert panels(ours, "Run History Line Plot") == panels(theirs, "Run History Line Plot")
    assert panels(ours, "Bar Chart") == panels(theirs, "Bar Chart")


def test_what_wandb_refuses_ends_in_one_sentence(runs, server, account):
    server.refuses = True
    account(WANDB_API_KEY="a" * 40, WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(ValueError, match=r"W&B must take the workspace for project p, and it did not \(.*permission denied\)"):
        make_dashboard([str(runs["sbr"])], "p", "others", "A title", dry_run=False)


def test_without_a_key_it_says_what_to_set(runs, account):
    account()
    with pytest.raises(
        SystemExit,
        match=r"error: W&B must take the .* did not \(No API key.*\)\. Check the network, WANDB_API_KEY \(or `wandb login`\)",
    ):
        casehard.main(["dashboard", str(runs["sbr"])])


def test_a_wandb_that_cannot_be_reached_ends_soon_and_in_one_sentence(runs, account):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        account(WANDB_API_KEY="a" * 40, WANDB_BASE_URL=f"http://127.0.0.1:{closed.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(
            SystemExit,
            match=r"error: W&B must take the workspace for project casehard, and it did not \(.*connection refused.*\)\. "
            r"Check the network, .*; --dry_run true needs none of these\.$",
        ):
            casehard.main(["dashboard", str(runs["sbr"])])
        assert time.monotonic() - started < 9  # seconds; it gave up by itself, before its timeout


def test_without_the_extra_it_says_what_to_install(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(ValueError, match=r"casehard dashboard needs wandb_workspaces, .* pip install 'casehard\[dashboard\]'"):
        make_dashboard([str(runs["sbr"])], "p", None, "A title", dry_run=True)


def test_runs_that_are_none_are_told_so(tmp_path):
    with pytest.raises(
        ValueError, match=r"a run must be a folder with a metrics.csv, and .* has none. Name folders such as runs/"
    ):
        make_dashboard([str(tmp_path)], "p", None, "A title", dry_run=True)
    (tmp_path / INDEX).write_text("[]")  # a study that has not begun
    with pytest.raises(ValueError, match=r"runs must have logged something, and .* did not. Name folders such as runs/"):
        make_dashboard([str(tmp_path)], "p", None, "A title", dry_run=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", "[1]", r"config.yaml must be a run's settings in YAML, and it is a list"),
        ("metrics.csv", "\udcff", r"metrics.csv must be CSV in UTF-8, and it is not"),
        (INDEX, "{", r"cells.json must be the list of cells that `casehard study` wrote"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, text, message):
    (tmp_path / "metrics.csv").write_text("train/loss\n1\n")
    (tmp_path / name).write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        make_dashboard([str(tmp_path)], "p", None, "A title", dry_run=True)


def test_help_says_what_it_needs(capsys):
    with pytest.raises(SystemExit):
        casehard.main(["dashboard", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "WANDB_API_KEY, or `wandb login`" in shown
    assert "print what would be saved, as JSON" in shown
