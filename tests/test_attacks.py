import math
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from toy import DEFENSES, ROOT, bits, csv_rows, same_bits, save_toy_checkpoint, toy_data, toy_trainer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from casehard import Backbone, Defense, FullParameterAttack, LoRA, LoRAAttack, ModerationJudge, Optimizer
from casehard.callbacks.attacks import HarmfulFineTuning
from casehard.callbacks.results import Results
from casehard.callbacks.scoring import score
from casehard.engine.training import DivergedError
from casehard.records.rows import ResultRow, read_run

FAST = {"num_samples": 16, "num_attack_steps": 3, "batch_size": 4, "optimizer": Optimizer(learning_rate=1e-2)}
ATTACKS = {
    "full": lambda **s: FullParameterAttack(**(FAST | s)),
    "lora": lambda **s: LoRAAttack(lora=LoRA(rank=2), **(FAST | s)),
}


class Spy(L.Callback):
    """Weights before, inside and after the attacks: callbacks run in order, so it stands around them."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append({k: v.clone() for k, v in pl_module.state_dict().items()})


def fitted(folder: Path, checkpoint: str, callbacks: list[L.Callback], defense: str = "none", **settings) -> Defense:
    kind, arguments = DEFENSES[defense]
    L.seed_everything(1)
    module = kind(checkpoint, optimizer=Optimizer(learning_rate=1e-3), **arguments)
    toy_trainer(folder, callbacks=callbacks, **settings).fit(module, datamodule=toy_data())
    return module


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(7.0), b[k].nan_to_num(7.0)) for k in a)


@pytest.mark.parametrize("threat_model", ["open_weight", "finetuning_service"])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("defense", DEFENSES)
def test_run_with_attacks_ends_with_the_bits_of_the_run_without(tmp_path, checkpoint, defense, attack, threat_model):
    results = Results(str(tmp_path / "run"), export=False)
    # after every epoch too: training goes on as if nothing had happened
    epochs = {"max_steps": 3, "limit_train_batches": 2}
    attack = ATTACKS[attack](threat_model=threat_model, every_n_epochs=1)
    attacked = fitted(tmp_path, checkpoint, [results, attack], defense, **epochs)
    drawn = torch.rand(1)
    reference = fitted(tmp_path, checkpoint, [], defense, **epochs)
    assert same(attacked.state_dict(), reference.state_dict())
    assert [type(m) for m in attacked.modules()] == [type(m) for m in reference.modules()]
    assert [p.requires_grad for p in attacked.parameters()] == [p.requires_grad for p in reference.parameters()]
    assert torch.equal(drawn, torch.rand(1))  # the generators go on from the same place
    assert {r.epoch for r in results.rows} == {"1", "2", ""}


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


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_changes_what_is_scored_and_leaves_no_trace(tmp_path, checkpoint, attack, monkeypatch):
    scored: list[torch.Tensor] = []
    prompt = torch.tensor([[5, 6, 7]])

    def spied(module, evaluation):
        with torch.no_grad():
            scored.append(module.model(prompt).logits.clone())
        return score(module, evaluation)

    monkeypatch.setattr("casehard.callbacks.attacks.score", spied)
    before, after = Spy(), Spy()
    fitted(tmp_path, checkpoint, [before, ATTACKS[attack](threat_model="open_weight"), after])
    assert same(before.seen[0], after.seen[0])
    assert len(scored) == 2
    assert not torch.allclose(scored[0], scored[1])  # it did attack


class Interrupting(FullParameterAttack):
    """Raises, or is sent Ctrl-C or SIGTERM, when its second step is scored."""

    def __init__(self, how: str) -> None:
        super().__init__("open_weight", **(FAST | {"score_steps": [2, 3]}))
        self.how = how

    def _record(self, job, step, *rest):
        super()._record(job, step, *rest)
        if step == 2:
            if self.how == "error":
                raise RuntimeError("boom")
            signal.raise_signal(signal.SIGINT if self.how == "ctrl-c" else signal.SIGTERM)


@pytest.fixture
def ctrl_c_raises():
    """As at a terminal: a shell's background jobs are started with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_raises")
@pytest.mark.parametrize("how", ["error", "ctrl-c", "sigterm"])
def test_interrupted_attack_leaves_the_model_restored_and_its_rows_written(tmp_path, checkpoint, how):
    results, before = Results(str(tmp_path), export=False), Spy()
    module = Defense(checkpoint)
    trainer = toy_trainer(tmp_path, callbacks=[results, before, Interrupting(how)])
    raised = {"error": RuntimeError, "ctrl-c": (KeyboardInterrupt, SystemExit), "sigterm": SIGTERMException}[how]
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(raised):
        trainer.fit(module, datamodule=toy_data())
    assert same(before.seen[0], module.state_dict())
    assert all(p.requires_grad for p in module.parameters())
    rows = csv_rows(tmp_path / "attacks.csv")
    assert [row["num_attack_steps"] for row in rows] == ["0", "2"]
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not trainer.state.finished


def test_undefended_twin_is_the_same_job_and_the_defended_run_differs(tmp_path, checkpoint):
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
    keep = lambda rows: [(a["prompt"], a["response"]) for a in rows]  # noqa: E731
    assert keep(beside._answers[: len(alone._answers)]) == keep(alone._answers)
    assert keep(beside._answers[len(alone._answers) :]) != keep(alone._answers)
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
    """A post-fine-tuning defense that leaves its mark."""

    def recover(self) -> None:
        for p in self.parameters():
            p.data.mul_(2)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(("threat_model", "factor"), [("finetuning_service", 2.0), ("open_weight", 1.0)])
def test_a_service_repairs_a_model_before_every_scoring_and_trains_on_from_its_own_weights(
    tmp_path, checkpoint, monkeypatch, attack, threat_model, factor
):
    scored: list[dict[str, torch.Tensor]] = []

    def spied(module, evaluation):
        scored.append({name: p.detach().clone() for name, p in module.named_parameters()})
        return score(module, evaluation)

    monkeypatch.setattr("casehard.callbacks.attacks.score", spied)
    for kind, steps in ((Doubling, [1, 2, 3]), (Defense, [3])):
        job = ATTACKS[attack](threat_model=threat_model, score_steps=steps, undefended=False)
        toy_trainer(tmp_path, callbacks=[job]).test(kind(checkpoint), datamodule=toy_data(), verbose=False)
    before, *_, repaired, also_before, plain = scored
    assert same(before, also_before)
    assert same(repaired, {name: p * factor for name, p in plain.items()})


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_service_job_starts_from_the_aligned_model_and_not_from_what_fit_made(tmp_path, checkpoint, monkeypatch, lora):
    prompt = torch.tensor([[5, 6, 7]])
    logits: list[torch.Tensor] = []

    def spied(module, evaluation):
        with torch.no_grad():
            logits.append(module.model(prompt).logits.clone())
        return score(module, evaluation)

    monkeypatch.setattr("casehard.callbacks.attacks.score", spied)
    kind, arguments = DEFENSES["sbr"]
    fresh = kind(checkpoint, lora=lora, **arguments)
    fresh.configure_model()
    with torch.no_grad():
        aligned = fresh.model.eval()(prompt).logits
    module = kind(checkpoint, lora=lora, optimizer=Optimizer(learning_rate=1e-2), **arguments)
    attack = ATTACKS["full"](threat_model="finetuning_service")
    saves = {
        "enable_checkpointing": True,
        "callbacks": [attack, ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)],
    }
    toy_trainer(tmp_path, **saves).fit(module, datamodule=toy_data())
    with torch.no_grad():
        assert not torch.allclose(module.model.eval()(prompt).logits, aligned)  # fit moved it
    last = {"ckpt_path": str(tmp_path / "last.ckpt"), "verbose": False}
    toy_trainer(tmp_path, callbacks=[attack]).test(kind(checkpoint, lora=lora, **arguments), datamodule=toy_data(), **last)
    assert torch.equal(logits[0], aligned)
    assert torch.equal(logits[len(logits) // 2], aligned)  # in a test of what fit made


def test_the_aligned_model_of_random_weights_is_the_one_that_fit_began_with(tmp_path, checkpoint):
    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.began = bits(pl_module.model)

        def on_fit_end(self, trainer, pl_module):
            with pl_module.as_aligned():
                self.aligned = bits(pl_module.model)

    kind, settings = DEFENSES["sbr"]
    whole, resumed, saver = Look(), Look(), ModelCheckpoint(tmp_path, save_last=True)
    for seed, callbacks, max_steps, last in ((1, [whole, saver], 2, None), (2, [resumed], 3, tmp_path / "last.ckpt")):
        L.seed_everything(seed)  # the resumed run may not lean on the seed
        trainer = toy_trainer(tmp_path, callbacks=callbacks, max_steps=max_steps, enable_checkpointing=True)
        trainer.fit(kind(checkpoint, backbone=Backbone(random_weights=True), **settings), datamodule=toy_data(), ckpt_path=last)
    assert same_bits(whole.aligned, whole.began)
    assert same_bits(resumed.aligned, whole.began)


def test_an_attacker_can_train_some_parameters_alone(tmp_path, checkpoint):
    seen = []

    class Looking(FullParameterAttack):
        def _record(self, job, step, scores, seconds):
            seen.append({name: p.detach().clone() for name, p in job.module.model.named_parameters()})

    only = ["model.layers.1.*", "*.0.mlp.up_proj.weight"]
    fitted(tmp_path, checkpoint, [Looking("open_weight", train_only=only, **FAST)])
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


def test_diverging_attack_says_which_and_what_to_do(tmp_path, checkpoint):
    attack = ATTACKS["full"](threat_model="open_weight", optimizer=Optimizer(learning_rate=1e30, clip_norm=None))
    before, module = Spy(), Defense(checkpoint)
    with pytest.raises(
        DivergedError, match=r"FullParameterAttack \(open_weight.*the loss must be finite, and it was nan at step .*Lower"
    ):
        toy_trainer(tmp_path, callbacks=[before, attack]).fit(module, datamodule=toy_data())
    assert same(before.seen[0], module.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"poison_ratio": 1.2}, r"poison_ratio must lie in \[0, 1\], got 1.2"),
        ({"threat_model": "white_box"}, "threat_model must be open_weight or finetuning_service, got 'white_box'"),
        ({"num_attack_steps": 0}, "num_attack_steps must be >= 1, got 0"),
        ({"score_steps": [200]}, r"score_steps must lie between 0 and num_attack_steps \(100\), got \[200\]"),
        ({"every_n_epochs": 0}, "every_n_epochs must be >= 1 or null, got 0"),
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
    attacks: list[HarmfulFineTuning] = [ATTACKS["lora"](threat_model="open_weight"), ATTACKS["full"](threat_model="open_weight")]
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
    assert [len(rows) for rows in results.jobs().values()] == [2, 2]


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
    attacks = [ATTACKS[name](threat_model="finetuning_service", num_attack_steps=1) for name in ATTACKS]
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

    monkeypatch.setattr("casehard.callbacks.attacks.score", never)
    module = Defense(save_family(tmp_path / "mixtral", "mixtral", num_local_experts=2, **HEADS))
    monkeypatch.setattr(module, "training_step", never)
    trainer = toy_trainer(tmp_path, callbacks=[LoRAAttack("open_weight", lora, **FAST)])
    with pytest.raises(ValueError, match=message):
        getattr(trainer, command)(module, datamodule=toy_data())


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_dropout_of_a_defenses_own_adapters_is_no_part_of_an_attack(tmp_path, checkpoint, monkeypatch, attack):
    ends: list[torch.Tensor] = []

    def spied(module, evaluation):
        with torch.no_grad():
            ends.append(module.model(torch.tensor([[5, 6, 7]])).logits.clone())
        return score(module, evaluation)

    monkeypatch.setattr("casehard.callbacks.attacks.score", spied)
    for dropout in (0.0, 0.5):
        module = Defense(checkpoint, lora=LoRA(rank=2, dropout=dropout))
        torch.manual_seed(3)
        module.configure_model()
        with torch.no_grad():
            for name, p in module.named_parameters():
                p += 0.05 * ("lora_B" in name)
        trainer = toy_trainer(tmp_path, callbacks=[ATTACKS[attack](threat_model="open_weight")])
        trainer.test(module, datamodule=toy_data(), verbose=False)
        assert {m.p for m in module.modules() if isinstance(m, torch.nn.Dropout)} == ({dropout} if dropout else set())
    assert not torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])
    assert torch.equal(ends[1], ends[3])
