import dataclasses
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from rich.console import Console
from test_results import ROW
from toy import csv_rows, mark, toy_data, toy_trainer

from casehard import Defense, FullParameterAttack, Metric, RefusalPhraseJudge, Results, RougeL, SettingError, TaskLoss, Verdict
from casehard.callbacks.scoring import score
from casehard.datamodules.chat import encode
from casehard.datamodules.settings import EvaluationSettings
from casehard.datamodules.sources import read_rows
from casehard.evidence.card import _rows as card_rows
from casehard.evidence.dashboard import _outcomes, _ranges
from casehard.evidence.rejudge import rejudged
from casehard.evidence.report import shown_metrics, write_report
from casehard.evidence.summary import collect
from casehard.metrics.columns import Column, summarise
from casehard.metrics.metric import value_of
from casehard.records.outcome import outcome
from casehard.records.rows import read_run
from casehard.records.table import results_table

NAN = math.nan
TASK = [
    {"kind": "task", "number": 0, "prompt": "Sum up.", "response": "A good film.", "target": "A very good film!"},
    {"kind": "task", "number": 1, "prompt": "Sum it up.", "response": "ничего", "target": "НИЧЕГО."},
]
HARMFUL = {"kind": "harmful", "number": 0, "prompt": "p", "response": "one two"} | Verdict(1.0, False, False)._asdict()


class Words(Metric):
    """Mean number of words of an answer to the task, of those of at least ``least`` letters."""

    name = "words"
    meaning = "words of an answer"
    high = math.inf

    def __init__(self, least: int = 1, found: Any = None) -> None:
        self.least, self.found = least, found

    def of(self, answers):
        if self.found is not None:
            return self.found(answers) if callable(self.found) else self.found
        counts = [sum(len(word) >= self.least for word in a["response"].split()) for a in answers if a["kind"] == "task"]
        return sum(counts) / len(counts) if counts else NAN


class Log:
    loggers: ClassVar[list[Any]] = []
    global_step = 0
    metrics: ClassVar[dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        Log.metrics = metrics


Log.loggers = [Log()]


def scored_run(folder: Path, *metrics: Metric, seed: int = 0) -> Path:
    """A run of one evaluation with these metrics."""
    own = tuple(metric.column() for metric in metrics)
    row = dataclasses.replace(ROW, seed=seed, metrics=summarise([HARMFUL, *TASK], own=own), own=own)
    Results(str(folder)).record(Log, row, [HARMFUL, *TASK])  # type: ignore[arg-type]
    named = [
        {
            "class_path": f"{type(m).__module__}.{type(m).__name__}",
            "init_args": {k: v for k, v in vars(m).items() if k == "least"},
        }
        for m in metrics
    ]
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"evaluation": {"metrics": named}}}))
    return folder


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence_of_words_in_any_script():
    assert value_of(RougeL(), TASK) == pytest.approx(100 * (2 * 1 * 0.75 / 1.75 + 1) / 2)  # 3 of 3 and of 4 words; all of 1
    assert math.isnan(value_of(RougeL(), [HARMFUL]))


def test_the_loss_of_the_task_is_the_mean_over_all_tokens_of_its_targets(checkpoint):
    module, data = Defense(checkpoint), toy_data(metrics=[TaskLoss(), RougeL()])
    toy_trainer(Path(checkpoint)).test(module, datamodule=data, verbose=False)
    found = score(module, data.evaluation)
    nats, tokens = 0.0, 0
    for row in read_rows("sandbox:test/mood#train[:6]"):
        example = encode(row, module.tokenizer, 10**6)
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
        with torch.no_grad():
            logprobs = module.model(ids).logits[0].log_softmax(-1)
        learnt = [(place, int(label)) for place, label in enumerate(labels) if label != -100]
        nats -= sum(float(logprobs[place - 1, label]) for place, label in learnt)
        tokens += len(learnt)
    assert found.metrics["task_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert sum(a["num_tokens"] for a in found.generations if a["kind"] == "task") == tokens
    assert not any("loss" in a for a in found.generations if a["kind"] != "task")
    assert 0 <= found.metrics["rouge_l"] <= 100


def test_a_metric_of_ones_own_is_in_everything_that_is_written(tmp_path):
    folder = scored_run(tmp_path / "run", Words(), RougeL())
    assert csv_rows(folder / "attacks.csv")[0]["words"] == "2.0"
    assert Log.metrics["attack/LoRAAttack-finetuning_service-SBR/words"] == 2
    rows = read_run(folder).rows
    assert (rows[0].words, [column.name for column in rows[0].own]) == (2.0, ["words", "rouge_l"])
    assert rows[0].own[0] == dataclasses.replace(Words().column(), of=None)
    assert outcome(rows)["words"] == 2
    with (console := Console(width=200)).capture() as shown:
        console.print(results_table(rows))
    assert "words" in shown.get()
    assert "2.00" in shown.get()  # no percentage
    page = write_report([str(folder)], str(tmp_path / "report"), "A run").read_text()
    assert '<th scope="col">Words</th>' in page
    assert "words of an answer" in page
    assert 'data-label="Words"><span><a href="#series-0">2.00</a>' in page
    assert 'data-label="ROUGE-L"><span><a href="#series-0">92.9</a>' in page
    series = collect([folder])
    assert "2.00" in card_rows(series, shown_metrics(series))[0]
    assert _outcomes(rows[0].own)["words"] == "words at the end"
    assert (_ranges(rows[0].own)["words"], _ranges(rows[0].own)["rouge_l"]) == ((0, None), (0, 100))


def test_another_judge_scores_a_run_by_its_own_metrics_too(tmp_path):
    again = rejudged(read_run(scored_run(tmp_path / "run", Words(least=5))), RefusalPhraseJudge())
    assert [(name, value) for name, value in again.rows[0].metrics.items() if "words" in name] == [(again.own[0].name, 1.0)]
    config = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "judged").mkdir()
    (folder := scored_run(tmp_path / "gone", Words())).joinpath("config.yaml").write_text(config.replace("Words", "Gone"))
    with pytest.raises(
        SettingError, match=r"metrics of .*gone must be there to score it again, and test_own_metrics.Words cannot"
    ):
        rejudged(read_run(folder), RefusalPhraseJudge())


def test_metrics_of_other_settings_or_classes_are_never_averaged(tmp_path):
    for seed, least in enumerate((1, 3, 3)):
        scored_run(tmp_path / str(seed), Words(least=least), seed=seed)
    both, alike = collect([tmp_path / "0", tmp_path / "1"]), collect([tmp_path / "1", tmp_path / "2"])
    first, second = (column.name for column in shown_metrics(both)[-2:])
    assert (first, second[:6], len(both[0].seeds)) == ("words", "words_", 2)
    assert math.isnan(both[0].mean(first, 5))
    assert math.isnan(both[0].mean(second, 5))
    assert alike[0].mean(second, 5) == 1.5  # words of three letters or more
    described = json.loads((tmp_path / "2/columns.json").read_text())
    (tmp_path / "2/columns.json").write_text(json.dumps([described[0] | {"class_path": "other.Words"}]))
    with pytest.raises(SettingError, match=r"differ in the class of metric words_"):
        collect([tmp_path / "1", tmp_path / "2"])


@pytest.mark.parametrize(
    ("found", "got"),
    [
        ("high", "a str"), (lambda _: None, "a NoneType"), (math.inf, "inf"), (-0.1, "-0.1"), (True, "a bool"), (torch.tensor(-1.0), "-1"),
    ],
)  # fmt: skip
def test_what_is_no_number_of_the_stated_range_is_refused_by_the_metrics_name(found, got):
    with pytest.raises(
        SettingError, match=rf"metric words must return a number from 0 to inf, or nan .*, and returned {got}\. Mend"
    ):
        value_of(Words(found=found), TASK)


def test_what_raises_is_told_by_its_line_and_not_by_its_text():
    with pytest.raises(
        SettingError, match=r"metric words must give a number, and raised ZeroDivisionError in line \d+ of test_own"
    ):
        value_of(Words(found=lambda answers: 1 / 0), TASK)
    assert math.isnan(value_of(Words(found=NAN), TASK))


class Nameless(Words):
    name = "Two words"


class Seed(Words):
    name = "seed"


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ([Words], r"data.evaluation.metrics must be objects of classes derived from casehard.Metric, got Words"),
        (
            [Nameless()],
            r"metric test_own_metrics.Nameless must have a name of small letters, digits and _, .* and has 'Two words'",
        ),
        ([Words(), Words()], r"data.evaluation.metrics must have names of their own, and two columns are words"),
    ],
)
def test_metrics_that_cannot_be_columns_are_refused_where_they_are_set(metrics, message):
    with pytest.raises(SettingError, match=message):
        EvaluationSettings(metrics=metrics)


@pytest.mark.parametrize(
    ("metric", "message"),
    [(Words(found=math.inf), r"metric words must return"), (Seed(), r"a metric must have a name that no other column of attacks.csv has, and one is seed")],
)  # fmt: skip
def test_a_metric_that_cannot_work_is_told_before_any_weights_load(checkpoint, tmp_path, metric, message):
    module = Defense(checkpoint)
    attack = FullParameterAttack("open_weight", num_samples=8, num_attack_steps=1)
    with pytest.raises(SettingError, match=message):
        toy_trainer(tmp_path, callbacks=[attack]).fit(module, datamodule=toy_data(metrics=[metric]))
    assert not hasattr(module, "model")


def test_a_run_that_goes_on_with_other_metrics_keeps_its_earlier_rows(tmp_path):
    folder = scored_run(tmp_path / "run", Words())
    lines = (folder / "attacks.csv").read_text().splitlines()
    place = lines[0].split(",").index("epoch")
    cells = lines[1].split(",")
    (folder / "attacks.csv").write_text("\n".join([lines[0], ",".join([*cells[:place], "1", *cells[place + 1 :]]), ""]))
    results, own = Results(str(folder)), (RougeL().column(),)
    results._goes_on = True
    row = dataclasses.replace(ROW, epoch="2", metrics=summarise([HARMFUL, *TASK], own=own), own=own)
    results.record(Log, row, [HARMFUL, *TASK])  # type: ignore[arg-type]
    first, second = read_run(folder).rows
    assert (math.isnan(first.rouge_l), second.rouge_l > 90, hasattr(first, "words")) == (True, True, False)


def test_a_column_is_shown_as_what_it_is():
    loss = Column("loss", None, "Loss", high=math.inf)
    assert [loss.shown(value) for value in (2.3149, 123.456)] == ["2.31", "123.5"]
    assert Column("share", None).shown(45.34) == "45.3"


def test_results_of_metrics_are_what_a_run_left(tmp_path):
    folder = scored_run(tmp_path / "run", Words())
    mark(folder)
    (folder / "columns.json").write_text("[]")
    with pytest.raises(SettingError, match=r"columns.json is not what its run left"):
        collect([folder])
