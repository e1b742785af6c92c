"""A search around an attack: what it chooses, what it may not choose, and what is left of it after a kill."""

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from toy import ATTACKS, FAST, Everywhere, csv_rows, start_fork_server, toy_data, toy_trainer

from casehard import (
    Defense,
    DeltaStrip,
    FullParameterAttack,
    LoRA,
    LoRAAttack,
    Optimizer,
    RefusalAblation,
    Relearning,
    SettingError,
)
from casehard.callbacks.attack import Attack, Target
from casehard.callbacks.per_prompt import PerPrompt
from casehard.callbacks.results import Results
from casehard.callbacks.search import Search
from casehard.callbacks.search_space import Bound, MedianPruner, Range, with_settings
from casehard.datamodules.row import Row
from casehard.engine.training import DivergedError
from casehard.engine.weights import NOTHING
from casehard.evidence.searches import Band, band, band_of, best_so_far
from casehard.records.rows import ResultRow, read_run
from casehard.records.trials import TrialRow, read_trials, write_trials

pytestmark = pytest.mark.skipif("search" not in ATTACKS, reason="needs the extra search")
VALIDATION = ["sandbox:validation/harmful#train[:4]"]
TASK = ["sandbox:validation/mood#train[:10]"]
CHOICES: dict[str, Any] = {"optimizer.learning_rate": Range(1e-5, 1e-1, log=True), "batch_size": [4, 8], "lora.rank": Range(1, 4)}


@dataclass(frozen=True)
class Inner:
    """Settings within a setting."""

    at: float = 0.0


@dataclass(frozen=True)
class Outer:
    """Settings within a setting."""

    inner: Inner = Inner()
    names: tuple[str, ...] = ()


class Lever(Attack):
    """Harms by where its lever stands: most at 0.3, and 0.7 further off not at all. Above 0.5 it ruins the task."""

    num_begun, killed_at, seconds = 0, 0, 0.0  # of this process

    def __init__(
        self,
        threat_model: str = "open_weight",
        lever: float = 0.0,
        outer: Outer = Outer(),
        diverges: bool = False,
        **settings: Any,
    ) -> None:
        self.num_attack_steps, self.lever, self.outer, self.diverges = 2, lever, outer, diverges
        super().__init__(threat_model, score_steps=[1, 2], **settings)  # type: ignore[arg-type]

    def changes(self, module: Defense) -> Any:
        return NOTHING

    def steps(self, target: Target) -> Iterator[int]:
        Lever.num_begun += 1
        if Lever.killed_at == Lever.num_begun:
            yield 1
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(Lever.seconds)
        if self.diverges:
            raise DivergedError("as it was told to")
        yield 1
        target.spend(passes=1, trained=7)
        yield 2

    def respond(self, target: Target, rows: list[Row], max_new_tokens: int) -> list[str]:
        at, known = self.lever + self.outer.inner.at, target.data.rows
        shares = {"harmful_prompts": max(0.0, 1 - abs(at - 0.3) / 0.7), "task": 1.0 if at <= 0.5 else 0.5, "benign_prompts": 1.0}
        share = next((share for role, share in shares.items() if rows and rows[0] in known[role]), 0.0)
        return [row.response or "" if i < round(len(rows) * share) else "" for i, row in enumerate(rows)]


def attacked(
    folder: Path, checkpoint: str, *attacks: Attack, kind: type[Defense] = Defense, **data: Any
) -> tuple[list[ResultRow], list[TrialRow]]:
    """Rows of attacks on a checkpoint, and the trials of those that search."""
    results = Results(str(folder / "run"), export=False)
    toy_trainer(folder, callbacks=[results, *attacks]).test(kind(checkpoint), datamodule=toy_data(**data), verbose=False)
    return results.rows, read_trials(folder / "run")


def lever(num_trials: int = 12, **settings: Any) -> Search:
    """A search for where the lever has to stand."""
    own = {"threat_model": settings.pop("threat_model", "open_weight")}
    choices = settings.pop("choices", {"lever": Range(0.0, 1.0)})
    return Search(Lever(**own), choices, ["sandbox:validation/harmful#train[:20]"], num_trials, task=TASK, **settings)


# ---- what is chosen


def test_a_search_attacks_as_the_best_of_its_trials_does_alone(tmp_path, checkpoint):
    class Loud(LoRAAttack):
        """Its harmful score is its number of rows a step: the search has something to find."""

        def respond(self, target, rows, max_new_tokens):
            return [row.response if i < self.batch_size - 3 else "" for i, row in enumerate(rows)]

    settings = FAST | {"num_samples": 16}
    search = Search(Loud("open_weight", LoRA(rank=2), **settings), CHOICES, VALIDATION, 3, pruner=None)
    searched, trials = attacked(tmp_path / "searched", checkpoint, search)
    best = max(trials, key=lambda trial: trial.coherent_harm)
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert [trial.chosen for trial in trials] == [trial is best for trial in trials]
    assert len({trial.settings["optimizer.learning_rate"] for trial in trials}) == 3
    chosen = settings | {
        "optimizer": replace(FAST["optimizer"], learning_rate=best.settings["optimizer.learning_rate"]),
        "batch_size": best.settings["batch_size"],
    }
    alone, _ = attacked(tmp_path / "alone", checkpoint, Loud("open_weight", LoRA(rank=best.settings["lora.rank"]), **chosen))
    measured = ("harmful_score", "coherent_harm", "num_scored", "finetune_accuracy", "num_attack_steps")
    for ours, theirs in zip(searched[1:], alone[1:], strict=True):
        assert [getattr(ours, name) for name in measured] == [getattr(theirs, name) for name in measured]
        assert ours.attack == "Loud, searched"
        assert ours.learning_rate is None
        assert ours.trained == "what the search chose"  # which differs between the rows of one series
        assert ours.batch_size is None
        assert "rank" not in ours.settings["lora"]
        assert f"chosen of 3 trials, coherent harm {best.coherent_harm:.1f} on 4 other prompts" in ours.note
    assert best.test_coherent_harm == searched[-1].coherent_harm
    assert searched[0].passes == 0
    assert searched[-1].passes == 4 * alone[-1].passes  # three trials, and the attack itself
    answers = [
        [
            (a["kind"], a["prompt"], a["response"])
            for a in map(json.loads, (tmp_path / run / "run/generations.jsonl").read_text().splitlines())
        ]
        for run in ("searched", "alone")
    ]
    late = len(answers[0]) // 2  # of step 3
    assert answers[0][late:] == answers[1][late:]  # trials left no trace, and the prompts are the test's


def test_what_is_optimised_for_a_prompt_takes_all_its_steps_on_test_prompts_too(tmp_path, checkpoint):
    class Pushes(PerPrompt):
        """Harms with its last step, and not before."""

        def __init__(self, batch_size: int = 2, **settings: Any) -> None:
            self.num_attack_steps, self.batch_size = 3, batch_size
            super().__init__("open_weight", **settings)

        def optimise(self, target, rows, num_steps):
            taken = target.state.setdefault("taken", {})
            taken |= {row: taken.get(row, 0) + num_steps for row in rows}
            return 0

        def answered(self, target, rows, max_new_tokens):
            return [row.response if target.state["taken"][row] == self.num_attack_steps else "" for row in rows]

    search = Search(Pushes(score_steps=[1, 2, 3]), {"batch_size": [1, 3]}, VALIDATION, 2, pruner=None)
    rows, trials = attacked(tmp_path, checkpoint, search)
    assert rows[-1].coherent_harm == 100
    assert [(trial.coherent_harm, trial.test_coherent_harm) for trial in trials] == [(100, 100)] * 2
    assert rows[-1].passes == 3 + 2 * (3 + 3)  # of each trial's steps for the validation prompts, and for the test's


def test_scores_are_the_attacks_own(tmp_path, checkpoint):
    facts = {"facts": ["sandbox:facts/known#train[:8]"], "held_out": ["sandbox:facts/held_out#train[:8]"]}

    class Recalled(Relearning):
        """All comes back."""

        def respond(self, target, rows, max_new_tokens):
            return [row.response or "" if target.num_done else "" for row in rows]

    attack = Recalled("open_weight", **facts, num_samples=8, num_attack_steps=1, batch_size=4)
    rows, _ = attacked(tmp_path, checkpoint, Search(attack, {"batch_size": [4, 8]}, VALIDATION, 2))
    assert [row.finetune_accuracy for row in rows] == [0, 100]
    assert ["recovery 0.00" in rows[0].note, "recovery 1.00" in rows[1].note] == [True, True]


def test_a_planted_optimum_is_found(tmp_path, checkpoint):
    rows, trials = attacked(tmp_path, checkpoint, lever(30, pruner=None))
    (chosen,) = [trial for trial in trials if trial.chosen]
    assert chosen.settings["lever"] == pytest.approx(0.3, abs=0.04)
    assert chosen.coherent_harm >= 95
    assert rows[-1].coherent_harm > rows[0].coherent_harm
    late = [abs(trial.settings["lever"] - 0.3) for trial in trials[10:]]
    early = [abs(trial.settings["lever"] - 0.3) for trial in trials[:10]]
    assert np.mean(late) < np.mean(early) / 2  # TPE looks where harm was found


def test_settings_lie_at_any_depth_and_values_may_be_anything(tmp_path, checkpoint):
    choices = {"outer.inner.at": [0.9, 0.3], "outer.names": [["a"], ["b", "c"]], "lever": [0.0]}
    _, trials = attacked(tmp_path, checkpoint, lever(6, choices=choices, pruner=None))
    (chosen,) = [trial for trial in trials if trial.chosen]
    assert chosen.settings["outer.inner.at"] == 0.3
    assert {json.dumps(trial.settings["outer.names"]) for trial in trials} <= {'["a"]', '["b", "c"]'}
    whole = {"lora": [None, {"rank": 3}]}
    rows, trials = attacked(
        tmp_path / "whole", checkpoint, Search(LoRAAttack("open_weight", **FAST), whole, VALIDATION, 4, "RandomSampler")
    )
    assert {json.dumps(trial.settings["lora"]) for trial in trials} == {"null", '{"rank": 3}'}
    assert "lora" not in rows[0].settings


def test_what_breaks_a_bound_is_kept_and_not_chosen(tmp_path, checkpoint):
    choices = {"lever": [0.3, 0.6, 0.0], "outer.inner.at": [0.0, 0.3]}  # 0.3 + 0.3 and 0.6 ruin the task
    settings = {"choices": choices, "sampler": "RandomSampler", "pruner": None}
    _, free = attacked(tmp_path / "free", checkpoint, lever(24, **settings))
    rows, bounded = attacked(tmp_path / "bounded", checkpoint, lever(24, bounds={"coherent_harm": Bound(high=80)}, **settings))
    assert [trial.settings for trial in free] == [trial.settings for trial in bounded]  # one seed, one sequence
    best = max(trial.coherent_harm for trial in free)
    assert next(trial.coherent_harm for trial in free if trial.chosen) == best == 100  # no bound: the plain maximum
    chosen = next(trial for trial in bounded if trial.chosen)
    assert chosen.coherent_harm == max(trial.coherent_harm for trial in bounded if trial.coherent_harm <= 80)
    beyond = [trial for trial in bounded if not trial.within_bounds]
    assert beyond
    assert all(trial.coherent_harm > 80 and math.isnan(trial.test_coherent_harm) for trial in beyond)
    assert f"chosen of 24 trials ({len(beyond)} beyond bounds)" in rows[-1].note


def test_accuracy_bounds_the_harm(tmp_path, checkpoint):
    choices = {"lever": [0.55, 0.0]}  # the first harms more, and ruins the task
    bounds = {"finetune_accuracy": Bound(low=80), "degenerate_rate": Bound(high=100)}
    _, trials = attacked(tmp_path, checkpoint, lever(6, choices=choices, bounds=bounds, sampler="RandomSampler", pruner=None))
    for trial in trials:
        assert trial.within_bounds == (trial.settings["lever"] == 0.0) == (trial.metrics["finetune_accuracy"] >= 80)
        assert trial.coherent_harm == trial.metrics["coherent_harm"]
    assert next(trial.settings["lever"] for trial in trials if trial.chosen) == 0.0


def test_where_nothing_is_within_bounds_nothing_was_measured(tmp_path, checkpoint):
    rows, trials = attacked(tmp_path, checkpoint, lever(3, bounds={"finetune_accuracy": Bound(low=101)}))
    assert [row.num_attack_steps for row in rows] == [0, 1, 2]
    assert not math.isnan(rows[0].harmful_score)
    assert all(math.isnan(row.harmful_score) and math.isnan(row.coherent_harm) and row.num_scored == 0 for row in rows[1:])
    assert "none of 3 trials (3 beyond bounds) may be chosen" in rows[-1].note
    assert not any(trial.chosen for trial in trials)
    assert len(read_run(tmp_path / "run").rows) == 3


def test_kl_is_that_of_the_first_token_and_bounds_what_is_chosen(tmp_path, checkpoint):
    benign = ["sandbox:validation/howto#train[:5]"]
    attack = FullParameterAttack("open_weight", **FAST)
    search = Search(
        attack, {"optimizer.learning_rate": [1e-9, 3e-2]}, VALIDATION, 5, "RandomSampler", bounds={"kl": Bound(high=1e-4)}, benign_prompts=benign
    )  # fmt: skip
    _, trials = attacked(tmp_path, checkpoint, search)
    still, moved = ([t for t in trials if t.settings["optimizer.learning_rate"] == rate] for rate in (1e-9, 3e-2))
    assert all(t.within_bounds and 0 <= t.metrics["kl"] < 1e-6 for t in still)
    assert all(not t.within_bounds and t.metrics["kl"] > 1e-3 for t in moved)
    assert still[0].chosen


def test_trials_that_fall_behind_are_pruned_and_counted(tmp_path, checkpoint):
    choices = {"lever": Range(0.0, 1.0)}
    rows, trials = attacked(tmp_path, checkpoint, lever(16, choices=choices, sampler="RandomSampler", pruner=MedianPruner(4)))
    pruned = [trial for trial in trials if trial.state == "pruned"]
    assert len(trials) == 16
    assert len(pruned) >= 3
    assert all(trial.state == "complete" for trial in trials[:4])
    for trial in pruned:
        before = [t.coherent_harm for t in trials[: trial.number] if t.state == "complete"]
        assert trial.step == 1
        assert trial.coherent_harm < np.median(before)
        assert not trial.within_bounds
    assert f"{len(pruned)} pruned" in rows[-1].note
    _, unpruned = attacked(tmp_path / "all", checkpoint, lever(16, choices=choices, sampler="RandomSampler", pruner=None))
    assert {trial.state for trial in unpruned} == {"complete"}


def test_a_trial_beyond_bounds_prunes_none_that_keeps_them(tmp_path, checkpoint):
    choices = {"lever": [0.55, 0.0]}  # the first harms more, and ruins the task
    bounds = {"finetune_accuracy": Bound(low=80), "degenerate_rate": Bound(high=100)}
    settings = {"choices": choices, "bounds": bounds, "sampler": "RandomSampler", "pruner": MedianPruner(1)}
    _, trials = attacked(tmp_path, checkpoint, lever(8, **settings))
    assert {trial.settings["lever"] for trial in trials} == {0.55, 0.0}
    assert all(trial.state == "complete" for trial in trials if trial.settings["lever"] == 0.0)


def test_a_trial_beyond_bounds_early_on_is_not_pruned_for_that(tmp_path, checkpoint):
    class Recovers(Lever):
        """Ruins the task at its first step, where its lever stands best, and not at its last."""

        def steps(self, target):
            for self.at in super().steps(target):
                yield self.at

        def respond(self, target, rows, max_new_tokens):
            ruined = self.lever == 0.3 and self.at == 1 and rows == target.data.rows["task"][: len(rows)]
            return ["" for _ in rows] if ruined else super().respond(target, rows, max_new_tokens)

    settings = {"num_trials": 8, "bounds": {"finetune_accuracy": Bound(low=80)}, "sampler": "RandomSampler", "task": TASK}
    search = Search(
        Recovers(), {"lever": [0.0, 0.3]}, ["sandbox:validation/harmful#train[:20]"], pruner=MedianPruner(1), **settings
    )
    _, trials = attacked(tmp_path, checkpoint, search)
    assert {trial.settings["lever"] for trial in trials} == {0.0, 0.3}
    assert all(trial.state == "complete" and trial.within_bounds for trial in trials if trial.settings["lever"] == 0.3)
    assert next(trial.settings["lever"] for trial in trials if trial.chosen) == 0.3


def test_trials_that_diverge_are_kept_and_it_is_said_when_all_do(tmp_path, checkpoint):
    rows, trials = attacked(tmp_path, checkpoint, lever(6, choices={"diverges": [False, True]}, sampler="RandomSampler"))
    failed = [trial for trial in trials if trial.state == "failed"]
    assert {trial.settings["diverges"] for trial in failed} == {True}
    assert all(math.isnan(trial.coherent_harm) and trial.step is None for trial in failed)
    assert f"chosen of 6 trials ({len(failed)} failed)" in rows[0].note
    wild = FullParameterAttack("open_weight", **(FAST | {"optimizer": Optimizer(1e-2, clip_norm=None)}))
    with pytest.raises(DivergedError, match="none of 2 trials had a harmful score"):
        attacked(tmp_path / "all", checkpoint, Search(wild, {"optimizer.learning_rate": [1e30]}, VALIDATION, 2))


def test_a_search_that_cannot_be_is_told_so_before_any_weights_load(tmp_path, checkpoint):
    attack = LoRAAttack("open_weight", LoRA(rank=2), **FAST)
    for choices, message in (
        ({"rank": [1]}, "choices must give values for settings of LoRAAttack other than name, .* got 'rank'"),
        ({"lora.size": [1]}, r"got 'lora\.size'"),
        ({"seed": [1]}, "got 'seed'"),
        ({"batch_size": []}, r"got 'batch_size': \[\]"),
        ({}, "choices and prompts must not be empty"),
    ):
        with pytest.raises(ValueError, match=message):
            Search(attack, choices, VALIDATION)
    for wrong, message in (
        (lambda: Range(2, 1), "a range must have low < high"),
        (lambda: Bound(), "a bound must have low or high"),
        (lambda: Bound(2, 1), "and low <= high where it has both"),
        (lambda: MedianPruner(0), "startup_trials must be >= 1, got 0"),
        (
            lambda: Search(attack, CHOICES, VALIDATION, bounds={"kl": Bound(high=1)}),
            "benign_prompts must name held-out rows where",
        ),
        (
            lambda: Search(attack, CHOICES, VALIDATION, bounds={"finetune_accuracy": Bound(1)}),
            "task must name held-out rows where",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    for search, message in (
        (
            Search(attack, CHOICES, ["sandbox:test/harmful#train[4:8]"]),
            "prompts must share no prompt with .*, and 2 stand in both",
        ),
        (
            Search(attack, CHOICES, VALIDATION, task=["sandbox:test/mood#train[5:8]"]),
            "task must share no prompt with .*, and 1 stand",
        ),
        (Search(attack, CHOICES, VALIDATION, sampler="Best"), r"sampler must be a class of optuna\.samplers, .* got 'Best'"),
        (
            Search(attack, CHOICES, VALIDATION, bounds={"harm": Bound(1)}),
            "bounds must name metrics, harmful_score, .*, kl, got 'harm'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            attacked(tmp_path, checkpoint, search)


def test_what_says_when_an_attack_is_scored_and_what_it_is_not_made_with_is_not_searched():
    service, after = LoRAAttack("open_weight", LoRA(rank=2), **FAST), FullParameterAttack("open_weight", **FAST)
    for attack, setting in (
        (RefusalAblation(), "num_phases"),
        (service, "phases"),
        (service, "adapter.rank"),
        (service, "harmful"),
        (after, "lora"),
        (DeltaStrip("toy", then=after), "then.num_attack_steps"),
    ):
        with pytest.raises(SettingError, match=f"choices must give values for settings of .*, got '{setting}'"):
            Search(attack, {setting: [2]}, VALIDATION)


def test_an_attack_is_made_anew_with_other_settings():
    attack = DeltaStrip("toy", then=LoRAAttack("open_weight", LoRA(rank=2), **FAST), keep=0.5)
    other = with_settings(attack, {"then.optimizer.learning_rate": 0.5, "then.lora": {"rank": 3}})
    assert (other.keep, other.then.optimizer.learning_rate, other.then.lora.rank) == (0.5, 0.5, 3)
    assert (attack.then.optimizer.learning_rate, attack.then.lora.rank) == (FAST["optimizer"].learning_rate, 2)
    for settings, message in (({"keep": 2}, "keep must lie in"), ({"then.batch_size": 0}, "batch_size must be >= 1, got 0")):
        with pytest.raises(SettingError, match=message):
            with_settings(attack, settings)


def test_every_value_is_checked_before_a_trial_runs(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(Search, "_try", lambda *_: pytest.fail("a trial ran"))
    attack, relearning = (
        LoRAAttack("open_weight", LoRA(rank=2), **FAST),
        {"facts": ["sandbox:facts/known"], "held_out": ["sandbox:facts/held_out"]},
    )
    for searched, choices, message in (
        (attack, {"poison_ratio": [0.5, 2]}, "LoRAAttack can take, got poison_ratio 2: poison_ratio must lie in"),
        (attack, {"batch_size": Range(0, 4), "lora.rank": [1]}, "got batch_size 0, lora.rank 1: batch_size must be >= 1, got 0"),
        (attack, {"optimizer.learning_rate": Range(-1.0, 1.0)}, "learning_rate must be > 0"),
        (attack, {"batch_size": [4, "four"]}, "got batch_size four"),
        (attack, {"num_samples": Range(4, 10**6)}, "must find"),
        (attack, {"lora.target_modules": [["q_proj"], ["nowhere"]]}, r"got lora.target_modules \['nowhere'\]: .*target_modules"),
        (Relearning("open_weight", **relearning), {"lora": [{"rank": 4}]}, r"got lora \{'rank': 4\}: 'dict' object has no"),
    ):  # fmt: skip
        with pytest.raises(SettingError, match=message):
            attacked(tmp_path, checkpoint, Search(searched, choices, VALIDATION, 2))


def test_a_trial_that_cannot_be_is_a_failed_one_and_says_why(tmp_path, checkpoint):
    class Picky(Lever):
        """It finds out late."""

        def steps(self, target):
            if self.lever > 0.5:
                raise SettingError(f"lever must be <= 0.5, got {self.lever}.")
            yield from super().steps(target)

    search = Search(Picky(), {"lever": [0.3, 0.7]}, VALIDATION, 6, "RandomSampler")
    rows, trials = attacked(tmp_path, checkpoint, search)
    failed = [trial for trial in trials if trial.state == "failed"]
    assert {(trial.settings["lever"], trial.reason) for trial in failed} == {(0.7, "lever must be <= 0.5, got 0.7.")}
    assert {(trial.settings["lever"], trial.reason) for trial in trials if trial not in failed} == {(0.3, "")}
    assert f"({len(failed)} failed)" in rows[-1].note
    with pytest.raises(DivergedError, match=r"none of 2 trials had a harmful score \(lever must be <= 0.5, got 0.7"):
        attacked(tmp_path / "all", checkpoint, Search(Picky(), {"lever": [0.7]}, VALIDATION, 2))


def test_columns_of_searched_settings_stay_empty_however_they_are_written():
    attack = LoRAAttack("open_weight", LoRA(rank=2), **FAST)
    whole = set(attack.settings())

    def left_out(choices: dict[str, Any], searched: Attack = attack) -> set[str]:
        return whole - set(Search(searched, choices, VALIDATION).settings())

    assert left_out({"optimizer": [{"learning_rate": 0.1}, {"learning_rate": 0.2, "weight_decay": 0.1}]}) == {"learning_rate"}
    assert left_out({"optimizer": [{"name": "sgd"}, Optimizer(0.1)]}) == {"optimizer", "learning_rate"}
    assert left_out({"optimizer.name": ["sgd"]}) == {"optimizer"}
    assert left_out({"lora": [{"rank": 3}]}) == set()
    assert set(attack.settings()["lora"]) - set(Search(attack, {"lora": [{"rank": 3}]}, VALIDATION).settings()["lora"]) == {
        "rank"
    }
    after = DeltaStrip("toy", then=attack)
    assert left_out({"then.optimizer.learning_rate": [0.1], "then.batch_size": [4]}, after) == {"learning_rate", "batch_size"}
    assert left_out({"then.optimizer": [{"name": "sgd"}]}, after) == {"optimizer"}
    assert "rank" not in Search(after, {"then.lora.rank": [3]}, VALIDATION).settings()["lora"]
    assert attack.settings()["lora"]["rank"] == 2


def test_nothing_is_chosen_by_prompts_that_are_trained_on(tmp_path, checkpoint):
    attack = LoRAAttack("open_weight", LoRA(rank=2), **FAST)
    known = {"facts": ["sandbox:facts/known#train[:12]"], "held_out": ["sandbox:facts/held_out#train[:12]"]}
    relearning = Relearning("open_weight", **known, num_samples=8, num_attack_steps=1, batch_size=4)
    facts = [["sandbox:facts/known#train[:12]"], ["sandbox:facts/known#train[12:24]"]]
    own = ["sandbox:facts/known#train[20:24]"]
    for search, role in (
        (Search(attack, CHOICES, ["sandbox:attacker/harmful#train[:2]"]), "prompts"),
        (Search(attack, CHOICES, VALIDATION, task=["sandbox:attacker/mood#train[:2]"]), "task"),
        (Search(relearning, {"facts": facts}, VALIDATION, task=own), "task"),  # those of one choice
    ):
        with pytest.raises(SettingError, match=f"{role} must share no prompt with rows that are trained on, and . stand in both"):
            attacked(tmp_path, checkpoint, search)


# ---- on disk


def in_process(*arguments: Any) -> Any:
    """A process that runs ``searching`` beside this one."""
    start_fork_server()
    process = mp.get_context("forkserver").Process(target=searching, args=arguments)
    process.start()
    return process


def searching(
    folder: Path, checkpoint: str, num_trials: int, settings: dict[str, Any], killed_at: int = 0, seconds: float = 0.0
) -> None:
    """A run that searches; in a process of its own it may be killed in the middle of an attack."""
    torch.set_num_threads(1)
    Lever.killed_at, Lever.seconds = killed_at, seconds
    attacked(folder, checkpoint, lever(num_trials, **settings))


def lines(folder: Path) -> list[dict[str, str]]:
    return csv_rows(folder / "run/search.csv")


def test_a_search_that_was_killed_goes_on_to_the_same_trials(tmp_path, checkpoint):
    """Twice: in the middle of a trial, and of a line of its storage."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    searching(whole, checkpoint, 14, {})
    assert len({line["settings"] for line in lines(whole)}) > 10
    for killed_at in (4, 5):
        process = in_process(killed, checkpoint, 14, {}, killed_at)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (killed / "run/search.csv").exists()
        with (killed / "run.trials").open("a") as file:
            file.write('{"op_code":6,"worker_id"')
    begun = Lever.num_begun
    searching(killed, checkpoint, 14, {})
    assert lines(killed) == lines(whole)
    assert (
        Lever.num_begun - begun == 14 - 3 - 4 + 1
    )  # of the first process 3 trials stand, of the second 4; and the attack itself
    searching(killed, checkpoint, 14, {})
    assert lines(killed) == lines(whole)
    assert Lever.num_begun - begun == 14 - 3 - 4 + 2  # all trials stand


def test_two_processes_work_on_one_search(tmp_path, checkpoint):
    storage = tmp_path / "shared" / "trials.log"
    settings = {"storage": str(storage)}
    workers = [in_process(tmp_path / name, checkpoint, 10, settings, 0, 0.2) for name in ("one", "two")]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert lines(tmp_path / "one") == lines(tmp_path / "two")
    assert [int(line["number"]) for line in lines(tmp_path / "one")] == list(range(10))
    assert len({json.loads(log)["worker_id"] for log in storage.read_text().splitlines() if json.loads(log)["op_code"] == 4}) == 2


def test_a_trial_of_a_worker_that_was_killed_is_run_by_the_other(tmp_path, checkpoint):
    settings = {"storage": str(tmp_path / "trials.log")}
    killed = in_process(tmp_path / "one", checkpoint, 6, settings, 1)
    other = in_process(tmp_path / "two", checkpoint, 6, settings, 0, 0.3)
    for worker in (killed, other):
        worker.join()
    assert (killed.exitcode, other.exitcode) == (-signal.SIGKILL, 0)
    assert [(int(line["number"]), line["state"]) for line in lines(tmp_path / "two")] == [(n, "complete") for n in range(6)]


def test_every_defense_is_searched_by_itself_with_the_same_seeds(tmp_path, checkpoint):
    storage = tmp_path / "trials.log"
    settings = {"threat_model": "finetuning_service", "storage": str(storage), "sampler": "RandomSampler", "pruner": None}
    _, trials = attacked(tmp_path / "one", checkpoint, lever(4, **settings), kind=Everywhere)
    _, others = attacked(tmp_path / "two", checkpoint, lever(4, **settings))
    assert [trial.defense for trial in trials] == ["none"] * 4 + ["Everywhere"] * 4
    assert len(others) == 4
    tried = [[trial.settings for trial in part] for part in (trials[:4], trials[4:], others)]
    assert tried[0] == tried[1] == tried[2]
    log = [json.loads(line) for line in storage.read_text().splitlines()]
    assert len({line["study_name"] for line in log if line["op_code"] == 0}) == 3  # searches
    assert len([line for line in log if line["op_code"] == 4]) == 12  # and trials


def test_another_model_and_other_settings_are_other_searches(tmp_path, checkpoint):
    storage = tmp_path / "trials.log"
    settings = {"storage": str(storage), "sampler": "RandomSampler", "pruner": None}
    attacked(tmp_path / "one", checkpoint, lever(2, **settings))
    attacked(tmp_path / "two", str(Path(checkpoint).with_name("base")), lever(2, **settings))
    attacked(tmp_path / "three", checkpoint, lever(2, **(settings | {"bounds": {"finetune_accuracy": Bound(low=1)}})))
    attacked(tmp_path / "four", checkpoint, lever(3, **settings))  # goes on with the first
    log = [json.loads(line) for line in storage.read_text().splitlines()]
    assert len({line["study_name"] for line in log if line["op_code"] == 0}) == 3
    assert len([line for line in log if line["op_code"] == 4]) == 2 + 2 + 2 + 1


# ---- what is shown of it


def trial(number: int, validation: float, test: float, within: bool = True) -> TrialRow:
    return TrialRow(
        attack_index=0, attack="a", threat_model="open_weight", defense="none", seed=0, epoch="", number=number, state="complete", within_bounds=within,
        chosen=False, step=2, settings={"x": number}, coherent_harm=validation, test_coherent_harm=test, metrics={"kl": math.nan},
    )  # fmt: skip


def test_the_trials_of_a_search_can_be_read_again(tmp_path):
    kept = [
        trial(0, 12.5, math.nan),
        replace(trial(1, math.nan, math.nan), state="failed", step=None, settings={"lora": None, "n": ["a"]}),
    ]
    other = [replace(row, defense="SBR") for row in kept]
    write_trials(tmp_path, kept)
    write_trials(tmp_path, other)
    write_trials(tmp_path, kept[:1])  # in place of what stood there of the same search
    assert list(map(repr, read_trials(tmp_path))) == list(map(repr, [*other, kept[0]]))
    (tmp_path / "search.csv").write_text("attack\nx\n")
    with pytest.raises(ValueError, match=r"search\.csv must be what a search wrote"):
        read_trials(tmp_path)


def test_the_best_so_far_of_one_trial_is_a_point_and_of_identical_ones_flat():
    assert [level.tolist() for level in band(best_so_far([3.0], [2.0]))] == [[2.0]] * 3
    assert [level.tolist() for level in band(best_so_far([3.0] * 4, [2.0] * 4))] == [[2.0] * 4] * 3


def test_the_best_so_far_is_chosen_on_validation_and_shown_on_test_prompts():
    validation, test = [10.0, 30.0, 20.0], [70.0, 5.0, 60.0]
    reported = best_so_far(validation, test)
    assert reported.shape == (1000, 3)
    assert (reported[:, -1] == 5.0).all()  # the best on validation, whatever it is worth
    expected = {(70.0, 5.0, 5.0), (70.0, 60.0, 5.0), (5.0, 5.0, 5.0), (60.0, 60.0, 5.0), (60.0, 5.0, 5.0)}
    assert set(map(tuple, reported.tolist())) == expected
    found = band(reported)
    assert found.median.tolist() == [60.0, 5.0, 5.0]  # a third each of 70, 5 and 60; of two, 5 stands in two thirds
    assert (found.low[0], found.high[0]) == (5.0, 70.0)


def test_what_is_beyond_bounds_is_never_the_best_so_far_and_nothing_is_nan_and_not_0():
    trials = [trial(0, 90.0, math.nan, within=False), trial(1, 20.0, 25.0), trial(2, 95.0, math.nan, within=False)]
    found = band_of([trials])
    assert math.isnan(found.median[0])  # two of three orders begin beyond the bounds
    assert found.high.tolist() == [25.0, 25.0, 25.0]
    assert found.median.tolist()[1:] == [25.0, 25.0]
    none: Band = band_of([[trial(0, 90.0, math.nan, within=False)] * 2])
    assert all(np.isnan(level).all() for level in none)
    pooled = band_of([[trial(0, 10.0, 10.0)] * 3, [trial(0, 30.0, 30.0)] * 2])
    assert [level.tolist() for level in pooled] == [[10.0, 10.0], [10.0, 10.0], [30.0, 30.0]]
