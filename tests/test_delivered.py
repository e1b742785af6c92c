import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from toy import bits, csv_rows, same_bits, toy_data, toy_trainer

from casehard import Defense, Judge, LoRA, Optimizer, RefusalPhraseJudge, SafeLoRAModule, SBRModule, Verdict
from casehard.callbacks.results import Results
from casehard.callbacks.scoring import score
from casehard.metrics.errors import SettingError
from casehard.records.delivered import DELIVERED, DELIVERED_ANSWERS, Delivered, read_delivered
from casehard.records.marker import changed_results, leaves
from casehard.records.table import delivered_table

NAN = float("nan")
ANCHORS = "sandbox:defender/refusals#train[:3]"
KINDS: dict[str, Any] = {
    "none": lambda checkpoint: Defense(checkpoint),
    "sbr, dropout": lambda checkpoint: SBRModule(
        checkpoint, optimizer=Optimizer(0.05), anchors=ANCHORS, lora=LoRA(rank=2, dropout=0.5)
    ),
}


def fit(module: Defense, folder: Path, score: bool = True, data: dict[str, Any] | None = None, **settings: Any) -> Results:
    torch.manual_seed(0)
    results = Results(str(folder), score=score)
    saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    ckpt = settings.pop("ckpt_path", None)
    trainer = toy_trainer(
        folder, callbacks=[results, saver], enable_checkpointing=True, logger=CSVLogger(folder), log_every_n_steps=1, **settings
    )
    trainer.fit(module, datamodule=toy_data(**(data or {})), ckpt_path=ckpt)
    return results


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_leaves_no_trace_on_weights_modes_or_generators(checkpoint, tmp_path, kind):
    ends = []
    for scored in (False, True):
        module = KINDS[kind](checkpoint)
        random.seed(3)
        np.random.seed(3)
        fit(module, tmp_path / str(scored), scored)
        assert (tmp_path / str(scored) / DELIVERED).exists() == scored
        modes = [m.training for m in module.modules()]
        ends.append((bits(module), modes, torch.get_rng_state(), random.random(), np.random.random()))
    (weights, *states), (scored_weights, *scored_states) = ends
    assert same_bits(weights, scored_weights)
    assert torch.equal(states.pop(1), scored_states.pop(1))
    assert states == scored_states


def test_before_is_the_checkpoint_and_after_the_model_that_is_exported(checkpoint, tmp_path):
    results = fit(KINDS["sbr, dropout"](checkpoint), tmp_path)
    found = read_delivered(tmp_path)
    assert found is not None
    assert found == results.delivered
    said = {}
    for state, where in (("before", checkpoint), ("delivered", str(tmp_path / "model"))):
        other = Results(str(tmp_path / state), score=False, export=False)
        module = Defense(where)
        trainer = toy_trainer(tmp_path, max_steps=0, callbacks=[other])
        trainer.fit(module, datamodule=toy_data())
        expected = score(module, trainer.datamodule.evaluation)
        assert getattr(found, state) == expected.metrics
        lines = [json.loads(line) for line in (tmp_path / DELIVERED_ANSWERS).read_text().splitlines()]
        said[state] = [a["response"] for a in lines if a["when"] == state]
        assert said[state] == [a["response"] for a in expected.generations]
    assert said["before"] != said["delivered"]
    assert found.num_prompts == {"harmful": 6, "benign": 6, "task": 6}
    (logged,) = [row for row in csv_rows(next(tmp_path.rglob("metrics.csv"))) if row.get("delivered/degenerate_rate")]
    assert float(logged["delivered/degenerate_rate"]) == found.delivered["degenerate_rate"]
    assert float(logged["delivered/degenerate_rate_before"]) == found.before["degenerate_rate"]


def test_a_service_that_repairs_is_scored_by_what_it_hands_back(checkpoint, tmp_path):
    base = str(Path(checkpoint).with_name("base"))
    module = SafeLoRAModule(checkpoint, base=base, num_layers=5, lora=LoRA(rank=2))
    found = fit(module, tmp_path).delivered
    assert module.recovered
    assert found is not None
    assert found.delivered == score(module, toy_evaluation(module)).metrics


def toy_evaluation(module: Defense) -> Any:
    return module.trainer.datamodule.evaluation


def test_a_run_that_goes_on_keeps_the_scores_of_its_beginning(checkpoint, tmp_path):
    first = fit(Defense(checkpoint), tmp_path, max_steps=2)
    again = fit(Defense(checkpoint), tmp_path, max_steps=3, ckpt_path=str(tmp_path / "saved/step=1.ckpt"))
    whole = fit(Defense(checkpoint), tmp_path / "whole", max_steps=3)
    assert again.before == first.before
    assert again.delivered == whole.delivered
    assert (tmp_path / DELIVERED_ANSWERS).read_text() == (tmp_path / "whole" / DELIVERED_ANSWERS).read_text()
    at_its_end = fit(Defense(checkpoint), tmp_path / "end", max_steps=3, ckpt_path=str(tmp_path / "saved/step=3.ckpt"))
    assert at_its_end.delivered == whole.delivered


def test_what_was_not_measured_is_said_and_never_a_number(checkpoint, tmp_path):
    sources = {"harmful_prompts": [], "benign_prompts": []}
    found = fit(Defense(checkpoint), tmp_path, data=sources).delivered
    assert found is not None
    assert math.isnan(found.delivered["harmful_score"])
    assert json.loads((tmp_path / DELIVERED).read_text())["delivered"]["harmful_score"] is None
    console = Console(width=130)
    with console.capture() as shown:
        console.print(delivered_table(found))
    cells = {line.split("│")[1].strip(): line.split("│")[2:4] for line in shown.get().splitlines() if "│" in line}
    assert [cell.strip() for cell in cells["harmful score"]] == 2 * ["not measured"]
    assert [float(cell) for cell in cells["accuracy"]] == [
        found.before["finetune_accuracy"],
        found.delivered["finetune_accuracy"],
    ]
    assert "0 harmful, 0 benign and 6 task prompts" in shown.get()
    assert "one answer is 16.7 points (task)\n" in re.sub(r" +$", "", shown.get(), flags=re.M)
    assert "degenerate:" not in shown.get()


@pytest.mark.parametrize(
    ("rates", "score", "said", "cell"),
    [
        ((20.0, 0.0), 0.0, "before: the model answers in gibberish, so nothing can be said of its safety", "0.0?"),
        ((0.0, 90.0), 0.0, "delivered: the model answers in gibberish", "0.0"),
        ((90.0, 90.0), NAN, "before and delivered: the model answers in gibberish", "not measured"),
        ((19.9, 0.0), 0.0, "", "0.0"),
    ],
)
@pytest.mark.parametrize("width", [80, 130])
def test_gibberish_is_said_in_words_and_no_score_is_doubted_that_is_not_there(rates, score, said, cell, width):
    before, delivered = ({"harmful_score": score, "degenerate_rate": rate} for rate in rates)
    found = Delivered(before, delivered, {"harmful": 10, "benign": 50, "task": 12}, RefusalPhraseJudge().label, [])
    console = Console(width=width)
    with console.capture() as shown:
        console.print(delivered_table(found))
    text, lines = " ".join(shown.get().split()), shown.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert said in text
    assert ("gibberish" in text) == bool(said)
    assert "low score" not in text
    (row,) = (line.split("│") for line in lines if "harmful score " in line)
    assert row[2].strip() == cell
    assert "one answer is 10 points (harmful), 8.33 points (task)" in text  # of 50 it is two, which needs no word
    assert "degenerate: of the answers to harmful and benign prompts" in text


def test_the_command_to_read_answers_is_told_where_there_are_any(checkpoint, tmp_path, capsys):
    folder = tmp_path / "a run"
    fit(Defense(checkpoint), folder).close()
    assert f"To read the answers: casehard answers '{folder}'\nRun folder: {folder}" in capsys.readouterr().out
    stopped = Results(str(folder))  # of a run that has scored but the model before
    stopped.close(stopped=True)
    assert "To read the answers" not in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    results = Results(str(tmp_path / "none"), generations=False, export=False)
    toy_trainer(tmp_path / "none", callbacks=[results]).fit(Defense(checkpoint), datamodule=toy_data())
    results.close()
    assert "To read the answers" not in capsys.readouterr().out


def test_without_held_out_rows_nothing_is_scored_and_the_run_says_so(checkpoint, tmp_path, capsys):
    results = fit(Defense(checkpoint), tmp_path, data={"harmful_prompts": [], "benign_prompts": [], "task": []})
    assert not (tmp_path / DELIVERED).exists()
    results.close()
    assert "Not scored: data.sources names no harmful_prompts, benign_prompts or task." in capsys.readouterr().out


def test_a_changed_file_is_told_from_what_the_run_left(tmp_path):
    Delivered({"harmful_score": 1.0}, {"harmful_score": NAN}, {"harmful": 1}, "own", ["n"]).write(tmp_path)
    marker = leaves(tmp_path)
    assert not list(changed_results(marker, tmp_path))
    (tmp_path / DELIVERED).write_text('{"before": []}')
    assert list(changed_results(marker, tmp_path))
    with pytest.raises(SettingError, match=r"delivered.json must be what `casehard fit` wrote"):
        read_delivered(tmp_path)
    assert read_delivered(tmp_path / "nowhere") is None


class Silent(Judge):
    """One whose endpoint is down."""

    name = "silent"

    def __call__(self, prompts, responses):
        return [Verdict(NAN, False, False, "HTTP 401")] * len(responses)


def test_a_fit_whose_judge_scored_nothing_says_why_and_is_not_finished(checkpoint, tmp_path):
    with pytest.warns(UserWarning, match="HTTP 401"):
        results = fit(Defense(checkpoint), tmp_path, data={"judge": Silent()})
    with pytest.raises(SettingError, match=r"HTTP 401.*start again with --ckpt_path last, which scores it without training"):
        results.require_verdicts()
    fit(Defense(checkpoint), tmp_path / "unasked", data={"judge": Silent(), "harmful_prompts": []}).require_verdicts()
