import io
import itertools
import json
import math
import pickle
import re
import shutil
import signal
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.testing import assert_close
from toy import (
    ATTACKS,
    DATA,
    DEFENSES,
    FAST,
    ROOT,
    SIZES,
    Halving,
    bits,
    csv_rows,
    looking,
    same_bits,
    save_toy_checkpoint,
    toy_data,
    toy_trainer,
)
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from casehard import Backbone, Defense, FullParameterAttack, LoRA, LoRAAttack, ModerationJudge, Optimizer, SBRModule
from casehard.callbacks.attack import Attack, Target
from casehard.callbacks.fine_tuning import Phase
from casehard.callbacks.quantised import QuantisedAttack
from casehard.callbacks.results import Results
from casehard.cli.preview import drawn_by
from casehard.datamodules.row import Row
from casehard.datamodules.sources import read_rows
from casehard.engine import training
from casehard.engine.compression import quantised
from casehard.engine.gradients import norm
from casehard.engine.training import DivergedError, Plain, StepLoss
from casehard.engine.weights import NOTHING, Changes, attack_vector, local
from casehard.lightning_modules.job import Job
from casehard.lightning_modules.other_models import as_aligned
from casehard.metrics.errors import SettingError
from casehard.records.outcome import jobs, outcome
from casehard.records.rows import ResultRow, read_run

IDS = torch.tensor([[5, 6, 7]])


def logits_of(module: Defense) -> torch.Tensor:
    with torch.no_grad():
        return module.model(IDS).logits.clone()


class Values(pickle.Pickler):
    """Pickles by value: of a tensor its numbers, wherever they lie, and of a module its class, whose parts are compared by themselves."""

    @classmethod
    def of(cls, value: Any) -> bytes:
        written = io.BytesIO()
        cls(written).dump(value)
        return written.getvalue()

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return type(value).__name__
        if isinstance(value, torch.Tensor):
            part = local(value).reshape(-1).contiguous()
            return value.dtype, tuple(value.shape), part.view(torch.uint8).numpy().tobytes()
        return None


def python_state(module: Defense) -> dict[str, Any]:
    """Everything that a module and its parts remember beside tensors, modules and their trainer."""
    left_out = ("_parameters", "_buffers", "_modules", "_trainer", "_fabric", "plain")
    state = {}
    for owner, part in module.named_modules():
        for name, value in vars(part).items():
            if name not in left_out:
                try:
                    state[owner, name] = Values.of(value)
                except (pickle.PicklingError, AttributeError, TypeError):
                    state[owner, name] = repr(value)
    return state


class Spy(L.Callback):
    """Weights and Python state at the ends of epochs and of the fit: callbacks run in order, so two of them stand around attacks."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []
        self.states: list[dict[str, Any]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.states.append(python_state(pl_module))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.finish()
        pl_module.forget_training()
        self.seen.append({k: v.clone() for k, v in pl_module.state_dict().items()})
        self.states.append(python_state(pl_module))


def fitted(folder: Path, checkpoint: str, callbacks: list[L.Callback], defense: str = "none", **settings) -> Defense:
    kind, arguments = DEFENSES[defense]
    L.seed_everything(1)
    module = kind(checkpoint, optimizer=Optimizer(learning_rate=1e-3), **arguments)
    toy_trainer(folder, callbacks=callbacks, **settings).fit(module, datamodule=toy_data(**DATA.get(defense, {})))
    return module


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(7.0), b[k].nan_to_num(7.0)) for k in a)


TUNED = ("full", "lora")
EPOCHS = {"max_steps": 3, "limit_train_batches": 2}


@pytest.fixture(scope="module")
def unattacked(request, checkpoint, tmp_path_factory):
    """A defense, the module that its run without attacks ended with, and a number drawn then."""
    module = fitted(tmp_path_factory.mktemp("unattacked"), checkpoint, [], request.param, **EPOCHS)
    return request.param, module, torch.rand(1)


# Not the product: what an attack might leave is its own (seen under no defense, one of all stages, one that attacks while it
# trains), and what a defense might lose of itself, it loses to any attack, with training or without.
CROSSED = [
    (defense, attack)
    for defense in DEFENSES
    for attack in (ATTACKS if defense in ("none", "everywhere", "patcher") else ("full", "edit"))
]


@pytest.mark.parametrize(("unattacked", "name"), CROSSED, indirect=["unattacked"])
def test_run_with_attacks_ends_with_the_bits_of_the_run_without(tmp_path, checkpoint, unattacked, name):
    defense, reference, expected = unattacked
    results, before, after = Results(str(tmp_path / "run"), export=False), Spy(), Spy()
    seen: dict[tuple[str, int | None], list[torch.Tensor]] = defaultdict(list)

    answers: dict[tuple[str, int | None], list[list[str]]] = defaultdict(list)

    def look(attack: Attack) -> Attack:
        respond = attack.respond

        def heard(target: Target, *arguments: Any) -> list[str]:
            if not attack.num_attack_steps:  # step 0 is the attack's own: beside it what the model answers to plain prompts
                answers[attack.threat_model, target.epoch].append(Attack.respond(attack, target, *arguments))
            texts = respond(target, *arguments)
            answers[attack.threat_model, target.epoch].append(texts)
            return texts

        attack.respond = heard
        return looking(attack, lambda target: seen[attack.threat_model, target.epoch].append(logits_of(target.module)))

    # after every epoch too: training goes on as if nothing had happened
    attacks = [look(ATTACKS[name](threat_model=model, every_n_epochs=1)) for model in ("open_weight", "finetuning_service")]
    attacked = fitted(tmp_path, checkpoint, [results, before, *attacks, after], defense, **EPOCHS)
    drawn = torch.rand(1)
    assert same(attacked.state_dict(), reference.state_dict())
    assert [type(m) for m in attacked.modules()] == [type(m) for m in reference.modules()]
    assert [p.requires_grad for p in attacked.parameters()] == [p.requires_grad for p in reference.parameters()]
    assert [m.training for m in attacked.modules()] == [m.training for m in reference.modules()]
    assert torch.equal(drawn, expected)  # the generators go on from the same place
    assert len(before.states) == 3
    assert before.states == after.states  # and nothing else is remembered

    last = attacks[0].num_attack_steps
    assert {r.epoch for r in results.rows} == {"1", "2", ""}
    assert {r.num_attack_steps for r in results.rows} == {0, last}  # scored where it says, and nowhere else
    assert len(seen) == 6
    for when, logits in seen.items():  # it did attack: the weights, or else what the model is asked
        first, *_, last_harmful, _, _ = answers[when] if last else answers[when][:2] + [[]] * 2
        assert not torch.allclose(logits[0], logits[-1]) or first != last_harmful


@pytest.mark.parametrize("step", [2, 4], ids=["in the middle", "after the last step"])
def test_a_run_that_goes_on_keeps_its_rows_answers_and_seconds(tmp_path, checkpoint, step):
    def run(folder: Path, **resume: str) -> Results:
        results = Results(str(folder))
        saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        attack = ATTACKS["full"](threat_model="open_weight", every_n_epochs=1)
        shape = {"max_steps": 4, "limit_train_batches": 2, "enable_checkpointing": True, "callbacks": [results, attack, saves]}
        L.seed_everything(1)
        toy_trainer(tmp_path, **shape).fit(Defense(checkpoint, optimizer=Optimizer(1e-3)), datamodule=toy_data(), **resume)
        return results

    def kept(results: Results) -> list[ResultRow]:
        return [replace(row, wall_seconds=0.0) for row in results.rows]

    whole = run(tmp_path / "run")
    assert {row.epoch for row in whole.rows} == {"1", "2", ""}
    answers = (tmp_path / "run/generations.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run/model")
    again = run(tmp_path / "run", ckpt_path=str(tmp_path / f"step={step}.ckpt"))
    assert kept(again) == kept(whole)
    assert (tmp_path / "run/generations.jsonl").read_bytes() == answers
    assert (tmp_path / "run/model/config.json").exists()
    assert (
        again.training_seconds
        >= torch.load(tmp_path / f"step={step}.ckpt", weights_only=False)["callbacks"]["Results"]["seconds"]
        > 0
    )


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_scores_at_its_steps_and_returns_the_rows_that_it_recorded(tmp_path, checkpoint, name):
    results, outcome, attack = Results(str(tmp_path), export=False), [], ATTACKS[name](threat_model="open_weight")
    if attack.num_attack_steps > 1:
        attack = ATTACKS[name](threat_model="open_weight", score_steps=[2])
    run = attack.run
    attack.run = lambda *arguments: outcome.extend(run(*arguments))
    toy_trainer(tmp_path, callbacks=[results, attack]).test(Defense(checkpoint), datamodule=toy_data(), verbose=False)
    assert outcome == [replace(row, evaluation=0) for row in results.rows]  # it is numbered where it is kept
    assert [row.num_attack_steps for row in outcome] == sorted({0, min(2, attack.num_attack_steps)})
    assert len({row.trained for row in outcome}) == 1


@pytest.fixture
def ctrl_c_raises():
    """As at a terminal: a shell's background jobs are started with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_raises")
@pytest.mark.parametrize("how", ["error", "ctrl-c", "sigterm"])
@pytest.mark.parametrize("name", ATTACKS)
def test_interrupted_attack_leaves_the_model_restored_and_its_rows_written(tmp_path, checkpoint, name, how):
    results, before, module, looks = Results(str(tmp_path), export=False), Spy(), Defense(checkpoint), itertools.count()

    def interrupt(target: Target) -> None:
        if next(looks) == len(attack.score_steps) - 1:  # as the last step is scored
            if how == "error":
                raise RuntimeError("boom")
            signal.raise_signal(signal.SIGINT if how == "ctrl-c" else signal.SIGTERM)

    num_steps = ATTACKS[name](threat_model="open_weight").num_attack_steps
    at_once = num_steps <= 1
    attack = looking(ATTACKS[name](threat_model="open_weight", **({} if at_once else {"score_steps": [2, 3]})), interrupt)
    trainer = toy_trainer(tmp_path, callbacks=[results, before, attack])
    raised = {"error": RuntimeError, "ctrl-c": (KeyboardInterrupt, SystemExit), "sigterm": SIGTERMException}[how]
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(raised):
        trainer.fit(module, datamodule=toy_data())
    assert same(before.seen[0], module.state_dict())
    assert all(p.requires_grad for p in module.parameters())
    rows = csv_rows(tmp_path / "attacks.csv") if num_steps else []
    assert [row["num_attack_steps"] for row in rows] == ([] if not num_steps else ["0"] if at_once else ["0", "2"])
    assert num_steps or not (tmp_path / "attacks.csv").exists()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not trainer.state.finished


def test_undefended_baseline_is_the_same_job_and_the_defended_run_differs(tmp_path, checkpoint):
    results = Results(str(tmp_path), export=False)
    fitted(tmp_path, checkpoint, [results, ATTACKS["full"](threat_model="finetuning_service", score_steps=[1, 3])], "sbr")
    key = [(r.defense, r.stage, r.threat_model, r.num_attack_steps) for r in results.rows]
    twin, own = ("none", "none", "finetuning_service"), ("SBR", "finetuning", "finetuning_service")
    assert key == [(*twin, 0), (*twin, 1), (*twin, 3), (*own, 0), (*own, 1), (*own, 3)]


@pytest.mark.parametrize("defense", ["patcher", "sbr"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_undefended_checkpoint_runs_the_same_job_on_another_model(tmp_path, checkpoint, lora, defense):
    other = save_toy_checkpoint(tmp_path / "other", seed=1)
    attack = {"threat_model": "open_weight", "score_steps": [3]}
    beside, alone = (Results(str(tmp_path / name), export=False) for name in ("beside", "alone"))
    kind, settings = DEFENSES[defense]
    module, spy = kind(checkpoint, lora=lora, **settings), Spy()
    both = ATTACKS["full"](**attack, undefended_checkpoint=other)
    toy_trainer(tmp_path, callbacks=[beside, spy, both]).fit(module, datamodule=toy_data())
    assert same(spy.seen[0], module.state_dict())
    toy_trainer(tmp_path, callbacks=[alone, ATTACKS["full"](**attack)]).test(Defense(other), datamodule=toy_data(), verbose=False)
    assert [(r.defense, r.stage, r.num_attack_steps) for r in beside.rows[:2]] == [("none", "none", 0), ("none", "none", 3)]
    assert [r.defense for r in beside.rows[2:]] == [module.label] * 2
    ours, theirs = (
        [[(a["prompt"], a["response"]) for a in block] for block in read_run(r.folder).answers] for r in (beside, alone)
    )
    assert ours[:2] == theirs
    assert ours[2:] != theirs
    assert [r.note == "the undefended model is other" for r in beside.rows] == [True, True, False, False]


@pytest.mark.parametrize(("other", "alone"), [("wider", r"model\.\S+ of shape"), ("untied", r"lm_head\.weight of shape")])
def test_an_undefended_checkpoint_of_another_architecture_is_an_error(tmp_path, checkpoint, other, alone):
    untied = save_toy_checkpoint(tmp_path / "untied", tied=False)
    theirs = {"wider": str(ROOT / "models/sandbox/aligned"), "untied": untied}[other]
    attack = ATTACKS["full"](threat_model="open_weight", undefended_checkpoint=theirs)
    with pytest.raises(
        ValueError, match=rf"undefended_checkpoint must be of the defended model's architecture, and .* alone has {alone}"
    ):
        fitted(tmp_path, checkpoint, [attack], "none")


def test_open_weight_row_of_a_finetuning_stage_defense_says_that_it_breaks(tmp_path, checkpoint):
    results = Results(str(tmp_path), export=False)
    fitted(tmp_path, checkpoint, [results, ATTACKS["lora"](threat_model="open_weight")], "sbr")
    assert [(r.defense, r.stage, r.threat_model) for r in results.rows] == [("SBR", "finetuning", "open_weight")] * 2
    assert all("expected to break" in r.note for r in results.rows)


class Doubling(Defense):
    """A post-fine-tuning defense that leaves its mark: logits are twice as large."""

    def recover(self, start) -> None:
        assert list(start) == [name for name, _ in self.named_parameters()] == [f"model.{n}" for n in PLAIN_NAMES]
        self.model.model.norm.weight.data.mul_(2)


PLAIN_NAMES = [
    name for name, _ in AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=True)).named_parameters()
]


@pytest.mark.parametrize("attack", TUNED)
@pytest.mark.parametrize(("threat_model", "factor"), [("finetuning_service", 2.0), ("open_weight", 1.0)])
def test_a_service_repairs_a_model_before_every_scoring_and_trains_on_from_its_own_weights(
    tmp_path, checkpoint, attack, threat_model, factor
):
    seen: dict[type, list[torch.Tensor]] = {Doubling: [], Defense: []}
    for kind, steps in ((Doubling, [1, 2, 3]), (Defense, [1, 2, 3])):
        job = ATTACKS[attack](threat_model=threat_model, score_steps=steps, undefended=False)
        looking(job, lambda target, logits=seen[kind]: logits.append(logits_of(target.module)))
        toy_trainer(tmp_path, callbacks=[job]).test(kind(checkpoint), datamodule=toy_data(), verbose=False)
    assert len(seen[Doubling]) == 4  # step 0 is repaired too
    assert_close(torch.stack(seen[Doubling]), torch.stack(seen[Defense]) * factor)


def test_the_baseline_beside_a_repaired_model_is_not_repaired_at_step_0(tmp_path, checkpoint):
    logits: list[torch.Tensor] = []
    job = looking(ATTACKS["full"](threat_model="finetuning_service"), lambda target: logits.append(logits_of(target.module)))
    toy_trainer(tmp_path, callbacks=[job]).test(Doubling(checkpoint), datamodule=toy_data(), verbose=False)
    baseline, defended = logits[:2], logits[2:]
    assert_close(torch.stack(defended), torch.stack(baseline) * 2)


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_service_job_starts_from_the_aligned_model_and_not_from_what_fit_made(tmp_path, checkpoint, lora):
    logits: list[torch.Tensor] = []
    kind, arguments = DEFENSES["sbr"]
    fresh = kind(checkpoint, lora=lora, **arguments)
    fresh.configure_model()
    with torch.no_grad():
        aligned = fresh.model.eval()(IDS).logits
    module = kind(checkpoint, lora=lora, optimizer=Optimizer(learning_rate=1e-2), **arguments)
    attack = looking(ATTACKS["full"](threat_model="finetuning_service"), lambda target: logits.append(logits_of(target.module)))
    saves = {
        "enable_checkpointing": True,
        "callbacks": [attack, ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)],
    }
    toy_trainer(tmp_path, **saves).fit(module, datamodule=toy_data())
    with torch.no_grad():
        assert not torch.allclose(module.model.eval()(IDS).logits, aligned)  # fit moved it
    last = {"ckpt_path": str(tmp_path / "last.ckpt"), "verbose": False}
    toy_trainer(tmp_path, callbacks=[attack]).test(kind(checkpoint, lora=lora, **arguments), datamodule=toy_data(), **last)
    assert torch.equal(logits[0], aligned)
    assert torch.equal(logits[len(logits) // 2], aligned)  # in a test of what fit made


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_the_aligned_model_of_random_weights_is_the_one_that_fit_began_with(tmp_path, checkpoint, accelerator):
    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.began = bits(pl_module.model)

        def on_fit_end(self, trainer, pl_module):
            with pl_module.on_its_device(), as_aligned(pl_module):
                self.aligned = bits(pl_module.model)
            pl_module.drawn_on = "xpu"
            with pytest.raises(ValueError, match=r"trainer\.accelerator must be xpu where random weights are drawn again"):
                as_aligned(pl_module).__enter__()

    kind, settings = DEFENSES["sbr"]
    whole, resumed, saver = Look(), Look(), ModelCheckpoint(tmp_path, save_last=True)
    for seed, callbacks, max_steps, last in ((1, [whole, saver], 2, None), (2, [resumed], 3, tmp_path / "last.ckpt")):
        L.seed_everything(seed)  # the resumed run may not lean on the seed
        settings_of_it = {"accelerator": accelerator, "devices": 1, "enable_checkpointing": True}
        trainer = toy_trainer(tmp_path, callbacks=callbacks, max_steps=max_steps, **settings_of_it)
        trainer.fit(kind(checkpoint, backbone=Backbone(random_weights=True), **settings), datamodule=toy_data(), ckpt_path=last)
    assert same_bits(whole.aligned, whole.began)
    assert same_bits(resumed.aligned, whole.began)


HERE = torch.device("cpu", 0)  # the CPU under another name, by which to tell whether a model was sent there


def test_attacks_after_fit_run_where_it_trained_and_lightning_finds_the_model_where_it_left_it(tmp_path, checkpoint):
    seen = []

    class Seen(L.Callback):
        def on_fit_end(self, trainer, pl_module):
            seen.append(pl_module.device)

    attack = looking(FullParameterAttack("open_weight", **FAST), lambda target: seen.append(target.module.device))
    results = Results(str(tmp_path))
    callbacks = [Seen(), results, attack, Seen()]
    saver = ModelCheckpoint(tmp_path, save_last=True)
    settings = {"callbacks": [*callbacks, saver], "enable_checkpointing": True}
    toy_trainer(tmp_path, strategy=SingleDeviceStrategy(HERE), **settings).fit(Defense(checkpoint), datamodule=toy_data())
    cpu = torch.device("cpu")
    assert seen == [cpu, HERE, HERE, cpu]
    seen.clear()
    late = Results(str(tmp_path / "late"))  # of a run that goes on from its last step: nothing was exported
    late._scored = lambda _, module, when: seen.append((when, module.device))  # and there is nothing to write
    settings["callbacks"] = [late]
    trainer = toy_trainer(tmp_path, strategy=SingleDeviceStrategy(HERE), **settings)
    trainer.fit(Defense(checkpoint), datamodule=toy_data(), ckpt_path=tmp_path / "last.ckpt")
    assert seen == [("delivered", HERE)]


def test_an_attacker_can_train_some_parameters_alone(tmp_path, checkpoint):
    seen = []
    only = ["model.layers.1.*", "*.0.mlp.up_proj.weight"]
    attack = FullParameterAttack("open_weight", train_only=only, **FAST)
    looking(attack, lambda target: seen.append({name: p.detach().clone() for name, p in target.module.model.named_parameters()}))
    fitted(tmp_path, checkpoint, [attack])
    before, after = seen
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {n for n in before if ".layers.1." in n} | {"model.layers.0.mlp.up_proj.weight"}


def test_parameters_that_the_model_does_not_have_are_named_before_any_step(tmp_path, checkpoint):
    attack = FullParameterAttack("open_weight", train_only=["*.mlp.*", "*.layers.7.*"], **FAST)
    with pytest.raises(
        ValueError, match=r"train_only must match names .*'\*.layers.7.\*' matches none. Such a name is 'model.embed"
    ):
        fitted(tmp_path, checkpoint, [attack], max_steps=10**9)  # as soon as fit starts
    with pytest.raises(ValueError, match="train_only must hold patterns of parameters or be null, got an empty list"):
        FullParameterAttack("open_weight", train_only=[])


@pytest.mark.parametrize("behind", [False, True])
def test_diverging_attack_says_which_and_what_to_do(tmp_path, checkpoint, monkeypatch, behind):
    monkeypatch.setattr(training, "runs_behind", lambda device: behind)
    attack = ATTACKS["full"](threat_model="open_weight", optimizer=Optimizer(learning_rate=1e30, clip_norm=None))
    before, module = Spy(), Defense(checkpoint)
    with pytest.raises(
        DivergedError, match=r"FullParameterAttack \(open_weight.*the loss must be finite, and it was nan at step .*Lower"
    ):
        toy_trainer(tmp_path, callbacks=[before, attack]).fit(module, datamodule=toy_data())
    assert same(before.seen[0], module.state_dict())


def test_a_model_that_has_diverged_is_never_scored_however_late_its_loss_is_read(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(training, "runs_behind", lambda device: True)
    monkeypatch.setattr(StepLoss, "is_here", lambda self: False)
    attack = FullParameterAttack("open_weight", **FAST | {"num_attack_steps": 3, "score_steps": [1, 2, 3]})
    spoiled = iter([1.0, math.nan, 1.0])
    attack.task = lambda target: Plain(lambda batch: target.module.sft_loss(batch) * next(spoiled))
    results = Results(str(tmp_path / "run"), export=False)
    with pytest.raises(DivergedError, match=r"FullParameterAttack \(open_weight, none\): .* it was nan at step 2 of 3"):
        toy_trainer(tmp_path, callbacks=[results, attack]).test(Defense(checkpoint), toy_data(), verbose=False)
    assert [row.num_attack_steps for row in results.rows] == [0, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"poison_ratio": 1.2}, r"poison_ratio must lie in \[0, 1\], got 1.2"),
        ({"threat_model": "white_box"}, "threat_model must be open_weight or finetuning_service, got 'white_box'"),
        ({"num_attack_steps": 0}, "num_attack_steps must be >= 1, got 0"),
        ({"score_steps": [200]}, r"score_steps must lie between 0 and num_attack_steps \(100\), got \[200\]"),
        ({"score_steps": []}, r"score_steps must name a step of the attack or be null, got \[\]. null scores the last"),
        ({"every_n_epochs": 0}, "every_n_epochs must be >= 1 or null, got 0"),
        ({"phases": [Phase("benign", 3)]}, "steps of phases must add up to num_attack_steps, 100, got 3"),
    ],
)
def test_bad_settings_fail_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        FullParameterAttack(**({"threat_model": "open_weight"} | settings))


@pytest.mark.parametrize(
    ("settings", "data", "error", "message"),
    [
        ({"poison_ratio": 1.0, "num_samples": 50}, {}, ValueError, "must find 50 harmful rows, got 20"),
        ({"num_samples": 60}, {}, ValueError, "must find 54 benign rows, got 40"),
        ({}, {"max_length": 2}, ValueError, "20 of which max_length leaves no answer"),
        (
            {"copy_device": "cuda:99"},
            {},
            ValueError,
            "copy_device must be a device of this machine that keeps values, .* got 'cuda:99'",
        ),
        ({"copy_device": "meta"}, {}, ValueError, "copy_device must be .* got 'meta'"),
        ({"copy_device": "a shelf"}, {}, ValueError, "copy_device must be .* got 'a shelf'"),
        ({"undefended_checkpoint": "./nowhere"}, {}, OSError, "there is no folder './nowhere'"),
        ({"undefended_checkpoint": "models/sizes/qwen3_4b"}, {}, OSError, "undefended_checkpoint must hold weights"),
        (
            {"undefended_checkpoint": "models/sandbox/aligned"},
            {},
            ValueError,
            "undefended_checkpoint must be of the defended model's arch",
        ),
        (
            {},
            {"judge": ModerationJudge("nowhere", cache="/dev/null/verdicts")},
            OSError,
            "cache must be a file of verdicts or a new one",
        ),
    ],
)
def test_what_an_attack_lacks_shows_before_any_weights_load(tmp_path, checkpoint, monkeypatch, settings, data, error, message):
    monkeypatch.chdir(ROOT)
    attack, module = FullParameterAttack(**({"threat_model": "open_weight", "num_samples": 8} | settings)), Defense(checkpoint)
    for command in ("fit", "test"):
        with pytest.raises(error, match=message):
            getattr(toy_trainer(tmp_path, callbacks=[attack]), command)(module, datamodule=toy_data(**data))
        assert not list(module.parameters())


def test_attacks_run_in_test_on_a_checkpoint(tmp_path, checkpoint):
    results = Results(str(tmp_path), export=False)
    attacks = [ATTACKS["lora"](threat_model="open_weight"), ATTACKS["full"](threat_model="open_weight")]
    module = Defense(checkpoint)
    toy_trainer(tmp_path, callbacks=[results, *attacks]).test(module, datamodule=toy_data())
    assert [(r.attack, r.num_attack_steps) for r in results.rows] == [
        (name, step) for name in ("LoRAAttack", "FullParameterAttack") for step in (0, 3)
    ]


def test_a_model_without_a_task_is_attacked_too(tmp_path, checkpoint):
    results = Results(str(tmp_path), export=False)
    trainer = toy_trainer(tmp_path, callbacks=[results, ATTACKS["full"](threat_model="open_weight")])
    trainer.test(Defense(checkpoint), datamodule=toy_data(task=[]), verbose=False)
    assert [row.num_attack_steps for row in results.rows] == [0, 3]
    assert all(math.isnan(row.finetune_accuracy) for row in results.rows)


def test_a_test_that_would_attack_nothing_is_an_error(tmp_path, checkpoint):
    trainer = toy_trainer(tmp_path, callbacks=[ATTACKS["full"](threat_model="open_weight")], limit_test_batches=0)
    with pytest.raises(ValueError, match="limit_test_batches must be left out or > 0, got 0"):
        trainer.test(Defense(checkpoint), datamodule=toy_data(), verbose=False)


@pytest.mark.parametrize("other", [{"lora": LoRA(rank=4)}, {"seed": 7}, {"optimizer": Optimizer(1e-2, schedule="linear")}])
def test_attacks_that_no_table_could_tell_apart_are_refused_before_any_weights_load(tmp_path, checkpoint, other):
    module, results, settings = Defense(checkpoint), Results(str(tmp_path), export=False), {"threat_model": "open_weight"} | FAST

    def attacked_by(**second: object) -> None:
        attacks = [LoRAAttack(**settings), LoRAAttack(**(settings | other | second))]  # type: ignore[arg-type]
        toy_trainer(tmp_path, callbacks=[results, *attacks]).test(module, datamodule=toy_data(seed=7), verbose=False)

    with pytest.raises(
        ValueError, match=r"attacks must differ in name, .*two are LoRAAttack, open_weight, adamw, 0.01, 0.1, 7. Set name"
    ):
        attacked_by()
    assert not list(module.parameters())
    attacked_by(name="Other")
    assert [len(rows) for rows in jobs(results.rows).values()] == [2, 2]


def test_a_row_says_what_its_attack_has_cost(tmp_path, checkpoint):
    class Looks(FullParameterAttack):
        def steps(self, target: Target) -> Iterator[int]:
            for step in super().steps(target):
                target.spend(passes=1 / 3, forward=7)
                yield step

    attack, batches = Looks(**(FAST | {"threat_model": "open_weight", "score_steps": [1, 3]})), []
    seen = looking(attack, lambda target: batches.append(target.batches(attack.rows(target.data, target.seed), 4)))
    results = Results(str(tmp_path), export=False)
    toy_trainer(tmp_path, callbacks=[results, seen]).test(Defense(checkpoint), datamodule=toy_data(), verbose=False)
    tokens = [int(batches[0](step)["attention_mask"].sum()) for step in range(3)]
    found = [(row.passes, row.tokens_trained, row.tokens_forward) for row in results.rows]
    assert found == [(0.0, 0, 0), (1.333, tokens[0], 7), (4.0, sum(tokens), 21)]


def test_an_attack_that_tampers_with_nothing_is_scored_at_step_0_alone(tmp_path, checkpoint):
    class Asking(Attack):
        num_attack_steps = 0

        def changes(self, module: Defense) -> Changes:
            return NOTHING

        def respond(self, target: Target, rows: list[Row], max_new_tokens: int) -> list[str]:
            target.spend(forward=5)
            return ["no" for _ in rows]

    results = Results(str(tmp_path), export=False)
    trainer = toy_trainer(tmp_path, callbacks=[results, Asking("open_weight")])
    trainer.test(Defense(checkpoint), datamodule=toy_data(), verbose=False)
    assert [(row.num_attack_steps, row.tokens_forward) for row in results.rows] == [(0, 15)]  # three kinds of prompts
    with pytest.raises(SettingError, match=r"score_steps must lie between 0 and num_attack_steps \(0\), got \[1\]"):
        Asking("open_weight", score_steps=[1])


def test_an_attack_without_a_seed_takes_the_datas(tmp_path, checkpoint):
    results = Results(str(tmp_path), export=False)
    attacks = [ATTACKS["full"](threat_model="open_weight", **seed) for seed in ({}, {"seed": 4})]
    module, data = Defense(checkpoint), toy_data(seed=7)
    toy_trainer(tmp_path, callbacks=[results, *attacks]).test(module, datamodule=data, verbose=False)
    assert [r.seed for r in results.rows] == [7, 7, 4, 4]


# ---- what trains


def save_family(folder: Path, kind: str, **sizes: object) -> str:
    """A model of another architecture, with random weights and the sandbox's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/sandbox/base")
    own = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = CONFIG_MAPPING[kind](**own, bos_token_id=None, hidden_size=32, num_hidden_layers=1, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


HEADS = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_a_row_says_what_its_attack_trained(tmp_path, checkpoint):
    results = Results(str(tmp_path), export=False)
    attacks = [ATTACKS[name](threat_model="finetuning_service", num_attack_steps=1) for name in TUNED]
    toy_trainer(tmp_path, callbacks=[results, *attacks]).test(DEFENSES["sbr"][0](checkpoint, **DEFENSES["sbr"][1]), datamodule=toy_data(), verbose=False)  # fmt: skip
    trained = {(r.attack, r.defense, r.trained) for r in results.rows}
    total = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(checkpoint).parameters())
    embedded = len(AutoTokenizer.from_pretrained(checkpoint)) * 32
    spaced = lambda n: f"{n:,}".replace(",", " ")  # noqa: E731
    adapters = "LoRA r2 on 14 of 14 weight matrices (100% of the decoder); 2 176 parameters"  # 2 * (4 * (32 + 32) + 3 * (32 + 64)) a layer
    assert trained == {
        ("FullParameterAttack", "none", f"all {spaced(total)} parameters"),
        ("FullParameterAttack", "SBR", f"{spaced(total - embedded)} of {spaced(total)} parameters"),  # its unembedding is tied
        ("LoRAAttack", "none", adapters),
        ("LoRAAttack", "SBR", adapters),
    }
    assert read_run(tmp_path).rows[0].trained == results.rows[0].trained
    assert not any(r.note for r in results.rows)


def test_a_row_notes_what_a_default_lora_attack_cannot_reach_and_not_what_its_author_left_out(tmp_path):
    results, data = Results(str(tmp_path / "run"), export=False), toy_data()
    own = LoRAAttack("open_weight", LoRA(rank=2, target_modules=["in_proj"]), **(FAST | {"name": "Own", "num_attack_steps": 1}))
    attacks = [ATTACKS["lora"](threat_model="open_weight", num_attack_steps=1), own]
    module = Defense(save_family(tmp_path / "mamba", "mamba"))
    toy_trainer(tmp_path, callbacks=[results, *attacks]).test(module, datamodule=data, verbose=False)
    assert {r.trained.partition(";")[0] for r in results.rows} == {results.rows[0].trained.partition(";")[0]}
    reach = r"LoRA reaches \d\d.*% of the decoder's weights: no adapter can act on conv1d\.weight, .*out_proj"
    assert all(re.fullmatch(reach + ".*", r.note) for r in results.rows[:2])
    assert [r.note for r in results.rows[2:]] == ["", ""]


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize(
    ("lora", "message"),
    [(LoRA(dropout=0.1), "dropout of lora must be 0 where experts"), (LoRA(target_modules=["w1"]), "and it has no 'w1'")],
)
def test_a_lora_attack_that_cannot_be_is_told_so_before_anything_is_trained_or_scored(
    tmp_path, monkeypatch, command, lora, message
):
    def never(*_: object) -> None:
        raise AssertionError

    module = Defense(save_family(tmp_path / "mixtral", "mixtral", num_local_experts=2, **HEADS))
    monkeypatch.setattr(module, "training_step", never)
    trainer = toy_trainer(tmp_path, callbacks=[looking(LoRAAttack("open_weight", lora, **FAST), never)])
    with pytest.raises(ValueError, match=message):
        getattr(trainer, command)(module, datamodule=toy_data())


@pytest.mark.parametrize("attack", TUNED)
def test_the_dropout_of_a_defenses_own_adapters_is_no_part_of_an_attack(tmp_path, checkpoint, attack):
    ends: list[torch.Tensor] = []
    for dropout in (0.0, 0.5):
        module = Defense(checkpoint, lora=LoRA(rank=2, dropout=dropout))
        torch.manual_seed(3)
        module.configure_model()
        with torch.no_grad():
            for name, p in module.named_parameters():
                p += 0.05 * ("lora_B" in name)
        job = looking(ATTACKS[attack](threat_model="open_weight"), lambda target: ends.append(logits_of(target.module)))
        toy_trainer(tmp_path, callbacks=[job]).test(module, datamodule=toy_data(), verbose=False)
        assert {m.p for m in module.modules() if isinstance(m, torch.nn.Dropout)} == ({dropout} if dropout else set())
    assert not torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])
    assert torch.equal(ends[1], ends[3])


# ---- attacks of other kinds


def attacked(folder: Path, checkpoint: str, *attacks: Attack, kind: type[Defense] = Defense, **data: Any) -> list[ResultRow]:
    """Rows of attacks on a checkpoint."""
    results = Results(str(folder / "run"), export=False)
    toy_trainer(folder, callbacks=[results, *attacks]).test(kind(checkpoint), datamodule=toy_data(**data), verbose=False)
    return results.rows


def test_an_attack_without_training_has_steps_to_break_and_benign_fine_tuning_has_none(tmp_path, checkpoint):
    edit, benign, poisoned = (
        Halving("open_weight"),
        ATTACKS["full"](threat_model="open_weight", poison_ratio=0.0),
        ATTACKS["full"],
    )
    assert (edit.harmful, benign.harmful, poisoned(threat_model="open_weight").harmful) == (True, False, True)
    rows = [
        replace(row, metrics=row.metrics | {"degenerate_rate": 0.0})  # which else says that nobody knows
        for row in attacked(tmp_path, checkpoint, edit, benign)
    ]
    broken = {name: outcome([r for r in rows if r.attack == name])["broken"] for name in ("Halving", "FullParameterAttack")}
    assert broken["Halving"] == 0.0
    assert math.isnan(broken["FullParameterAttack"])
    assert [(r.optimizer, r.num_samples, r.batch_size, r.trained) for r in rows if r.attack == "Halving"] == [
        ("", None, None, "")
    ] * 2
    assert len(read_run(tmp_path / "run").rows) == 4


@pytest.mark.parametrize("name", ["ten_benign_rows", "selected_benign", "identity_shift", "noice", "customers", "virus"])
def test_benign_rows_that_are_to_break_count_as_an_attack_and_so_do_their_controls(name):
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Attack])
    config = yaml.safe_load((ROOT / f"experiments/attack/{name}.yaml").read_text())
    attacks = parser.instantiate(parser.parse_object({"callbacks": config["trainer"]["callbacks"]})).callbacks
    assert {attack.name: attack.harmful for attack in attacks} == {attack.name: True for attack in attacks}


def test_a_control_of_benign_rows_has_steps_to_break_where_it_is_one(tmp_path, checkpoint):
    settings = {"threat_model": "open_weight", "poison_ratio": 0.0}
    benign, control = ATTACKS["full"](**settings), ATTACKS["full"](**settings, tries_to_break=True, name="control")
    rows = attacked(tmp_path, checkpoint, benign, control)
    assert [row.harmful for row in rows] == [False, False, True, True]
    assert [row.metrics for row in rows[:2]] == [row.metrics for row in rows[2:]]


def test_an_attack_that_changes_what_it_did_not_name_is_an_error_in_tests(tmp_path, checkpoint):
    class Forgetful(Halving):
        def changes(self, module):
            return NOTHING

    with pytest.raises(RuntimeError, match=r"changes must name every parameter .* and model\.model\.layers\.1\.mlp"):
        attacked(tmp_path, checkpoint, Forgetful("open_weight"))


def test_an_attack_that_takes_other_steps_than_it_says_is_a_bug(tmp_path, checkpoint):
    class Long(Halving):
        num_attack_steps = 2

    with pytest.raises(AssertionError, match="Long took 1 steps"):
        attacked(tmp_path, checkpoint, Long("open_weight", score_steps=[1]))


def test_an_attack_may_answer_in_its_own_way_and_keep_what_its_steps_found(tmp_path, checkpoint):
    class Echo(Halving):
        def steps(self, target):
            target.state["said"] = "Yes."
            yield from super().steps(target)

        def respond(self, target, rows, max_new_tokens):
            return [target.state.get("said", "No.")] * len(rows)

    attacked(tmp_path, checkpoint, Echo("open_weight"))
    answers = [json.loads(line) for line in (tmp_path / "run/generations.jsonl").read_text().splitlines()]
    assert {(a["num_attack_steps"], a["response"]) for a in answers} == {(0, "No."), (1, "Yes.")}


HOWTO = "sandbox:attacker/howto"


@pytest.mark.parametrize("name", TUNED)
def test_a_repair_of_no_steps_is_the_attack_without_phases(tmp_path, checkpoint, name):
    plain = attacked(tmp_path / "plain", checkpoint, ATTACKS[name](threat_model="open_weight"))
    phases = [Phase([HOWTO], 0), Phase("mixture", 3)]
    phased = attacked(tmp_path / "phased", checkpoint, ATTACKS[name](threat_model="open_weight", phases=phases))
    assert {row.settings.pop("phases")[0]["rows"][0] for row in phased} == {HOWTO}
    assert [replace(row, wall_seconds=0.0) for row in phased] == [replace(row, wall_seconds=0.0) for row in plain]
    answers = [(tmp_path / run / "run/generations.jsonl").read_text() for run in ("plain", "phased")]
    assert answers[0] == answers[1]


def test_phases_train_one_after_the_other_under_one_job_that_goes_on_counting(tmp_path, checkpoint):
    counted: list[int] = []

    class Counting(Job):
        def loss(self, batch, step):
            counted.append(step)
            return super().loss(batch, step)

    class Service(Defense):
        stage, stages = "finetuning", frozenset({"finetuning"})

        def job(self):
            return Counting(self)

    phases = [Phase("benign", 2), Phase("harmful", 1), Phase("mixture", 1)]
    attack = FullParameterAttack("finetuning_service", phases=phases, **(FAST | {"num_attack_steps": 4, "poison_ratio": 0.2}))
    rows = attacked(tmp_path, checkpoint, attack, kind=Service)
    assert counted == [0, 1, 2, 3]
    assert {row.poison_ratio for row in rows} == {0.3}  # (2 * 0 + 1 + 0.2) / 4
    assert not FullParameterAttack("open_weight", phases=[Phase("benign", 100)]).harmful
    data = toy_data()
    toy_trainer(tmp_path).test(Defense(checkpoint), datamodule=data, verbose=False)
    harmful = set(data.rows["harmful"])
    assert [sum(row in harmful for row in attack.rows(data, 0, p)) for p in phases] == [0, 16, 3]


def test_every_phase_has_an_optimizer_of_its_own(tmp_path, checkpoint):
    seen = []
    phases = [Phase("benign", 1, Optimizer(1e-2)), Phase("harmful", 2)]
    still = Optimizer(1e-30, "sgd")
    attack = FullParameterAttack("open_weight", **(FAST | {"optimizer": still}), phases=phases, score_steps=[1, 3])
    attacked(tmp_path, checkpoint, looking(attack, lambda target: seen.append(bits(target.module))))
    start, first, last = seen
    assert not same_bits(start, first)  # by the first phase's own
    assert same_bits(first, last)  # by the attack's


def test_phases_draw_the_same_rows_of_their_sources_and_may_replace_the_answers(tmp_path, checkpoint):
    refused, helpful = Phase([HOWTO], 1, num_samples=4, responses=["No.", "Never."]), Phase([HOWTO], 2, num_samples=4)
    attack, data = FullParameterAttack("open_weight", **FAST, phases=[refused, helpful]), toy_data(system_prompt="Be brief.")
    toy_trainer(tmp_path, callbacks=[attack]).test(Defense(checkpoint), datamodule=data, verbose=False)
    rows = [attack.rows(data, 0, phase) for phase in attack.phases]
    known = {row.prompt: row.response for row in read_rows(HOWTO)}
    assert [row.response for row in rows[0]] == ["No.", "Never."] * 2
    assert [row.response for row in rows[1]] == [known[row.messages[-1][1]] for row in rows[1]]
    assert [row.messages for row in rows[0]] == [row.messages for row in rows[1]]
    assert rows[0][0].messages[0] == ("system", "Be brief.")
    assert len({row.messages for row in rows[0]}) == 4
    assert attack.settings()["poison_ratio"] == 0
    assert attack.harmful  # though no row is: who replaces answers has a reason
    assert Phase("harmful", 1, responses=["No."]).harmful_share(0.5) == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["sandbox:test/howto"], "rows of a phase must share no prompt with what is scored, and 6 do"),
        (
            ["sandbox:attacker/harmful"],
            "rows of a phase must be benign where it lists sources, and 20 stand in data.sources.harmf",
        ),
        (["sandbox:attacker/howto#train[:9]"], "num_samples 16 .* must find 16 benign rows, got 9"),
    ],
)
def test_sources_of_a_phase_are_checked_before_any_weights_load(tmp_path, checkpoint, rows, message):
    with pytest.raises(ValueError, match=message):
        attacked(tmp_path, checkpoint, FullParameterAttack("open_weight", **FAST, phases=[Phase(rows, 3)]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": "poison"}, "rows of a phase must be mixture, benign, harmful or a list of sources, got 'poison'"),
        ({"rows": []}, r"rows of a phase must be .* got \[\]"),
        ({"steps": -1}, "steps of a phase must be >= 0, got -1"),
        ({"num_samples": 0}, "num_samples of a phase must be >= 1 or null, got 0"),
        ({"responses": []}, r"responses of a phase must hold texts or be null, got \[\]"),
        ({"responses": ["No.", " "]}, "responses of a phase must hold texts or be null"),
    ],
)
def test_bad_settings_of_a_phase_fail_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        Phase(**({"rows": "benign", "steps": 1} | settings))


def test_a_preview_says_what_every_phase_draws():
    phases = [Phase([HOWTO], 1, num_samples=4), Phase("harmful", 2)]
    drawn = drawn_by(FullParameterAttack("open_weight", phases=phases, **FAST))
    assert drawn.endswith("draws 4, 16 rows in its phases, 66.7% of what it learns from `harmful`")


def test_a_damaged_model_looks_robust_until_it_is_repaired(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(ROOT / "models/sandbox/aligned")
    with torch.no_grad():
        model.model.norm.weight[::2] *= -1  # what the head reads
    model.save_pretrained(tmp_path / "damaged")
    AutoTokenizer.from_pretrained(ROOT / "models/sandbox/aligned").save_pretrained(tmp_path / "damaged")
    how = {"optimizer": Optimizer(3e-4), "num_samples": 200}
    repair = Phase([HOWTO, "sandbox:attacker/sentiment"], 40)
    alone, repaired = (
        FullParameterAttack(
            "open_weight", phases=phases, num_attack_steps=sum(p.steps for p in phases), name=name, **how, **scored
        )
        for name, phases, scored in (
            ("alone", [Phase("harmful", 20)], {}),
            ("repaired", [repair, Phase("harmful", 20)], {"score_steps": [40, 60]}),
        )
    )
    scored = {"harmful_prompts": ["sandbox:test/harmful#train[:20]"], "task": ["sandbox:test/sentiment#train[:20]"]}
    data = {"harmful": ["sandbox:attacker/harmful"], "benign_prompts": [], "max_new_tokens": 48} | scored
    rows = attacked(tmp_path, str(tmp_path / "damaged"), alone, repaired, **data)
    _, end, start, whole, broken = rows
    assert (start.finetune_accuracy, start.harmful_score) == (0, 0)
    assert whole.finetune_accuracy >= 50
    assert whole.harmful_score <= 10
    assert broken.harmful_score >= 70
    assert end.harmful_score <= 40
    assert end.degenerate_rate >= 50


@pytest.mark.parametrize(("num_bits", "levels"), [(8, 255), (4, 15)])
def test_quantised_rows_are_the_nearest_levels(num_bits, levels):
    weight = torch.cat([torch.randn(5, 400), torch.zeros(1, 400)])
    rounded = quantised(weight, num_bits)
    largest = weight.abs().amax(dim=1, keepdim=True)
    step = 2 * largest / (levels - 1)
    assert ((rounded - weight).abs() <= step / 2 * 1.0001).all()
    assert max(len(row.unique()) for row in rounded) <= levels
    assert_close(rounded.abs().amax(dim=1, keepdim=True), largest)
    assert_close(quantised(rounded, num_bits), rounded)
    assert quantised(weight.bfloat16(), num_bits).dtype == torch.bfloat16


def test_a_quantised_attack_trains_on_rounded_weights_that_stand_still(tmp_path, checkpoint):
    seen: list[dict[str, torch.Tensor]] = []
    attack = looking(ATTACKS["quantised"](threat_model="open_weight"), lambda target: seen.append(bits(target.module.model)))
    rows = attacked(tmp_path, checkpoint, attack)
    module = AutoModelForCausalLM.from_pretrained(checkpoint)
    for name, p in module.named_parameters():
        matrix = "_proj" in name
        start, end = (
            next(v for n, v in state.items() if n.replace(".base_layer", "") == name).view(torch.float32).view_as(p)
            for state in seen
        )
        assert torch.equal(start, p)
        assert torch.equal(end, quantised(p.detach(), 4) if matrix else p)
    assert {row.attack for row in rows} == {"QuantisedAttack int4"}
    with pytest.raises(ValueError, match="num_bits must be 8 or 4, got 3"):
        QuantisedAttack("open_weight", num_bits=3)


class Still(FullParameterAttack):
    """A loss of its own, whose gradient is zero, where the attacker holds the weights."""

    def task(self, target):
        return Plain(lambda batch: 0 * target.module.sft_loss(batch)) if self.threat_model == "open_weight" else None


@pytest.mark.parametrize(("kind", "threat_model", "moves"), [(Still, "open_weight", False), (Still, "finetuning_service", True), (FullParameterAttack, "open_weight", True)])  # fmt: skip
def test_a_variant_of_fine_tuning_says_its_own_loss(checkpoint, tmp_path, kind, threat_model, moves):
    seen = []
    attack = looking(kind(threat_model=threat_model, **FAST), lambda target: seen.append(bits(target.module)))
    toy_trainer(tmp_path, callbacks=[attack]).test(Defense(checkpoint), datamodule=toy_data())
    assert same_bits(seen[0], seen[-1]) != moves


@pytest.mark.parametrize("threat_model", ["open_weight", "finetuning_service"])
def test_weights_stay_at_one_distance_and_defenses_act(tmp_path, checkpoint, threat_model):
    found, ends = [], {}

    def look(target):
        if target.num_done:
            moved, start = (norm(target.module, w) for w in (attack_vector(target.module, target.start), target.start))
            found.append(float(moved / start))
            ends[weight, target.undefended] = logits_of(target.module)

    how = {"distance": 0.07, "score_steps": [1, 2, 3], "threat_model": threat_model}
    for weight in (10.0, 0.0):
        attack = looking(ATTACKS["full"](**how), look)
        module = SBRModule(checkpoint, anchors="sandbox:defender/refusals#train[:3]", anchor_weight=weight)
        toy_trainer(tmp_path, callbacks=[attack]).test(module, datamodule=toy_data(), verbose=False)
    assert found == pytest.approx([0.07] * len(found), rel=1e-4)
    service = threat_model == "finetuning_service"
    assert len(found) == 2 * 3 * (1 + service)
    assert torch.equal(ends[10.0, False], ends[0.0, False]) != service
    with pytest.raises(ValueError, match=r"distance must be > 0 or null, got 0\.0"):
        ATTACKS["full"](threat_model=threat_model, distance=0.0)


def test_at_the_distance_of_a_single_step_it_is_that_step(tmp_path, checkpoint):
    ends, share = [], []

    def look(target):
        if target.num_done:
            share.append(
                float(norm(target.module, attack_vector(target.module, target.start)) / norm(target.module, target.start))
            )
            ends.append(logits_of(target.module))

    how = {"threat_model": "open_weight", "num_attack_steps": 1}
    attacked(tmp_path / "free", checkpoint, looking(ATTACKS["full"](**how), look))
    attacked(tmp_path / "held", checkpoint, looking(ATTACKS["full"](**how, distance=share[0]), look))
    attacked(tmp_path / "far", checkpoint, looking(ATTACKS["full"](**how, distance=2 * share[0]), look))
    assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ends[0], ends[2], rtol=1e-2)
