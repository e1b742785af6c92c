import gc
import random
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from casehard import Defense
from casehard.datamodules.chat import collate
from casehard.engine import forward, prefix_tree
from casehard.engine.anatomy import decoder_layers, final_norm
from casehard.engine.forward import (
    Batch,
    differing_positions,
    label_positions,
    label_targets,
    last_positions,
    prefill,
    run,
    takes_prefix_trees,
)

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
LLAMA = SIZES | {"num_key_value_heads": 2, "initializer_range": 0.3}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 64, "initializer_range": 0.3}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 60, "initializer_range": 0.3}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "initializer_range": 0.3}
GEMMA2 = LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0}
MODELS = {
    "llama, tied": ("llama", LLAMA | {"tie_word_embeddings": True}, True),
    "llama, untied": ("llama", LLAMA | {"tie_word_embeddings": False}, True),
    "llama, eager": ("llama", LLAMA | {"attn_implementation": "eager"}, True),
    "gpt2, learned positions": ("gpt2", GPT2, True),
    "gemma2, soft-capped": ("gemma2", GEMMA2 | {"sliding_window": 64}, True),
    "granite, scaled": ("granite", LLAMA | {"logits_scaling": 3.0, "residual_multiplier": 0.5}, True),
    "mistral, narrow window": ("mistral", LLAMA | {"sliding_window": 8}, False),
    "lfm2, convolutions": ("lfm2", LLAMA | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}, False),
    "bloom, no positions": ("bloom", BLOOM, False),
    "mamba, recurrent": ("mamba", MAMBA, False),
}


def build(name: str, **settings) -> PreTrainedModel:
    kind, sizes, _ = MODELS[name]
    torch.manual_seed(0)
    sizes = sizes | settings
    implementation = sizes.pop("attn_implementation", None)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes, **ends), attn_implementation=implementation).eval()


@pytest.fixture(params=MODELS)
def model(request) -> PreTrainedModel:
    return build(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return build("llama, tied")


def batch_of(seed: int, padding_side: str = "right", num_rows: int = 7) -> Batch:
    """Rows that begin alike, of several lengths, with labels at their ends."""
    rng = random.Random(seed)
    instructions = [[rng.randrange(3, 60) for _ in range(rng.randint(2, 9))] for _ in range(2)]
    rows = []
    for _ in range(num_rows):
        ids = rng.choice(instructions) + [rng.randrange(3, 60) for _ in range(rng.randint(2, 14))]
        answer = rng.randint(1, 3)
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - answer) + ids[-answer:]})
    return collate(rows, 0, padding_side)


def one_by_one(model: PreTrainedModel, batch: Batch, layer: int = -1) -> tuple[list[Tensor], list[Tensor]]:
    """States and logits of every row's real tokens, each row in a plain pass of its own."""
    states, logits = [], []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        out = model(input_ids=ids[mask][None], output_hidden_states=True)
        states.append(out.hidden_states[layer][0])
        logits.append(out.logits[0])
    return states, logits


def picked(values: list[Tensor], batch: Batch, where: Tensor) -> Tensor:
    masks = batch["attention_mask"].bool()
    return torch.cat([v[w[m]] for v, w, m in zip(values, where, masks, strict=True)])


def random_positions(batch: Batch, seed: int, share: float = 0.3) -> Tensor:
    mask = batch["attention_mask"].bool()
    return (torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < share) & mask


def sft_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    logits = run(model, batch, logits_at=label_positions(batch["labels"])).logits
    targets = batch["labels"][:, 1:]
    return F.cross_entropy(logits.float(), targets[targets != -100])


def assert_equals_one_by_one(
    model: PreTrainedModel, batch: Batch, layers: tuple[int, ...] = (-1,), seed: int = 0, fold: bool = True
) -> None:
    asked, scored = random_positions(batch, seed), random_positions(batch, seed + 1)
    with torch.no_grad():
        states, logits = run(model, batch, logits_at=scored, states_at=asked, layers=layers, fold=fold)
        for layer, ours in zip(layers, states, strict=True):
            by_hand_states, by_hand_logits = one_by_one(model, batch, layer)
            assert_close(ours, picked(by_hand_states, batch, asked), rtol=1e-4, atol=1e-4)
    assert_close(logits, picked(by_hand_logits, batch, scored), rtol=1e-4, atol=1e-4)


# ---- positions


def test_label_positions_by_hand():
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 5, -100, 6], [9, -100, -100, -100]])
    assert label_positions(labels).tolist() == [1, 2, 4, 6]
    assert label_targets(labels).tolist() == [7, 8, 5, 6]


def test_last_positions_by_hand():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]])
    assert last_positions(mask).tolist() == [1, 7, 11, 14]


@pytest.mark.parametrize("sides", [("right", "right"), ("left", "right"), ("right", "left"), ("left", "left")])
def test_differing_positions_by_hand(sides):
    ours = [{"input_ids": ids, "labels": ids} for ids in ([5, 6, 7, 8], [5, 6], [0, 4, 0])]
    others = [{"input_ids": ids, "labels": ids} for ids in ([5, 9, 7], [5, 6, 7, 8, 9], [0, 4])]  # 0 is the padding, too
    first, second = (collate(rows, 0, side) for rows, side in zip((ours, others), sides, strict=True))
    expected = {
        "right": [[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]],
        "left": [[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]],
    }
    assert differing_positions(first, second).int().tolist() == expected[sides[0]]
    assert not differing_positions(first, first).any()


# ---- the values


@torch.no_grad()
def test_modules_outputs_and_logits_of_early_layers_are_those_of_rows_one_by_one(model):
    """Folded as a prefix tree too, and in the order that is asked for."""
    batch, (first, second) = batch_of(3), decoder_layers(model)
    asked, scored = random_positions(batch, 0), random_positions(batch, 1)
    outputs: dict[Any, list[Tensor]] = {first: [], second: []}
    hooks = [
        layer.register_forward_hook(lambda at, _, out: outputs[at].append(out[0] if isinstance(out, tuple) else out))
        for layer in outputs
    ]
    states, by_hand = one_by_one(model, batch, 1)
    for hook in hooks:
        hook.remove()
    ends, _ = one_by_one(model, batch)
    early = []
    for hidden in outputs[first]:
        hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, __, h=hidden: (final_norm(model)(h),))
        early.append(model(input_ids=torch.zeros(hidden.shape[:2], dtype=torch.long)).logits[0])
        hook.remove()
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    (state, output, end), logits = run(
        model, batch, logits_at=scored, states_at=asked, layers=[1, second, -1], lens=[0, 0]
    )  # twice, to tell lenses from rows
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == before
    for ours, theirs in ((state, states), (output, [out[0] for out in outputs[second]]), (end, ends)):
        assert_close(ours, picked(theirs, batch, asked), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(logits, (by_hand, early, early), strict=True):
        assert_close(ours, picked(theirs, batch, scored), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_another_pass_go_through_the_unembedding_along(model, dtype):
    model = model.to(dtype)
    batch, other = batch_of(3), batch_of(4)
    scored, asked = random_positions(batch, 0), random_positions(other, 1)
    (states,), expected = run(model, other, states_at=asked, logits_at=asked)
    alone = run(model, batch, logits_at=scored).logits
    logits = run(model, batch, logits_at=scored, along=states.float()).logits
    assert logits.dtype == alone.dtype
    bound = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    assert_close(logits, torch.cat([alone, expected]), **bound)


def test_the_final_norm_is_the_one_before_the_unembedding():
    model = build("llama, tied")
    assert final_norm(model) is model.model.norm
    model = build("gpt2, learned positions")
    assert final_norm(model) is model.transformer.ln_f
    model = build("bloom, no positions")
    assert final_norm(model) is model.transformer.ln_f  # and not that of the embedding
    model.transformer.ln_f = model.transformer.word_embeddings_layernorm = torch.nn.Identity()
    with pytest.raises(ValueError, match="a norm after its layers for a logit lens, and BloomForCausalLM has none"):
        final_norm(model)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_states_and_logits_are_those_of_rows_one_by_one(model, seed, padding_side):
    assert_equals_one_by_one(model, batch_of(seed, padding_side), seed=seed)


@pytest.mark.parametrize("widest", [16, 20, 30, 60, 1024])
def test_they_are_the_same_in_any_number_of_packs(llama, monkeypatch, widest):
    monkeypatch.setattr(prefix_tree, "WIDEST", widest)
    monkeypatch.setattr(forward, "_break_even_length", lambda model: torch.inf)
    widths = []
    llama.register_forward_pre_hook(lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True)
    takes_prefix_trees(llama, 0)
    widths.clear()
    batch = batch_of(3, num_rows=9)
    run(llama, batch)
    assert len(widths) == 1
    assert (widths[0][0] == 1) == (widest == 1024)
    assert_equals_one_by_one(llama, batch)


@pytest.mark.parametrize("layers", [(0,), (1,), (2,), (-2,), (0, -1, 1), ()], ids=str)
@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_states_of_all_layers_asked_for_are_those_of_transformers_from_one_pass(llama, layers, fold, padding_side):
    takes_prefix_trees(llama, 0)
    shapes, batch = [], batch_of(4, padding_side)
    hook = llama.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    run(llama, batch, states_at=random_positions(batch, 0), layers=layers, fold=fold)
    hook.remove()
    assert len(shapes) == 1
    assert (shapes[0] == batch["input_ids"].shape) == (not fold)
    if layers:
        assert_equals_one_by_one(llama, batch, layers, fold=fold)


@pytest.mark.parametrize("seed", [0, 1])
def test_real_tokens_may_stand_anywhere(llama, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(6, 17, generator=generator) < 0.7
    mask[:, 4] = True
    ids = torch.randint(3, 60, mask.shape, generator=generator)
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.full_like(ids, -100)}
    assert_equals_one_by_one(llama, batch)
    asked = random_positions(batch, seed)
    with torch.no_grad():
        (states,), _ = run(llama, batch, states_at=asked)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        full = llama(input_ids=ids, attention_mask=mask.long(), position_ids=positions, output_hidden_states=True)
    assert_close(states, full.hidden_states[-1][asked], rtol=1e-4, atol=1e-4)


def test_nothing_may_be_asked_for(llama):
    (states,), logits = run(llama, batch_of(0))
    assert states.shape == (0, 32)
    assert logits.shape == (0, 60)


# ---- the cache


@pytest.mark.parametrize("widest", [16, 1024])
@pytest.mark.parametrize("num_rows", [1, 7])
@pytest.mark.parametrize("name", [name for name, (*_, exact) in MODELS.items() if exact])
def test_a_prefilled_cache_is_that_of_rows_one_by_one(name, monkeypatch, num_rows, widest):
    model = build(name)
    monkeypatch.setattr(prefix_tree, "WIDEST", widest)
    batch = batch_of(11, "left", num_rows)
    logits, cache = prefill(model, batch)
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
        alone = model(input_ids=ids[mask][None], past_key_values=DynamicCache(), use_cache=True)
        assert_close(logits[row], alone.logits[0, -1], rtol=1e-4, atol=1e-4)
        for layer, expected in zip(cache.layers, alone.past_key_values.layers, strict=True):
            assert_close(layer.keys[row][:, mask], expected.keys[0], rtol=1e-4, atol=1e-4)
            assert_close(layer.values[row][:, mask], expected.values[0], rtol=1e-4, atol=1e-4)


# ---- the loss


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_loss_and_gradient_are_those_of_the_plain_loss(model, padding_side):
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss = sft_loss(model, batch_of(5, padding_side))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    plain = model(**batch_of(5, "right")).loss
    plain.backward()
    assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(llama):
    llama.train()
    plain = sft_loss(llama, batch_of(6))
    llama.gradient_checkpointing_enable()
    loss = sft_loss(llama, batch_of(6))
    loss.backward()
    assert torch.equal(loss, plain)
    assert all(p.grad is not None for p in llama.parameters())


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_is_as_near_as_the_plain_loss_in_bfloat16(llama, how):
    batch, masks = batch_of(7), []
    exact = sft_loss(llama, batch)
    llama.register_forward_pre_hook(lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    if how == "weights":
        llama.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss, plain = sft_loss(llama, batch), llama(**batch).loss
    assert masks[0].dtype == torch.bfloat16  # else every layer makes and keeps a copy
    assert 0 < (loss - exact).abs() < 4 * (plain.float() - exact).abs() + 0.02


# ---- what is computed


def test_the_unembedding_sees_the_label_positions_alone(model):
    batch, seen = batch_of(8), []
    takes_prefix_trees(model, 0)
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append((args[0].shape, out.shape)))
    sft_loss(model, batch)
    num_labels = int((batch["labels"] != -100).sum())
    assert seen == [((1, num_labels, 32), (1, num_labels, 60))]


def test_only_models_that_are_exact_on_prefix_trees_are_given_them(request, model):
    expected = MODELS[request.node.callspec.params["model"]][2]
    batch, shapes = batch_of(9), []
    assert takes_prefix_trees(model, batch["input_ids"].shape[1]) == expected
    model.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    sft_loss(model, batch)
    rows = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    beginnings = {row[: i + 1] for row in rows for i in range(len(row))}
    assert len(shapes) == 1
    assert (shapes[0].numel() < batch["attention_mask"].sum()) == expected
    assert shapes[0].numel() >= len(beginnings)
    assert expected or shapes[0] == batch["input_ids"].shape


def test_rows_within_a_window_make_trees():
    assert takes_prefix_trees(build("mistral, narrow window"), 8)
    assert not takes_prefix_trees(build("mistral, narrow window"), 9)


def test_finding_out_leaves_the_model_the_generators_and_gradients_alone():
    model = build("gpt2, learned positions").train()
    model.transformer.h[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    assert takes_prefix_trees(model, 10)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_a_model_is_found_out_once_and_then_not_held(llama):
    takes_prefix_trees(llama, 10)
    calls = []
    llama.register_forward_pre_hook(lambda *_: calls.append(1))
    takes_prefix_trees(llama, 10)
    assert not calls
    other = build("llama, tied")
    takes_prefix_trees(other, 10)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None


def test_the_hook_is_gone_after_an_exception(llama):
    batch = batch_of(10)
    plain = llama(input_ids=batch["input_ids"]).logits
    takes_prefix_trees(llama, 10)
    failing = llama.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sft_loss(llama, batch)
    failing.remove()
    assert not llama.get_output_embeddings()._forward_pre_hooks
    assert torch.equal(llama(input_ids=batch["input_ids"]).logits, plain)


def test_a_defense_finds_out_before_anybody_can_watch(checkpoint):
    module, seen = Defense(checkpoint), []
    module.configure_model()
    module.model.register_forward_pre_hook(lambda *_: seen.append(1))
    batch = batch_of(12)
    module.sft_loss(batch)
    assert len(seen) == 1
