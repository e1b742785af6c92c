"""What is held in copies of what trains, and that what saves memory leaves the result alone."""

import gc
from collections import defaultdict
from math import floor

import pytest
import torch
from test_patcher import ATTACKER, data
from test_sbr import rows_of
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from toy import DATA, DEFENSES, looking, save_toy_checkpoint, toy_data, toy_trainer

from casehard import Backbone, Defense, FullParameterAttack, LoRA, LoRAAttack, Optimizer, PatcherModule, SBRModule
from casehard.datamodules.chat import collate
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


# ---- copies


def held() -> int:
    """Bytes of all tensors that Python knows, gradients too; what autograd keeps of a pass is not among them."""
    gc.collect()
    found = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and not isinstance(t, FakeTensor)]  # torch.compile's
    found += [t.grad for t in found if t.is_leaf and t.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found if t.device.type == "cpu"}.values())


class Copies:
    """Most copies of the model that are held, by phase, when an optimizer has stepped or a counted method returns."""

    def __init__(self, module: Defense) -> None:
        self.before, self.phase, self.most = held(), "step", defaultdict(int)
        Defense.configure_model(module)
        self.module, self.one = module, sum(p.nbytes for p in module.model.parameters())

    def count(self, *_: object) -> None:
        self.most[self.phase] = max(self.most[self.phase], floor((held() - self.before) / self.one + 0.2))  # buffers, batches

    def run(self, name: str, folder, loader, **settings) -> dict[str, int]:
        """What was found while the trainer's method of that name ran."""
        handle = register_optimizer_step_post_hook(self.count)
        try:
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
def test_a_step_holds_weights_gradients_and_two_moments(checkpoint, tmp_path, kind, accumulate_grad_batches):
    settings = {"freeze_unembedding": False} if kind is SBRModule else {}
    copies = Copies(kind(checkpoint, **settings))
    found = copies.run("fit", tmp_path, toy_data(), max_steps=3, accumulate_grad_batches=accumulate_grad_batches)
    assert found == {"step": 4}


@pytest.mark.parametrize(("fresh_optimizer", "attack"), [(False, 7), (True, 5)])
def test_a_round_of_patcher_holds_what_the_table_says(checkpoint, tmp_path, fresh_optimizer, attack):
    module = PatcherModule(checkpoint, ATTACKER, None, 2, 1, fresh_optimizer=fresh_optimizer)
    copies = Copies(module)
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
def test_a_full_parameter_attack_holds_what_the_table_says(checkpoint, tmp_path, case):
    run, kind, settings, threat_model, expected = ATTACKED[case]
    other = save_toy_checkpoint(tmp_path / "other", seed=1) if "undefended" in case else None
    copies = Copies(kind(checkpoint, **settings))

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
