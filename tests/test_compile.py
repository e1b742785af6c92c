"""Compiled decoder layers train the model that others train."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_patcher import data
from torch._dynamo.utils import counters
from torch.testing import assert_close
from toy import DEFENSES, bits, same_bits, toy_trainer
from transformers import PreTrainedModel

from casehard import Backbone, Defense, FullParameterAttack, LoRA, Optimizer
from casehard.engine.anatomy import decoder_layers
from casehard.engine.checkpoint import load_model
from casehard.engine.private import runs_compiled
from casehard.lightning_modules import backbone

COMPILED = {"backbone": Backbone(compile_backend="aot_eager")}  # needs no C++ compiler
SHAPE = {"num_samples": 16, "num_attack_steps": 2, "batch_size": 4}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def num_compiled() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("defense", ["none", "sbr"])  # Patcher's is compiled in test_distributed_adapters
def test_a_compiled_model_is_trained_and_attacked_as_it_would_be_otherwise(checkpoint, tmp_path, defense):
    kind, settings = DEFENSES[defense]
    settings = settings | {"optimizer": Optimizer(1e-2, "sgd")}
    found = []
    for compiled in (None, "aot_eager"):  # which needs no C++ compiler
        loading = Backbone(compile_backend=compiled, activation_checkpointing=defense == "none")
        module, seen = kind(checkpoint, backbone=loading, **settings), []
        attack = FullParameterAttack("open_weight", **SHAPE)  # adapters: test_adapters
        loss = module.sft_loss
        module.sft_loss = lambda batch, loss=loss, seen=seen: seen.append(loss(batch)) or seen[-1]
        toy_trainer(tmp_path, max_steps=2, callbacks=[attack]).fit(module, datamodule=data())
        found.append(torch.stack(seen).detach())
        assert (num_compiled() > 0) == bool(compiled)
    assert_close(*found, rtol=1e-4, atol=1e-5)


def test_answers_are_generated_by_layers_as_they_are(checkpoint):
    compiled, plain = Defense(checkpoint, **COMPILED), Defense(checkpoint)
    for module in (compiled, plain):
        module.configure_model()
    prompts = [[5, 6, 7], [5, 6, 8, 9]]
    assert compiled.generate(prompts, 8, 2) == plain.generate(prompts, 8, 2)
    assert num_compiled() == 0
    ids = torch.tensor(prompts[1])[None]
    compiled.sft_loss({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    assert num_compiled() == 1  # for both layers, and not for the trial of a prefix tree


def test_an_architecture_that_declares_no_layers_is_an_error(checkpoint, monkeypatch):
    monkeypatch.setattr(backbone, "load_model", undeclared)
    with pytest.raises(ValueError, match="architecture that declares its decoder layers, and LlamaForCausalLM declares none"):
        Defense(checkpoint, **COMPILED).configure_model()
    Defense(checkpoint).configure_model()


def undeclared(*args: Any) -> PreTrainedModel:
    model = load_model(*args)
    model._no_split_modules = set()
    return model


def test_an_exported_model_is_not_compiled(checkpoint):
    module = Defense(checkpoint, lora=LoRA(rank=2), **COMPILED)
    module.configure_model()
    assert all(runs_compiled(layer) for layer in decoder_layers(module.model))
    exported = module.exported()
    assert all(not runs_compiled(layer) for layer in decoder_layers(exported))
    plain = Defense(checkpoint)
    plain.configure_model()
    assert same_bits(bits(exported), bits(plain.model))
