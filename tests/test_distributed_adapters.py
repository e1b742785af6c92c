"""As test_distributed, with adapters and Patcher's rounds; and what is of FSDP2 alone."""

import itertools
import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import Cases, check_same, defended, run_all, trainer, weights
from test_patcher import ATTACKER, LORA_ATTACKER, data
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing import ProcessExitedException
from torch.testing import assert_close
from toy import DEFENSES, on_ranks

from casehard import Backbone, Defense, LoRA, Optimizer, PatcherModule
from casehard.callbacks.results import Results
from casehard.engine.sharding import broadcast
from casehard.engine.weights import reshard, snapshot

ROUNDS = {"num_outer_steps": 2, "num_sft_steps": 1}
CASES: Cases = {
    "sbr_lora": (DEFENSES["sbr"][0], DEFENSES["sbr"][1] | {"lora": LoRA(rank=2)}),
    "everywhere_lora": (DEFENSES["everywhere"][0], {"lora": LoRA(rank=2)}),
    "safelora_lora": (DEFENSES["safelora"][0], DEFENSES["safelora"][1] | {"lora": LoRA(rank=2)}),
    "patcher_rounds": (PatcherModule, {"attacker": ATTACKER, **ROUNDS}),
    "patcher_lora": (PatcherModule, {"attacker": LORA_ATTACKER, "lora": LoRA(rank=2), **ROUNDS}),
}


@pytest.fixture(scope="module")
def runs(checkpoint, tmp_path_factory) -> Path:
    return run_all(checkpoint, tmp_path_factory.mktemp("runs"), CASES)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_model_and_the_rows_of_one(runs, strategy, case):
    check_same(runs, strategy, CASES, case)


def killed(rank: int, checkpoint: str, folder: Path, deadly: int, ckpt_path: Path | None) -> None:
    """The sharded case ``patcher_rounds`` again, of which rank 1 dies as ``kill -9`` does, in pass ``deadly``."""
    module = defended(CASES, "patcher_rounds", checkpoint)
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


def checked(rank: int, checkpoint: str, folder: Path) -> None:
    check_refused(checkpoint)
    check_mixed_precision(rank, checkpoint, folder)
    check_compiled(rank, checkpoint, folder)


def test_sharded_weights_are_computed_with_in_bfloat16_and_compiled(checkpoint, tmp_path):
    on_ranks(checked, tmp_path, checkpoint, tmp_path)


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
