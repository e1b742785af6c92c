"""Every attack on two ranks, under DDP and FSDP2, is that of one process: the same rows and answers, and no trace on either rank."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from ranks import bits_of_shards
from test_attacks import python_state
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from toy import ATTACKS, DEFENSES, csv_rows, looking, on_ranks, same_bits, toy_data, toy_trainer

from casehard import Optimizer
from casehard.callbacks.attack import Target
from casehard.callbacks.results import Results
from casehard.engine.weights import reshard

ALONE = {name for name, make in ATTACKS.items() if not make(threat_model="open_weight").num_attack_steps}
THREATS = ("open_weight", "finetuning_service")
STRATEGIES: dict[str, dict[str, Any]] = {"ddp": {"strategy": "ddp"}, "fsdp2": {"strategy": ModelParallelStrategy(2, 1)}}
PROMPTS = {  # the ranks have unequal shares of each kind, and one has none of the second
    "harmful_prompts": ["sandbox:test/harmful#train[:3]"],
    "benign_prompts": ["sandbox:test/howto#train[:1]"],
    "task": ["sandbox:test/mood#train[:3]"],
}


class Spy(L.Callback):
    """What there is between two attacks: weights, by shard, Python state, and where the generator stands."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.finish()
        pl_module.forget_training()
        self.state = python_state(pl_module)
        self.trains = {name: p.requires_grad for name, p in pl_module.named_parameters()}
        self.weights = bits_of_shards(pl_module)
        self.generator = torch.get_rng_state()


def attacked(folder: Path, checkpoint: str, **strategy: Any) -> None:
    """One training step, then every attack; on each rank none leaves a trace."""
    kind, settings = DEFENSES["everywhere"]  # it trains, hardens, repairs
    L.seed_everything(0)
    module = kind(checkpoint, optimizer=Optimizer(1e-2, "sgd"), **settings)
    logits: dict[str, list[torch.Tensor]] = defaultdict(list)

    @torch.no_grad()
    def look(target: Target) -> None:
        assert target.module.device == trainer.strategy.root_device  # Lightning has sent whole weights to the CPU by then
        logits[target.name].append(target.module.model(torch.tensor([[5, 6, 7]])).logits.clone())
        reshard(target.module)

    attacks = [looking(make(threat_model=threat), look) for make in ATTACKS.values() for threat in THREATS]
    for attack, name in zip(attacks, (name for name in ATTACKS for _ in THREATS), strict=True):
        attack.name = name
        for tuned in (attack, getattr(attack, "attack", None)):
            if hasattr(tuned, "optimizer"):
                tuned.optimizer = Optimizer(0.1, "sgd")  # AdamW's first steps have the sign of a gradient, be it of rounding
    spies = [Spy() for _ in range(len(attacks) + 1)]
    between = [callback for pair in zip(spies, attacks, strict=False) for callback in pair]
    trainer = toy_trainer(folder, max_steps=1, callbacks=[Results(str(folder), export=False), *between, spies[-1]], **strategy)
    if isinstance(trainer.strategy, ParallelStrategy):
        trainer.strategy.parallel_devices = [torch.device("cpu", 0)] * 2  # the CPU under another name
    trainer.fit(module, datamodule=toy_data(**PROMPTS))
    assert any(isinstance(p, DTensor) for p in module.parameters()) == isinstance(trainer.strategy, ModelParallelStrategy)
    for attack, before, after in zip(attacks, spies, spies[1:], strict=False):
        where = f"{attack.name}, {attack.threat_model}"
        assert same_bits(before.weights, after.weights), where
        assert before.state == after.state, where
        assert before.trains == after.trains, where
        assert torch.equal(before.generator, after.generator), where
    if trainer.is_global_zero:
        torch.save(dict(logits), folder / "logits.pt")


def on_each_rank(rank: int, checkpoint: str, folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    for name, strategy in STRATEGIES.items():
        attacked(folder / name, checkpoint, devices=2, **strategy)


@pytest.fixture(scope="module")
def runs(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    attacked(folder / "one", checkpoint)
    on_ranks(on_each_rank, folder, checkpoint, folder)
    return folder


def results(folder: Path, attack: str) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """Rows of an attack without their seconds, and its answers."""
    rows = [row | {"wall_seconds": ""} for row in csv_rows(folder / "attacks.csv") if row["attack"] == attack]
    answers = map(json.loads, (folder / "generations.jsonl").read_text().splitlines())
    return rows, [answer for answer in answers if answer["attack"] == attack]


@pytest.mark.parametrize("attack", ATTACKS)
def test_two_ranks_give_the_rows_and_answers_of_one_process_and_no_attack_leaves_a_trace(runs, attack):
    rows, answers = results(runs / "one", attack)
    num_steps = len({row["num_attack_steps"] for row in rows})
    assert num_steps == 2 - (attack in ALONE)
    assert len(rows) == 3 * num_steps  # defended at both threats, undefended at a service, each at two steps or at step 0 alone
    plain = {a["response"] for a in answers if a["num_attack_steps"] == 0}
    expected = torch.load(runs / "one/logits.pt")
    for strategy in STRATEGIES:
        assert results(runs / strategy, attack) == (rows, answers)
        logits = torch.load(runs / strategy / "logits.pt")
        assert list(logits) == list(expected)
        for name in (name for name in expected if name.startswith(f"{attack} (")):
            first, *_, last = [*expected[name], expected[name][-1]]
            assert (
                attack in ALONE or not torch.allclose(first, last) or len({a["response"] for a in answers}) > len(plain)
            )  # it did attack
            assert_close(logits[name], expected[name], rtol=1e-4, atol=1e-4)
