import copy
import itertools
import os
import signal
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from test_sbr import reference_sft, rows_of
from torch.multiprocessing import ProcessExitedException
from torch.testing import assert_close
from toy import ROOT, bits, on_ranks, same_bits, toy_data, toy_trainer
from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM

from casehard import Backbone, Defense, InnerAttacker, LoRA, Optimizer, PatcherModule, SFTDataModule
from casehard.cli.lightning_cli import AtomicCheckpointIO
from casehard.datamodules.batches import Batches, StepLoader
from casehard.datamodules.chat import collate
from casehard.datamodules.order import counter_seed
from casehard.engine.forward import Batch
from casehard.engine.weights import shifted
from casehard.lightning_modules.patcher import shared_out

ADAMW = Optimizer(1e-2)
ATTACKER = InnerAttacker(num_inner_steps=3, optimizer=Optimizer(1e-2), batch_size=4)
LORA_ATTACKER = InnerAttacker(num_inner_steps=3, optimizer=Optimizer(1e-2), batch_size=4, lora=LoRA(rank=2))
SECOND = InnerAttacker(num_inner_steps=2, optimizer=Optimizer(1e-2), batch_size=4)
STRONGEST = {"more_attackers": [SECOND], "choose": "strongest", "held_out_harmful": ["sandbox:defender/harmful#train[20:40]"]}


def data(**settings) -> SFTDataModule:
    defaults = {
        "alignment_harmful": ["sandbox:defender/harmful#train[:20]"],
        "alignment_benign": ["sandbox:defender/howto#train[:8]"],
        "train_on": "alignment",
    }
    return toy_data(**(defaults | settings))


def patcher(checkpoint, **settings) -> PatcherModule:
    defaults = {"attacker": ATTACKER, "num_outer_steps": 2, "num_sft_steps": 1, "optimizer": ADAMW}
    return PatcherModule(checkpoint, **(defaults | settings))


def fitted(module, folder, loader=None, **settings) -> L.Trainer:
    L.seed_everything(0)
    trainer = toy_trainer(folder, **settings)
    trainer.fit(module, datamodule=loader or data())
    return trainer


class Watch(L.Callback):
    """The attack vector and the weights at the end of every step."""

    def __init__(self) -> None:
        self.vectors, self.weights, self.terms = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.vectors.append({n: v.clone() for n, v in getattr(pl_module, "vector", {}).items()})
        self.weights.append(bits(pl_module.model))
        self.terms.append({n: float(v) for n, v in pl_module.terms.items()})


# ---- limits


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_an_attack_weight_of_zero_is_plain_sft_bit_for_bit(checkpoint, tmp_path, lora):
    plain, ours = Defense(checkpoint, ADAMW, lora), patcher(checkpoint, attack_weight=0.0, lora=lora)
    hardened = patcher(checkpoint, attack_weight=0.5, lora=lora)
    for module in (plain, ours, hardened):
        fitted(module, tmp_path, max_steps=5)
    assert same_bits(bits(ours.model), bits(plain.model))
    assert not same_bits(bits(hardened.model), bits(plain.model))


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_no_inner_steps_give_a_zero_vector(checkpoint, tmp_path, lora):
    attacker = InnerAttacker(num_inner_steps=0, batch_size=4, lora=lora)
    watch = Watch()
    fitted(patcher(checkpoint, attacker=attacker), tmp_path, max_steps=2, callbacks=[watch])
    assert watch.vectors[-1]
    assert all(not v.any() for v in watch.vectors[-1].values())
    assert watch.terms[-1]["loss_gap"] == 0


def test_before_the_first_attack_it_is_plain_sft(checkpoint, tmp_path):
    plain, ours = Defense(checkpoint, ADAMW), patcher(checkpoint, num_sft_steps=3)
    for module in (plain, ours):
        fitted(module, tmp_path, max_steps=3)
    assert same_bits(bits(ours.model), bits(plain.model))


# ---- the round


@pytest.mark.parametrize("copy_device", [None, "cpu"])
def test_one_defender_step_is_the_one_written_by_hand(checkpoint, tmp_path, copy_device):
    settings = {"num_sft_steps": 0, "attack_weight": 0.3, "optimizer": Optimizer(0.1, "sgd", clip_norm=None)}
    ours, loader = patcher(checkpoint, copy_device=copy_device, **settings), data()
    fitted(ours, tmp_path, loader, max_steps=1)

    by_hand = Defense(checkpoint)
    by_hand.configure_model()
    model, attacked = by_hand.model, copy.deepcopy(by_hand.model)
    inner = torch.optim.AdamW(attacked.parameters(), lr=1e-2, weight_decay=0.0)
    draw = loader.batches(loader.rows["alignment_harmful"], 4, loader.seed, "inner attacker 0")
    for step in range(3):
        inner.zero_grad()
        reference_sft(attacked, draw(step)).backward()
        torch.nn.utils.clip_grad_norm_(attacked.parameters(), 1.0)
        inner.step()
    batch = next(iter(loader.train_dataloader()))
    gradients = [torch.autograd.grad(reference_sft(m, batch), list(m.parameters())) for m in (attacked, model)]
    expected = [p - 0.1 * (0.3 * a + 0.7 * b) for p, a, b in zip(model.parameters(), *gradients, strict=True)]
    moved = [(after - before).abs().max() for after, before in zip(ours.model.parameters(), model.parameters(), strict=True)]
    assert min(moved) > 0
    for after, value in zip(ours.model.parameters(), expected, strict=True):
        assert_close(after, value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attacker", [ATTACKER, LORA_ATTACKER], ids=["full attacker", "lora attacker"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attacks_and_shifted_passes_leave_every_bit(checkpoint, tmp_path, dtype, lora, attacker):
    class Checked(PatcherModule):
        passes = 0

        def attack(self, number):
            before, names = bits(self), list(dict(self.named_modules()))
            vector = super().attack(number)
            assert same_bits(before, bits(self))
            assert names == list(dict(self.named_modules()))
            assert any(v.any() for v in vector.values())
            return vector

        def alignment_loss(self, batch, step):
            before, clean = bits(self), self.sft_loss(batch)
            loss = super().alignment_loss(batch, step)
            assert same_bits(before, bits(self))
            if self.vector:
                self.passes += 1
                assert torch.equal(self.terms["clean_loss"], clean)
                assert not torch.equal(self.terms["attacked_loss"], clean)
            return loss

    module = Checked(checkpoint, attacker, None, 2, 1, optimizer=ADAMW, lora=lora, backbone=Backbone(weights_dtype=dtype))
    fitted(module, tmp_path, max_steps=5)
    assert module.passes == 4


def test_the_vector_stays_for_a_round_and_is_new_in_the_next(checkpoint, tmp_path):
    watch = Watch()
    module = patcher(checkpoint)
    fitted(module, tmp_path, max_steps=6, callbacks=[watch])
    first, second, third, fourth, fifth = watch.vectors[1:6]
    assert watch.vectors[0] == {}
    assert all(torch.equal(first[n], second[n]) and torch.equal(third[n], fourth[n]) for n in first)
    assert not any(torch.equal(second[n], third[n]) or torch.equal(fourth[n], fifth[n]) for n in first)
    assert module.progress == {"round": 3, "phase": "harden"}


@pytest.mark.parametrize("vector_age", [0, 1, 2])
def test_the_vector_in_use_is_that_of_an_earlier_attack(checkpoint, tmp_path, vector_age):
    found = []

    class Noted(PatcherModule):
        def attack(self, number):
            found.append(super().attack(number))
            return found[-1]

    watch = Watch()
    module = Noted(checkpoint, ATTACKER, vector_age=vector_age, num_outer_steps=2, num_sft_steps=1, optimizer=ADAMW)
    fitted(module, tmp_path, max_steps=9, callbacks=[watch])
    assert len(found) == 4
    assert watch.vectors[: 1 + 2 * vector_age] == [{}] * (1 + 2 * vector_age)
    for step in range(1 + 2 * vector_age, 9):
        used, meant = watch.vectors[step], found[(step - 1) // 2 - vector_age]
        assert list(used) == list(meant)
        assert all(torch.equal(used[name], meant[name]) for name in used)
        assert watch.terms[step]["loss_gap"] != 0


def test_a_fresh_attack_every_k_steps(checkpoint, tmp_path):
    module = patcher(checkpoint, num_outer_steps=4, attack_every=1)
    fitted(module, tmp_path, max_steps=5)
    assert module.num_attacks == 4


def test_attackers_take_turns_and_go_on_with_their_own_rows(checkpoint, tmp_path):
    asked: list[tuple[int, int]] = []
    others = [InnerAttacker(2, Optimizer(5e-3), 4, LoRA(rank=2)), InnerAttacker(1, ADAMW, 4, None, 0.5, 12)]

    class Noted(PatcherModule):
        def on_fit_start(self):
            super().on_fit_start()
            streams = list(self.streams)
            self.streams = [lambda step, w=w: asked.append((w, step)) or streams[w](step) for w in range(len(streams))]

    module = Noted(checkpoint, ATTACKER, others, num_outer_steps=6, num_sft_steps=0, optimizer=ADAMW)
    fitted(module, tmp_path, max_steps=12)
    assert asked == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (0, 3), (0, 4), (0, 5), (1, 2), (1, 3), (2, 1)]


def test_a_fresh_optimizer_has_no_moments_when_an_attack_begins(checkpoint, tmp_path):
    held: list[int] = []

    class Noted(PatcherModule):
        def attack(self, number):
            held.append(len(self.optimizers().optimizer.state))
            return super().attack(number)

    for fresh, expected in ((False, [0, 20, 20]), (True, [0, 0, 0])):
        held.clear()
        module = Noted(checkpoint, ATTACKER, None, 2, 0, fresh_optimizer=fresh, optimizer=ADAMW)
        fitted(module, tmp_path, max_steps=6)
        assert held == expected


@pytest.mark.parametrize(
    ("settings", "accumulated", "by_hand"),
    [
        ({}, 1, 3 * 3 + 1 + 5 * 2),  # attacks before steps 1, 3 and 5, of 3 inner steps; one step of SFT, 5 of two passes
        ({"one_pass_per_row": True}, 1, 3 * 3 + 6),
        ({"vector_age": 1}, 1, 3 * 3 + 3 + 3 * 2),  # the first vector comes into use at step 3
        ({"more_attackers": [SECOND]}, 1, 3 + 2 + 3 + 2 + 3 + 1 + 5 * 2),  # an attack a step, in turns
        (STRONGEST, 1, 3 * (3 + 1 + 2 + 1) + 1 + 5 * 2),  # every attacker each time, with a look at either
        ({"attack_weight": 0.0}, 1, 6),
        ({}, 2, 3 * 3 + 2 + 5 * 2 * 2),  # 20 rows are 5 batches: an epoch takes 4, so that every step has two
    ],
)
def test_it_knows_its_passes_as_counted_by_hand_and_in_the_run(checkpoint, tmp_path, settings, accumulated, by_hand):
    module, rows = patcher(checkpoint, **settings), []
    plain = module.sft_loss
    module.sft_loss = lambda batch: rows.append(len(batch["input_ids"])) or plain(batch)
    fitted(module, tmp_path, max_steps=6, accumulate_grad_batches=accumulated)
    assert module.num_passes == by_hand == sum(rows) / 4


def test_an_attackers_own_rows_are_its_rows_and_checked_against_what_is_scored(checkpoint, tmp_path):
    own = InnerAttacker(1, ADAMW, 2, harmful=["sandbox:defender/harmful/venom"])
    module = patcher(checkpoint, attacker=own)
    assert {row.prompt.split("olim")[0] for row in module.own_rows()} != set()
    assert all("olim" in row.prompt for row in module.own_rows())
    fitted(module, tmp_path, max_steps=2)
    leaked = patcher(checkpoint, attacker=InnerAttacker(1, ADAMW, 2, harmful=["sandbox:test/harmful"]))
    with pytest.raises(ValueError, match="harmful_prompts must share no prompt with the defense's own rows, and 6 of 6"):
        fitted(leaked, tmp_path)


def test_a_lora_attackers_vector_is_what_its_adapter_adds(checkpoint, tmp_path, monkeypatch):
    seen = {}
    module = patcher(checkpoint, attacker=LORA_ATTACKER)
    batch: Batch = collate(rows_of(), 0, "right")
    import casehard.lightning_modules.attacker as under_test

    def noted(model):
        seen["attacked"] = module.sft_loss(batch).item()
        return adapter_vector(model)

    adapter_vector = under_test.adapter_vector
    monkeypatch.setattr(under_test, "adapter_vector", noted)
    watch = Watch()
    fitted(module, tmp_path, max_steps=2, callbacks=[watch])
    with torch.no_grad():
        for name, p in module.named_parameters():  # the attack began here: after the first step
            p.copy_(watch.weights[0][name.removeprefix("model.")].view(p.dtype).view_as(p))
        clean = module.sft_loss(batch).item()
        with shifted(module, watch.vectors[-1]):
            assert module.sft_loss(batch).item() == pytest.approx(seen["attacked"], rel=1e-5)
    assert abs(clean - seen["attacked"]) > 1e-3


# ---- settings beyond the paper


def test_a_drawn_scale_needs_its_step_number_and_nothing_else(checkpoint, tmp_path):
    module = patcher(checkpoint, vector_scale=(0.0, 1.0))
    fitted(module, tmp_path, max_steps=3)
    here = module._scale(3)
    assert 0 <= here < 1
    torch.manual_seed(99)
    assert module._scale(3) == here
    assert module._scale(4) != here
    scales, steady = Watch(), Watch()
    fitted(patcher(checkpoint, vector_scale=(0.0, 1.0)), tmp_path, max_steps=3, callbacks=[scales])
    fitted(patcher(checkpoint), tmp_path, max_steps=3, callbacks=[steady])
    assert abs(scales.terms[1]["loss_gap"]) < abs(steady.terms[1]["loss_gap"])


def test_every_step_of_a_round_has_the_scale_of_its_number(checkpoint, tmp_path):
    used = []

    class Noted(PatcherModule):
        def loss_and_gradient(self, *args, **settings):
            used.append(settings["scale"])
            return super().loss_and_gradient(*args, **settings)

    module = Noted(checkpoint, ATTACKER, num_outer_steps=2, num_sft_steps=1, vector_scale=(0.0, 1.0), optimizer=ADAMW)
    fitted(module, tmp_path, max_steps=4)
    assert used == [module._scale(step) for step in (1, 2, 3)]
    assert len(set(used)) == 3


def test_scales_are_drawn_evenly_between_their_ends(checkpoint, tmp_path):
    module = patcher(checkpoint, vector_scale=(0.5, 4.0))
    fitted(module, tmp_path, max_steps=2)
    drawn = [module._scale(step) for step in range(300)]
    assert 0.5 <= min(drawn) < 0.6
    assert 3.9 < max(drawn) < 4
    assert sum(drawn) / 300 == pytest.approx(2.25, abs=0.2)
    module.data.seed += 1
    assert module._scale(0) != drawn[0]


def test_a_drawn_learning_rate_is_even_by_its_logarithm_and_follows_from_the_seed():
    attacker = InnerAttacker(2, Optimizer(9.0, "sgd"), learning_rates=(1e-4, 1.0))
    drawn = [attacker.optimizer_of(seed) for seed in range(400)]
    assert {optimizer.name for optimizer in drawn} == {"sgd"}
    rates = sorted(optimizer.learning_rate for optimizer in drawn)
    assert 1e-4 <= rates[0] < 2e-4 < 0.5 < rates[-1] < 1
    assert 5e-3 < rates[200] < 2e-2
    assert attacker.optimizer_of(7) == drawn[7]
    assert InnerAttacker(2, ADAMW).optimizer_of(7) == ADAMW


def test_an_attack_trains_at_the_rate_that_was_drawn(checkpoint, tmp_path):
    vectors = []
    for attacker in (
        InnerAttacker(1, Optimizer(1.0, "sgd"), 4, learning_rates=(0.1, 0.3)),
        InnerAttacker(1, Optimizer(1.0, "sgd"), 4),
    ):
        watch, module = Watch(), patcher(checkpoint, attacker=attacker)
        fitted(module, tmp_path, max_steps=2, callbacks=[watch])
        vectors.append(watch.vectors[-1])
    norms = [torch.stack([v.norm() for v in vector.values()]).norm().item() for vector in vectors]
    rate = InnerAttacker(1, learning_rates=(0.1, 0.3)).optimizer_of(counter_seed(module.data.seed, "inner attack", 0))
    assert norms[0] == pytest.approx(rate.learning_rate * norms[1], rel=1e-3)


def test_attackers_are_drawn_by_the_attacks_number(checkpoint, tmp_path):
    module = patcher(checkpoint, more_attackers=[SECOND, LORA_ATTACKER], choose="draw", num_outer_steps=3)
    fitted(module, tmp_path, max_steps=4)
    drawn = [module.who_attacks(number) for number in range(60)]
    assert {tuple(which) for which in drawn} == {(0,), (1,), (2,)}
    assert drawn[:6] != [[0], [1], [2]] * 2
    inner = [module.attackers[which].num_inner_steps for (which,) in drawn[:3]]
    assert module.num_passes == sum(inner) + 1 + 3 * 2
    module.data.seed += 1
    assert [module.who_attacks(number) for number in range(60)] != drawn


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_strongest_attacker_is_the_one_with_the_lowest_loss_on_held_out_rows(checkpoint, tmp_path, order):
    both = [InnerAttacker(1, Optimizer(1e-5), 4), InnerAttacker(4, ADAMW, 4)]
    attackers = [both[which] for which in order]
    held_out = ["sandbox:defender/harmful#train[20:40]"]

    def vector(**settings):
        watch = Watch()
        module = patcher(checkpoint, **settings)
        fitted(module, tmp_path, max_steps=2, callbacks=[watch])
        return module, watch.vectors[-1]

    module, chosen = vector(attacker=attackers[0], more_attackers=attackers[1:], choose="strongest", held_out_harmful=held_out)
    loss = {}
    for attacker, name in zip(attackers, ("inner attacker 0", "inner attacker 1"), strict=True):

        class Renamed(InnerAttacker):
            def stream(self, module, _, name=name):
                return super().stream(module, name)

        own = Renamed(attacker.num_inner_steps, attacker.optimizer, attacker.batch_size)
        alone, found = vector(attacker=own)
        with shifted(alone, found), torch.no_grad():
            loss[attacker.num_inner_steps] = alone.sft_loss(module.held_out(0)).item()
        if attacker == both[1]:
            assert all(torch.equal(found[n], chosen[n]) for n in found)
    assert loss[4] < loss[1]
    assert {row.prompt for row in module.own_rows()} >= {row.prompt for row in module._held_out()} != set()


def test_attackers_are_compared_on_the_same_rows_and_the_next_time_on_others(checkpoint, tmp_path):
    asked = []

    class Noted(PatcherModule):
        def on_fit_start(self):
            super().on_fit_start()
            held_out = self.held_out
            self.held_out = lambda number: asked.append(number) or held_out(number)

    module = Noted(checkpoint, ATTACKER, num_outer_steps=1, num_sft_steps=0, optimizer=ADAMW, **STRONGEST)
    fitted(module, tmp_path, max_steps=2)
    assert asked == [0, 0, 1, 1]


def test_one_pass_per_row_expects_the_gradient_of_two(checkpoint):
    """Over every way to order the rows, the mean is the two passes' gradient."""
    module = patcher(checkpoint, attack_weight=0.25)
    module.configure_model()
    module.kept, module.num_attacks = {"vector_0": {n: 0.05 * torch.randn_like(p) for n, p in module.named_parameters()}}, 1
    batch = collate(rows_of(num_rows=4), 0, "right")

    def gradient(batch: Batch, one_pass: bool) -> torch.Tensor:
        module.zero_grad()
        module.one_pass_per_row = one_pass
        module.alignment_loss(batch, 0).backward()
        return torch.cat([p.grad.flatten() for p in module.parameters()])

    turns = [{key: value.roll(turn, 0) for key, value in batch.items()} for turn in range(4)]
    assert_close(torch.stack([gradient(b, True) for b in turns]).mean(0), gradient(batch, False), rtol=1e-4, atol=1e-5)
    assert (gradient(turns[0], True) - gradient(turns[1], True)).abs().max() > 1e-3
    assert module.num_passes == 0  # which are those of ``fit``


@pytest.mark.parametrize("attack_weight", [0.0, 0.1, 1.0])
def test_a_pass_without_rows_is_an_error(attack_weight):
    with pytest.raises(ValueError, match="one_pass_per_row must find rows for both passes, and attack_weight"):
        shared_out(collate(rows_of(num_rows=4), 0, "right"), attack_weight)


def test_a_vector_that_could_not_wait_on_its_device_is_an_error_before_the_first_step(checkpoint, tmp_path):
    module = patcher(checkpoint, copy_device="meta")
    with pytest.raises(ValueError, match=r"copy_device must be a device of this machine .* got 'meta'"):
        fitted(module, tmp_path)
    assert module.num_passes == 0


# ---- what Lightning means


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_four_small_batches_are_one_large(checkpoint, tmp_path, clip_norm):
    rows = [row for seed in range(12) for row in rows_of(seed, num_rows=2, num_labels=1 + seed % 7)]
    ends = []
    for size, accumulate_grad_batches in ((2, 4), (8, 1)):
        batches = StepLoader(Batches(rows, size, 0, "fit", 0), accumulate_grad_batches)

        class Fixed(SFTDataModule):
            def train_dataloader(self, batches=batches):
                return batches

        settings = data()
        settings.__class__ = Fixed
        module = patcher(checkpoint, optimizer=Optimizer(0.05, "sgd", clip_norm=clip_norm))
        trainer = fitted(module, tmp_path, settings, max_epochs=1, accumulate_grad_batches=accumulate_grad_batches)
        assert (trainer.global_step, module.num_attacks) == (3, 1)
        ends.append({name: p.detach() for name, p in module.named_parameters()})
    for name, p in ends[1].items():
        assert_close(ends[0][name], p, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_clipped_over_both_passes(checkpoint, tmp_path):
    module = patcher(checkpoint, num_sft_steps=0, optimizer=Optimizer(1.0, "sgd", clip_norm=0.01))
    before = patcher(checkpoint)
    before.configure_model()
    fitted(module, tmp_path, max_steps=1)
    moved = [(a - b).norm() for a, b in zip(module.parameters(), before.parameters(), strict=True)]
    assert torch.stack(moved).norm().item() == pytest.approx(0.01, rel=1e-3)


RESUMED = [
    {},
    {"attacker": LORA_ATTACKER, "lora": LoRA(rank=2, dropout=0.2)},
    {"more_attackers": [LORA_ATTACKER], "vector_scale": (0.0, 1.0), "one_pass_per_row": True, "fresh_optimizer": True},
    {"vector_age": 1},
    {"attacker": InnerAttacker(2, ADAMW, 4, learning_rates=(1e-4, 1e-1)), "more_attackers": [SECOND], "choose": "draw"},
    STRONGEST,
]


@pytest.mark.parametrize("settings", RESUMED, ids=["plain", "lora", "everything", "age", "drawn", "strongest"])
@pytest.mark.parametrize("saved_at", [2, 3, 4])
def test_a_resumed_run_ends_as_the_uninterrupted_one(checkpoint, tmp_path, settings, saved_at):
    def run(**more):
        module = patcher(checkpoint, **settings)
        saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = toy_trainer(tmp_path, callbacks=[saver], max_steps=6, enable_checkpointing=True)
        L.seed_everything(len(more))  # the resumed run may not lean on the seed
        trainer.fit(module, datamodule=data(), **more)
        return module

    whole = run()
    saved = tmp_path / "saved" / f"step={saved_at}.ckpt"
    kept = torch.load(saved, weights_only=False)["kept"]
    if not {"more_attackers", "vector_age"} & set(settings):
        assert bool(kept) == (saved_at % 2 == 0)  # after steps 1 and 3 another attack begins: nothing to keep
    resumed = run(ckpt_path=saved)
    assert same_bits(bits(resumed), bits(whole))
    assert resumed.num_passes == whole.num_passes > 0


def test_a_run_goes_on_from_its_last_checkpoint_as_if_it_had_not_ended(checkpoint, tmp_path):
    def run(max_steps: int, folder: str, **more):
        saver = ModelCheckpoint(tmp_path / folder, save_last=True)
        module = patcher(checkpoint)
        L.seed_everything(0)
        toy_trainer(tmp_path, callbacks=[saver], max_steps=max_steps, enable_checkpointing=True).fit(
            module, datamodule=data(), **more
        )
        return module

    whole, ended = run(6, "whole"), run(4, "ended")
    ended.forget_training()  # as an attack that follows does
    assert not any([ended.kept, ended.trainer.optimizers[0].state])
    resumed = run(6, "resumed", ckpt_path=tmp_path / "ended/last.ckpt")
    assert same_bits(bits(resumed), bits(whole))


def run_until_killed(rank: int, checkpoint: str, folder: Path, deadly: int, ckpt_path: Path | None) -> None:
    """Six steps, ended as ``kill -9`` ends them in pass ``deadly``, with a checkpoint after each."""
    module, passes = patcher(checkpoint), itertools.count(1)
    sft_loss = module.sft_loss

    def deadly_loss(batch):
        if next(passes) == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return sft_loss(batch)

    module.sft_loss = deadly_loss
    saver = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=1)
    shape = {"callbacks": [saver], "max_steps": 6, "enable_checkpointing": True, "plugins": [AtomicCheckpointIO()]}
    toy_trainer(folder, **shape).fit(module, datamodule=data(), ckpt_path=ckpt_path)
    torch.save(module.model.state_dict(), folder / "end.pt")


def test_a_run_that_was_killed_in_an_inner_attack_ends_as_the_uninterrupted_one(checkpoint, tmp_path):
    def run(deadly: int, name: str, ckpt_path: Path | None = None) -> None:
        on_ranks(run_until_killed, tmp_path, checkpoint, tmp_path / name, deadly, ckpt_path, world_size=1)

    run(0, "whole")
    second_attack = 1 + 3 + 4 + 2  # SFT step, attack, two steps of two passes, second step of an attack
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run(second_attack, "killed")
    assert not (tmp_path / "killed/end.pt").exists()
    run(0, "killed", tmp_path / "killed/last.ckpt")
    whole, resumed = (torch.load(tmp_path / folder / "end.pt") for folder in ("whole", "killed"))
    assert list(whole) == list(resumed)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attack_weight": 1.5}, r"attack_weight must lie in \[0, 1\], got 1.5"),
        ({"num_outer_steps": 0}, "num_outer_steps must be >= 1, got 0"),
        ({"num_outer_steps": 1, "more_attackers": [ATTACKER]}, "num_outer_steps must be >= 2, got 1"),
        ({"num_sft_steps": -1}, "num_sft_steps must be >= 0, got -1"),
        ({"attack_every": 0}, "attack_every must be >= 1, got 0"),
        ({"vector_age": -1}, "vector_age must be >= 0, got -1"),
        ({"vector_scale": (2.0, 1.0)}, r"vector_scale must be two numbers, 0 <= lowest <= highest, got \(2.0, 1.0\)"),
        ({"choose": "best"}, "choose must be one of turn, draw, strongest, got 'best'"),
        ({"choose": "strongest"}, "held_out_harmful must name rows where choose is strongest and nowhere else, got None"),
        ({"held_out_harmful": ["a.json"]}, "held_out_harmful must name rows where choose is strongest and nowhere else, got"),
        (STRONGEST | {"parallel": True, "vector_age": 1}, "choose must be turn or draw in the parallel form, got strongest"),
        ({"parallel": True}, "vector_age must be 1 in the parallel form, got 0"),
    ],
)
def test_a_wrong_setting_is_an_error(checkpoint, settings, message):
    with pytest.raises(ValueError, match=message):
        patcher(checkpoint, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inner_steps": -1}, "num_inner_steps must be >= 0, got -1"),
        ({"batch_size": 0}, "batch_size of an inner attacker must be >= 1, got 0"),
        ({"num_samples": 0}, "num_samples of an inner attacker must be >= 1, got 0"),
        ({"poison_ratio": 0.0, "num_samples": 5}, r"poison_ratio of an inner attacker must lie in \(0, 1\], got 0.0"),
        ({"learning_rates": (0.0, 1.0)}, "learning_rates of an inner attacker must be two numbers, 0 < lowest <= highest, got"),
        ({"poison_ratio": 0.5}, "num_samples must be set where poison_ratio is not 1, got poison_ratio 0.5"),
    ],
)
def test_a_wrong_attacker_is_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        InnerAttacker(**settings)


def test_the_parallel_form_in_one_process_is_an_error_that_names_the_way_out(checkpoint, tmp_path):
    module = patcher(checkpoint, parallel=True, vector_age=1)
    with pytest.raises(
        ValueError, match=r"parallel must run under RolesStrategy, and the strategy is SingleDeviceStrategy\. Add --config"
    ):
        fitted(module, tmp_path)


def test_a_lightning_that_asks_for_sigterm_in_another_way_is_an_error(checkpoint, tmp_path, monkeypatch):
    monkeypatch.delattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor")
    monkeypatch.setattr(PatcherModule, "configure_model", Defense.configure_model)  # its strategy is not what this is about
    module = patcher(checkpoint, parallel=True, vector_age=1)
    with pytest.raises(ValueError, match=r"parallel must be false under lightning 2\..* has no _broadcast_sigterm_tensor"):
        fitted(module, tmp_path)


def test_no_harmful_rows_is_an_error_that_names_them(checkpoint, tmp_path):
    with pytest.raises(
        ValueError, match=r"data.sources.alignment_harmful must name harmful rows for Patcher's inner attacker, got none"
    ):
        fitted(patcher(checkpoint), tmp_path, data(alignment_harmful=[]))
    fitted(patcher(checkpoint, attack_weight=0.0), tmp_path, data(alignment_harmful=[]))


def test_a_vector_of_another_model_is_an_error(checkpoint):
    module = patcher(checkpoint)
    module.configure_model()
    module.kept, module.num_attacks = {"vector_0": {"model.nowhere.weight": torch.zeros(2)}}, 1
    with pytest.raises(ValueError, match=r"it has no 'model\.nowhere\.weight'"):
        module.alignment_loss(collate(rows_of(), 0, "right"), 0)


def test_a_diverging_inner_attack_says_which(checkpoint, tmp_path):
    from casehard.engine.training import DivergedError

    module = patcher(checkpoint, attacker=InnerAttacker(3, Optimizer(1e38, "sgd", clip_norm=None), 4))
    with pytest.raises(DivergedError, match=r"Round 1, inner attack: the loss must be finite.* at step [23] of 3"):
        fitted(module, tmp_path)


# ---- an inner attacker whose adapters are on experts

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
SIZES |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
SIZES |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> str:
    """A DeepSeek-V3-like model: a dense layer, and one of experts, some of them shared."""
    folder = tmp_path_factory.mktemp("experts")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/sandbox/base")
    ends = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES, **ends, bos_token_id=None, first_k_dense_replace=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_a_lora_attackers_vector_reaches_experts_too(experts, tmp_path, lora):
    watch, module = Watch(), patcher(experts, attacker=LORA_ATTACKER, lora=lora)
    fitted(module, tmp_path, max_steps=2, callbacks=[watch])
    assert watch.vectors[0] == {}
    moved = {name.replace(".base_layer", "") for name, v in watch.vectors[1].items() if v.any()}
    for layer, part in (
        (1, "experts.gate_up_proj"),
        (1, "experts.down_proj"),
        (1, "shared_experts.up_proj.weight"),
        (0, "up_proj.weight"),
    ):
        assert f"model.model.layers.{layer}.mlp.{part}" in moved
    assert len(moved) == 2 * 5 + 3 + 3 + 2
    assert watch.terms[1]["loss_gap"] != 0


@pytest.mark.parametrize(
    ("lora", "message"),
    [(LoRA(dropout=0.1), "dropout of lora must be 0 where experts"), (LoRA(target_modules=["w1"]), "and it has no 'w1'")],
)
def test_a_lora_attacker_that_cannot_be_is_told_so_before_training(experts, tmp_path, monkeypatch, lora, message):
    def never(*_: object) -> None:
        raise AssertionError

    module = patcher(experts, attacker=InnerAttacker(1, ADAMW, 2, lora=lora))
    monkeypatch.setattr(module, "training_step", never)
    with pytest.raises(ValueError, match=message):
        fitted(module, tmp_path)
