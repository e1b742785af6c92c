"""What is held in copies of what trains, and that what saves memory leaves the result alone."""

import gc
import json
import os
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from math import floor
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from test_patcher import ATTACKER, data
from test_sbr import rows_of
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader
from toy import DATA, DEFENSES, ROOT, looking, on_ranks, save_toy_checkpoint, toy_data, toy_trainer

from casehard import Backbone, Defense, FullParameterAttack, LoRA, LoRAAttack, Optimizer, PatcherModule, SBRModule
from casehard.datamodules.chat import collate
from casehard.engine.gradients import average_gradients
from casehard.engine.weights import local


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_activations_computed_again_give_the_same_gradient(checkpoint, lora):
    batch, found = collate(rows_of(), 0, "right"), []
    for again in (False, True):
        torch.manual_seed(0)
        module = Defense(checkpoint, lora=lora, backbone=Backbone(activation_checkpointing=again))
        module.configure_model()
        passes: list[int] = []
        module.model.model.layers[1].mlp.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        module.sft_loss(batch).backward()
        assert len(passes) == 1 + again
        found.append([p.grad for p in module.parameters() if p.requires_grad])
    assert all(torch.equal(kept, computed) for kept, computed in zip(*found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("copy_device", [None, "cpu"])
@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_attacks_on_a_gpu_leave_every_bit(checkpoint, tmp_path, strategy, defense, copy_device):
    from lightning.pytorch.strategies import ModelParallelStrategy
    from ranks import Untouched

    kind, settings = DEFENSES[defense]
    settings = settings | ({"copy_device": copy_device} if defense == "patcher" else {})
    module = kind(checkpoint, optimizer=Optimizer(1e-3), backbone=Backbone(activation_checkpointing=True), **settings)
    spies, shape = [Untouched(), Untouched()], {"num_samples": 16, "num_attack_steps": 3, "batch_size": 4}
    attacks = [kind("open_weight", copy_device=copy_device, **shape) for kind in (FullParameterAttack, LoRAAttack)]
    places = []
    for attack in attacks:
        looking(attack, lambda target: places.extend(local(p).device.type for p in target.module.parameters()))
    trainer = toy_trainer(
        tmp_path,
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        strategy=strategy if strategy == "auto" else ModelParallelStrategy(1, 1),
        callbacks=[spies[0], *attacks, spies[1]],
        inference_mode=False,
    )
    trainer.fit(module, datamodule=toy_data(**DATA.get(defense, {})))
    before, after = (spy.seen[0] for spy in spies)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert set(places) == {"cuda"}


# ---- bytes

PRECISIONS = {"float32": "32-true", "bf16-mixed": "bf16-mixed", "bf16": "32-true"}
COUNTED = {
    "autocast": {},
    "bfloat16, checkpointing": {"precision": "bf16", "activation_checkpointing": True},
    "float32, adapters": {"precision": "float32", "lora_rank": 2},
}


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import memory

    return memory


def half_learnt(batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """Rows that begin with other tokens, so that nothing of them is computed once."""
    ids = torch.randint(5, 600, (batch_size, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = torch.arange(batch_size)
    labels = ids.clone()
    labels[:, : length // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("case", COUNTED)
def test_the_bytes_that_are_computed_from_sizes_are_those_of_a_real_fit(memory, checkpoint, tmp_path, case):
    step = memory.Step(checkpoint, batch_size=3, length=48, **COUNTED[case])
    backbone = Backbone(
        weights_dtype="bfloat16" if step.precision == "bf16" else "float32",
        activation_checkpointing=step.activation_checkpointing,
    )
    module, batch = Defense(checkpoint, lora=LoRA(rank=2) if step.lora_rank else None, backbone=backbone), half_learnt(3, 48)
    module.configure_model()
    meter = memory.Meter(module.model, step.num_labels)

    class Second(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            meter.most.clear()  # the first step makes the moments
            for state in trainer.optimizers[0].state.values():
                for tensor in state.values():
                    meter.note(tensor, memory.MOMENTS, over=(memory.PASSING,))

    settings = {"precision": PRECISIONS[step.precision], "max_steps": 2, "callbacks": [Second()]}
    with meter.looking():
        toy_trainer(tmp_path, **settings).fit(module, train_dataloaders=DataLoader([batch, batch], batch_size=None))
    computed = step.held()
    for kind in (set(memory.KINDS) - {memory.SAVED, memory.PASSING}) | {memory.HOST}:
        assert meter.most[kind] == computed[kind], kind
    with_batch = sum(tensor.nbytes for tensor in batch.values())  # and where its labels are
    for kind in (memory.SAVED, memory.PASSING):
        assert 0 <= meter.most[kind] - computed[kind] <= with_batch + 100, kind
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    assert 0 <= computed[memory.MOMENTS] - 2 * trained < 4 * 100  # and the numbers of steps
    if case == "autocast":  # by hand: the logits' log-probabilities and two gradients, and every matrix once more
        assert computed[memory.LOGITS] == 3 * 4 * step.num_labels * module.model.config.vocab_size
        assert computed[memory.HALVES] == 2 * sum(p.numel() for p in module.parameters() if p.ndim == 2)
        assert computed[memory.WEIGHTS] == trained + sum(buffer.nbytes for buffer in module.buffers())


@pytest.mark.gpu
def test_a_gpu_holds_the_computed_bytes_and_what_its_kernels_need(memory, tmp_path):
    sizes = {"checkpoint": str(ROOT / "models/sizes/qwen2_5_1_5b"), "layers": 4, "batch_size": 4, "length": 512}
    backbone = Backbone(random_weights=True, sizes={"num_hidden_layers": 4}, tokenizer=str(ROOT / "models/sandbox/base"))
    module, before = Defense(sizes["checkpoint"], backbone=backbone), torch.cuda.memory_allocated()
    module.optimizer = Optimizer(1e-12)
    loader = DataLoader([half_learnt(4, 512)] * 2, batch_size=None)
    torch.cuda.reset_peak_memory_stats()
    toy_trainer(tmp_path, accelerator="gpu", devices=1, precision="bf16-mixed", max_steps=2).fit(module, train_dataloaders=loader)
    measured, computed = torch.cuda.max_memory_allocated() - before, memory.Step(**sizes).held().total()
    print(f"{measured / computed:.3f} of what is computed")
    assert 0.97 <= measured / computed <= 1.4  # by kind on the CPU: above


def test_the_published_bytes_of_qwen_are_those_that_are_computed(memory):
    one, two = (memory.Step(str(ROOT / "models/sizes/qwen2_5_1_5b"), layers=layers).held() for layers in (1, 2))
    kinds = [one[kind] + 27 * (two[kind] - one[kind]) for kind in memory.KINDS]  # of 28 layers, which are alike
    line = "| " + " | ".join(["SFT", *map(memory.gib, (*kinds, sum(kinds), 0))]) + " |"
    assert line in (ROOT / "docs/scale.md").read_text()


def test_patcher_holds_two_copies_more_than_sft_one_of_them_on_the_cpu_by_a_setting(memory, checkpoint):
    sft = memory.Step(checkpoint, batch_size=3, length=48)
    step = replace(sft, method="Patcher")
    moved = replace(step, copy_device="cpu").held()
    plain, patcher, one = sft.held(), step.held(), sum(p.nbytes for p in sft.model().parameters())
    assert round((patcher.total() - plain.total()) / one, 1) == 2
    assert moved[memory.HOST] == one
    assert round((moved.total() - moved[memory.HOST] - plain.total()) / one, 1) == 1
    attack = replace(sft, method="inner attack", copy_device="cpu").held()
    assert attack[memory.HOST] == 3 * one
    assert attack.total() - attack[memory.HOST] == plain.total()
    module = PatcherModule(checkpoint, ATTACKER, None, 2, 1)  # and its own step, of which the vector is there
    module.configure_model()
    batch = half_learnt(3, 48)
    meter = memory.Meter(module.model, sft.num_labels)
    with meter.looking(), sft.precise():
        module.kept[module._in_use] = {n: torch.zeros_like(p) for n, p in module.named_parameters()}
        moments = [torch.zeros(one // 2, dtype=torch.float32)]
        module.alignment_loss(batch, 0).backward()
    del moments
    assert abs(meter.most.total() - patcher.total()) < 2 * sum(tensor.nbytes for tensor in batch.values())


# ---- copies


class Copies:
    """Most copies of the model that are held, by phase, when an optimizer has stepped or a counted method returns."""

    def __init__(self, memory: Any, module: Defense) -> None:
        Defense.configure_model(module)
        self.module, self.one = module, sum(p.nbytes for p in module.model.parameters())
        self.meter, self.phase, self.most = memory.Meter(module.model, 1), "step", defaultdict(int)

    def count(self, *_: object) -> None:
        self.most[self.phase] = max(self.most[self.phase], floor(self.meter.held.total() / self.one + 0.2))  # buffers, batches

    def run(self, name: str, folder, loader, **settings) -> dict[str, int]:
        """What was found while the trainer's method of that name ran."""
        handle = register_optimizer_step_post_hook(self.count)
        try:
            with self.meter.looking():
                getattr(toy_trainer(folder, **settings), name)(self.module, datamodule=loader)
        finally:
            handle.remove()
        return dict(self.most)

    def during(self, name: str, phase: str) -> None:
        """Count under ``phase`` while a method of the module runs."""
        method = getattr(self.module, name)

        def counted(*args, **named):
            outer, self.phase = self.phase, phase
            try:
                return method(*args, **named)
            finally:
                self.count()
                self.phase = outer

        setattr(self.module, name, counted)


@pytest.mark.parametrize("kind", [Defense, SBRModule])
@pytest.mark.parametrize("accumulate_grad_batches", [1, 2])
def test_a_step_holds_weights_gradients_and_two_moments(memory, checkpoint, tmp_path, kind, accumulate_grad_batches):
    settings = {"freeze_unembedding": False} if kind is SBRModule else {}
    copies = Copies(memory, kind(checkpoint, **settings))
    found = copies.run("fit", tmp_path, toy_data(), max_steps=3, accumulate_grad_batches=accumulate_grad_batches)
    assert found == {"step": 4}


@pytest.mark.parametrize(("fresh_optimizer", "attack"), [(False, 7), (True, 5)])
def test_a_round_of_patcher_holds_what_the_table_says(memory, checkpoint, tmp_path, fresh_optimizer, attack):
    module = PatcherModule(checkpoint, ATTACKER, None, 2, 1, fresh_optimizer=fresh_optimizer)
    copies = Copies(memory, module)
    copies.during("attack", "attack")
    copies.during("loss_and_gradient", "shifted pass")
    copies.during("add_gradient", "shifted pass")
    found = copies.run("fit", tmp_path, data(), max_steps=5)
    assert found == {"step": 5, "attack": attack, "shifted pass": 5}


ATTACKED = {
    "after fit": ("fit", Defense, {}, "open_weight", 5),
    "after fit, beside an undefended model": ("fit", Defense, {}, "open_weight", 6),
    "after Patcher": ("fit", PatcherModule, {"attacker": ATTACKER, "num_outer_steps": 2, "num_sft_steps": 0}, "open_weight", 5),
    "after SBR, from the aligned model": ("fit", SBRModule, {"freeze_unembedding": False}, "finetuning_service", 6),
    "in test": ("test", Defense, {}, "open_weight", 5),
}


@pytest.mark.parametrize("case", ATTACKED)
def test_a_full_parameter_attack_holds_what_the_table_says(memory, checkpoint, tmp_path, case):
    run, kind, settings, threat_model, expected = ATTACKED[case]
    other = save_toy_checkpoint(tmp_path / "other", seed=1) if "undefended" in case else None
    copies = Copies(memory, kind(checkpoint, **settings))

    class Noted(FullParameterAttack):
        def run(self, *args):
            copies.phase = "attack"
            super().run(*args)

    attack = Noted(threat_model, num_samples=16, num_attack_steps=2, batch_size=4, undefended_checkpoint=other)
    found = copies.run(run, tmp_path, data(train_on="mixture"), max_steps=2, callbacks=[attack])
    assert found["attack"] == expected


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_autocast_keeps_the_weights_in_bfloat16_until_a_pass_is_over(checkpoint, activation_checkpointing):
    module, batch, kept = (
        Defense(checkpoint, backbone=Backbone(activation_checkpointing=activation_checkpointing)),
        collate(rows_of(), 0, "right"),
        {},
    )
    module.configure_model()
    matrices = [p for p in module.model.parameters() if p.ndim == 2]

    def keep(tensor):
        if tensor.dtype == torch.bfloat16 and any(tensor.shape in (p.shape, p.T.shape) for p in matrices):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        module.sft_loss(batch)
    share = sum(t.numel() for t in kept.values()) / sum(p.numel() for p in matrices)
    assert share == 1 if not activation_checkpointing else share < 0.6  # of the toy, the unembedding is more than half


# ---- on two processes


class Metered(L.Callback):
    """Counts a fit from its second step on, in which the moments are there."""

    def __init__(self, memory: Any, num_labels: int) -> None:
        self.memory, self.num_labels, self.block = memory, num_labels, ExitStack()

    def begin(self, module: Defense) -> None:
        self.meter = self.memory.Meter(module.model, self.num_labels)
        self.block.enter_context(self.meter.looking())

    def on_train_start(self, trainer: L.Trainer, pl_module: Defense) -> None:
        if not hasattr(self, "meter"):  # sharded weights come to be in ``fit``
            self.begin(pl_module)

    def on_train_batch_start(self, *_: Any) -> None:
        gc.disable()  # what is freed by chance alone is held
        self.meter.most.clear()

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.at_step = self.meter.held.total()

    def on_fit_end(self, trainer: L.Trainer, pl_module: Defense) -> None:
        pl_module.forget_training()
        one = sum(local(p).nbytes for p in pl_module.parameters())
        deadline = time.monotonic() + 10
        while self.meter.held.total() > 1.5 * one and time.monotonic() < deadline:
            time.sleep(0.02)  # gloo's threads let go of the buckets when they are done
        self.after = self.meter.held.total()
        self.block.close()
        gc.enable()


STRATEGIES = {"ddp": "ddp", "views": DDPStrategy(gradient_as_bucket_view=True), "fsdp2": ModelParallelStrategy(2, 1)}


def counted_on_a_rank(rank: int, checkpoint: str, folder: Path) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import memory

    os.environ["LOCAL_RANK"] = str(rank)
    step = memory.Step(checkpoint, batch_size=3, length=48)
    for strategy in STRATEGIES:
        module, callback = Defense(checkpoint), Metered(memory, step.num_labels)
        if strategy != "fsdp2":  # buckets are made before training starts
            module.configure_model()
            callback.begin(module)
        shape = {"devices": 2, "precision": "bf16-mixed", "max_steps": 2, "callbacks": [callback]}
        fit = toy_trainer(folder, strategy=STRATEGIES[strategy], **shape)
        fit.fit(module, train_dataloaders=DataLoader([half_learnt(3, 48)] * 4, batch_size=None))
        if rank == 0:
            one = sum(local(p).nbytes for p in module.parameters())
            copies = {"at the step": round(callback.at_step / one), "after": round(callback.after / one)}
            (folder / f"{strategy}.json").write_text(json.dumps({"most": callback.meter.most.total(), "copies": copies}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("casehard.engine.weights.BUCKET", 2000)
        module = Defense(checkpoint)
        module.configure_model()
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        meter = memory.Meter(module.model, 1)
        for p in module.parameters():
            meter.note(p.grad, memory.GRADIENTS)
        with meter.looking():
            average_gradients(list(module.parameters()))
        largest = max(4 * 2000, *(p.nbytes for p in module.parameters()))
        assert largest <= meter.most[memory.PASSING] <= 2 * largest  # one bucket and the one before it


def test_two_processes_hold_what_is_computed_the_buckets_of_ddp_too(memory, checkpoint, tmp_path):
    on_ranks(counted_on_a_rank, tmp_path, checkpoint, tmp_path)
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in STRATEGIES}
    one = memory.Step(checkpoint, batch_size=3, length=48)
    computed = {"ddp": replace(one, strategy="ddp"), "fsdp2": replace(one, strategy="fsdp2", processes=2)}
    for name, step in computed.items():
        assert 0 <= found[name]["most"] - step.held().total() <= 6 * half_learnt(3, 48)["labels"].nbytes, name
    at_step = {name: each["copies"]["at the step"] for name, each in found.items()}
    assert at_step == {"ddp": 5, "views": 4, "fsdp2": 4}  # weights, gradients, two moments; and the buckets
    assert {name: each["copies"]["after"] for name, each in found.items()} == {"ddp": 1, "views": 1, "fsdp2": 1}
