"""Vaccine: the perturbation of the attention's outputs, and the step that is taken under it."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from test_gradients import SGD, far, loaded
from test_patcher import data
from toy import bits, same_bits, toy_trainer
from transformers import AutoModelForCausalLM, MambaConfig

from casehard import Backbone, Defense, LoRA, VaccineModule
from casehard.engine.outputs import changed_outputs
from casehard.lightning_modules import backbone


def fitted(module: Defense, folder, steps: int = 1, **settings) -> Defense:
    L.seed_everything(0)
    toy_trainer(folder, max_steps=steps, **settings).fit(module, datamodule=data())
    return module


def update(module: Defense, checkpoint: str) -> dict[str, torch.Tensor]:
    start = dict(loaded(checkpoint, lora=module.lora).named_parameters())
    return {name: (p - start[name]).detach() for name, p in module.named_parameters() if p.requires_grad}


def test_vaccine_of_radius_zero_is_sft_bit_for_bit(checkpoint, tmp_path):
    plain, zero, module = (
        fitted(kind, tmp_path, 4)
        for kind in (Defense(checkpoint), VaccineModule(checkpoint, radius=0.0), VaccineModule(checkpoint))
    )
    assert same_bits(bits(plain), bits(zero))
    assert not same_bits(bits(plain), bits(module))
    assert (zero.num_passes, module.num_passes) == (4, 2 * 4)


def test_vaccines_step_is_the_one_written_by_hand(checkpoint, tmp_path):
    loader, module, start = data(), VaccineModule(checkpoint, 0.5, optimizer=SGD), loaded(checkpoint)
    L.seed_everything(0)
    toy_trainer(tmp_path, max_steps=1).fit(module, datamodule=loader)
    batch = next(iter(loader.train_dataloader()))
    layers, shape = start.model.model.layers, (*batch["input_ids"].shape, start.model.config.hidden_size)

    def loss(shifts: list[torch.Tensor]) -> torch.Tensor:
        hooks = [
            layer.self_attn.o_proj.register_forward_hook(lambda _, __, out, shift=shift: out + shift)
            for layer, shift in zip(layers, shifts, strict=True)
        ]
        logits = start.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for hook in hooks:
            hook.remove()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    zeros = [torch.zeros(shape, requires_grad=True) for _ in layers]
    gradients = torch.autograd.grad(loss(zeros), zeros)
    length = torch.cat([g.flatten() for g in gradients]).norm()
    shifts = [0.5 * g / (length + 1e-7) for g in gradients]
    assert sum(float(s.square().sum()) for s in shifts) == pytest.approx(0.25, rel=1e-4)
    own = dict(start.named_parameters())
    expected = torch.autograd.grad(loss(shifts), list(own.values()))
    assert far(update(module, checkpoint), {n: -0.05 * g for n, g in zip(own, expected, strict=True)}) < 1e-4
    assert module.terms["sft_loss"] == pytest.approx(loss(zeros).item(), rel=1e-5)


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, target_modules=["down_proj"])], ids=["full", "lora"])
def test_the_perturbation_has_the_length_of_the_radius_and_no_hook_stays(checkpoint, tmp_path, lora):
    """With adapters behind the attention alone, too: the first layer's attention then depends on nothing that trains."""
    seen = []

    class Looks(VaccineModule):
        def backward(self, loss, *args, **kwargs):
            seen.append(sum(float(s.square().sum()) for s in self.shifts.values()))
            assert len(self.shifts) == 2
            super().backward(loss, *args, **kwargs)

    module = fitted(Looks(checkpoint, 1.5, lora=lora), tmp_path, 2)
    assert seen == pytest.approx([1.5**2] * 2, rel=1e-4)
    assert module.shifts == {}
    assert not any(m._forward_hooks for m in module.modules())


@pytest.mark.parametrize("loading", [Backbone(activation_checkpointing=True), Backbone(compile_backend="aot_eager")], ids=["again", "compiled"])  # fmt: skip
def test_layers_that_are_computed_again_or_compiled_are_perturbed_too(checkpoint, tmp_path, loading):
    ours, expected = (
        update(fitted(VaccineModule(checkpoint, 5.0, optimizer=SGD, backbone=b), tmp_path), checkpoint)
        for b in (loading, Backbone())
    )
    assert far(ours, expected) < 1e-5
    assert far(expected, update(fitted(Defense(checkpoint, SGD), tmp_path), checkpoint)) > 1e-2


def test_an_architecture_without_attention_is_an_error_before_the_first_step(checkpoint, tmp_path, monkeypatch):
    def load(*_args):
        return AutoModelForCausalLM.from_config(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=700))

    monkeypatch.setattr(backbone, "load_model", load)
    with pytest.raises(ValueError, match="every decoder layer must have an attention for this method, and layer 0"):
        fitted(module := VaccineModule(checkpoint), tmp_path)
    assert module.num_passes == 0


def test_a_negative_radius_is_an_error(checkpoint):
    with pytest.raises(ValueError, match=r"radius of Vaccine must be >= 0, got -1. 0 is plain SFT."):
        VaccineModule(checkpoint, radius=-1)


def test_a_compiled_layer_that_ran_before_is_changed_too():
    layer, x = torch.nn.Sequential(torch.nn.Linear(3, 3)), torch.ones(3)
    layer.compile(backend="eager")
    plain = layer(x)
    with changed_outputs(layer, [layer[0]], lambda _, out: out + 1):
        assert torch.equal(layer(x), plain + 1)
    assert torch.equal(layer(x), plain)


def test_only_the_first_of_several_outputs_is_changed_and_only_in_the_block():
    class Two(torch.nn.Module):
        def forward(self, x):
            return x, 2 * x

    one, two, x = torch.nn.Identity(), Two(), torch.ones(3)
    both = torch.nn.ModuleList([one, two])
    with changed_outputs(both, [one, two], lambda number, out: out + 10 * (number + 1)):
        assert torch.equal(one(x), x + 10)
        assert torch.equal(torch.stack(two(x)), torch.stack([x + 20, 2 * x]))
    assert torch.equal(one(x), x)
    assert torch.equal(two(x)[0], x)
