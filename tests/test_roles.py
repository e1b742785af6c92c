"""Patcher's parallel form: half of the processes attack while the other half defend."""

import time
import warnings
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import Untouched, answers, bits_of_shards, rows, trainer, weights
from test_distributed_adapters import ROUNDS
from test_patcher import ATTACKER, LORA_ATTACKER, data
from torch.distributed.tensor import DTensor
from toy import on_ranks, same_bits, toy_trainer

from casehard import FullParameterAttack, LoRA, Optimizer, PatcherModule
from casehard.callbacks.results import Results
from casehard.lightning_modules.roles import DEFENDERS, RolesStrategy

FORMS = {
    "full": {"attacker": ATTACKER},
    "lora": {"attacker": LORA_ATTACKER, "more_attackers": [ATTACKER], "vector_scale": (0.0, 1.0), "choose": "draw"},
    "all lora": {"attacker": LORA_ATTACKER, "lora": LoRA(rank=2, dropout=0.2)},
    "fresh": {"attacker": ATTACKER, "fresh_optimizer": True},
}


class Watch(L.Callback):
    """Counts the attacks that this process has run, and looks for what belongs to the other role."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.attack = Mock(wraps=pl_module.attack)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert bool(trainer.optimizers[0].state) == pl_module.plays(DEFENDERS)
        assert any(isinstance(p, DTensor) for p in pl_module.parameters()) == (trainer.world_size // pl_module.num_roles > 1)


def hardened(rank: int, strategy: str, checkpoint: str, folder: Path, forms: Iterable[str] = FORMS) -> None:
    """Seven steps at vector age 1, an attack, and from step 4 on once more."""
    parallel = "roles" in strategy
    for form in forms:

        def module(form: str = form) -> PatcherModule:
            L.seed_everything(0)
            return PatcherModule(checkpoint, **FORMS[form], **ROUNDS, vector_age=1, parallel=parallel, optimizer=Optimizer(1e-2))

        here, whole, resumed = folder / strategy / form, module(), module()
        attack = FullParameterAttack("open_weight", num_samples=16, num_attack_steps=3, batch_size=4, optimizer=Optimizer(1e-2))
        saver = ModelCheckpoint(here / "saved", "{step}", every_n_train_steps=2, save_top_k=-1)
        callbacks = [Results(str(here)), Untouched(), attack, Untouched(), Watch(), saver]
        fit = trainer(folder, strategy, rank, max_steps=7, callbacks=callbacks, enable_checkpointing=True)
        fit.fit(whole, datamodule=data())
        assert same_bits(callbacks[1].seen[0], callbacks[3].seen[0])
        assert whole.attack.call_count == (0 if parallel and rank % 2 == 0 else whole.num_attacks)
        again = trainer(folder, strategy, rank, max_steps=7, callbacks=[Watch()])
        again.fit(resumed, datamodule=data(), ckpt_path=here / "saved/step=4.ckpt")
        assert same_bits(*(bits_of_shards(m) for m in (whole, resumed)))


def same_outcome(one: Path, other: Path) -> bool:
    """The same models, bit for bit, and the same rows and answers."""
    ours, theirs = weights(one), weights(other)
    assert list(ours) == list(theirs)
    return (
        all(torch.equal(ours[n], theirs[n]) for n in ours)
        and list(rows(one)) == list(rows(other))
        and answers(one) == answers(other)
    )


def test_a_defender_beside_an_attacker_is_the_sequential_form_with_vectors_of_the_same_age(checkpoint, tmp_path):
    hardened(0, "one", checkpoint, tmp_path)
    on_ranks(hardened, tmp_path, "roles", checkpoint, tmp_path)
    assert all(same_outcome(tmp_path / "one" / form, tmp_path / "roles" / form) for form in FORMS)
    assert not same_outcome(tmp_path / "roles/full", tmp_path / "roles/fresh")  # the optimizer's moments were dropped


def overlapped(rank: int, checkpoint: str, folder: Path) -> None:
    """Every attack waits for the last defender step of its own interval: it would wait for ever, did that step wait for it."""
    events = dist.FileStore(str(folder / "events"), 2)

    class Waiting(PatcherModule):
        def attack(self, number):
            last = self.num_sft_steps + (number + 1) * self.attack_every
            events.wait([f"step {last}"], timedelta(seconds=60))
            found = super().attack(number)
            time.sleep(0.2)
            return found

        def on_train_batch_end(self, *_):
            if self.plays(DEFENDERS):
                events.set(f"step {self.trainer.global_step}", "taken")

    module = Waiting(checkpoint, ATTACKER, num_outer_steps=3, num_sft_steps=1, vector_age=1, parallel=True)
    fit = trainer(folder, "roles", rank, max_steps=7)
    fit.fit(module, datamodule=data())
    assert module.num_attacks == 2
    waited = fit.callback_metrics
    assert waited["train/defenders_waited"] > 0.2 > waited["train/attackers_waited"] >= 0


def test_the_halves_work_at_the_same_time(checkpoint, tmp_path):
    on_ranks(overlapped, tmp_path, checkpoint, tmp_path)


@pytest.mark.slow
def test_two_defenders_beside_two_attackers_are_two_processes_of_the_sequential_form(checkpoint, tmp_path):
    for strategy, world_size in (("fsdp2", 2), ("four roles", 4)):
        on_ranks(hardened, tmp_path, strategy, checkpoint, tmp_path, world_size=world_size)
    assert all(same_outcome(tmp_path / "fsdp2" / form, tmp_path / "four roles" / form) for form in FORMS)


def test_halves_of_unequal_size_are_an_error(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # as one of three processes, which are not waited for
    module = PatcherModule(checkpoint, vector_age=1, parallel=True)
    fit = toy_trainer(tmp_path, devices=3, strategy=RolesStrategy(timeout=timedelta(seconds=5)))
    with pytest.raises(ValueError, match=r"devices \* num_nodes must be even, as many processes attack as defend, and it is 3"):
        fit.fit(module, datamodule=data())


def test_the_parallel_form_does_not_go_on_from_a_single_file(tmp_path):
    strategy = RolesStrategy()
    strategy.broadcast = lambda path: path
    file = tmp_path / "last.ckpt"
    file.touch()
    with pytest.raises(ValueError, match=r"ckpt_path must be a sharded checkpoint under RolesStrategy, and .*last\.ckpt is no"):
        strategy.load_checkpoint(file)


@pytest.mark.parametrize(
    ("steps", "num_sft_steps", "warned"), [(4, 2, ""), (4, 1, "4 and 1"), (3, 2, "3 and 2"), (None, 2, "one epoch and 2")]
)
def test_checkpoints_that_make_the_halves_wait_are_warned_of(checkpoint, tmp_path, steps, num_sft_steps, warned):
    module = PatcherModule(checkpoint, ATTACKER, num_outer_steps=2, num_sft_steps=num_sft_steps, vector_age=1, parallel=True)
    module.trainer = L.Trainer(callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=steps)], logger=False)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        module._warn_of_checkpoints_between_exchanges()
    assert bool(found) == bool(warned)
    assert all(f"multiples of attack_every, 2, in the parallel form, and they are {warned}:" in str(w.message) for w in found)
