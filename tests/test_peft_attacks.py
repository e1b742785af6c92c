"""Attacks that differ in what trains: their limiting cases. The crossed tests have them in toy.ATTACKS."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from test_adapters import built
from toy import DEFENSES, FAST, bits, looking, save_toy_checkpoint, toy_data, toy_trainer

from casehard import Defense, LoRA, SettingError
from casehard.callbacks.attack import Attack, Target
from casehard.callbacks.head_only import HeadOnly
from casehard.callbacks.results import Results
from casehard.engine.adapters import temporary_adapter

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
