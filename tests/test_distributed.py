"""Two processes with gloo do what one does at the same global batch: DDP, and FSDP2, where each holds half of every weight."""

import itertools
import os
import signal
import time
import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from test_patcher import ATTACKER, LORA_ATTACKER, data
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing import ProcessExitedException
from torch.testing import assert_close
from toy import DEFENSES, ROOT, csv_rows, on_ranks, same_bits, save_toy_checkpoint, toy_trainer

from casehard import Backbone, Defense, FullParameterAttack, InnerAttacker, LoRA, LoRAAttack, Optimizer, PatcherModule, SBRModule
from casehard.callbacks.results import Results
from casehard.engine.gradients import norm
from casehard.engine.sharding import broadcast
from casehard.engine.weights import reshard, shifted, snapshot
from casehard.lightning_modules.roles import DEFENDERS, RolesStrategy

ROUNDS = {"num_outer_steps": 2, "num_sft_steps": 1}
CASES: dict[str, tuple[type[Defense], dict[str, Any]]] = {
    **DEFENSES,
    "sbr_lora": (SBRModule, DEFENSES["sbr"][1] | {"lora": LoRA(rank=2)}),
    "everywhere_lora": (DEFENSES["everywhere"][0], {"lora": LoRA(rank=2)}),
    "patcher_rounds": (PatcherModule, {"attacker": ATTACKER, **ROUNDS}),
    "patcher_lora": (PatcherModule, {"attacker": LORA_ATTACKER, "lora": LoRA(rank=2), **ROUNDS}),
}


UNEVEN = {  # one rank has three prompts, in two batches, the other two; and one of a kind has none
    "harmful_prompts": ["sandbox:test/harmful#train[:5]"],
    "benign_prompts": ["sandbox:test/howto#train[:1]"],
    "task": ["sandbox:test/mood#train[:3]"],
    "max_new_tokens": 12,
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


def defended(case: str, checkpoint: str) -> Defense:
    kind, settings = CASES[case]
    L.seed_everything(0)
    return kind(checkpoint, optimizer=Optimizer(1e-2, "sgd"), **settings)


def run(rank: int, strategy: str, checkpoint: str, other: str, folder: Path, cases: Iterable[str] = CASES) -> None:
    """Every case: train, export, attack, save, resume. What has a meaning in one process alone is checked here."""
    if strategy == "fsdp2":
        check_refused(checkpoint)
        check_mixed_precision(rank, checkpoint, folder)
        check_compiled(rank, checkpoint, folder)
    for case in cases:
        module, spies, here = defended(case, checkpoint), [Untouched(), Untouched()], folder / strategy / case
        module._whole = Mock(wraps=module._whole)
        attack = {"num_samples": 16, "num_attack_steps": 3, "batch_size": 4}
        attacks = [
            FullParameterAttack("open_weight", optimizer=Optimizer(1e-2, "sgd"), undefended_checkpoint=other, **attack),
            LoRAAttack("finetuning_service", LoRA(rank=2), optimizer=Optimizer(1e-1, "sgd"), **attack),
        ]
        saver = ModelCheckpoint(here / "saved", "{step}", every_n_train_steps=2, save_top_k=-1)
        callbacks = [Results(str(here)), spies[0], *attacks, spies[1], saver]
        fit = trainer(folder, strategy, rank, max_steps=4, callbacks=callbacks, enable_checkpointing=True)
        fit.fit(module, datamodule=data(**UNEVEN))
        assert same_bits(spies[0].seen[0], spies[1].seen[0])
        sharded = [isinstance(p, DTensor) for p in module.parameters()]
        assert all(sharded) if strategy == "fsdp2" else not any(sharded)
        assert module._whole.call_count == (strategy != "fsdp2" or rank == 0)  # no other rank ever holds all weights
        check_shift(module)

        resumed = defended(case, checkpoint)
        trainer(folder, strategy, rank, max_steps=4).fit(resumed, datamodule=data(), ckpt_path=here / "saved/step=2.ckpt")
        ends = [bits_of_shards(m) for m in (module, resumed)]
        assert same_bits(*ends), case


def bits_of_shards(module: Defense) -> dict[str, torch.Tensor]:
    reshard(module)
    module.requires_grad_(True)
    return {name: shard.view(-1).view(torch.uint8) for name, shard in snapshot(module).items()}


def killed(rank: int, checkpoint: str, folder: Path, deadly: int, ckpt_path: Path | None) -> None:
    """The sharded case ``patcher_rounds`` again, of which rank 1 dies as ``kill -9`` does, in pass ``deadly``."""
    module = defended("patcher_rounds", checkpoint)
    passes, loss = itertools.count(1), module.sft_loss

    def deadly_loss(batch):
        if rank == 1 and next(passes) == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(batch)

    module.sft_loss = deadly_loss
    saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=1, save_top_k=1, save_last="link")
    callbacks = [saver, Results(str(folder))]
    fit = trainer(folder, "fsdp2", rank, max_steps=4, callbacks=callbacks, enable_checkpointing=True)
    fit.fit(module, datamodule=data(), ckpt_path=ckpt_path)


def check_mixed_precision(rank: int, checkpoint: str, folder: Path) -> None:
    """Shards are float32, the weights of a pass bfloat16, and answers those of one process under autocast."""
    module, alone = Defense(checkpoint, Optimizer(1e-2, "sgd")), Defense(checkpoint)
    seen = set()
    fit = trainer(folder, "fsdp2", rank, max_steps=2, precision="bf16-mixed")
    fit.fit(module, datamodule=data())
    projection = module.model.model.layers[0].self_attn.q_proj
    projection.register_forward_hook(lambda layer, *_: seen.add(layer.weight.dtype))
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]][rank:]
    ours = module.generate(prompts, 8, 2)
    assert seen == {torch.bfloat16}
    reshard(module)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    exported = module.exported()
    weights = broadcast(exported and exported.state_dict(), module.model.model.embed_tokens.weight.device_mesh)
    alone.configure_model()
    alone.model.load_state_dict(weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert alone.generate(prompts, 8, 2) == ours


def check_compiled(rank: int, checkpoint: str, folder: Path) -> None:
    """Compiled layers are put together and split up as others are."""
    ends = []
    for backend in (None, "eager"):
        counters.clear()
        backbone = Backbone(compile_backend=backend)
        module = PatcherModule(checkpoint, ATTACKER, **ROUNDS, optimizer=Optimizer(1e-2, "sgd"), backbone=backbone)
        trainer(folder, "fsdp2", rank, max_steps=4).fit(module, datamodule=data())
        assert (counters["stats"]["unique_graphs"] > 0) == (backend is not None)
        module.requires_grad_(True)
        reshard(module)
        ends.append(snapshot(module))
    for name, shard in ends[0].items():
        assert_close(ends[1][name], shard, rtol=1e-4, atol=1e-5)


def check_refused(checkpoint: str) -> None:
    module = Defense(checkpoint)
    module._device_mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    with pytest.raises(ValueError, match="tensor_parallel_size must be 1, the number of roles, got 2"):
        module.configure_model()


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


@pytest.fixture(scope="module")
def runs(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    other = save_toy_checkpoint(folder / "other", seed=1)
    run(0, "one", checkpoint, other, folder)
    for strategy in ("ddp", "fsdp2"):
        on_ranks(run, folder, strategy, checkpoint, other, folder)
    return folder


def answers(folder: Path) -> str:
    return (folder / "generations.jsonl").read_text()


def rows(folder: Path) -> Iterator[dict[str, str]]:
    for row in csv_rows(folder / "attacks.csv"):
        yield {name: value for name, value in row.items() if name != "wall_seconds"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model/model.safetensors")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_model_and_the_rows_of_one(runs, strategy, case):
    one, two = (weights(runs / name / case) for name in ("one", strategy))
    assert list(one) == list(two)
    for name, tensor in two.items():
        assert_close(tensor, one[name], rtol=1e-4, atol=1e-5)
    ours, theirs = (list(rows(runs / name / case)) for name in (strategy, "one"))
    assert ours == theirs
    assert len(ours) == 2 * (4 if {"finetuning", "post_finetuning"} & CASES[case][0].stages else 3)
    assert answers(runs / strategy / case) == answers(runs / "one" / case)


def test_a_run_one_rank_of_which_was_killed_in_an_inner_attack_ends_as_the_uninterrupted_one(runs, checkpoint, tmp_path):
    second_attack = 1 + 3 + 2 * 2 + 2  # SFT step, attack, two steps of two passes, second step of an attack
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        on_ranks(killed, tmp_path, checkpoint, tmp_path, second_attack, None)
    assert not (tmp_path / "model").exists()
    last = tmp_path / "saved/last.ckpt"
    assert last.resolve().name == "step=3.ckpt"
    on_ranks(killed, runs, checkpoint, tmp_path, 0, last)
    uninterrupted, resumed = weights(runs / "fsdp2/patcher_rounds"), weights(tmp_path)
    assert list(resumed) == list(uninterrupted)
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)


# ---- Patcher's parallel form

FORMS = {
    "full": {"attacker": ATTACKER},
    "lora": {"attacker": LORA_ATTACKER, "more_attackers": [ATTACKER], "random_scale": True},
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


# ---- at length


def twenty_steps(rank: int, strategy: str, checkpoint: str, folder: Path) -> None:
    gentle = Optimizer(1e-3, "sgd")  # at 1e-2 rounding errors grow a hundredfold in 20 steps
    attacker = InnerAttacker(3, gentle, batch_size=4)
    rounds = (PatcherModule, {"attacker": attacker, "num_outer_steps": 8, "num_sft_steps": 4})
    for case, (kind, settings) in (DEFENSES | {"patcher": rounds}).items():
        L.seed_everything(0)
        module = kind(checkpoint, optimizer=gentle, **settings)
        fit = trainer(folder, strategy, rank, max_steps=20, callbacks=[Results(str(folder / strategy / case))])
        fit.fit(module, datamodule=data())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["toy", "sandbox"])
def test_twenty_steps_of_two_processes_are_those_of_one(checkpoint, tmp_path, model):
    start = checkpoint if model == "toy" else str(ROOT / "models/sandbox/base")
    twenty_steps(0, "one", start, tmp_path)
    for strategy in ("ddp", "fsdp2"):
        on_ranks(twenty_steps, tmp_path, strategy, start, tmp_path)
        for case in DEFENSES:
            one, two = (weights(tmp_path / name / case) for name in ("one", strategy))
            assert (one["model.norm.weight"] - 1).abs().max() > 1e-4
            for name, tensor in two.items():
                assert_close(tensor, one[name], rtol=1e-4, atol=1e-5)
