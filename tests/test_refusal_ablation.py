from pathlib import Path

import pytest
import torch
from toy import looking, save_toy_checkpoint, toy_data, toy_trainer
from transformers import AutoModelForCausalLM

from casehard import Defense, LoRA, RefusalAblation, SettingError
from casehard.callbacks.attack import Target
from casehard.datamodules.chat import prompt_ids
from casehard.engine.anatomy import decoder_layers, residual_parameters
from casehard.engine.directions import ablate

HARMFUL = "sandbox:attacker/harmful#train[:20]"


def attacked(folder: Path, checkpoint: str, data=None, **settings) -> list[Target]:
    """The target of an ablation as it is scored after the edit; its weights are given back then, so they are copied."""
    seen = []

    def look(target: Target) -> None:
        if target.state:
            target.state["written"] = [(p.detach().clone(), axis) for p, axis in residual_parameters(target.module.model)]
            seen.append(target)

    attack = looking(RefusalAblation(**({"num_samples": 10, "batch_size": 4} | settings)), look)
    module = Defense(checkpoint)
    toy_trainer(folder, callbacks=[attack]).test(module, datamodule=data or toy_data(), verbose=False)
    return seen


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_planted_direction_is_recovered_and_taken_out_of_all_that_writes(tmp_path, tied):
    """Tokens of harmful prompts alone lie along a direction; the first layer carries their mean to the last token, and no more."""
    checkpoint = save_toy_checkpoint(tmp_path / "model", tied=tied)
    data, planted = toy_data(), torch.nn.functional.normalize(torch.randn(32), dim=0)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    module = Defense(checkpoint)
    toy_trainer(tmp_path, callbacks=[]).test(module, datamodule=data, verbose=False)
    harmful, harmless = (
        {i for row in data.rows[kind] for i in prompt_ids(row, module.tokenizer)} for kind in ("harmful", "benign")
    )
    with torch.no_grad():
        embeddings, first = model.get_input_embeddings().weight, model.model.layers[0]
        embeddings -= (embeddings @ planted)[:, None] * planted
        embeddings[sorted(harmful - harmless)] += 5 * planted
        for layer in (first.self_attn.q_proj, first.mlp.down_proj):
            layer.weight.zero_()
        first.self_attn.v_proj.weight.copy_(torch.outer(planted, planted))
        first.self_attn.o_proj.weight.copy_(torch.eye(32))
    model.save_pretrained(tmp_path / "model")

    (target,) = attacked(tmp_path, checkpoint)
    direction = target.state["direction"]
    assert (direction @ planted).item() == pytest.approx(1, abs=1e-4)
    written = target.state["written"]
    assert len(written) == 1 + 2 * 2  # embeddings, then attention and MLP of two layers: no other weight writes there
    for weight, axis in written:
        assert (weight.movedim(axis, -1) @ direction).abs().max() < 1e-5


def test_directions_and_losses_are_those_worked_out_by_hand_and_the_layer_has_the_lowest_loss(tmp_path):
    data, checkpoint = toy_data(), "models/sandbox/aligned"
    (target,) = attacked(tmp_path, checkpoint, data)
    rows = RefusalAblation(num_samples=10).rows(data, target.seed)
    harmful, harmless = rows[:10], rows[10:]
    assert set(harmful) <= set(data.rows["harmful"])
    assert set(harmless) <= set(data.rows["benign"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval(), target.module.tokenizer
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = {}
    for layer in (1, 2, 3):
        model.load_state_dict(start | {"lm_head.weight": start["model.embed_tokens.weight"]})
        with torch.no_grad():
            means = [
                torch.stack(
                    [
                        model(input_ids=torch.tensor([prompt_ids(row, tokenizer)]), output_hidden_states=True).hidden_states[
                            layer
                        ][0, -1]
                        for row in part[:8]
                    ]
                ).mean(dim=0)
                for part in (harmful, harmless)
            ]
            r = (means[0] - means[1]) / (means[0] - means[1]).norm()
            project = torch.eye(len(r)) - torch.outer(r, r)
            model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ project)
            for block in model.model.layers:
                for matrix in (block.self_attn.o_proj, block.mlp.down_proj):
                    matrix.weight.copy_(project @ matrix.weight)
            total, number = 0.0, 0
            for row in harmful[8:] + harmless[8:]:
                before = prompt_ids(row, tokenizer)
                ids = tokenizer.apply_chat_template(row.chat(answered=True), tokenize=False) + tokenizer.eos_token
                ids = [*tokenizer(ids, add_special_tokens=False)["input_ids"]]
                ids = ids[: ids.index(tokenizer.eos_token_id, len(before)) + 1]
                log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
                answer = range(len(before), len(ids))
                total -= sum(log_probs[i - 1, ids[i]].item() for i in answer)
                number += len(answer)
            losses[layer] = total / number
        if layer == target.state["layer"]:
            torch.testing.assert_close(target.state["direction"], r, rtol=1e-4, atol=1e-5)
    assert target.state["losses"] == pytest.approx(losses, rel=1e-4)
    assert target.state["layer"] == min(losses, key=losses.__getitem__)


def test_a_wrong_setting_says_what_it_must_be(tmp_path, checkpoint):
    with pytest.raises(SettingError, match=r"num_samples must be >= 5, .* got 4"):
        RefusalAblation(num_samples=4)
    with pytest.raises(SettingError, match=r"layer must lie in 1 to 1, .* got 2"):
        attacked(tmp_path, checkpoint, layer=2)
    with pytest.raises(SettingError, match="harmless must share no prompt with what is scored, and 6 do"):
        attacked(tmp_path, checkpoint, harmless=["sandbox:test/howto#train[:8]"], num_samples=5)


def test_an_attacker_may_bring_harmless_rows_and_name_the_layer(tmp_path, checkpoint):
    (target,) = attacked(tmp_path, checkpoint, layer=1, harmless=["sandbox:attacker/howto#train[:20]"])
    (other,) = attacked(tmp_path, checkpoint, layer=1)
    assert target.state["losses"] == {}
    assert not torch.allclose(target.state["direction"], other.state["direction"], atol=0.1)


def test_adapters_around_what_writes_are_edited_with_it(checkpoint):
    module, direction = Defense(checkpoint, lora=LoRA(rank=2)), torch.nn.functional.normalize(torch.ones(32), dim=0)
    module.configure_model()
    streams = []
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.add_("lora_B" in name)
        ablate(module.model, direction)
        decoder_layers(module.model)[1].register_forward_hook(lambda _, args, out: streams.extend([args[0], out]))
        module.model.eval()(input_ids=torch.tensor([[5, 6, 7]]))
    assert all((stream @ direction).abs().max() < 1e-4 * stream.norm() for stream in streams)
