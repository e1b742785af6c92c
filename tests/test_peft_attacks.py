"""Attacks that differ in what trains: their limiting cases. The crossed tests have them in toy.ATTACKS."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora import LoraLayer
from test_adapters import built, family, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.testing import assert_close
from toy import DEFENSES, FAST, bits, looking, on_ranks, same_bits, save_toy_checkpoint, toy_data, toy_trainer

from casehard import Backbone, Defense, LoRA, Optimizer, SettingError
from casehard.callbacks.adapter_attack import AdapterAttack
from casehard.callbacks.attack import Attack, Target
from casehard.callbacks.fine_tuning import Phase
from casehard.callbacks.head_only import HeadOnly
from casehard.callbacks.lofit import LoFiT
from casehard.callbacks.results import Results
from casehard.datamodules.chat import prompt_ids
from casehard.engine.adapters import add_adapter, temporary_adapter, trainable
from casehard.engine.attention_heads import AttentionHeads, HeadEdits
from casehard.engine.checkpoint import load_model
from casehard.engine.forward import run, use_layout
from casehard.engine.generation import generate
from casehard.engine.gradients import average_gradients
from casehard.engine.other_adapters import IA3, AdaLoRA, LoReFT, OtherAdapter, PromptTuning, orthogonality
from casehard.engine.output_head import OutputHead
from casehard.engine.sharding import sharded
from casehard.engine.soft_tokens import table_shape
from casehard.engine.training import Plain, train_steps
from casehard.engine.weights import reshard

IDS = torch.arange(5, 37).view(2, 16)


@pytest.fixture
def llama(checkpoint) -> Defense:
    module = Defense(checkpoint)
    module.configure_model()
    module.model.eval()
    return module


def attacked(folder: Path, module: Defense, attack: Attack, look: Any = lambda target: None) -> Results:
    results = Results(str(folder), export=False)
    trainer = toy_trainer(folder, callbacks=[results, looking(attack, look)])
    trainer.test(module, datamodule=toy_data(), verbose=False)
    return results


def moved(model: nn.Module, adapter: Any) -> None:
    """As if what trains had been trained."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)


# ---- random subspace


@pytest.mark.parametrize("rank", [1, 2])
def test_a_frozen_factor_stays_and_every_matrix_moves_within_its_rows(llama, rank):
    model = llama.model
    torch.manual_seed(3)
    with temporary_adapter(model, LoRA(rank, alpha=rank, rslora=False, frozen_a=True)):
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        start = [layer.lora_A["attack"].weight.detach().clone() for layer in layers]
        trained = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {"lora_B"}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(3):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for layer, a in zip(layers, start, strict=True):
            assert torch.equal(layer.lora_A["attack"].weight, a)
            moved = layer.get_delta_weight("attack").detach()
            assert torch.linalg.matrix_rank(moved) == rank  # B has moved
            within = moved @ torch.linalg.pinv(a) @ a
            torch.testing.assert_close(within, moved)
            torch.testing.assert_close(moved, layer.lora_B["attack"].weight.detach() @ a)  # scale 1
        entries = torch.cat([(a * a.shape[1] ** 0.5).flatten() for a in start])
        assert abs(entries.mean()) < 0.1
        assert abs(entries.std() - 1) < 0.1


def test_freezing_the_first_factor_changes_it_and_nothing_else(llama):
    starts = []
    for frozen in (False, True):
        torch.manual_seed(5)
        with temporary_adapter(llama.model, LoRA(2, frozen_a=frozen)):
            starts.append(bits(llama.model))
            still = {name for name, p in llama.model.named_parameters() if ".attack." in name and not p.requires_grad}
            assert still == ({name for name in starts[0] if ".lora_A." in name} if frozen else set())
    plain, other = starts
    assert list(plain) == list(other)
    assert {name for name in plain if not torch.equal(plain[name], other[name])} == still


# ---- the head alone


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def either(request, tmp_path) -> Defense:
    return Defense(save_toy_checkpoint(tmp_path / "model", tied=request.param))


@pytest.mark.parametrize("norm", [False, True], ids=["head", "head and norm"])
def test_the_head_alone_moves_and_the_states_that_enter_it_stay(tmp_path, either, norm):
    seen: list[tuple[Any, ...]] = []

    @torch.no_grad()
    def look(target: Target) -> None:
        model = target.module.model
        out = model(IDS, output_hidden_states=True)
        inner = bits(model.model)
        gain = inner.pop("norm.weight")
        seen.append((out.logits, out.hidden_states, inner, gain, model.lm_head.weight.clone(), built(model)))

    result = attacked(tmp_path, either, HeadOnly("open_weight", final_norm=norm, score_steps=[1, 3], **FAST), look)
    (logits, states, inner, gain, head, structure), *others = seen
    assert len(others) == 2
    for after in others:
        assert not torch.equal(after[0], logits)
        assert all(torch.equal(a, b) for a, b in zip(after[1][:-1], states[:-1], strict=True))
        assert torch.equal(after[1][-1], states[-1]) == torch.equal(after[3], gain) == (not norm)
        assert list(after[2]) == list(inner)
        assert all(torch.equal(a, b) for a, b in zip(after[2].values(), inner.values(), strict=True))  # the embedding among them
        assert not torch.equal(after[4], head)
    model = either.model
    assert built(model) == structure
    assert torch.equal(model.lm_head.weight, head)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    num = head.numel() + 32 * norm
    assert (
        result.rows[-1].trained
        == f"the output head{' and the final norm' if norm else ''}: {num // 1000} {num % 1000:03} parameters"
    )


def test_before_its_first_step_a_head_of_its_own_says_the_same(either):
    either.configure_model()
    model = either.model
    with torch.no_grad():
        before = model(IDS).logits
        with HeadOnly("open_weight", final_norm=True).adapter.added(model):
            assert torch.equal(model(IDS).logits, before)
            assert {name for name, p in model.named_parameters() if p.requires_grad} == {"lm_head.weight", "model.norm.weight"}


def test_a_service_that_freezes_the_head_is_refused_and_one_that_trains_it_sees_no_drift(tmp_path, checkpoint):
    kind, settings = DEFENSES["sbr"]
    with pytest.raises(
        SettingError, match="threat_model must be open_weight for HeadOnly where the service freezes the output head"
    ):
        attacked(tmp_path, kind(checkpoint, **settings), HeadOnly("finetuning_service", **FAST))
    drifts = []

    def look(target: Target) -> None:
        if target.defended and target.num_done:
            drifts.append(float(target.task.terms["anchor_drift"]))

    module = kind(checkpoint, freeze_unembedding=False, **settings)
    attacked(tmp_path, module, HeadOnly("finetuning_service", score_steps=[2, 3], **FAST), look)
    assert len(drifts) == 2
    assert max(drifts) < 1e-12  # the batch beside the anchors rounds


# ---- other adapters

ADAPTERS: dict[str, Any] = {
    "adalora": AdaLoRA(1, 3),
    "ia3": IA3(),
    "soft prompt": PromptTuning(3),
    "reft": LoReFT(2, first=2, last=3),
    "head": OutputHead(final_norm=True),
    "attention heads": AttentionHeads(),
}
OWN = {
    "adalora": {"lora_A", "lora_B", "lora_E"},
    "ia3": {"ia3_l"},
    "soft prompt": {"soft"},
    "reft": {"free", "weight", "bias"},
    "head": {"weight"},
    "attention heads": {"scale"},
}


def asked(adapter: Any, model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """``ids`` as the adapter has them as prompts."""
    rows = ids.tolist()
    return torch.tensor([adapter.prompt(row, model) for row in rows]) if isinstance(adapter, OtherAdapter) else ids


@pytest.mark.parametrize("own", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_starts_at_nothing_trains_alone_and_goes_as_it_came(llama, name, own):
    model, adapter = llama.model, ADAPTERS[name]
    if own:
        add_adapter(model, LoRA(rank=2, dropout=0.5), "defense")
        train(model, "defense")
        model.eval()
    flags = {p: p.requires_grad for p in model.parameters()}
    before, structure = bits(model), built(model)
    with torch.no_grad():
        logits = model(IDS).logits
        for ending in (None, KeyboardInterrupt):
            with pytest.raises(ending) if ending else nullcontext(), trainable(llama, model, adapter):
                ids = asked(adapter, model)
                new = model(ids).logits[:, -16:]
                if name == "soft prompt":  # it begins as tokens
                    first = model.attack.tokens.expand(len(IDS), -1)
                    assert torch.equal(new, model(torch.cat([first, IDS], 1)).logits[:, -16:])
                else:
                    assert torch.equal(new, logits)
                    if name != "head":
                        assert torch.equal(model(IDS).logits, logits)
                assert {
                    n.split(".")[-2 if name in ("adalora", "ia3") else -1] for n, p in model.named_parameters() if p.requires_grad
                } == OWN[name]
                moved(model, adapter)
                assert not torch.allclose(model(ids).logits[:, -16:], new)
                assert all(
                    torch.equal(now, before[n])
                    for n, now in bits(model).items()
                    if n in before and "lm_head" not in n and n != "model.norm.weight"
                )
                if ending:
                    raise ending
            for p, flag in flags.items():
                p.requires_grad_(flag)
            assert built(model) == structure
            assert same_bits(bits(model), before)
            assert torch.equal(model(IDS).logits, logits)


REFUSED = {"mixtral": {"adalora", "ia3"}, "falcon_h1": {"ia3"}, "mamba": {"ia3", "attention heads"}}


@pytest.mark.parametrize("kind", ["gemma2", "mixtral", "falcon_h1", "mamba", "gpt2"])
def test_an_adapter_fits_a_family_or_says_why_not(kind):
    model, refused = family(kind), set()
    structure = built(model)
    for name, adapter in ADAPTERS.items():
        try:
            adapter.check(model)
        except SettingError:
            refused.add(name)
            continue
        with torch.no_grad():
            logits = model(IDS).logits
            with adapter.added(model):
                new = model(asked(adapter, model)).logits[:, -16:]
                assert name == "soft prompt" or torch.equal(new, logits)
                moved(model, adapter)
                assert not torch.allclose(model(asked(adapter, model)).logits[:, -16:], new)
        assert built(model) == structure
    assert refused == REFUSED.get(kind, set())


def test_ia3_scales_keys_values_and_what_enters_down_proj(llama, checkpoint):
    by_hand = load_model(checkpoint)
    with torch.no_grad(), IA3().added(llama.model):
        moved(llama.model, IA3())
        for layer, plain in zip(llama.model.model.layers, by_hand.model.layers, strict=True):
            for ours, theirs in (
                (layer.self_attn.k_proj, plain.self_attn.k_proj),
                (layer.self_attn.v_proj, plain.self_attn.v_proj),
            ):
                theirs.weight.mul_(ours.ia3_l["attack"])
            plain.mlp.down_proj.weight.mul_(layer.mlp.down_proj.ia3_l["attack"])
        assert_close(llama.model(IDS).logits, by_hand(IDS).logits)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
def test_adalora_trains_as_pefts_own_model_does(llama, checkpoint):
    adapter, num_steps, optimizer = AdaLoRA(1, 3, warm_up_ratio=0.2, final_ratio=0.3), 10, Optimizer(1e-2, clip_norm=None)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    more = {"lora_alpha": 16, "target_modules": names, "total_step": num_steps, "tinit": 2, "tfinal": 3, "task_type": "CAUSAL_LM"}
    torch.manual_seed(3)
    theirs = get_peft_model(load_model(checkpoint), AdaLoraConfig(init_r=3, target_r=1, **more))
    torch.manual_seed(3)
    with trainable(llama, llama.model, adapter):
        ours = {n: p for n, p in llama.model.named_parameters() if p.requires_grad}
        reference = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for a, b in zip(ours.values(), reference.values(), strict=True):
                b.copy_(a)
        task = adapter.around(Plain(lambda batch: llama.model(**batch).loss), llama.model, num_steps)
        opt, schedule = optimizer.build(list(reference.values()), num_steps)
        steps = train_steps(llama, task, lambda step: {"input_ids": IDS + step, "labels": IDS + step}, num_steps, optimizer)
        for step, loss in steps:
            value = theirs(input_ids=IDS + step - 1, labels=IDS + step - 1).loss
            assert_close(float(loss), value.item())
            value.backward()
            opt.step()
            schedule.step()
            theirs.base_model.update_and_allocate(step)
            opt.zero_grad()
            assert_close(list(ours.values()), list(reference.values()))
        left = sum(int((layer.lora_E["attack"] != 0).sum()) for layer in llama.model.modules() if isinstance(layer, SVDLinear))
        assert left == 14  # rank 1 on average


def test_a_layer_without_a_token_has_no_importance_and_does_not_stop_adalora(llama):
    adapter = AdaLoRA(1, 3)
    with trainable(llama, llama.model, adapter):
        task = adapter.around(Plain(lambda batch: llama.model.model.layers[0](**batch)[0].square().mean()), llama.model, 4)
        states = torch.randn(2, 16, 32)
        where = llama.model.model.rotary_emb(states, torch.arange(16)[None])
        batch = {"hidden_states": states, "position_embeddings": where}
        for _ in train_steps(llama, task, lambda step: batch, 4, Optimizer(1e-2)):
            pass
        kept = {n: bool(p.any()) for n, p in llama.model.named_parameters() if ".lora_E." in n}
    assert {n.split(".layers.")[1][0] for n, any_left in kept.items() if any_left} == {"0"}


def test_adalora_counts_over_phases(tmp_path, checkpoint):
    left, settings = [], FAST | {"num_attack_steps": 4, "score_steps": [4]}

    def look(target: Target) -> None:
        layers = [layer for layer in target.module.model.modules() if isinstance(layer, SVDLinear)]
        left.append(sum(int((layer.lora_E["attack"] != 0).sum()) for layer in layers))

    attacked(
        tmp_path,
        Defense(checkpoint),
        AdapterAttack("open_weight", AdaLoRA(1, 3), phases=[Phase("harmful", 2)] * 2, **settings),
        look,
    )
    assert left[-1] == 14  # rank 1 on average


@pytest.mark.parametrize(("num_steps", "ratio"), [(3, 0.7), (1, 0.0), (2, 0.5)])
def test_adalora_refuses_to_end_its_budget_before_a_second_step(num_steps, ratio):
    message = (
        f"num_attack_steps must leave AdaLoRA two steps or more before its last ones, got {num_steps} with final_ratio {ratio}"
    )
    with pytest.raises(SettingError, match=message):
        AdapterAttack("open_weight", AdaLoRA(final_ratio=ratio), **(FAST | {"num_attack_steps": num_steps}))


@pytest.mark.parametrize(("num_steps", "ratio"), [(3, 0.6), (2, 0.3)])
def test_adalora_takes_the_fewest_steps_that_it_can(tmp_path, checkpoint, num_steps, ratio):
    attack = AdapterAttack("open_weight", AdaLoRA(1, 3, final_ratio=ratio), **(FAST | {"num_attack_steps": num_steps}))
    assert len(attacked(tmp_path, Defense(checkpoint), attack).rows) == 2


def test_orthogonal_factors_cost_nothing(llama):
    with torch.no_grad(), AdaLoRA(1, 3).added(llama.model):
        for layer in llama.model.modules():
            if isinstance(layer, SVDLinear):
                nn.init.orthogonal_(layer.lora_A["attack"])
                nn.init.orthogonal_(layer.lora_B["attack"])
        assert float(orthogonality(llama.model)) < 1e-5


PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 8, 9], [5, 6, 7], [20, 21]]  # each begins as the one before does, but the last


def edited_by_hand(model: Any, edit: Any, prompt: list[int], answer: list[int], first: int, last: int) -> torch.Tensor:
    """Logits of a whole row, whose ids are plain and whose places are counted."""
    places = [i for i in range(len(prompt)) if i < first or i >= len(prompt) - last]

    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        states = out[0] if isinstance(out, tuple) else out
        new = states.clone()
        r, w, b = edit.rotation, edit.source.weight, edit.source.bias
        for place in places:
            h = states[0, place]
            new[0, place] = h + r.T @ (w @ h + b - r @ h)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    handle = model.model.layers[0].register_forward_hook(hook)
    try:
        return model(torch.tensor([prompt + answer])).logits[0]
    finally:
        handle.remove()


@pytest.mark.parametrize("layout", ["prefix_tree", "padded"])
def test_reft_edits_the_ends_of_prompts_in_passes_and_in_answers_and_nothing_else(llama, checkpoint, layout):
    use_layout(llama.model, layout, torch.float32)
    model, adapter = llama.model, LoReFT(2, [0], first=1, last=2)
    plain = load_model(checkpoint)
    with torch.no_grad(), adapter.added(model):
        moved(model, adapter)
        (edit,) = model.attack
        assert_close(edit.rotation @ edit.rotation.T, torch.eye(2))
        answers = generate(model, llama.tokenizer, [adapter.prompt(prompt, model) for prompt in PROMPTS], 5)
        rows = []
        for prompt, text in zip(PROMPTS, answers, strict=True):
            ids: list[int] = []
            for _ in range(5):
                ids.append(int(edited_by_hand(plain, edit, prompt, ids, 1, 2)[-1].argmax()))
            assert llama.tokenizer.decode(ids).startswith(text)
            rows.append(ids)
        assert len({tuple(row) for row in rows}) > 1
        width = max(len(prompt) + 5 for prompt in PROMPTS)
        asked = [adapter.prompt(prompt, model) + ids for prompt, ids in zip(PROMPTS, rows, strict=True)]
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in asked])
        batch = {"input_ids": torch.tensor([row + [0] * (width - len(row)) for row in asked]), "attention_mask": mask}
        ours = run(model, batch, logits_at=mask.bool()).logits
        expected = torch.cat([edited_by_hand(plain, edit, prompt, ids, 1, 2) for prompt, ids in zip(PROMPTS, rows, strict=True)])
        assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_reft_trains_alike_where_layers_are_computed_again(checkpoint):
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        module = Defense(checkpoint, backbone=Backbone(activation_checkpointing=again))
        module.configure_model()
        adapter = LoReFT(2, [0], 1, 1)
        with trainable(module, module.model, adapter):
            moved(module, adapter)
            module.train()
            ids = asked(adapter, module.model)
            module.model(ids, labels=IDS).loss.backward()
            found.append({n: p.grad for n, p in module.model.named_parameters() if p.requires_grad})
    assert len(found[0]) == 3
    assert_close(found[0], found[1])


@pytest.mark.parametrize("name", [name for name in ADAPTERS if "head" not in name])
def test_an_attack_trains_and_asks_as_the_adapter_has_it_and_step_0_is_plain(tmp_path, checkpoint, name):
    adapter, seen, trained = ADAPTERS[name], [], []
    attack = AdapterAttack("open_weight", adapter, **FAST)
    module = Defense(checkpoint)
    sft_loss, generate = module.sft_loss, module.generate
    module.sft_loss = lambda batch: trained.append(batch) or sft_loss(batch)
    module.generate = lambda prompts, *rest: seen.append(prompts) or generate(prompts, *rest)
    attacked(tmp_path, module, attack)
    plain = [
        [prompt_ids(row, module.tokenizer) for row in rows]
        for rows in (module.data.evaluation.harmful, module.data.evaluation.benign, module.data.evaluation.task)
    ]
    assert seen[:3] == plain
    assert seen[3:] == [[adapter.prompt(ids, module.model) for ids in rows] for rows in plain]
    for batch in trained[-3:]:  # those before are of the test loop
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            start = next(i for i, label in enumerate(labels) if label != -100)
            size = table_shape(module.model)[0]
            read = [i - size if name == "reft" and i >= size else i for i in ids[:start] if name == "reft" or i < size]
            assert ids[:start] == adapter.prompt(read, module.model)
            assert labels[start] == ids[start]


def test_edited_states_are_refused_where_a_service_computes_several_passes_again(tmp_path, checkpoint):
    kind, settings = DEFENSES["sbr"]
    module = kind(checkpoint, backbone=Backbone(activation_checkpointing=True), **settings)
    with pytest.raises(SettingError, match="activation_checkpointing must be false for LoReFT at a service that defends itself"):
        attacked(tmp_path, module, AdapterAttack("finetuning_service", LoReFT(), **FAST))


# ---- few attention heads


def test_scales_and_biases_act_on_what_enters_the_output_projections(llama, checkpoint):
    plain, dim = load_model(checkpoint), 16
    with torch.no_grad(), AttentionHeads().added(llama.model):
        edits = llama.model.attack
        edits.scale[0, 1] = torch.linspace(-1, 1, dim)
        edits.scale[1, 0] = 3.0
        for layer, head in ((0, 1), (1, 0)):
            columns = slice(head * dim, (head + 1) * dim)
            plain.model.layers[layer].self_attn.o_proj.weight[:, columns] *= 1 + edits.scale[layer, head]
        assert_close(llama.model(IDS).logits, plain(IDS).logits)
        edits.choose(1)
        assert edits.chosen.tolist() == [2]  # layer 1, head 0
        assert {name for name, p in llama.model.named_parameters() if p.requires_grad} == {"attack.bias"}
        reference = load_model(checkpoint)
        assert torch.equal(llama.model(IDS).logits, reference(IDS).logits)
        edits.bias.fill_(0.7)
        shift = reference.model.layers[1].self_attn.o_proj.weight[:, :dim].sum(1) * 0.7
        reference.model.layers[1].self_attn.o_proj.bias = nn.Parameter(shift)  # folded
        assert_close(llama.model(IDS).logits, reference(IDS).logits)


def test_lofit_trains_scales_then_biases_of_the_heads_that_scaled_most_and_nothing_else(tmp_path, checkpoint):
    seen: list[tuple[Any, ...]] = []

    def look(target: Target) -> None:
        inside = bits(target.module)
        edits = getattr(target.module.model, "attack", None)
        kept = {n: b for n, b in inside.items() if ".attack." not in n}
        seen.append((kept, edits and (edits.scale.detach().clone(), edits.bias.detach().clone(), edits.chosen.clone())))

    settings = FAST | {"num_attack_steps": 6, "score_steps": [1, 2, 3, 6], "optimizer": Optimizer(1e-2)}
    module = Defense(checkpoint)
    rows = attacked(tmp_path, module, LoFiT("open_weight", 2, 3, **settings), look).rows
    assert all(same_bits(kept, seen[0][0]) for kept, _ in seen)
    (_, none), (_, (first, *_)), _, (_, (scale, bias, chosen)), (_, (dropped, trained, heads)) = seen
    assert none is None
    assert len(bias) == len(chosen) == 0
    assert first.ne(0).any()
    assert set(heads.tolist()) == set(scale.norm(dim=-1).flatten().topk(2).indices.tolist())
    assert not dropped.any()
    assert trained.shape == (2, 16)
    assert trained.ne(0).any(1).all()
    assert {row.trained for row in rows} == {"scales of 4 attention heads, then a bias of 2: 32 parameters"}
    assert not hasattr(module.model, "attack")


def test_a_strong_penalty_keeps_scales_at_nothing(tmp_path, checkpoint):
    sizes = []

    def look(target: Target) -> None:
        if isinstance(edits := getattr(target.module.model, "attack", None), HeadEdits):
            sizes.append(float(edits.scale.detach().abs().sum()))

    for weight in (0.0, 1e3):
        settings = FAST | {"num_attack_steps": 21, "score_steps": [20]}
        attack = LoFiT("open_weight", 1, 20, Optimizer(1e-2, "sgd", clip_norm=1.0), weight, **settings)
        attacked(tmp_path / str(weight), Defense(checkpoint), attack, look)
    assert sizes[1] < 0.2 * sizes[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 0}, "num_heads must be >= 1 and l1_weight >= 0, got 0"),
        ({"num_selection_steps": 3}, "num_selection_steps must be >= 1 and < num_attack_steps, 3, got 3"),
        ({"num_selection_steps": 1, "num_heads": 5}, "num_heads must be at most the number of attention heads, 4, got 5"),
    ],
)
def test_a_wrong_setting_of_lofit_says_what_it_must_be(tmp_path, checkpoint, settings, message):
    with pytest.raises(SettingError, match=message):
        attacked(tmp_path, Defense(checkpoint), LoFiT("open_weight", **(FAST | settings)))


# ---- on two ranks


def two_ranks(rank: int, checkpoint: str) -> None:
    def prepare(model: Any) -> None:
        add_adapter(model, LoRA(rank=2), "defense")

    whole = load_model(checkpoint)
    torch.manual_seed(2)
    prepare(whole)
    train(whole, "defense")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    model, _ = sharded(whole if rank == 0 else None, mesh, torch.device("cpu"), MixedPrecisionPolicy(), prepare)
    for name, adapter in ADAPTERS.items():
        found = []
        for m in (whole, model):
            torch.manual_seed(1)
            with trainable(m, m, adapter):
                moved(m, adapter)
                rows = slice(None) if m is whole else slice(rank, rank + 1)  # a row a rank
                ids = asked(adapter, m)[rows]
                labels = torch.cat([torch.full((len(ids), ids.shape[1] - 16), -100), IDS[rows]], 1)
                m.train()(ids, labels=labels).loss.backward()
                trained = [p for p in m.parameters() if p.requires_grad]
                average_gradients(trained)
                reshard(m)
                found.append([p.grad.clone() for p in trained])
        assert_close(found[1], found[0], msg=lambda text, name=name: f"{name}: {text}")
        assert all(gradient.any() for gradient in found[0])


def test_adapters_get_the_gradients_of_one_process_on_sharded_adapted_weights(tmp_path, checkpoint):
    on_ranks(two_ranks, tmp_path, save_toy_checkpoint(tmp_path / "untied", tied=False))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaLoRA(4, 4), "rank of AdaLoRA must be >= 1 and < first_rank, got 4 and 4"),
        (lambda: AdaLoRA(orthogonality_weight=-1), "orthogonality_weight must be >= 0, got -1"),
        (lambda: AdaLoRA(warm_up_ratio=0.5, final_ratio=0.5), "together < 1, got 0.5 and 0.5"),
        (lambda: PromptTuning(0), "num_tokens must be >= 1, got 0"),
        (lambda: LoReFT(0), "rank of LoReFT must be >= 1, got 0"),
        (lambda: LoReFT(first=0, last=0), "first and last must be >= 0, and not both 0, got 0 and 0"),
        (lambda: LoReFT(layers=[]), "layers must name layers or be null, got an empty list"),
    ],
)
def test_a_wrong_setting_of_an_adapter_says_what_it_must_be(make, message):
    with pytest.raises(SettingError, match=message):
        make()


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (LoReFT(layers=[2]), r"layers must lie between 0 and 1, got \[2\]"),
        (LoReFT(rank=33), "rank of LoReFT must be at most the width of the states, 32, got 33"),
        (AdaLoRA(target_modules=["nope"]), "has no 'nope'"),
        (IA3(["nope"], []), "has no 'nope'"),
        (PromptTuning(2040), "adapter must leave prompt and answer within 2048 positions, and they need 20"),
    ],
)
def test_an_adapter_that_does_not_fit_the_model_is_refused(tmp_path, checkpoint, adapter, message):
    with pytest.raises(SettingError, match=message):
        attacked(tmp_path, Defense(checkpoint), AdapterAttack("open_weight", adapter, **FAST))
