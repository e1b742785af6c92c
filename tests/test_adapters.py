import copy
import math
from contextlib import nullcontext

import pytest
import torch
from peft.tuners.lora import Linear, LoraLayer, ParamWrapper
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.testing import assert_close
from toy import bits, on_ranks, same_bits, save_toy_checkpoint
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from casehard import LoRA
from casehard.engine.adapters import (
    _read_past_forward,
    adapted,
    adapter_vector,
    add_adapter,
    coverage,
    matrices,
    merged,
    targets,
    temporary_adapter,
    trainable,
    what_trains,
)
from casehard.engine.anatomy import decoder_layers
from casehard.engine.checkpoint import load_model
from casehard.engine.sharding import shard_of, sharded
from casehard.engine.weights import local, reshard

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


def names_of(model: PreTrainedModel) -> set[str]:
    """Of what an adapter can go on."""
    return {matrix.short for matrix in matrices(model) if not matrix.still}


# ---- which layers


def test_linear_layers_are_those_of_the_decoder_adapted_or_not(model, kind):
    assert names_of(model) == LAYERS[kind]
    add_adapter(model, LoRA(rank=2, target_modules=TWO[kind], dropout=0.1), "defense")
    assert names_of(model) == LAYERS[kind]
    add_adapter(model, LoRA(rank=2), "attack")
    assert names_of(model) == LAYERS[kind]


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


# ---- every family

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
HEAD = SIZES | {"head_dim": 8}
CHOOSING = SIZES | {"num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
DEEPSEEK |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
GEMMA_3N = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0, "laurel_rank": 4}
GEMMA_3N |= {"intermediate_size": [48, 48], "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0]}
LLAMA_4 = {"intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1}
FALCON = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 8}
FAMILIES: dict[str, tuple[dict[str, object], set[str]]] = {  # sizes, and what cannot be adapted
    "llama": (SIZES, set()),
    "llama4_text": (HEAD | LLAMA_4, {"router.weight"}),
    "qwen2": (SIZES, set()),
    "qwen3": (HEAD, set()),
    "qwen3_moe": (CHOOSING | {"head_dim": 8, "moe_intermediate_size": 16}, {"gate.weight"}),
    "gemma": (HEAD, set()),
    "gemma2": (HEAD, set()),
    "gemma3_text": (HEAD, set()),
    "gemma3n_text": (HEAD | GEMMA_3N, {"correction_coefs"}),
    "mistral": (SIZES, set()),
    "mixtral": (SIZES | {"num_local_experts": 4}, {"gate.weight"}),
    "phi": (SIZES, set()),
    "phi3": (SIZES, set()),
    "olmo": (SIZES, set()),
    "olmo2": (SIZES, set()),
    "olmoe": (CHOOSING, {"gate.weight"}),
    "gpt_oss": (HEAD | {"num_local_experts": 4, "num_experts_per_tok": 2}, {"router.weight"}),
    "deepseek_v3": (SIZES | DEEPSEEK | {"num_key_value_heads": 4, "first_k_dense_replace": 1}, {"gate.weight"}),
    "falcon_h1": (HEAD | FALCON, {"out_proj", "conv1d.weight"}),
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2}, {"x_proj", "dt_proj", "out_proj", "conv1d.weight", "mixer.A_log"}),
    "gpt_neox": (SIZES, set()),
    "smollm3": (SIZES, set()),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, set()),
}


def family(kind: str) -> PreTrainedModel:
    sizes, _ = FAMILIES[kind]
    torch.manual_seed(0)
    ends = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(ends | {"initializer_range": 0.2} | sizes))).eval()


def to_adapt(model: PreTrainedModel, still: set[str]) -> dict[str, nn.Parameter]:
    """By a rule of its own: parameters of linear layers and stacks of them, by name."""
    head = model.get_output_embeddings()
    linear = {f"{n}.weight" for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D) and m is not head}
    own = {n: p for n, p in model.named_parameters() if n in linear or (".experts." in n and p.ndim == 3)}
    return {n: p for n, p in own.items() if not any(n.removesuffix(".weight").endswith(s) for s in still)}


@pytest.mark.parametrize("kind", FAMILIES)
def test_by_default_lora_trains_every_linear_layer_and_expert_of_every_family_and_nothing_stays(kind):
    model = family(kind)
    wanted = to_adapt(model, still := FAMILIES[kind][1])
    before, structure, seen = bits(model), built(model), logits(model)
    with temporary_adapter(model, LoRA(rank=2)):
        assert coverage(model)[1] == sorted(still)
        assert torch.equal(logits(model), seen)
        factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert len(factors) == 2 * len(wanted)
        optimizer = torch.optim.AdamW(factors.values(), lr=1e-2)
        for _ in range(2):
            model.train()(IDS, labels=IDS).loss.backward()
            optimizer.step()
        unused = "per_layer_" if kind == "gemma3n_text" else "?"  # scaled by a parameter that starts at zero
        assert all(p.grad.any() for name, p in factors.items() if unused not in name)
        assert all(p.any() for name, p in factors.items() if unused not in name)
        spoken = logits(model.eval())
        assert not torch.allclose(spoken, seen, atol=1e-2)
        assert_close(logits(merged(model)), spoken, atol=1e-5, rtol=1e-5)
        vector = adapter_vector(model)
        assert vector.keys() == {id(p) for p in wanted.values()}
        assert all(vector[id(p)].shape == p.shape for p in wanted.values())
    assert built(model) == structure
    assert same_bits(bits(model), before)
    assert torch.equal(logits(model), seen)


@torch.no_grad()
def test_a_vector_holds_what_the_adapters_of_experts_add():
    model = family("deepseek_v3")
    with temporary_adapter(model, LoRA(rank=2)):
        train(model, "attack")
        spoken, vector = logits(model), adapter_vector(model)
    for p in model.parameters():
        p += vector.get(id(p), 0)
    assert_close(logits(model), spoken, atol=1e-5, rtol=1e-5)


def test_dense_and_shared_experts_are_adapted_as_layers_and_every_expert_at_the_rank_that_was_set():
    model = family("deepseek_v3")
    add_adapter(model, LoRA(rank=3), "defense")
    layers = {name.replace(".base_layer", ""): m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    dense = [f"model.layers.{part}.{name}_proj" for part in ("0.mlp", "1.mlp.shared_experts") for name in ("gate", "up", "down")]
    assert all(isinstance(layers[name], Linear) for name in dense)
    assert {layer.r["defense"] for layer in layers.values()} == {3}
    experts = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    assert {m.parameter_name: (m.num_experts, len(m.lora_A["defense"].weight)) for m in experts} == {
        "gate_up_proj": (4, 12),
        "down_proj": (4, 12),
    }


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_adapters_on_some_and_on_all_parameters_of_experts_go_as_they_came(kind):
    model = family(kind)
    add_adapter(model, LoRA(rank=2, target_modules=["experts.gate_up_proj", "q_proj"]), "defense")
    train(model, "defense")
    before, seen = bits(model), logits(model)
    structure, plain = built(model), logits(merged(model))
    assert_close(plain, seen, atol=1e-5, rtol=1e-5)
    with temporary_adapter(model, LoRA(rank=4)):
        second = [p for name, p in model.named_parameters() if "lora_B.attack" in name]
        assert second
        assert not any(p.any() for p in second)
        used: list[Tensor] = []  # by a pass: what the first adapter alone makes of every expert, to the bit
        for stack in (stacks := [m for m in model.modules() if isinstance(m, ParamWrapper) and "defense" in m.lora_A]):
            experts, name = stack.get_base_layer(), stack.parameter_name
            hook = experts.register_forward_pre_hook(lambda experts, _, name=name: used.append(getattr(experts, name).detach()))
            assert_close(logits(model), seen, atol=1e-5, rtol=1e-5)  # two adapters are summed, one is written by baddbmm
            hook.remove()
        assert len(used) == len(stacks) == 2
        for weight, stack in zip(used, stacks, strict=True):
            assert torch.equal(weight, stack.get_param() + stack.get_delta_weight("defense"))
        train(model, "attack", seed=1)
        both = logits(model)
        assert not torch.allclose(both, seen, atol=1e-2)
        assert_close(logits(merged(model)), both, atol=1e-5, rtol=1e-5)
    assert built(model) == structure
    assert same_bits(bits(model), before)
    assert torch.equal(logits(model), seen)


def test_the_parameters_of_experts_are_in_their_order_after_passes_with_adapters():
    model = family("gpt_oss")
    names = [name for name, _ in model.named_parameters()]
    with temporary_adapter(model, LoRA(rank=2)):
        logits(model)
    assert [name for name, _ in model.named_parameters()] == names


def test_recomputed_and_compiled_layers_train_the_adapters_of_experts_as_plain_ones_do():
    def trained(prepare) -> dict[str, Tensor]:
        model = family("mixtral").train()
        prepare(model)
        torch.manual_seed(1)
        with temporary_adapter(model, LoRA(rank=2)):
            train(model, "attack")
            model(IDS, labels=IDS).loss.backward()
            return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    def compiled(model: PreTrainedModel) -> None:
        for layer in decoder_layers(model):
            layer.compile(dynamic=True, backend="eager")

    plain = trained(lambda model: None)
    assert_close(trained(lambda model: model.gradient_checkpointing_enable()), plain)
    assert_close(trained(compiled), plain)


# ---- names


@pytest.mark.parametrize(
    ("kind", "names", "found"),
    [
        ("llama", ["model.layers.1.mlp.up_proj"], {"model.layers.1.mlp.up_proj"}),
        ("llama", ["0.mlp.up_proj", "1.self_attn.q_proj"], {"model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"}),
        ("mixtral", ["experts.down_proj"], {f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)}),
        ("deepseek_v3", ["0.mlp.gate_proj", "experts.gate_up_proj"], {"model.layers.0.mlp.gate_proj", "model.layers.1.mlp.experts.gate_up_proj"}),
        ("gemma3n_text", ["altup_projections.0"], {"model.altup_projections.0"}),
        ("falcon_h1", ["in_proj"], {f"model.layers.{i}.mamba.in_proj" for i in (0, 1)}),
    ],
)  # fmt: skip
def test_target_modules_may_be_full_names_or_the_ends_of_names(kind, names, found):
    model = family(kind)
    assert {matrix.name for matrix in targets(model, LoRA(target_modules=names))} == found
    wrapped = {m.name: m.weight for m in matrices(model) if m.name in found}
    with temporary_adapter(model, LoRA(rank=2, target_modules=names)):
        assert adapter_vector(model).keys() == {id(weight) for weight in wrapped.values()}


@pytest.mark.parametrize(
    ("kind", "name", "why"),
    [
        ("mamba", "out_proj", "MambaMixer reads its weight past its forward pass"),
        ("llama4_text", "router.weight", "Llama4Router is no linear layer"),
        ("mixtral", "gate.weight", "MixtralTopKRouter is no linear layer"),
    ],
)
def test_a_target_module_on_which_no_adapter_can_act_is_an_error_that_says_why(kind, name, why):
    message = rf"target_modules must name layers that an adapter can act on, got '{name}': {why}\. Leave it out, .*It has "
    with pytest.raises(ValueError, match=message):
        targets(family(kind), LoRA(target_modules=[name]))


def test_part_of_a_name_is_no_name():
    for name in ("proj", "rn.q_proj", "layers.1.mlp", "experts"):
        with pytest.raises(ValueError, match=f"and it has no '{name}'"):
            targets(family("mixtral"), LoRA(target_modules=[name]))


def test_dropout_is_an_error_where_experts_are_adapted_and_only_there():
    model = family("olmoe")
    message = (
        r"dropout of lora must be 0 where experts are adapted, got 0\.1: .*experts\.down_proj, experts\.gate_up_proj are one"
    )
    with pytest.raises(ValueError, match=message):
        add_adapter(model, LoRA(dropout=0.1), "defense")
    add_adapter(model, LoRA(dropout=0.1, target_modules=["q_proj"]), "defense")


# ---- what it comes to


def test_what_trains_is_said_in_one_line(caplog):
    model = family("mixtral")
    total = sum(p.numel() for p in model.parameters())
    with trainable(model, model, None):
        assert what_trains(model, model, None) == "all 47 520 parameters"
        assert total == 47520
        model.lm_head.weight.requires_grad_(False)
        assert what_trains(model, model, None) == "45 472 of 47 520 parameters"
    # 16 a row and column: attention 32-32, 32-16, 32-16, 32-32, and four experts of 32-96 and 48-32, in two layers
    factors = 2 * 3 * (64 + 48 + 48 + 64 + 4 * (128 + 80))
    weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 4 * (32 * 96 + 48 * 32))
    share = math.floor(1000 * weights / (weights + 2 * 4 * 32)) / 10
    line = f"LoRA r3 on 12 of 14 weight matrices ({share}% of the decoder); {f'{factors:_}'.replace('_', ' ')} parameters; not on gate.weight"
    with caplog.at_level("INFO"), trainable(model, model, LoRA(rank=3)):
        assert what_trains(model, model, LoRA(rank=3)) == line == adapted(model)
    with trainable(model, model, LoRA(rank=3)):
        pass
    assert caplog.text.count(line) == 1  # a run says it once


def test_all_is_said_only_of_all():
    model = family("llama")
    with temporary_adapter(model, LoRA(rank=2)):
        assert coverage(model) == (100.0, [])
    with temporary_adapter(model, LoRA(rank=2, target_modules=["q_proj"])):
        share, still = coverage(model)
        assert share < 20
        assert still == ["down_proj", "gate_proj", "k_proj", "o_proj", "up_proj", "v_proj"]


class Reading(nn.Module):
    """Reads weights in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.kernel, self.sliced, self.looked_at = (nn.Linear(4, 4) for _ in range(4))
        nn.init.zeros_(self.called.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x.to(self.looked_at.weight.dtype)) @ self.kernel.weight
        return self.looked_at(self.sliced(x) @ self.sliced.weight[:, :2])


class Derived(Reading):
    """Reads what its base does."""


def test_a_weight_counts_as_read_where_code_takes_it_past_its_layer():
    assert _read_past_forward(Reading) == _read_past_forward(Derived) == {"kernel"}


# ---- what stands still


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_while_an_attacker_trains_the_other_adapters_drop_nothing(model, lora):
    add_adapter(model, LoRA(rank=2, dropout=0.5), "defense")
    train(model, "defense")
    model.eval()
    before, structure, seen = bits(model), built(model), logits(model)

    def adapters_train() -> None:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.train()

    with trainable(model, model, lora):
        adapters_train()
        assert torch.equal(logits(model), seen)
    adapters_train()
    assert not torch.equal(logits(model), seen)
    assert built(model.eval())[:3] == structure[:3]
    assert same_bits(bits(model), before)


# ---- on two ranks


def two_ranks_train_the_adapters_of_experts(rank: int) -> None:
    whole = family("mixtral")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    model, _ = sharded(whole if rank == 0 else None, mesh, torch.device("cpu"), MixedPrecisionPolicy())
    found = []
    for m in (whole, model):
        torch.manual_seed(1)
        with temporary_adapter(m, LoRA(rank=2)):
            train(m, "attack")
            m.train()(IDS, labels=IDS).loss.backward()
            reshard(m)
            vector, own = adapter_vector(m), dict(m.named_parameters())
            gradients = {name: p.grad for name, p in own.items() if p.requires_grad}
            added = {name: shard_of(vector[id(p)], p) for name, p in own.items() if id(p) in vector}
            found.append((gradients, added, {name: p for name, p in own.items() if name in added}))
    (plain, added, _), (ours, shards, own) = found
    assert_close(ours, plain)
    assert shards.keys() == added.keys()
    assert len(shards) == 12
    for name, part in shards.items():
        assert torch.equal(part, shard_of(added[name], own[name]))
        assert part.shape == local(own[name]).shape
    reshard(model)
    before = {name: p.full_tensor() for name, p in model.named_parameters()}
    assert_close(before, dict(whole.named_parameters()), rtol=0, atol=0)


def test_the_adapters_of_experts_train_alike_on_sharded_weights(tmp_path):
    on_ranks(two_ranks_train_the_adapters_of_experts, tmp_path)
