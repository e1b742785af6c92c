"""FSDP2's mixed precision on one process (experiments/cluster/one_gpu.yaml)."""

import os
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor
from toy import DEFENSES, ROOT, on_ranks, toy_data, toy_trainer
from transformers import AutoModelForCausalLM

from casehard import Defense, FullParameterAttack, Optimizer
from casehard.callbacks.results import Results
from casehard.engine import cross_entropy
from casehard.engine.anatomy import decoder_layers
from casehard.engine.outputs import changed_outputs
from casehard.engine.weights import reshard


def fitted(defense: str, checkpoint: str, folder: Path, max_steps: int, one_gpu: bool, **more) -> tuple[Defense, L.Trainer]:
    settings = yaml.safe_load((ROOT / "experiments/cluster/one_gpu.yaml").read_text())["trainer"]
    settings["strategy"] = ModelParallelStrategy(**settings["strategy"]["init_args"])
    kind, own = DEFENSES[defense]
    L.seed_everything(0)
    module = kind(checkpoint, optimizer=Optimizer(1e-3), **own)
    attack = FullParameterAttack("open_weight", num_samples=16, num_attack_steps=2, batch_size=4)
    saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=2, save_top_k=-1)
    callbacks = [saver, Results(str(folder), export=True), attack]
    common = {"precision": "bf16-mixed", "max_steps": max_steps, "callbacks": callbacks, "enable_checkpointing": True}
    trainer = toy_trainer(folder, **common | (settings if one_gpu else {}))
    trainer.fit(module, toy_data(), **more)
    return module, trainer


def check(rank: int, checkpoint: str, folder: Path) -> None:
    os.environ["LOCAL_RANK"] = "0"
    ends = {}
    for name, one_gpu in (("autocast", False), ("one_gpu", True)):
        module, trainer = fitted("patcher", checkpoint, folder / name, 4, one_gpu)
        assert all(isinstance(p, DTensor) == one_gpu and p.dtype == torch.float32 for p in module.parameters())
        ends[name] = {key: value.float() for key, value in trainer.callback_metrics.items()}
        assert all(p.full_tensor().isfinite().all() for p in module.parameters() if one_gpu)
    assert ends["one_gpu"].keys() == ends["autocast"].keys()
    for key in ("train/clean_loss", "train/attacked_loss", "train/attack_vector_norm"):
        assert ends["one_gpu"][key] == pytest.approx(ends["autocast"][key].item(), rel=2e-2), key

    streams = []  # what a layer hands on
    ids = torch.arange(5, 21)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    layers = decoder_layers(module.model)
    with changed_outputs(module.model, layers, lambda _, out: streams.append(out.dtype) or out), module.forward_context():
        loss = module.sft_loss(batch)
        with pytest.MonkeyPatch.context() as patch:  # logits are whole, whatever is sharded: they can be cut up
            patch.setattr(cross_entropy, "CHUNK", 2048)
            assert module.sft_loss(batch).item() == pytest.approx(loss.item(), rel=1e-5)
    reshard(module)
    assert {*streams} == {torch.bfloat16}

    resumed, _ = fitted("patcher", checkpoint, folder / "resumed", 4, True, ckpt_path=folder / "one_gpu/saved/step=2.ckpt")
    for (name, p), q in zip(module.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q.full_tensor()), name
    model = AutoModelForCausalLM.from_pretrained(folder / "one_gpu/model")
    exported = module.exported()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), exported.parameters(), strict=True))


def test_one_process_trains_attacks_resumes_and_exports_with_the_residual_stream_in_bfloat16(checkpoint, tmp_path):
    on_ranks(check, tmp_path, checkpoint, tmp_path, world_size=1)
