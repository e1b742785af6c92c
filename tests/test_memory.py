"""What saves memory leaves the result alone."""

import pytest
import torch
from test_sbr import rows_of
from toy import DEFENSES, toy_data, toy_trainer

from casehard import Defense, FullParameterAttack, LoRA, LoRAAttack, Optimizer
from datamodules.chat import collate


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_activations_computed_again_give_the_same_gradient(checkpoint, lora):
    batch, found = collate(rows_of(), 0, "right"), []
    for again in (False, True):
        torch.manual_seed(0)
        module = Defense(checkpoint, lora=lora, activation_checkpointing=again)
        module.configure_model()
        with torch.no_grad():
            module.sft_loss(batch)  # the first one tries out whether rows fold
        passes: list[int] = []
        module.model.model.layers[1].mlp.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        module.sft_loss(batch).backward()
        assert len(passes) == 1 + again
        found.append([p.grad for p in module.parameters() if p.requires_grad])
    assert all(torch.equal(kept, computed) for kept, computed in zip(*found, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("copy_device", [None, "cpu"])
@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_attacks_on_a_gpu_leave_every_bit(checkpoint, tmp_path, strategy, defense, copy_device):
    from lightning.pytorch.strategies import ModelParallelStrategy
    from test_distributed import Untouched

    kind, settings = DEFENSES[defense]
    settings = settings | ({"copy_device": copy_device} if defense == "patcher" else {})
    module = kind(checkpoint, optimizer=Optimizer(1e-3), activation_checkpointing=True, **settings)
    spies, shape = [Untouched(), Untouched()], {"num_samples": 16, "num_attack_steps": 3, "batch_size": 4}
    attacks = [kind("open_weight", copy_device=copy_device, **shape) for kind in (FullParameterAttack, LoRAAttack)]
    trainer = toy_trainer(
        tmp_path,
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        strategy=strategy if strategy == "auto" else ModelParallelStrategy(1, 1),
        callbacks=[spies[0], *attacks, spies[1]],
        inference_mode=False,
    )
    trainer.fit(module, datamodule=toy_data())
    before, after = (spy.seen[0] for spy in spies)
    assert all(torch.equal(before[name], after[name]) for name in before)
