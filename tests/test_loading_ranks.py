"""Every setting of loading trains on two ranks, under DDP and FSDP2, what one process trains uncompiled on a prefix tree."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from toy import on_ranks, toy_data, toy_trainer

from casehard import Backbone, Defense, LoRA, Optimizer
from casehard.engine.anatomy import blocks
from casehard.engine.checkpoint import load_model
from casehard.engine.sharding import shard_of, whole_of
from casehard.engine.weights import local

CELLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "activation checkpointing": {"backbone": Backbone(activation_checkpointing=True)},
    "lora": {"lora": LoRA(rank=2)},
    "bfloat16": {"backbone": Backbone(weights_dtype="bfloat16")},
    "padded": {"backbone": Backbone(layout="padded")},
    "compiled": {"backbone": Backbone(compile_backend="eager")},  # traced, and no more
    "adapters, compiled, checkpointed": {
        "lora": LoRA(rank=2),
        "backbone": Backbone(activation_checkpointing=True, compile_backend="eager", layout="varlen"),
    },
}


def trained(checkpoint: str, settings: dict[str, Any], folder: Path, strategy: str, **more: Any) -> Defense:
    """Two steps of plain SFT."""
    shapes: dict[str, dict[str, Any]] = {
        "one": {},
        "ddp": {"devices": 2, "strategy": "ddp"},
        "fsdp2": {"devices": 2, "strategy": ModelParallelStrategy(2, 1)},
    }
    L.seed_everything(0)
    module = Defense(checkpoint, Optimizer(1e-2, "sgd"), **settings)
    module._whole = Mock(wraps=module._whole)
    saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = toy_trainer(folder, max_steps=2, callbacks=[saver], enable_checkpointing=True, **shapes[strategy])
    trainer.fit(module, datamodule=toy_data(), **more)
    return module


def check_weights_of(module: Defense, checkpoint: str) -> None:
    """Another model's weights come by shard under the names of this one's, and every rank can put each together."""
    plain = dict(load_model(checkpoint, module.backbone.dtype).named_parameters())
    own = {name: p for name, p in module.named_parameters() if "lora_" not in name}
    theirs = module.weights_of(checkpoint, "base")
    assert list(theirs) == list(own)
    for name, p in own.items():
        whole = plain[name.removeprefix("model.").replace(".base_layer", "")]
        assert theirs[name].shape == local(p).shape
        assert torch.equal(whole_of(theirs[name], p), whole)
        assert torch.equal(shard_of(whole, p), theirs[name])


def every_cell(rank: int, checkpoint: str, folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    for name in ("ddp", "fsdp2"):
        for cell in CELLS:
            here = folder / name / cell
            torch._dynamo.reset()
            counters.clear()
            module = trained(checkpoint, CELLS[cell], here, name)
            num_graphs = counters["stats"]["unique_graphs"]
            assert (num_graphs > 0) == ("compiled" in cell), f"{name}, {cell}: {num_graphs} graphs were compiled"
            assert all(isinstance(p, DTensor) == (name == "fsdp2") for p in module.parameters())
            parts = blocks(module.model, "attention", "mlp")  # sharded, compiled and inside adapters too
            assert [len(block.writers) for block in parts] == [2, 2]
            assert module._whole.call_count == (name == "ddp" or rank == 0)  # no other rank ever holds all weights
            check_weights_of(module, checkpoint)
            models = [module.exported()]
            if (name, cell) == ("fsdp2", "adapters, compiled, checkpointed"):
                models.append(
                    trained(checkpoint, CELLS[cell], here / "again", name, ckpt_path=here / "saved/step=1.ckpt").exported()
                )
            if rank == 0:
                weights = [{name: w.clone() for name, w in model.state_dict().items()} for model in models]
                assert all(torch.equal(w, weights[0][name]) for name, w in weights[-1].items())
                save_file(weights[0], here / "model.safetensors")


@pytest.fixture(scope="module")
def on_two_ranks(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(every_cell, folder, checkpoint, folder)
    return folder


@pytest.mark.parametrize("cell", CELLS)
def test_two_ranks_train_the_model_of_one_process_however_it_is_loaded(on_two_ranks, checkpoint, tmp_path, cell):
    settings = CELLS[cell] | {"backbone": replace(CELLS[cell].get("backbone", Backbone()), compile_backend=None, layout="auto")}
    one = trained(checkpoint, settings, tmp_path, "one").exported().state_dict()
    start = Defense(checkpoint, **settings)
    start.configure_model()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if one["lm_head.weight"].dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    for strategy in ("ddp", "fsdp2"):
        two = load_file(on_two_ranks / strategy / cell / "model.safetensors")
        assert two.keys() == one.keys()
        for name, tensor in two.items():
            assert_close(tensor, one[name], **tolerance)
    before = start.exported().state_dict()
    assert any(not torch.equal(one[name], before[name]) for name in one)
