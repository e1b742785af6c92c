import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_sbr import rows_of
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toy import DATA, DEFENSES, ROOT, Everywhere, StatefulJob, bits, csv_rows, looking, same_bits, toy_data, toy_trainer
from transformers import AutoModelForCausalLM

from casehard import Defense, FullParameterAttack, LoRA, LoRAAttack, Optimizer, PatcherModule, SBRModule
from casehard.callbacks.results import Results
from casehard.datamodules.batches import Batches, StepLoader
from casehard.datamodules.chat import collate
from casehard.datamodules.row import Row
from casehard.engine.adapters import fold_adapters, merged, plain_layers
from casehard.engine.weights import snapshot
from casehard.lightning_modules import private
from casehard.lightning_modules.job import Job

ADAMW = Optimizer(1e-2)
FAST: dict[str, Any] = {"num_samples": 16, "num_attack_steps": 3, "batch_size": 4, "optimizer": ADAMW}
LORAS = pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])


class Counting(Everywhere):
    """Counts what acts, and in which order."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.acted: list[str] = []

    def alignment_loss(self, batch, step):
        self.acted.append("alignment_loss")
        return super().alignment_loss(batch, step)

    def harden(self) -> None:
        self.acted.append("harden")
        super().harden()

    def job(self) -> Job:
        return CountingJob(self)

    def recover(self, start) -> None:
        self.acted.append("recover")
        super().recover(start)


class CountingJob(StatefulJob):
    def loss(self, batch, step):
        self.defense.acted.append("loss")
        return super().loss(batch, step)

    def before_step(self, step):
        self.defense.acted.append("before_step")
        super().before_step(step)

    def after_step(self, step, optimizer):
        self.defense.acted.append("after_step")
        super().after_step(step, optimizer)


class Halving(Defense):
    """A post-fine-tuning defense: half of what the job has added stays."""

    @torch.no_grad()
    def recover(self, start) -> None:
        for name, p in self.named_parameters():
            p.lerp_(start[name], 0.5)


class Scaling(Defense):
    """A defense that only hardens: every weight twice as large, exactly."""

    @torch.no_grad()
    def harden(self) -> None:
        for p in self.parameters():
            p.mul_(2)


def fitted(module: Defense, folder: Path, data: Any = None, ckpt_path: Any = None, **settings: Any) -> L.Trainer:
    L.seed_everything(0)
    trainer = toy_trainer(folder, **settings)
    trainer.fit(module, datamodule=toy_data() if data is None else data, ckpt_path=ckpt_path)
    return trainer


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def read(folder: str | Path) -> dict[str, Tensor]:
    return weights(AutoModelForCausalLM.from_pretrained(folder))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- stages


def test_stages_are_those_of_the_methods_that_are_overridden_or_those_declared():
    declared = type("Declared", (Defense,), {"stages": frozenset({"alignment"})})
    more = type("More", (declared,), {"recover": lambda self, start: None})
    mixed = type("Mixed", (type("Mixin", (), {"harden": lambda self: None}), SBRModule), {})
    expected = {
        Defense: "none", SBRModule: "finetuning", PatcherModule: "alignment", Halving: "post_finetuning", Scaling: "alignment",
        Everywhere: "alignment+finetuning+post_finetuning", declared: "alignment", more: "alignment+post_finetuning",
        mixed: "alignment+finetuning",
    }  # fmt: skip
    for kind, stage in expected.items():
        module = kind.__new__(kind)
        assert kind.stage.fget(module) == stage


@pytest.mark.parametrize("train_on", ["alignment", "mixture"])
def test_a_defense_of_three_stages_acts_in_all_three(checkpoint, tmp_path, train_on):
    module = Counting(checkpoint, optimizer=ADAMW)
    attack = FullParameterAttack("finetuning_service", undefended=False, **FAST)
    steps = ["loss", "before_step", "after_step"] * 3
    fitted(module, tmp_path, toy_data(train_on=train_on), callbacks=[attack])
    aligned = ["harden"] if train_on == "mixture" else []  # read anew from the checkpoint, which is not hardened
    of_fit = ["harden", *steps, *aligned, "recover"] if train_on == "mixture" else ["alignment_loss"] * 3 + ["harden"]
    assert module.acted == [*of_fit, *aligned, "recover", *steps, "recover"]


class Marking(Everywhere):
    """Its repair shows at step 0, too."""

    @torch.no_grad()
    def recover(self, start) -> None:
        super().recover(start)
        self.model.model.norm.weight.mul_(2)


@LORAS
def test_a_defense_of_three_stages_is_scored_in_all_three(checkpoint, tmp_path, lora):
    """The released model under an attacker who holds it, and what a customer of the service gets, from step 0 on."""
    seen: dict[str, list[dict[str, Tensor]]] = {"open_weight": [], "finetuning_service": []}
    attacks = [FullParameterAttack(who, **FAST) for who in seen]
    for attack in attacks:
        looking(attack, lambda target, kept=seen[attack.threat_model]: kept.append(weights(merged(target.module.model))))
    fitted(Marking(checkpoint, ADAMW, lora), tmp_path, callbacks=[Results(str(tmp_path / "run")), *attacks])

    columns = ("defense", "stage", "threat_model", "num_attack_steps", "note")
    rows = [[row[name] for name in columns] for row in csv_rows(tmp_path / "run/attacks.csv")]
    stages = ["Marking", "alignment+finetuning+post_finetuning"]
    assert rows == [
        *([*stages, "open_weight", step, ""] for step in "03"),  # and no word of a defense that does not act
        *([who, stage, "finetuning_service", step, ""] for who, stage in (("none", "none"), stages) for step in "03"),
    ]

    def repaired(model: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: w.lerp(start[name], 0.5) * (2 if name == "model.norm.weight" else 1) for name, w in model.items()}

    unrepaired = type("Unrepaired", (Everywhere,), {"recover": Defense.recover})(checkpoint, ADAMW, lora)
    fitted(unrepaired, tmp_path)
    hardened = {name: 1.5 * w for name, w in read(checkpoint).items()}
    exported = read(tmp_path / "run/model")
    assert same(exported, repaired(weights(merged(unrepaired.model)), hardened))
    assert same(seen["open_weight"][0], exported)
    undefended, _, at_service, attacked = seen["finetuning_service"]
    assert same(undefended, hardened)
    assert same(at_service, repaired(hardened, hardened))
    assert not same(attacked, at_service)


@pytest.mark.parametrize("accumulate_grad_batches", [1, 2])
def test_hooks_around_the_step_act_as_often_in_fit_as_in_an_attack_on_the_service(checkpoint, tmp_path, accumulate_grad_batches):
    acted = []
    module = Counting(checkpoint, optimizer=ADAMW)
    fitted(module, tmp_path, accumulate_grad_batches=accumulate_grad_batches)
    acted.append(Counter(module.acted))
    module = Counting(checkpoint)
    attack = FullParameterAttack("finetuning_service", undefended=False, **FAST)
    toy_trainer(tmp_path, callbacks=[attack]).test(module, datamodule=toy_data(), verbose=False)
    acted.append(Counter(module.acted))
    for name in ("before_step", "after_step"):
        assert acted[0][name] == acted[1][name] == 3
    assert (acted[0]["loss"], acted[1]["loss"]) == (3 * accumulate_grad_batches, 3)


def test_a_job_is_the_same_in_fit_and_in_an_attack(checkpoint, tmp_path):
    """The same rows and optimizer: ``fit`` and the attack end with the same bits, hooks and all."""
    module = Everywhere(checkpoint, optimizer=ADAMW)
    fitted(module, tmp_path)
    ends: list[dict[str, Tensor]] = []

    class AsFit(FullParameterAttack):
        def prepare(self, data, seed):
            rows = data.mixture(data.num_samples, data.poison_ratio, data.seed)
            self._batches = [data.batches(rows, data.batching.batch_size, data.seed, "fit")]

    attack = AsFit("finetuning_service", undefended=False, **FAST)
    looking(attack, lambda target: ends.append(weights(target.module.model)))
    other = Everywhere(checkpoint, optimizer=ADAMW)
    toy_trainer(tmp_path, callbacks=[attack]).test(other, datamodule=toy_data(), verbose=False)
    assert same(ends[-1], weights(module.model))


# ---- what fit leaves


@LORAS
def test_fit_exports_the_recovered_model(checkpoint, tmp_path, lora):
    plain = Defense(checkpoint, ADAMW, lora)
    fitted(plain, tmp_path)
    module = Halving(checkpoint, ADAMW, lora)
    saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=2)
    fitted(module, tmp_path, callbacks=[Results(str(tmp_path / "run")), saver], enable_checkpointing=True)
    began, ended, exported = read(checkpoint), weights(merged(plain.model)), read(tmp_path / "run/model")
    assert same(exported, {name: w.lerp(began[name], 0.5) for name, w in ended.items()})
    assert not same(exported, ended)
    assert same(exported, weights(merged(module.model)))  # and it is what attackers get
    goes_on = Halving(checkpoint, ADAMW, lora)
    fitted(goes_on, tmp_path, ckpt_path=tmp_path / "saved/step=2.ckpt")
    assert same(weights(merged(goes_on.model)), exported)


@LORAS
def test_a_recovering_defenses_service_job_starts_from_the_aligned_model(checkpoint, tmp_path, lora):
    seen = []

    attack = FullParameterAttack("finetuning_service", undefended=False, **FAST)
    looking(attack, lambda target: seen.append(weights(merged(target.module.model))))
    module = Halving(checkpoint, ADAMW, lora)
    saver = ModelCheckpoint(tmp_path, save_last=True)
    fitted(module, tmp_path, callbacks=[attack, saver], enable_checkpointing=True)
    toy_trainer(tmp_path, callbacks=[attack]).test(
        Halving(checkpoint, ADAMW, lora), datamodule=toy_data(), ckpt_path=tmp_path / "last.ckpt", verbose=False
    )
    assert len(seen) == 4  # two runs, at steps 0 and 3
    assert same(seen[0], read(checkpoint))
    assert same(seen[2], seen[0])
    assert same(seen[3], seen[1])
    assert not same(weights(merged(module.model)), read(checkpoint))


@LORAS
def test_hardening_acts_once(checkpoint, tmp_path, lora):
    start = read(checkpoint)
    plain, module = Defense(checkpoint, ADAMW, lora), Scaling(checkpoint, ADAMW, lora)
    data: dict[str, Any] = {"train_on": "alignment"}
    fitted(plain, tmp_path, toy_data(**data))
    saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=2, save_top_k=-1)
    saves = {"enable_checkpointing": True, "callbacks": [Results(str(tmp_path / "run")), saver]}
    fitted(module, tmp_path, toy_data(**data), **saves)
    twice = {name: 2 * w for name, w in weights(merged(plain.model)).items()}
    assert same(read(tmp_path / "run/model"), twice)

    def tested(checkpoint: str, **settings: Any) -> dict[str, Tensor]:
        module = Scaling(checkpoint, lora=lora)
        toy_trainer(tmp_path).test(module, datamodule=toy_data(), verbose=False, **settings)
        return weights(merged(module.model))

    assert same(tested(str(tmp_path / "run/model")), twice)  # it is hardened already
    assert same(tested(checkpoint), {name: 2 * w for name, w in start.items()})
    saved = tmp_path / "saved/step=2.ckpt"
    goes_on = Scaling(checkpoint, ADAMW, lora)
    fitted(goes_on, tmp_path, toy_data(**data), ckpt_path=saved)
    assert same(weights(merged(goes_on.model)), twice)
    stopped = Defense(checkpoint, ADAMW, lora)
    fitted(stopped, tmp_path, toy_data(**data), max_steps=2)
    assert same(tested(checkpoint, ckpt_path=saved), {name: 2 * w for name, w in weights(merged(stopped.model)).items()})


@pytest.mark.parametrize("kind", [Scaling, Halving])
def test_the_released_model_is_not_trained_on(checkpoint, tmp_path, kind):
    data = {"train_on": "alignment" if kind is Scaling else "mixture"}
    module = kind(checkpoint, ADAMW)
    trainer = fitted(module, tmp_path, toy_data(**data))
    released = weights(module.model)
    trainer.save_checkpoint(tmp_path / "after.ckpt")  # as under any Lightning module
    again = kind(checkpoint, ADAMW)
    toy_trainer(tmp_path).test(again, datamodule=toy_data(), ckpt_path=tmp_path / "after.ckpt", verbose=False)
    assert same(weights(again.model), released)
    with pytest.raises(ValueError, match="ckpt_path must be a checkpoint from before training ended to train on from"):
        fitted(kind(checkpoint, ADAMW), tmp_path, toy_data(**data), max_steps=5, ckpt_path=tmp_path / "after.ckpt")


def test_a_whole_checkpoint_can_be_saved_until_an_attack_follows(checkpoint, tmp_path):
    trainer = fitted(Defense(checkpoint), tmp_path)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert torch.load(tmp_path / "after.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    trainer = fitted(Defense(checkpoint), tmp_path, callbacks=[FullParameterAttack("open_weight", **FAST)])
    with pytest.raises(
        ValueError, match=r"save_checkpoint must be called before the attacks that follow training, .* Add a ModelCheckpoint"
    ):
        trainer.save_checkpoint(tmp_path / "after.ckpt")
    trainer.save_checkpoint(tmp_path / "after.ckpt", weights_only=True)


# ---- state


def python_state(module: Defense) -> Any:
    """All that a module and its running job hold beside modules, buffers and what Lightning holds, in a form to compare."""
    own = {name: value for name, value in vars(module).items() if name not in vars(L.LightningModule())}
    job = {name: value for name, value in vars(module.running).items() if name != "defense"} if module.running else {}
    return comparable(own | {"running": job})


def comparable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().view(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {name: comparable(part) for name, part in value.items()}
    return [comparable(part) for part in value] if isinstance(value, list) else repr(value)


@pytest.mark.parametrize("defense", [*DEFENSES, "everywhere_lora"])
def test_attacks_in_the_middle_of_fit_leave_no_trace_in_python_state(checkpoint, tmp_path, defense):
    seen: list[Any] = []

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(python_state(pl_module))

    kind, settings = DEFENSES[defense.removesuffix("_lora")]
    module = kind(checkpoint, optimizer=ADAMW, lora=LoRA(rank=2) if defense.endswith("_lora") else None, **settings)
    shape = {**FAST, "num_attack_steps": 1, "every_n_epochs": 1}
    attacks = [FullParameterAttack("open_weight", **shape), LoRAAttack("finetuning_service", **shape)]  # others: test_attacks
    data = toy_data(**DATA.get(defense, {}), harmful_prompts=["sandbox:test/harmful#train[:1]"], benign_prompts=[], task=[])
    fitted(module, tmp_path, data, callbacks=[Look(), *attacks, Look()], limit_train_batches=2, max_steps=4)
    assert (seen[0], seen[2]) == (seen[1], seen[3])
    assert seen[0] != seen[2]  # it is looked at


@pytest.mark.parametrize(
    ("accumulate_grad_batches", "length", "at"),
    [
        (1, {"max_steps": 5}, 2),
        (2, {"max_steps": 5}, 2),
        (2, {"max_steps": -1, "max_epochs": 2}, 3),  # the end of an epoch; Lightning asks for the loader before it restores it
        (2, {"max_steps": -1, "max_epochs": 2}, 4),
        (1, {"max_steps": -1, "max_epochs": 2}, 4),
    ],
)
@LORAS
def test_a_job_with_state_resumes_to_the_bits_of_the_uninterrupted_one(
    checkpoint, tmp_path, lora, accumulate_grad_batches, length, at
):
    def run(**resume: Any) -> Everywhere:
        module = Everywhere(checkpoint, optimizer=Optimizer(1e-2, schedule="cosine"), lora=lora)
        saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)
        shape = {"accumulate_grad_batches": accumulate_grad_batches, "enable_checkpointing": True, "callbacks": [saver]}
        fitted(module, tmp_path, **length, **shape, **resume)
        return module

    whole = run()
    resumed = run(ckpt_path=tmp_path / f"saved/step={at}.ckpt")
    assert same_bits(bits(resumed), bits(whole))
    assert resumed.running.state["steps"] == whole.running.state["steps"] == whole.trainer.global_step
    assert same(resumed.running.state["start"], whole.running.state["start"])


# ---- what a defense uses


def test_alignment_trains_on_the_defenses_rows(checkpoint, tmp_path):
    seen = []

    class Own(Defense):
        def rows(self, data):
            return data.rows["refusals"][:2]

        def alignment_loss(self, batch, step):
            seen.append((step, batch["input_ids"].shape[0]))
            return super().alignment_loss(batch, step)

    data = toy_data(train_on="alignment", batch_size=2)
    module = Own(checkpoint)
    trainer = fitted(module, tmp_path, data)
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert trainer.num_training_batches == 1
    with pytest.raises(ValueError, match=r"data\.train_on must be alignment for Own"):
        fitted(Own(checkpoint), tmp_path, toy_data())


def test_pairs_stay_together_and_are_dropped_as_one(checkpoint, tmp_path):
    data, module = toy_data(), Defense(checkpoint)
    fitted(module, tmp_path, data, max_steps=1)
    first = [Row((("user", f"{i} " * (40 if i == 2 else 1)),), f"Answer {i}.") for i in range(6)]
    second = [Row((("user", f"{i} " * (40 if i == 5 else 2)),), f"Another {i}.") for i in range(6)]
    data.batching = replace(data.batching, max_length=40)  # the prompts of row 2 here and of row 5 there leave no answer
    fitting = [[data.encode([rows[i]], "x")[0]["input_ids"] for i in (0, 1, 3, 4)] for rows in (first, second)]
    draw, seen = module.pairs(first, second, 3, "pairs"), set()
    for step in range(4):
        for ours, other in zip(*(map(unpadded, draw(step))), strict=True):
            assert fitting[0].index(ours) == fitting[1].index(other)
            seen.add(fitting[0].index(ours))
    assert seen == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="pairs must be of two lists of one length, got 6 and 5 rows for pairs"):
        module.pairs(first, second[:5], 3, "pairs")


def unpadded(batch: dict[str, Tensor]) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


@LORAS
def test_the_reference_is_the_model_before_the_first_step_also_after_a_resume(checkpoint, tmp_path, lora):
    prompt, logits = torch.tensor([[5, 6, 7]]), []

    class Held(Defense):
        def job(self):
            return HeldJob(self)

    class HeldJob(Job):
        def loss(self, batch, step):
            before = snapshot(self.defense)
            with self.defense.reference(self.state) as model:
                logits.append(model(prompt).logits)
                assert not logits[-1].requires_grad
            assert same(before, snapshot(self.defense))
            return super().loss(batch, step)

    expected = AutoModelForCausalLM.from_pretrained(checkpoint).train()(prompt).logits.detach()
    saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=2)
    fitted(Held(checkpoint, ADAMW, lora), tmp_path, callbacks=[saver], enable_checkpointing=True)
    fitted(Held(checkpoint, ADAMW, lora), tmp_path, max_steps=4, ckpt_path=tmp_path / "saved/step=2.ckpt")
    assert len(logits) == 5
    assert all(torch.equal(seen, expected) for seen in logits)


def test_folded_adapters_act_in_the_plain_weights_and_come_back_without_effect(checkpoint):
    module = Defense(checkpoint, lora=LoRA(rank=2))
    module.configure_model()
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.normal_()
    expected, build, names = weights(merged(module.model)), repr(module.model), list(weights(module))
    fold_adapters(module.model)
    with plain_layers(module.model):
        assert same(weights(module.model), expected)
    assert repr(module.model) == build
    assert list(weights(module)) == names
    assert same(weights(merged(module.model)), expected)


# ---- Lightning


def test_a_validation_loss_is_a_mean_over_labels(checkpoint, tmp_path):
    rows = [row for seed in range(4) for row in rows_of(seed, 2, 1 + 3 * seed)]
    trainer, module = toy_trainer(tmp_path, limit_val_batches=None), Defense(checkpoint)
    for name in ("validate", "test"):
        losses = []
        for size in (2, 8):
            batches = [collate(rows[i : i + size], 0, "right") for i in range(0, len(rows), size)]
            loader = DataLoader(batches, batch_size=None)
            losses += list(getattr(trainer, name)(module, loader, verbose=False)[0].values())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_generators_are_the_callers_where_the_data_has_no_seed(checkpoint, tmp_path):
    ends = []
    for seed in (0, 0, 1):
        module = Defense(checkpoint, ADAMW, LoRA(rank=2, dropout=0.5))
        L.seed_everything(0)
        module.configure_model()
        L.seed_everything(seed)
        toy_trainer(tmp_path).fit(module, StepLoader(Batches(rows_of(), 2, 0, "fit", 0)))
        ends.append(bits(module))
    assert same_bits(ends[0], ends[1])
    assert not same_bits(ends[0], ends[2])


def test_what_lightning_keeps_private_is_used_in_one_file_and_is_there(checkpoint, tmp_path):
    module = Defense(checkpoint)
    trainer = toy_trainer(tmp_path)
    assert private.trainer_of(module) is None, "lightning: LightningModule._trainer"
    module.trainer = trainer
    assert private.trainer_of(module) is trainer, "lightning: LightningModule._trainer"
    for file in (ROOT / "lightning_modules").glob("*.py"):
        if file.name != "private.py":
            assert not re.search(r"\._trainer\b|__dict__", file.read_text()), file
