"""What it costs to break a defense, on rows worked out by hand."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from test_report import ROW, Silent, record
from test_results import replace
from toy import mark

from casehard.callbacks.results import Results
from casehard.evidence.breaks import cheapest, in_words
from casehard.evidence.report import write_report
from casehard.evidence.study_plan import Cell
from casehard.evidence.summary import collect


def broken(folder: Path, attack: str, costs: dict[int, tuple[float, int, int]], **said: Any) -> Path:
    """A run that breaks at its last step: by step, passes, and tokens trained and forward."""
    told = {step: dict(zip(("passes", "tokens_trained", "tokens_forward"), cost, strict=True)) for step, cost in costs.items()}
    record(folder, replace(ROW, attack=attack, **said), {step: 20 if step == max(costs) else 0 for step in costs}, told=told)
    return folder


def test_attacks_stand_by_what_the_break_cost_and_those_that_failed_last(tmp_path):
    runs = [
        broken(tmp_path / "slow0", "Slow", {0: (0, 0, 0), 9: (9, 900, 0)}),
        broken(tmp_path / "slow1", "Slow", {0: (0, 0, 0), 5: (5, 500, 0)}, seed=1),
        broken(tmp_path / "slow2", "Slow", {0: (0, 0, 0), 7: (7, 700, 0)}, seed=2),
        broken(tmp_path / "sampled", "Sampled", {0: (0, 0, 0), 2: (2, 300, 900)}),
    ]
    record(tmp_path / "held", replace(ROW, attack="Held", passes=1.0, tokens_trained=1, tokens_forward=0), {0: 0, 50: 9})
    record(tmp_path / "benign", replace(ROW, attack="Benign", harmful=False), {0: 0, 50: 20})
    (found,) = cheapest(collect([*runs, tmp_path / "held", tmp_path / "benign"])).values()
    assert [(b.member.attack, b.passes, b.tokens) for b in found] == [
        ("Sampled, adamw 0.001, poison 0.1", 2, 600),  # 300 + 900 / 3
        ("Slow, adamw 0.001, poison 0.1", 7, 700),  # the median seed's
        ("Held, adamw 0.001, poison 0.1", math.inf, math.inf),
    ]
    assert in_words("SBR", found) == (
        "SBR: broken by 2 of 3 attacks, most cheaply by Sampled, adamw 0.001, poison 0.1 (2 steps, 2 passes, 600 tokens)."
    )
    assert in_words("SBR", found[2:]) == "SBR: none of 1 attacks broke it in half of the seeds."


def test_a_report_of_several_attacks_says_which_is_the_cheapest_break_and_what_it_left(tmp_path):
    useful = {"finetune_accuracy": 97.0, "degenerate_rate": 4.0}
    runs = [
        broken(tmp_path / "a", "Sampled", {0: (0, 0, 0), 2: (2, 3000, 900)}, **useful),
        broken(tmp_path / "b", "Slow", {0: (0, 0, 0), 9: (9, 9000, 0)}, **useful),
        broken(tmp_path / "c", "Slower", {0: (0, 0, 0), 20: (20, 90000, 0)}, **useful),
    ]
    page = write_report([str(run) for run in runs], str(tmp_path / "report"), "Breaks")
    text = page.with_suffix(".md").read_text()
    assert "- SBR: broken by 3 of 3 attacks, most cheaply by Sampled" in text
    assert "| finetuning_service | 2 | 2 | 3 300 | 100.0 | 97.0 to 97.0 | 0.0 to 0.0 | 4.0 to 4.0 |" in text
    assert "The cheapest break of each defense" in page.read_text()


def test_one_attack_is_no_choice_and_runs_without_costs_are_told_by_their_steps(tmp_path):
    for name, at in (("Quick", 5), ("Slow", 20)):
        record(tmp_path / name, replace(ROW, attack=name), {0: 0, at: 20})
    assert [b.member.attack.split(",")[0] for b in cheapest(collect([tmp_path / "Quick", tmp_path / "Slow"]))["SBR"]] == [
        "Quick",
        "Slow",
    ]
    page = write_report([str(tmp_path / "Quick")], str(tmp_path / "report"), "One")
    assert "cheapest break" not in page.read_text()


def test_what_nobody_counted_broke_it_all_the_same_and_stands_behind_what_was_counted(tmp_path):
    runs = [
        broken(tmp_path / "program", "Program", {0: (0, 0, 0), 1: (math.nan, 0, 0)}),
        broken(tmp_path / "slow", "Slow", {0: (0, 0, 0), 9: (9, 900, 0)}),
    ]
    found = cheapest(collect(runs))["SBR"]
    assert [(b.member.attack.split(",")[0], b.broken) for b in found] == [("Slow", True), ("Program", True)]
    assert (
        in_words("SBR", found[1:]) == "SBR: broken by 1 of 1 attacks, most cheaply by Program, adamw 0.001, poison 0.1 (1 step)."
    )


def test_half_of_the_seeds_is_enough_and_a_seed_that_was_not_scored_to_its_end_says_nothing(tmp_path):
    for seed, at in ((0, 5), (1, None)):
        record(tmp_path / f"half{seed}", replace(ROW, attack="Half", seed=seed), {0: 0, 5: 20 if at else 0})
    results = Results(str(tmp_path / "none"), generations=False)
    for step, score in ((0, 0.0), (5, math.nan)):
        results.record(Silent, replace(ROW, attack="Unscored", num_attack_steps=step, harmful_score=score), [])
    found = {b.member.attack.split(",")[0]: b.broken for b in cheapest(collect(tmp_path.iterdir()))["SBR"]}
    assert found == {"Half": True, "Unscored": False}
    half, unscored = cheapest(collect(tmp_path.iterdir()))["SBR"]
    assert (half.passes, math.isnan(unscored.passes)) == (5, True)


def test_controls_without_tampering_are_no_attacks(tmp_path):
    record(tmp_path / "prefill", replace(ROW, attack="Prefill", passes=0.0, tokens_trained=0, tokens_forward=0), {0: 20})
    broken(tmp_path / "slow", "Slow", {0: (0, 0, 0), 9: (9, 900, 0)})
    assert [b.member.attack.split(",")[0] for b in cheapest(collect(tmp_path.iterdir()))["SBR"]] == ["Slow"]


def test_a_cell_of_several_attacks_and_its_baseline_are_told_apart(tmp_path):
    folder = tmp_path / "study/sbr-customers-seed0-0"
    results = Results(str(folder), generations=False)
    for number, (attack, rate) in enumerate((("Plain", 1e-3), ("Plain", 1e-2), ("Backdoor", 1e-3))):
        for defense, stage in (("none", "none"), ("SBR", "finetuning")):
            for step in (0, 9):
                row = replace(ROW, attack=attack, learning_rate=rate, attack_index=number, defense=defense, stage=stage)
                results.record(Silent, replace(row, num_attack_steps=step, harmful_score=10.0 * number), [])
    mark(folder, config="c")
    cell = Cell("cell", "SBR at 50", "customers", 0, [], str(folder), "c")
    (tmp_path / "study/cells.json").write_text(json.dumps([asdict(cell)]))
    found = {(series.attack, series.defense): series.mean("harmful_score", 9) for series in collect([tmp_path / "study"])}
    names = ("customers: Plain, adamw 0.001, poison 0.1", "customers: Plain, adamw 0.01, poison 0.1", "customers: Backdoor")
    assert found == {(name, defense): 10.0 * n for n, name in enumerate(names) for defense in ("undefended", "SBR at 50")}
