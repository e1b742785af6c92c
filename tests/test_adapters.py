import copy
import math
from contextlib import nullcontext

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.testing import assert_close
from toy import bits, same_bits, save_toy_checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from casehard import LoRA
from lightning_modules.adapters import add_adapter, linear_layers, merged, temporary_adapter, trainable
from lightning_modules.checkpoint import load_model

IDS = torch.arange(5, 37).view(2, 16)
LAYERS = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "llama, untied": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},  # Conv1D, whose weights are transposed
}
TWO = {"llama": ["q_proj", "down_proj"], "llama, untied": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


@pytest.fixture(params=LAYERS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def model(kind, checkpoint, tmp_path) -> PreTrainedModel:
    if kind == "llama":
        return load_model(checkpoint)
    if kind == "llama, untied":
        return load_model(save_toy_checkpoint(tmp_path / "untied", tied=False))
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": 1}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=700, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2, **ends)
    ).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def train(model: nn.Module, name: str, seed: int = 0) -> None:
    """As if adapter ``name`` had been trained: its second factors start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if f"lora_B.{name}." in parameter_name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def added_by_hand(model: PreTrainedModel, scales: dict[str, float]) -> PreTrainedModel:
    """A plain model with ``scale * B @ A`` of every adapter in its weights."""
    plain = copy.deepcopy(model)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, LoraLayer):
            base = layer.get_base_layer()
            for adapter in layer.lora_A:
                product = scales[adapter] * layer.lora_B[adapter].weight.double() @ layer.lora_A[adapter].weight.double()
                base.weight.data += (product.T if isinstance(base, Conv1D) else product).float()
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, base)
    assert not any(isinstance(m, LoraLayer) for m in plain.modules())
    return plain


# ---- which layers


def test_linear_layers_are_those_of_the_decoder_adapted_or_not(model, kind):
    assert linear_layers(model) == LAYERS[kind]
    add_adapter(model, LoRA(rank=2, target_modules=TWO[kind], dropout=0.1), "defense")
    assert linear_layers(model) == LAYERS[kind]
    add_adapter(model, LoRA(rank=2), "attack")
    assert linear_layers(model) == LAYERS[kind]


def test_by_default_every_linear_layer_is_adapted_but_the_unembedding(model, kind):
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not model.get_output_embeddings()}
    add_adapter(model, LoRA(rank=2), "defense")
    assert {name for name, m in model.named_modules() if isinstance(m, LoraLayer)} == linear
    assert len(linear) == 2 * (7 if "llama" in kind else 4)


def test_only_the_layers_that_target_modules_names_are_adapted(model, kind):
    add_adapter(model, LoRA(rank=2, target_modules=TWO[kind]), "defense")
    assert {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, LoraLayer)} == set(TWO[kind])


@pytest.mark.parametrize(
    ("names", "unknown"), [(["q"], "'q'"), (["{known}", "c_oops", "b_oops"], "'b_oops', 'c_oops'"), (["lm_head"], "'lm_head'")]
)
def test_a_target_module_that_the_model_lacks_is_an_error_that_lists_what_it_has(model, kind, names, unknown):
    before = bits(model)
    settings = LoRA(target_modules=[name.format(known=TWO[kind][0]) for name in names])
    has = ", ".join(sorted(LAYERS[kind]))
    message = rf"target_modules must name linear layers of the model, and it has no {unknown}\. It has {has}\."
    with pytest.raises(ValueError, match=message):
        add_adapter(model, settings, "defense")
    with pytest.raises(ValueError, match=message), temporary_adapter(model, settings):
        pass
    assert same_bits(bits(model), before)


# ---- what an adapter does


def test_a_new_adapter_changes_no_bit_of_the_logits(model):
    before = logits(model)
    add_adapter(model, LoRA(rank=2), "defense")
    assert torch.equal(logits(model), before)
    train(model, "defense")
    between = logits(model)
    assert not torch.equal(between, before)
    add_adapter(model, LoRA(rank=4), "attack")
    assert torch.equal(logits(model), between)


def test_only_the_newest_adapter_trains(model):
    add_adapter(model, LoRA(rank=2), "defense")
    assert trained_names(model) == {name for name, _ in model.named_parameters() if ".defense." in name} != set()
    add_adapter(model, LoRA(rank=2), "attack")
    assert trained_names(model) == {name for name, _ in model.named_parameters() if ".attack." in name} != set()
    model(IDS, labels=IDS).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained_names(model)


@pytest.mark.parametrize(("rslora", "scales"), [(True, (3 / 2**0.5, 5 / 4**0.5)), (False, (3 / 2, 5 / 4))])
def test_adapters_add_their_scaled_products_and_all_of_them_act(model, kind, rslora, scales):
    add_adapter(model, LoRA(2, 3.0, rslora, target_modules=TWO[kind]), "defense")
    train(model, "defense")
    assert_close(logits(model), logits(added_by_hand(model, {"defense": scales[0]})), atol=1e-4, rtol=1e-4)
    one = logits(model)
    add_adapter(model, LoRA(4, 5.0, rslora), "attack")
    train(model, "attack", seed=1)
    assert_close(
        logits(model), logits(added_by_hand(model, dict(zip(("defense", "attack"), scales, strict=True)))), atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(logits(model), one, atol=0.01)


def test_dropout_acts_on_the_adapter_in_train_mode_and_nowhere_else(model):
    before = logits(model)
    add_adapter(model, LoRA(rank=2, dropout=0.5), "defense")
    assert torch.equal(logits(model.eval()), before)
    for m in model.modules():  # the model's own dropout (GPT-2) is not what is looked at
        m.training = isinstance(m, nn.Dropout) and m.p == 0.5
    assert torch.equal(logits(model), before)
    train(model, "defense")
    assert not torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model.eval()), logits(model))


def test_an_adapter_starts_alike_at_one_seed_and_in_the_dtype_of_the_model(model):
    starts = []
    for _ in range(2):
        torch.manual_seed(5)
        with temporary_adapter(model.bfloat16(), LoRA(rank=2)):
            starts.append(bits(model))
            assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert same_bits(*starts)


# ---- taken out again


def built(model: nn.Module) -> tuple[object, ...]:
    modules = [(name, type(m), id(m), sorted(vars(m))) for name, m in model.named_modules()]
    return modules, [(name, id(p)) for name, p in model.named_parameters()], list(model.state_dict()), repr(model)


@pytest.mark.parametrize("ending", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("own", [None, "two layers", "every layer"])
def test_after_a_temporary_adapter_the_model_is_built_as_it_was(model, kind, own, ending):
    if own:
        add_adapter(model, LoRA(rank=2, target_modules=TWO[kind] if own == "two layers" else None), "defense")
        train(model, "defense")
    before, structure, seen = bits(model), built(model), logits(model)
    for _ in range(2):  # once more: nothing was left in the way of the next
        with pytest.raises(ending) if ending else nullcontext(), temporary_adapter(model, LoRA(rank=4)):
            train(model, "attack")
            assert not torch.equal(logits(model), seen)
            if ending:
                raise ending
        assert built(model) == structure
        assert same_bits(bits(model), before)
        assert torch.equal(logits(model), seen)


# ---- merged


@pytest.mark.parametrize("rslora", [True, False])
def test_a_merged_model_is_plain_and_speaks_as_the_adapted_one(model, kind, rslora):
    plain = built(model)
    add_adapter(model, LoRA(2, 3.0, rslora, dropout=0.1, target_modules=TWO[kind]), "defense")
    train(model, "defense")
    add_adapter(model, LoRA(4, 5.0, rslora), "attack")
    train(model, "attack", seed=1)
    model.eval()
    before, structure, seen = bits(model), built(model), logits(model)
    flags = [p.requires_grad for p in model.parameters()]
    export = merged(model)
    assert_close(logits(export), seen, atol=1e-4, rtol=1e-4)
    assert [(name, kind) for name, kind, _, _ in built(export)[0]] == [(name, kind) for name, kind, _, _ in plain[0]]
    assert built(export)[2:] == plain[2:]
    assert same_bits(bits(model), before)
    assert built(model) == structure
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not {id(p) for p in export.parameters()} & {id(p) for p in model.parameters()}


def test_full_parameter_training_moves_an_adapted_model_as_it_moves_the_merged_one(model):
    add_adapter(model, LoRA(rank=2), "defense")
    train(model, "defense")
    shipped = merged(model)
    for trained in (model, shipped):
        with trainable(trained, trained, None):
            optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
            for _ in range(3):
                trained(IDS, labels=IDS).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    assert_close(merged(model).state_dict(), shipped.state_dict())


def test_merging_keeps_a_tied_unembedding_tied(checkpoint):
    model = load_model(checkpoint)
    add_adapter(model, LoRA(rank=2), "defense")
    export = merged(model)
    assert export.get_output_embeddings().weight is export.get_input_embeddings().weight


def test_a_model_without_adapters_is_merged_already(model):
    assert merged(model) is model


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"rank must be >= 1, got 0\. Leave lora out to train every parameter\."),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1\.0\."),
        ({"dropout": -0.1}, r"dropout must lie in \[0, 1\), got -0\.1\."),
        ({"dropout": math.nan}, r"dropout must lie in \[0, 1\), got nan\."),
        (
            {"target_modules": []},
            r"target_modules must name layers or be null, got an empty list\. null adapts every linear layer\.",
        ),
    ],
)
def test_a_wrong_setting_is_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**settings)
