import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_sbr import reference_sft
from torch.testing import assert_close
from toy import bits, looking, same_bits, toy_data, toy_trainer

from casehard import Defense, FullParameterAttack, LisaModule, LoRA, LoRAAttack, Optimizer, SettingError
from casehard.engine.weights import snapshot

SHAPE = {"num_alignment_steps": 2, "num_task_steps": 3, "alignment_batch_size": 4}
LORAS = pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])


def fitted(module, folder, ckpt_path=None, **settings) -> L.Trainer:
    L.seed_everything(0)
    trainer = toy_trainer(folder, **settings)
    trainer.fit(module, datamodule=toy_data(), ckpt_path=ckpt_path)
    return trainer


@LORAS
def test_without_alignment_steps_and_distance_it_is_sft_bit_for_bit(checkpoint, tmp_path, lora):
    ends = []
    for module in (
        Defense(checkpoint, lora=lora),
        LisaModule(checkpoint, 0, 2, 0.0, lora=lora),
        LisaModule(checkpoint, 0, 2, 1.0, lora=lora),
        LisaModule(checkpoint, 1, 2, 0.0, lora=lora),
    ):
        module.optimizer = Optimizer(1e-2)
        fitted(module, tmp_path, max_steps=4)
        ends.append(bits(module))
    assert same_bits(ends[0], ends[1])
    assert not same_bits(ends[0], ends[2])
    assert not same_bits(ends[0], ends[3])


def test_seven_steps_are_those_written_by_hand(checkpoint, tmp_path):
    ours = LisaModule(checkpoint, proximal_weight=2.0, optimizer=Optimizer(0.05, "sgd", clip_norm=None), **SHAPE)
    data = fitted(ours, tmp_path, max_steps=7).datamodule

    by_hand = Defense(checkpoint)
    by_hand.configure_model()
    aligned = data.rows["refusals"] + data.rows["alignment_benign"]
    alignment = data.batches(aligned, 4, data.seed, "lisa")
    customers = data.batches(data.mixture(24, 0.25, data.seed), 4, data.seed, "fit")
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9)
    other = snapshot(by_hand)
    for step, guide in enumerate([0, 1, None, None, None, 2, 3]):
        if step in (2, 5):
            other = snapshot(by_hand)
        loss = reference_sft(by_hand.model, customers(step) if guide is None else alignment(guide))
        distance = sum((p - other[name]).square().sum() for name, p in by_hand.named_parameters())
        optimizer.zero_grad()
        (loss + 2.0 / 2 * distance).backward()
        optimizer.step()
    for (name, p), (_, q) in zip(ours.named_parameters(), by_hand.named_parameters(), strict=True):
        assert_close(p, q, rtol=1e-4, atol=1e-6)
        assert (p - other[name]).abs().max() > 1e-4


def test_the_heavier_the_distance_the_less_the_weights_move(checkpoint, tmp_path):
    def moved(weight: float) -> float:
        module, start = LisaModule(checkpoint, 0, 100, weight, optimizer=Optimizer(1e-2, "sgd")), Defense(checkpoint)
        start.configure_model()
        fitted(module, tmp_path, max_steps=20)
        began = dict(start.named_parameters())
        return math.sqrt(sum((p - began[name]).square().sum().item() for name, p in module.named_parameters()))

    free, held, frozen = moved(0.0), moved(10.0), moved(100.0)
    assert free > 1.5 * held > 5 * frozen, (free, held, frozen)


@pytest.mark.parametrize("accumulate_grad_batches", [1, 2])
@LORAS
def test_a_resume_in_the_middle_of_a_state_ends_with_the_same_bits(checkpoint, tmp_path, lora, accumulate_grad_batches):
    def run(**resume) -> LisaModule:
        module = LisaModule(checkpoint, optimizer=Optimizer(1e-2, schedule="cosine"), lora=lora, **SHAPE)
        saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
        settings = {"accumulate_grad_batches": accumulate_grad_batches, "enable_checkpointing": True, "callbacks": [saver]}
        fitted(module, tmp_path, max_steps=6, **settings, **resume)
        return module

    whole = run()
    for step in (1, 3, 5):  # in alignment; in the customer's; at a switch
        resumed = run(ckpt_path=tmp_path / f"saved/step={step}.ckpt")
        assert same_bits(bits(resumed), bits(whole))
        ours, theirs = resumed.running.state["other"], whole.running.state["other"]
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert set(theirs) == {name for name, p in whole.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("attack", [FullParameterAttack, LoRAAttack])
def test_the_job_of_an_attack_is_its_own(checkpoint, tmp_path, attack):
    """An attack after every epoch, in the middle of a state, leaves no trace; and its customer's model is another than SFT's."""
    module, plain, seen = (LisaModule(checkpoint, optimizer=Optimizer(1e-2), **SHAPE) for _ in range(2)), [], []
    attacked, alone = module
    settings = {"num_samples": 16, "num_attack_steps": 4, "batch_size": 4, "optimizer": Optimizer(1e-2), "every_n_epochs": 1}
    look = attack("finetuning_service", **settings)
    looking(look, lambda target: (plain if target.undefended else seen).append(bits(target.module)))
    fitted(alone, tmp_path, max_steps=6, limit_train_batches=3)
    fitted(attacked, tmp_path, max_steps=6, limit_train_batches=3, callbacks=[look])
    assert same_bits(bits(attacked), bits(alone))
    assert not same_bits(seen[-1], plain[-1])
    assert same_bits(seen[-1], seen[0])  # epoch after epoch the same job from the same model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_alignment_steps": -1}, "num_alignment_steps of Lisa must be >= 0, got -1"),
        ({"num_task_steps": 0}, "num_task_steps of Lisa must be >= 1, got 0"),
        ({"proximal_weight": -0.5}, "proximal_weight of Lisa must be >= 0, got -0.5"),
        ({"alignment_batch_size": 0}, "alignment_batch_size of Lisa must be >= 1, got 0"),
    ],
)
def test_bad_settings_fail_at_construction(checkpoint, settings, message):
    with pytest.raises(SettingError, match=message):
        LisaModule(checkpoint, **settings)


def test_alignment_steps_without_rows_are_an_error_before_any_weights_load(checkpoint, tmp_path):
    module, none = LisaModule(checkpoint, **SHAPE), toy_data(refusals=[])
    with pytest.raises(SettingError, match=r"data\.sources\.refusals or alignment_benign must name rows for Lisa"):
        toy_trainer(tmp_path).test(module, datamodule=none, verbose=False)
    assert not hasattr(module, "model")
    toy_trainer(tmp_path).fit(LisaModule(checkpoint, 0, 5), datamodule=none)
