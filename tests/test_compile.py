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
from casehard.engine import graphs
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
    assert num_compiled() == 2  # one for both layers, one for the loss, and none for the trial of a prefix tree


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


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_layers_are_compiled_in_the_mode_that_is_asked_for(checkpoint, monkeypatch, mode):
    monkeypatch.setattr(graphs, "_used", False)
    module = Defense(checkpoint, backbone=Backbone(compile_backend="inductor", compile_mode=mode))
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **settings: asked.append(settings))
    module.configure_model()
    assert len(asked) == 2
    assert all(settings.get("mode", "default") == mode and settings["backend"] == "inductor" for settings in asked)
    assert graphs._used == (mode == "reduce-overhead")


def test_with_cuda_graphs_a_step_begins_where_no_backward_pass_is_to_come_and_gradients_are_kept_at_once(
    checkpoint, tmp_path, monkeypatch
):
    events, weights = [], []

    def noted(event, action):
        return lambda *given: (events.append(event), action(*given))[1]

    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", noted("begin", lambda: None))
    monkeypatch.setattr(graphs, "copies", noted("keep", graphs.copies))
    for used in (False, True):
        monkeypatch.setattr(graphs, "_used", used)
        events.clear()
        kind, settings = DEFENSES["patcher"]
        module = kind(checkpoint, optimizer=Optimizer(1e-2, "sgd"), **settings)
        module.sft_loss = noted("forward", module.sft_loss)
        toy_trainer(tmp_path, max_steps=3).fit(module, data())
        weights.append(bits(module))
        step = ["begin", "forward", "keep"]
        hardened = [*step, *step, "begin", *["forward", "keep"] * 2]  # an attack of two steps, a shifted and a clean pass
        expected = step + 2 * hardened
        assert events == [event for event in expected if used or event == "forward"]
    assert same_bits(*weights)


def test_kept_gradients_are_the_same_in_memory_of_their_own(monkeypatch):
    layer = torch.nn.Linear(2, 3)
    layer(torch.ones(1, 2)).sum().backward()
    there = layer.weight.grad
    for used in (False, True):
        monkeypatch.setattr(graphs, "_used", used)
        graphs.keep_gradients([layer.weight, torch.nn.Parameter(torch.ones(1))])
        assert (layer.weight.grad is there) != used
        assert torch.equal(layer.weight.grad, there)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compile_mode": "reduce-overhead"}, "compile_mode must be default unless compile_backend is inductor, got red.* null"),
        (
            {"compile_mode": "reduce-overhead", "compile_backend": "aot_eager"},
            "compile_mode must be default unless .* got reduce-overhead and aot_eager",
        ),
        ({"compile_mode": "fast", "compile_backend": "inductor"}, "compile_mode must be one of default, .*, got 'fast'"),
        (
            {"compile_mode": "reduce-overhead", "compile_backend": "inductor", "activation_checkpointing": True},
            "compile_mode must not be reduce-overhead with activation_checkpointing",
        ),
    ],
)
def test_a_mode_that_does_not_go_with_the_other_settings_is_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        Backbone(**settings)


def test_cuda_graphs_of_shards_are_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(backbone, "group_of", lambda model: object())
    with pytest.raises(
        ValueError, match="compile_mode must not be reduce-overhead under FSDP2: weights are put together in other"
    ):
        Defense(checkpoint, backbone=Backbone(compile_backend="inductor", compile_mode="reduce-overhead")).configure_model()


@pytest.mark.gpu
@pytest.mark.parametrize("defense", ["none", "sbr", "patcher", "tar"])
def test_on_a_gpu_cuda_graphs_train_what_is_trained_without(checkpoint, tmp_path, defense):
    kind, settings = DEFENSES[defense]
    found = []
    for loading in (Backbone(), Backbone(compile_backend="inductor", compile_mode="reduce-overhead")):
        module = kind(checkpoint, backbone=loading, optimizer=Optimizer(1e-2, "sgd"), **settings)
        attack = FullParameterAttack("open_weight", **SHAPE)
        trainer = toy_trainer(tmp_path, max_steps=6, accelerator="cuda", callbacks=[attack], accumulate_grad_batches=2)
        trainer.fit(module, datamodule=data())
        found.append([p.detach().cpu() for p in module.parameters()])
    assert_close(*found, rtol=1e-3, atol=1e-4)
