"""Liger's kernels: here those of a stand-in that computes the same and counts, on a GPU the real ones."""

import copy
import os
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import MethodType, ModuleType

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from toy import bits, on_ranks, same_bits, toy_data, toy_trainer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from casehard import Backbone, Defense, LoRA
from casehard.engine import kernels
from casehard.engine.weights import local
from casehard.lightning_modules import backbone

IDS = torch.arange(5, 25).view(2, 10)
USED = Counter()
NORM, MLP, ROTATE = modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP, modeling_llama.apply_rotary_pos_emb


def apply_liger_kernel_to_llama(
    rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None
):
    """As liger_kernel.transformers has it, whose kernels are counted copies of transformers' code."""
    assert not cross_entropy
    assert not fused_linear_cross_entropy

    def rotate(*args, **kwargs):
        USED["rotate"] += 1
        return ROTATE(*args, **kwargs)

    def norm(self, x):
        USED["norm"] += 1
        return NORM.forward(self, x)

    def gate(self, x):
        USED["gate"] += 1
        return MLP.forward(self, x)

    modeling_llama.apply_rotary_pos_emb = rotate
    modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP = type("LigerRMSNorm", (), {}), type("LigerSwiGLUMLP", (), {})
    for module in model.modules():
        if isinstance(module, NORM):
            module.in_place = True
            module.__dict__["forward"] = MethodType(norm, module)
        elif isinstance(module, MLP) and swiglu:
            module.__dict__["forward"] = MethodType(gate, module)


@pytest.fixture
def liger(monkeypatch):
    """The stand-in, whose kernels run on a CPU. Afterwards the architecture is as it was."""
    stand_in(monkeypatch)


def stand_in(monkeypatch):
    module = ModuleType("liger_kernel.transformers")
    module.apply_liger_kernel_to_llama = apply_liger_kernel_to_llama
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setattr(backbone, "require_installed", lambda: None)
    monkeypatch.setattr(kernels, "runs_on", lambda device: device.type == "cpu")
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", ROTATE)
    USED.clear()


def trained(checkpoint, folder, **settings):
    """Loss of two steps, and the weights after them, of a model with these settings of the backbone."""
    torch.manual_seed(0)
    lora, shards = settings.pop("lora", None), {key: settings.pop(key) for key in ("devices", "strategy") if key in settings}
    module = Defense(checkpoint, lora=lora, backbone=Backbone(**settings))
    trainer = toy_trainer(folder, max_steps=2, **shards)
    trainer.fit(module, toy_data())
    return trainer.callback_metrics["train/alignment_loss"], module


@pytest.mark.parametrize("settings", [{}, {"lora": LoRA(rank=2)}, {"activation_checkpointing": True}], ids=str)
def test_a_model_trains_by_fused_kernels_as_without_them_and_is_the_same_model(liger, checkpoint, tmp_path, settings):
    loss, plain = trained(checkpoint, tmp_path / "plain", **settings)
    assert not USED
    own_loss, fused = trained(checkpoint, tmp_path / "fused", kernels="liger", **settings)
    passes = 4 if settings.get("activation_checkpointing") else 2  # a layer's pass once more, going back
    assert USED["rotate"] >= 2 * passes
    assert USED["gate"] >= 2 * passes
    assert USED["norm"] >= 4 * passes + 2
    assert torch.equal(loss, own_loss)
    assert same_bits(bits(plain), bits(fused))
    assert not any(getattr(m, "in_place", False) for m in fused.modules())
    exported = fused.exported()
    assert type(exported) is LlamaForCausalLM
    exported.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(again(IDS).logits, exported.eval()(IDS).logits)


def test_other_models_of_the_architecture_and_copies_on_another_device_compute_as_they_did(liger, checkpoint, monkeypatch):
    first, second = (Backbone(kernels="liger").load(checkpoint) for _ in range(2))
    other = Backbone().load(checkpoint)
    prepare = Backbone(kernels="liger").prepared(None)
    for model in (first, second):
        prepare(model)
    assert (modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP) == (NORM, MLP)
    expected = other(IDS).logits
    assert not USED
    assert torch.equal(first(IDS).logits, expected)
    layers = len(first.model.layers)
    assert dict(USED) == {"norm": 2 * layers + 1, "gate": layers, "rotate": layers}
    copied = copy.deepcopy(second)
    with torch.no_grad():
        copied.model.norm.weight.mul_(2)
    assert not torch.equal(copied(IDS).logits, expected)  # by its own weights
    assert dict(USED) == {"norm": 4 * layers + 2, "gate": 2 * layers, "rotate": 2 * layers}
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    assert torch.equal(first(IDS).logits, expected)
    assert USED["norm"] == 4 * layers + 2


def test_a_gate_that_liger_would_compute_by_another_function_is_left_alone(liger):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(hidden_act="relu", **sizes))
    expected = model(IDS).logits
    kernels.fuse(model)
    assert torch.equal(model(IDS).logits, expected)
    assert "gate" not in USED
    assert USED["norm"] == 3


def check_shards(rank: int, checkpoint: str, folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in(monkeypatch)
        weights = []
        for number, settings in enumerate(({}, {"kernels": "liger"})):
            shards = {"devices": 2, "strategy": ModelParallelStrategy(2, 1)}
            _, module = trained(checkpoint, folder / str(number), activation_checkpointing=True, **settings, **shards)
            weights.append([local(p) for p in module.parameters()])
            assert bool(USED) == bool(number)
        assert all(map(torch.equal, *weights))
        exported = module.exported()
        if rank == 0:
            assert type(exported) is LlamaForCausalLM


def test_shards_pass_through_fused_kernels(checkpoint, tmp_path):
    on_ranks(check_shards, tmp_path, checkpoint, tmp_path)


def test_what_cannot_be_fused_is_refused(liger, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["liger_kernel.transformers"], "apply_liger_kernel_to_llama", None)
    with pytest.raises(
        ValueError, match=r"kernels must be null for LlamaForCausalLM, got liger: it has none for the archit.* llama"
    ):
        Defense(checkpoint, backbone=Backbone(kernels="liger")).configure_model()
    monkeypatch.undo()
    if find_spec("liger_kernel") is None:
        said = r"kernels: liger needs liger-kernel, and it is not installed\. Install it: pip install 'casehard\[cuda\]'"
        with pytest.raises(ValueError, match=said):
            Backbone(kernels="liger")
    monkeypatch.setattr(backbone, "require_installed", lambda: None)
    with pytest.raises(ValueError, match="kernels must be null where the model does not run on a CUDA device, got liger on cpu"):
        toy_trainer(tmp_path).fit(Defense(checkpoint, backbone=Backbone(kernels="liger")), toy_data())
    with pytest.raises(ValueError, match="kernels must be null beside compile_backend inductor, which fuses the same"):
        Backbone(kernels="liger", compile_backend="inductor")
    with pytest.raises(ValueError, match="kernels must be liger or null, got 'triton'"):
        Backbone(kernels="triton")


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs liger-kernel")
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 2e-3), ("bf16-mixed", 5e-2)])
def test_on_a_gpu_fused_kernels_give_the_loss_and_the_gradient_of_the_model(checkpoint, precision, tolerance):
    found = []
    for settings in ({}, {"kernels": "liger"}):
        module = Defense(checkpoint, backbone=Backbone(**settings))
        module.configure_model()
        module.cuda()
        batch = {"input_ids": IDS.cuda(), "attention_mask": torch.ones_like(IDS).cuda(), "labels": IDS.cuda()}
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = module.sft_loss(batch)
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in module.parameters()])))
    (loss, gradient), (own_loss, own_gradient) = found
    assert abs(own_loss - loss) <= tolerance * loss
    assert (own_gradient - gradient).norm() <= tolerance * gradient.norm()
