"""Gradients as values: what they are, how they are added to a step, and what a method keeps in the shape of its weights."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import trainer
from test_patcher import ATTACKER, data
from test_sbr import rows_of
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from toy import bits, on_ranks, same_bits, toy_trainer

from casehard import Backbone, BoosterModule, Defense, InnerAttacker, LoRA, Optimizer, RepNoiseModule, VaccineModule
from casehard.datamodules.chat import collate
from casehard.engine.gradients import difference, norm, scaled, summed
from casehard.engine.sharding import shard_of
from casehard.engine.training import Plain, train_steps
from casehard.engine.weights import reshard, snapshot

SGD = Optimizer(0.05, "sgd", clip_norm=None)


def batch_of(seed: int = 0) -> dict[str, torch.Tensor]:
    return collate(rows_of(seed), 0, "right")


def loaded(checkpoint: str, **settings: Any) -> Defense:
    torch.manual_seed(0)
    module = Defense(checkpoint, **settings)
    module.configure_model()
    return module


def autograd(module: Defense, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(module.sft_loss(batch), list(trained.values())), strict=True))


def same(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return list(ours) == list(others) and all(torch.equal(ours[name], others[name]) for name in ours)


# ---- what it is


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_is_that_of_autograd_and_what_waits_in_grad_stays(checkpoint, lora, dtype):
    module = loaded(checkpoint, lora=lora, backbone=Backbone(weights_dtype=dtype))
    expected = autograd(module, batch_of())
    module.sft_loss(batch_of(1)).backward()
    waiting, before = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}, bits(module)
    loss, gradient = module.loss_and_gradient(batch_of())
    assert same(gradient, expected)
    assert torch.equal(loss, module.sft_loss(batch_of()))
    assert same({n: p.grad for n, p in module.named_parameters() if p.grad is not None}, waiting)
    assert same_bits(bits(module), before)


def test_what_waits_stays_where_the_loss_fails(checkpoint):
    module = loaded(checkpoint)
    module.sft_loss(batch_of()).backward()
    waiting = [p.grad for p in module.parameters()]
    with pytest.raises(ZeroDivisionError):
        module.gradient(batch_of(), lambda _: 1 / 0)
    assert all(p.grad is g for p, g in zip(module.parameters(), waiting, strict=True))


def test_at_an_offset_it_is_the_gradient_of_the_model_that_was_moved_there(checkpoint):
    module, moved = loaded(checkpoint), loaded(checkpoint)
    offset, before = module.gradient(batch_of(1)), bits(module)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            p.add_(offset[name], alpha=-0.3)
    assert same(module.gradient(batch_of(), at=offset, scale=-0.3), autograd(moved, batch_of()))
    assert same_bits(bits(module), before)


def test_arithmetic_is_by_name_and_a_missing_name_is_zero():
    first, second = (
        {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])},
        {"a": torch.tensor([0.5, 0.5]), "c": torch.tensor(4.0)},
    )
    assert same(difference(first, second), {"a": torch.tensor([0.5, 1.5]), "b": torch.tensor([3.0]), "c": torch.tensor(-4.0)})
    assert same(summed(first, second, 2.0), {"a": torch.tensor([2.0, 3.0]), "b": torch.tensor([3.0]), "c": torch.tensor(8.0)})
    assert same(scaled(first, 0.5), {"a": torch.tensor([0.5, 1.0]), "b": torch.tensor([1.5])})
    assert first["b"].item() == 3
    assert norm(torch.nn.Linear(1, 1), {"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])}).item() == 5
    with pytest.raises(ValueError, match="weights must hold at least one tensor, got none"):
        norm(torch.nn.Linear(1, 1), {})


# ---- what it does to a step


class Adds(Defense):
    """SFT on its batch, plus three times its gradient: four times SFT."""

    def alignment_loss(self, batch, step):
        self.add_gradient(self.gradient(batch), 3.0)
        return self.sft_loss(batch)


class FourTimes(Defense):
    def alignment_loss(self, batch, step):
        return 4 * self.sft_loss(batch)


def moved(kind: type[Defense], checkpoint: str, folder: Path, **settings: Any) -> tuple[dict[str, torch.Tensor], Defense]:
    L.seed_everything(0)
    module = kind(checkpoint, SGD)
    start = loaded(checkpoint)
    toy_trainer(folder, **({"max_steps": 2} | settings)).fit(module, datamodule=data())
    ends, starts = dict(module.named_parameters()), dict(start.named_parameters())
    return {name: (ends[name] - starts[name]).detach() for name in starts}, module


def far(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Relative difference of two updates."""
    ours_, others_ = (torch.cat([v.flatten() for v in u.values()]) for u in (ours, others))
    return ((ours_ - others_).norm() / others_.norm()).item()


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_an_added_gradient_is_a_part_of_the_steps_own(checkpoint, tmp_path, settings):
    ours, module = moved(Adds, checkpoint, tmp_path, **settings)
    assert far(ours, moved(FourTimes, checkpoint, tmp_path, **settings)[0]) < (1e-2 if "precision" in settings else 1e-6)
    assert far(ours, moved(Defense, checkpoint, tmp_path, **settings)[0]) > 1
    assert module.num_passes == 2 * 2 * settings.get("accumulate_grad_batches", 1)


def test_under_autocast_it_is_the_gradient_that_lightning_would_take(checkpoint, tmp_path):
    """And at an offset, that of the weights there: nothing cast before is used again."""

    class Checks(Defense):
        checked = 0

        def alignment_loss(self, batch, step):
            first, there, here = self.gradient(batch), self.gradient(batch, at=snapshot(self)), self.gradient(batch)
            loss = self.sft_loss(batch)
            with torch.autocast("cpu", enabled=False):
                expected = torch.autograd.grad(loss, list(self.parameters()), retain_graph=True)
            assert same(first, here)
            assert same(here, dict(zip(here, expected, strict=True)))
            assert far(there, here) > 1e-2
            self.checked += 1
            return loss

    module = Checks(checkpoint, SGD)
    toy_trainer(tmp_path, max_steps=2, precision="bf16-mixed").fit(module, datamodule=data())
    assert module.checked == 2


def test_booster_of_weight_zero_is_sft_bit_for_bit(checkpoint, tmp_path):
    ends = []
    for module in (
        Defense(checkpoint),
        BoosterModule(checkpoint, weight=0.0),
        BoosterModule(checkpoint, radius=0.0),
        BoosterModule(checkpoint),
    ):
        L.seed_everything(0)
        toy_trainer(tmp_path, max_steps=4).fit(module, datamodule=data())
        ends.append(bits(module))
    assert same_bits(ends[0], ends[1])
    assert same_bits(ends[0], ends[2])
    assert not same_bits(ends[0], ends[3])
    assert module.num_passes == 3 * 4


def test_boosters_step_is_the_one_written_by_hand(checkpoint, tmp_path):
    loader, module, start = data(), BoosterModule(checkpoint, 2.0, 0.5, 4, optimizer=SGD), loaded(checkpoint)
    L.seed_everything(0)
    toy_trainer(tmp_path, max_steps=1).fit(module, datamodule=loader)
    harmful = loader.batches(loader.rows["alignment_harmful"], 4, loader.seed, "booster")(0)
    f, g = autograd(start, next(iter(loader.train_dataloader()))), autograd(start, harmful)
    length, shifted = torch.cat([v.flatten() for v in g.values()]).norm(), loaded(checkpoint)
    with torch.no_grad():
        for name, p in shifted.named_parameters():
            p.sub_(0.5 / (length + 1e-7) * g[name])
    there = autograd(shifted, harmful)
    update = {n: (p - dict(start.named_parameters())[n]).detach() for n, p in module.named_parameters()}
    assert far(update, {n: -0.05 * (f[n] + 2.0 * (g[n] - there[n])) for n in f}) < 1e-4


def test_an_added_gradient_is_not_held_twice(checkpoint):
    module = loaded(checkpoint)
    gradient = module.gradient(batch_of())
    module.add_gradient(gradient)
    assert gradient == {}


def test_a_loss_for_its_value_alone_adds_no_gradient(checkpoint):
    module = Adds(checkpoint)
    module.configure_model()
    with torch.no_grad():
        value = module.alignment_loss(batch_of(), 0)
    assert torch.equal(value, module.sft_loss(batch_of()).detach())
    assert all(p.grad is None for p in module.parameters())


def test_a_gradient_of_another_model_is_an_error(checkpoint):
    with pytest.raises(ValueError, match=r"gradients must be named as the module names its parameters, and it has no 'nowhere'"):
        loaded(checkpoint).add_gradient({"nowhere": torch.zeros(1)})


def test_what_an_attack_trains_on_is_not_divided_as_fits_batches_are(checkpoint, tmp_path):
    """Also in a run that accumulates: the steps of an attack are its own."""
    steps = {}
    for kind in (Adds, FourTimes):

        class AtTheEnd(L.Callback):
            def on_train_epoch_end(self, _, module):
                start = snapshot(module)
                for _ in train_steps(module, Plain(lambda batch: module.alignment_loss(batch, 0)), lambda _: batch_of(), 1, SGD):
                    pass
                steps[type(module)] = difference(snapshot(module), start)

        L.seed_everything(0)
        fit = toy_trainer(tmp_path, max_steps=1, accumulate_grad_batches=2, callbacks=[AtTheEnd()])
        fit.fit(kind(checkpoint, Optimizer(1e-30, "sgd")), datamodule=data())
    assert far(steps[Adds], steps[FourTimes]) < 1e-6


# ---- in the block of an inner attack


@pytest.mark.parametrize("attacker", [ATTACKER, InnerAttacker(3, Optimizer(1e-2), 4, LoRA(rank=2))], ids=["full", "lora"])
def test_between_an_inner_attackers_steps_a_gradient_is_taken_and_none_is_added(checkpoint, tmp_path, attacker):
    class Tampered(Defense):
        def on_fit_start(self):
            self.batches = attacker.stream(self, "inner attacker")

        def alignment_loss(self, batch, step):
            before, total = bits(self), {}
            with attacker.attack(self, self.batches, step, step * attacker.num_inner_steps) as attack:
                for number in attack.steps:
                    if number % 2:
                        total = summed(total, self.gradient(batch), 0.5)
                vector = attack.vector()
                with pytest.raises(RuntimeError, match="add_gradient must be called after the inner attack's block"):
                    self.add_gradient(dict(total))
            assert same_bits(before, bits(self))
            assert any(v.any() for v in vector.values())
            assert set(vector) <= set(dict(self.named_parameters()))
            if attacker.lora is None:  # its adapters are gone, and their gradients with them
                self.add_gradient(total)
            return self.sft_loss(batch)

    ours, module = moved(Tampered, checkpoint, tmp_path)
    assert module.num_passes == 2 * (1 + 2)
    assert (far(ours, moved(Defense, checkpoint, tmp_path)[0]) > 1e-2) == (attacker.lora is None)


# ---- on two ranks, and what is kept


class Remembers(Defense):
    """Adds a running mean of harmful gradients at an offset, which it keeps."""

    def on_fit_start(self):
        self.harmful = self.stream(self.data.rows["alignment_harmful"], 6, "harmful")

    def alignment_loss(self, batch, step):
        here = self.gradient(self.harmful(step))
        there = self.gradient(self.harmful(step), at=here, scale=-0.1 / float(norm(self, here)))
        self.kept["mean"] = summed(scaled(self.kept.get("mean", {}), 0.5), there, 0.5)
        self.add_gradient(scaled(self.kept["mean"], 1.0), 2.0)
        return self.sft_loss(batch)


Noisy = partial(RepNoiseModule, refused="sandbox:defender/refused", noise_weight=2.0, pair_batch_size=5)  # uneven on two ranks
KINDS = {  # and batches a step
    "remembers": (Remembers, 1),
    "accumulated": (Remembers, 2),
    "booster": (BoosterModule, 1),
    "vaccine": (VaccineModule, 1),
    "repnoise": (Noisy, 1),
}


def fitted(rank: int, strategy: str, checkpoint: str, folder: Path, ckpt_path: Path | None = None) -> None:
    """Four steps, each saved, or what is left of them after ``ckpt_path``; the last weights are written by rank 0."""
    for name, (kind, accumulated) in KINDS.items():
        L.seed_everything(0)
        module, here = kind(checkpoint, optimizer=Optimizer(1e-2, "sgd", clip_norm=None)), folder / name
        settings: dict[str, Any] = {"max_steps": 4, "accumulate_grad_batches": accumulated}
        if ckpt_path is None:
            saver = ModelCheckpoint(here / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
            settings |= {"callbacks": [saver], "enable_checkpointing": True}
        if strategy == "one fsdp2":
            fit = toy_trainer(folder, devices=1, strategy=ModelParallelStrategy(1, 1), **settings)
        else:
            fit = trainer(folder, strategy, rank, **settings)
        fit.fit(module, datamodule=data(), ckpt_path=ckpt_path and here / ckpt_path)
        reshard(module)
        whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in module.named_parameters()}
        if rank == 0:
            torch.save({n: p.detach() for n, p in whole.items()}, here / f"{strategy}-{ckpt_path and ckpt_path.stem}.pt")


def ranks(rank: int, strategy: str, checkpoint: str, folder: Path) -> None:
    """A gradient is the mean over ranks; then two runs, one of which goes on from step 2."""
    seen: list[dict[str, torch.Tensor]] = []

    class Notes(Defense):
        def alignment_loss(self, batch, step):
            seen.append(self.gradient(batch))
            assert all(p.grad is None for p in self.parameters())
            return self.sft_loss(batch)

    module, start, loader = Notes(checkpoint, Optimizer(1e-30, "sgd")), loaded(checkpoint), data()
    trainer(folder, strategy, rank, max_steps=1).fit(module, datamodule=loader)
    reshard(module)
    expected, parameters = (
        start.gradient(collate(loader.train_dataloader().batches.rows(0), 0, "right")),
        dict(module.named_parameters()),
    )
    assert list(seen[0]) == list(expected)
    for name, shard in seen[0].items():
        assert_close(shard, shard_of(expected[name], parameters[name]), rtol=1e-4, atol=1e-6)
    assert norm(module, seen[0]).item() == pytest.approx(norm(start, expected).item(), rel=1e-5)

    fitted(rank, strategy, checkpoint, folder)
    fitted(rank, strategy, checkpoint, folder, ckpt_path=Path("saved/step=2.ckpt"))


@pytest.fixture(scope="module")
def runs(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    for strategy in ("one", "ddp", "fsdp2"):
        (folder / strategy).mkdir()
    ranks(0, "one", checkpoint, folder / "one")
    for strategy in ("ddp", "fsdp2"):
        on_ranks(ranks, folder / strategy, strategy, checkpoint, folder / strategy)
    return folder


def update(file: Path, checkpoint: str) -> dict[str, torch.Tensor]:
    end, start = torch.load(file), dict(loaded(checkpoint).named_parameters())
    return {name: end[name] - p.detach() for name, p in start.items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_add_the_gradients_of_one_process(runs, checkpoint, strategy, kind):
    one, two = (update(runs / name / kind / f"{name}-None.pt", checkpoint) for name in ("one", strategy))
    assert far(two, one) < 1e-5


@pytest.mark.parametrize("strategy", ["one", "ddp", "fsdp2"])
@pytest.mark.parametrize("kind", ["remembers", "accumulated"])
def test_a_resumed_run_has_what_was_kept(runs, strategy, kind):
    whole, resumed = (torch.load(runs / strategy / kind / f"{strategy}-{name}.pt") for name in ("None", "step=2"))
    assert same(resumed, whole)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_what_two_ranks_kept_one_goes_on_with(runs, checkpoint, tmp_path, strategy):
    last, saved, alone = tmp_path / strategy, Path("saved/step=2.ckpt"), "one" if strategy == "ddp" else "one fsdp2"
    shutil.copytree(runs / strategy, last)
    if strategy == "ddp":
        fitted(0, alone, checkpoint, last, ckpt_path=saved)
    else:  # one shard, in a process group of its own
        on_ranks(fitted, tmp_path, alone, checkpoint, last, saved, world_size=1)
    two, one = (update(last / "remembers" / name, checkpoint) for name in (f"{strategy}-None.pt", f"{alone}-step=2.pt"))
    assert far(one, two) < 1e-5
