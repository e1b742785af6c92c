"""What tests on several ranks share: a case is trained, attacked, saved and resumed by one process and by two."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from toy import csv_rows, on_ranks, same_bits, save_toy_checkpoint, toy_data, toy_trainer

from casehard import Defense, FullParameterAttack, LoRA, LoRAAttack, Optimizer
from casehard.callbacks.attack import Attack
from casehard.callbacks.results import Results
from casehard.engine.gradients import norm
from casehard.engine.weights import reshard, shifted, snapshot
from casehard.lightning_modules.roles import RolesStrategy
from casehard.records.delivered import DELIVERED, DELIVERED_ANSWERS

Cases = Mapping[str, tuple[type[Defense], dict[str, Any]]]

UNEVEN = {  # one rank has three prompts, in two batches, the other two; and one of a kind has none
    "harmful_prompts": ["sandbox:test/harmful#train[:5]"],
    "benign_prompts": ["sandbox:test/howto#train[:1]"],
    "task": ["sandbox:test/mood#train[:3]"],
    "max_new_tokens": 6,
    "generation_batch_size": 2,
}


class Untouched(L.Callback):
    """Stands around the attacks: what they were given is there afterwards, bit for bit, on this rank."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        reshard(pl_module)
        tensors = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in pl_module.state_dict().items()}
        self.seen.append({n: t.detach().clone().reshape(-1).view(torch.uint8) for n, t in tensors.items()})


AMPLIFIED = {  # first updates that rounding moves by more than 1e-5 of their length: their losses take differences
    "sbr": 1e-4,  # of states that are alike before the first step, so that the anchors' gradient is of rounding alone
    "booster": 1e-4,  # of two gradients that are nearly alike
}


class FirstStep(L.Callback):
    """Saves this rank's part of the weights before the first optimizer step and after it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = snapshot(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save((self.before, snapshot(pl_module)), self.folder / f"first_step_{trainer.global_rank}.pt")


def first_update(folder: Path) -> torch.Tensor:
    """What the first step added to the weights, as one vector: of whole weights, or put together from the shards of two ranks."""
    ranks = [torch.load(path) for path in sorted(folder.glob("first_step_*.pt"))]
    updates = [{name: after[name].double() - before[name].double() for name in before} for before, after in ranks]
    whole = updates[0] if folder.parent.name == "ddp" else {name: torch.cat([u[name] for u in updates]) for name in updates[0]}
    return torch.cat([update.flatten() for update in whole.values()])


def trainer(folder: Path, strategy: str, rank: int = 0, **settings: Any) -> L.Trainer:
    """In a single process, or in one of two that were started already."""
    if strategy != "one":
        os.environ["LOCAL_RANK"] = str(rank)  # what a test leaves there makes every command wait for a second process
    shapes: dict[str, dict[str, Any]] = {
        "one": {},
        "ddp": {"devices": 2, "strategy": "ddp"},
        "fsdp2": {"devices": 2, "strategy": ModelParallelStrategy(2, 1)},
        "roles": {"devices": 2, "strategy": RolesStrategy()},
        "four roles": {"devices": 4, "strategy": RolesStrategy()},
    }
    return toy_trainer(folder, **(shapes[strategy] | settings))


ALIGNMENT = {
    "alignment_harmful": ["sandbox:defender/harmful#train[:20]"],
    "alignment_benign": ["sandbox:defender/howto#train[:8]"],
    "train_on": "alignment",
}


def defended(cases: Cases, case: str, checkpoint: str) -> Defense:
    kind, settings = cases[case]
    L.seed_everything(0)
    return kind(checkpoint, optimizer=Optimizer(1e-2, "sgd"), **settings)


def attack_on(cases: Cases, case: str, other: str) -> Attack:
    """One attack a case, the two in turn; every attack at both threats under one defense: test_attack_ranks."""
    attack = {"num_samples": 8, "num_attack_steps": 2, "batch_size": 4}
    if list(cases).index(case) % 2:
        return LoRAAttack("finetuning_service", LoRA(rank=2), optimizer=Optimizer(1e-1, "sgd"), **attack)
    return FullParameterAttack("open_weight", optimizer=Optimizer(1e-2, "sgd"), undefended_checkpoint=other, **attack)


def run(rank: int, strategies: Iterable[str], checkpoint: str, other: str, folder: Path, cases: Cases) -> None:
    """Every case: train, attack, export, save, resume. What has a meaning in one process alone is checked here."""
    for strategy in strategies:
        for case in cases:
            module, spies, here = defended(cases, case, checkpoint), [Untouched(), Untouched()], folder / strategy / case
            module._whole = Mock(wraps=module._whole)
            saver = ModelCheckpoint(here / "saved", "{step}", every_n_train_steps=2, save_top_k=-1)
            results = Results(str(here), score=case == next(iter(cases)))  # on one case: the score knows no defense
            callbacks = [FirstStep(here), results, spies[0], attack_on(cases, case, other), spies[1], saver]
            fit = trainer(folder, strategy, rank, max_steps=4, callbacks=callbacks, enable_checkpointing=True)
            fit.fit(module, datamodule=toy_data(**ALIGNMENT, **UNEVEN))
            assert same_bits(spies[0].seen[0], spies[1].seen[0])
            sharded = [isinstance(p, DTensor) for p in module.parameters()]
            assert all(sharded) if strategy == "fsdp2" else not any(sharded)
            assert module._whole.call_count == (strategy != "fsdp2" or rank == 0)  # no other rank ever holds all weights
            check_shift(module)
            resumed = defended(cases, case, checkpoint)
            again = trainer(folder, strategy, rank, max_steps=4)
            again.fit(resumed, datamodule=toy_data(**ALIGNMENT), ckpt_path=here / "saved/step=2.ckpt")
            assert same_bits(*(bits_of_shards(m) for m in (module, resumed))), case


def run_all(checkpoint: str, folder: Path, cases: Cases) -> Path:
    """The cases by one process, and by two under DDP and FSDP2."""
    other = save_toy_checkpoint(folder / "other", seed=1)
    run(0, ["one"], checkpoint, other, folder, cases)
    on_ranks(run, folder, ["ddp", "fsdp2"], checkpoint, other, folder, cases)
    return folder


def check_same(runs: Path, strategy: str, cases: Cases, case: str) -> None:
    """Two processes gave the model, the first update, the rows and the answers of one."""
    one, two = (weights(runs / name / case) for name in ("one", strategy))
    assert list(one) == list(two)
    for name, tensor in two.items():
        assert_close(tensor, one[name], rtol=1e-4, atol=1e-5)
    expected, update = (first_update(runs / name / case) for name in ("one", strategy))
    assert (update - expected).norm() < AMPLIFIED.get(case.partition("_")[0], 1e-5) * expected.norm()
    ours, theirs = (list(rows(runs / name / case)) for name in (strategy, "one"))
    assert ours == theirs
    attack = attack_on(cases, case, "other")
    served = cases[case][0].stages & {"finetuning", "post_finetuning"}  # whose jobs have a baseline of plain SFT beside them
    assert len(ours) == (4 if served or attack.threat_model == "open_weight" else 2)
    assert answers(runs / strategy / case) == answers(runs / "one" / case)
    for name in (DELIVERED, DELIVERED_ANSWERS) if case == next(iter(cases)) else ():
        assert (runs / strategy / case / name).read_text() == (runs / "one" / case / name).read_text()


def bits_of_shards(module: Defense) -> dict[str, torch.Tensor]:
    reshard(module)
    module.requires_grad_(True)
    return {name: shard.view(-1).view(torch.uint8) for name, shard in snapshot(module).items()}


@torch.no_grad()
def check_shift(module: Defense) -> None:
    """A pass at shifted weights is another than one at the weights, which are there again afterwards."""
    batch = {"input_ids": torch.arange(5, 21).view(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    batch |= {"labels": batch["input_ids"]}
    vector = {name: torch.full_like(shard, 0.05) for name, shard in snapshot(module).items()}
    num_weights = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert norm(module, vector).item() == pytest.approx(0.05 * num_weights**0.5)  # of all shards together
    before = module.sft_loss(batch)
    with shifted(module, vector):
        assert abs(module.sft_loss(batch) - before) > 1e-3
    assert torch.equal(module.sft_loss(batch), before)


def answers(folder: Path) -> str:
    return (folder / "generations.jsonl").read_text()


def rows(folder: Path) -> Iterator[dict[str, str]]:
    for row in csv_rows(folder / "attacks.csv"):
        yield {name: value for name, value in row.items() if name != "wall_seconds"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model/model.safetensors")
