import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import ANY, SIZES, looking, save_toy_checkpoint, toy_data, toy_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from casehard import Defense, KernelAblation, LoRA, RefusalAblation, SettingError
from casehard.callbacks.attack import Attack, Target
from casehard.callbacks.direction_edit import Place
from casehard.callbacks.results import Results
from casehard.datamodules.chat import prompt_ids
from casehard.datamodules.row import Row
from casehard.engine.anatomy import decoder_layers, residual_parameters
from casehard.engine.directions import Kernel, ablate, orthonormal

SMALL: dict[str, Any] = {"num_samples": 10, "batch_size": 4}
ALIGNED = "models/sandbox/aligned"


def run(folder: Path, checkpoint: str, attack: Attack, data=None) -> list[Target]:
    """The target of an attack, each time that it is scored; its weights are given back then, so what writes is copied."""
    seen = []

    def look(target: Target) -> None:
        if target.state:
            written = [(p.detach().clone(), axis) for p, axis in residual_parameters(target.module.model)]
            target.state.setdefault("written", []).append(written)
            seen.append(target)

    toy_trainer(folder, callbacks=[looking(attack, look)]).test(Defense(checkpoint), datamodule=data or toy_data(), verbose=False)
    return seen


def attacked(folder: Path, checkpoint: str, data=None, **settings) -> Target:
    """The target of a refusal ablation after its last step."""
    return run(folder, checkpoint, RefusalAblation(**(SMALL | ANY | settings)), data)[-1]


def basis_of(target: Target) -> Tensor:
    """All that was taken out in the end."""
    basis: Tensor = target.state["found"][-1][2]
    return basis


def planted(folder: Path, directions: Sequence[Tensor], tied: bool = True) -> str:
    """Write a model: tokens of harmful prompts alone lie along all ``directions``; layer i carries the mean of the i-th to later
    tokens, and no more."""
    tokenizer, data = AutoTokenizer.from_pretrained("models/sandbox/base"), toy_data()
    sizes = SIZES | {"vocab_size": len(tokenizer), "num_hidden_layers": len(directions) + 1}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **ends, tie_word_embeddings=tied, initializer_range=0.2))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    toy_trainer(folder, callbacks=[]).test(Defense(str(folder)), datamodule=data, verbose=False)
    harmful, harmless = ({i for row in data.rows[kind] for i in prompt_ids(row, tokenizer)} for kind in ("harmful", "benign"))
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        for direction in directions:
            embeddings -= (embeddings @ direction)[:, None] * direction
        for direction, layer in zip(directions, model.model.layers, strict=False):
            embeddings[sorted(harmful - harmless)] += 5 * direction
            for matrix in (layer.self_attn.q_proj, layer.mlp.down_proj):
                matrix.weight.zero_()
            layer.self_attn.v_proj.weight.copy_(torch.outer(direction, direction))
            layer.self_attn.o_proj.weight.copy_(torch.eye(32))
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_planted_direction_is_recovered_and_taken_out_of_all_that_writes(tmp_path, tied):
    direction = torch.nn.functional.normalize(torch.randn(32), dim=0)
    checkpoint = planted(tmp_path / "model", [direction], tied)
    target = attacked(tmp_path, checkpoint, token=0)
    (found,) = basis_of(target).float()
    assert (found @ direction).item() == pytest.approx(1, abs=1e-4)
    (written,) = target.state["written"]
    assert len(written) == 1 + 2 * 2  # embeddings, then attention and MLP of two layers: no other weight writes there
    for weight, axis in written:
        assert (weight.movedim(axis, -1) @ found).abs().max() < 1e-5


@pytest.mark.parametrize("seed", [0, 1])
def test_of_two_planted_directions_one_phase_leaves_one_and_two_leave_none(tmp_path, seed):
    torch.manual_seed(seed)
    directions = orthonormal(torch.randn(2, 32, dtype=torch.float64), torch.zeros(0, 32, dtype=torch.float64))
    checkpoint = planted(tmp_path / "model", directions.float())
    apart = {}

    def look(target: Target) -> None:
        states = []
        for kind in ("harmful", "benign"):
            prompts = [prompt_ids(row, target.module.tokenizer) for row in target.data.rows[kind][:8]]
            with torch.no_grad():
                outs = [
                    target.module.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0, -1] for ids in prompts
                ]
            states.append(torch.stack(outs).mean(dim=0))
        apart[len(target.state.get("found", []))] = (states[0] - states[1]).norm().item()

    attack = RefusalAblation(**(SMALL | ANY), token=0, num_phases=2, score_steps=[1, 2])
    toy_trainer(tmp_path, callbacks=[looking(attack, look)]).test(Defense(checkpoint), datamodule=toy_data(), verbose=False)
    assert apart[1] > 0.3 * apart[0] > 0
    assert apart[2] < 1e-4 * apart[0]


def mean_states(model, tokenizer, rows: list[Row], layer: int, token: int) -> Tensor:
    """In float64, prompt by prompt."""
    with torch.no_grad():
        prompts = [torch.tensor([prompt_ids(row, tokenizer)]) for row in rows]
        states = [model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0, -1 - token] for ids in prompts]
    return torch.stack(states).double().mean(dim=0)


@pytest.mark.parametrize("select", ["refusal", "loss"])
def test_directions_and_what_chooses_among_them_are_those_worked_out_by_hand(tmp_path, select):
    data = toy_data()
    target = attacked(tmp_path, ALIGNED, data, select=select)
    rows = RefusalAblation(**SMALL).rows(data, target.seed)
    harmful, harmless = rows[:10], rows[10:]
    assert set(harmful) <= set(data.rows["harmful"])
    assert set(harmless) <= set(data.rows["benign"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(ALIGNED, dtype=torch.float32).eval(), target.module.tokenizer
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    refusals = tokenizer.convert_tokens_to_ids(["I", "Sorry"])
    ((best, values, _),) = target.state["found"]
    expected, units = {}, {}
    for place in (Place(token, layer) for token in (0, 1) for layer in (1, 2, 3)):
        model.load_state_dict(start | {"lm_head.weight": start["model.embed_tokens.weight"]})
        means = [mean_states(model, tokenizer, part[:8], place.layer, place.token) for part in (harmful, harmless)]
        units[place] = torch.nn.functional.normalize(means[0] - means[1], dim=0)
        project = (torch.eye(len(means[0])) - torch.outer(units[place], units[place])).float()
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ project)
            for block in model.model.layers:
                for matrix in (block.self_attn.o_proj, block.mlp.down_proj):
                    matrix.weight.copy_(project @ matrix.weight)
        by_hand = refusing if select == "refusal" else loss
        expected[place] = by_hand(model, tokenizer, harmful[8:], harmless[8:], refusals)
    assert values == pytest.approx(expected, rel=1e-3)
    assert best == min(values, key=values.__getitem__)
    torch.testing.assert_close(basis_of(target)[0], units[best], rtol=1e-4, atol=1e-5)


def refusing(model, tokenizer, harmful: list[Row], harmless: list[Row], refusals: list[int]) -> float:
    odds = []
    for row in harmful:
        with torch.no_grad():
            p = model(input_ids=torch.tensor([prompt_ids(row, tokenizer)])).logits[0, -1].softmax(dim=0)[refusals].sum().item()
        odds.append(torch.logit(torch.tensor(p, dtype=torch.float64)).item())
    return sum(odds) / len(odds)


def loss(model, tokenizer, harmful: list[Row], harmless: list[Row], refusals: list[int]) -> float:
    total, number = 0.0, 0
    for row in harmful + harmless:
        before = prompt_ids(row, tokenizer)
        ids = tokenizer.apply_chat_template(row.chat(answered=True), tokenize=False) + tokenizer.eos_token
        ids = [*tokenizer(ids, add_special_tokens=False)["input_ids"]]
        ids = ids[: ids.index(tokenizer.eos_token_id, len(before)) + 1]
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        answer = range(len(before), len(ids))
        total -= sum(log_probs[i - 1, ids[i]].item() for i in answer)
        number += len(answer)
    return total / number


def test_a_direction_that_breaks_a_bound_is_not_chosen(tmp_path):
    howto = {"harmless": ["sandbox:attacker/howto#train[:40]"], "num_samples": 20}
    free = attacked(tmp_path, ALIGNED, **howto)
    bound = attacked(tmp_path, ALIGNED, **(howto | {"kl_threshold": 0.1, "steering_threshold": 0.0}))
    ((_, free_values, _),), ((best, values, _),) = free.state["found"], bound.state["found"]
    assert len(values) < len(free_values)  # some do not steer
    kept = {place: value for place, value in values.items() if value < float("inf")}
    assert kept.items() < free_values.items()
    assert best == min(kept, key=kept.__getitem__)


@pytest.mark.parametrize("estimated_on", [None, ALIGNED])
def test_a_run_in_which_no_direction_is_left_says_so_and_leaves_the_model_as_it_was(tmp_path, estimated_on):
    said = {"refusal": r"kl_threshold \(1e-09\) and steering_threshold \(0\)", "harm": r"kl_threshold \(1e-09\)"}
    attacks = [
        RefusalAblation(**SMALL, select=select, kl_threshold=1e-9, num_phases=2, estimated_on=estimated_on, name=select)
        for select in said
    ]
    before, seen = dict(AutoModelForCausalLM.from_pretrained(ALIGNED, dtype=torch.float32).named_parameters()), []

    def look(target: Target) -> None:
        seen.append(all(torch.equal(p, before[name]) for name, p in target.module.model.named_parameters()))

    results = Results(str(tmp_path), export=False)
    callbacks = [results, *(looking(attack, look) for attack in attacks)]
    toy_trainer(tmp_path, callbacks=callbacks).test(Defense(ALIGNED), datamodule=toy_data(), verbose=False)
    assert seen == [True] * 4
    for attack, bounds in said.items():
        (row,) = [row for row in results.rows if row.attack == attack and row.num_attack_steps == 2]
        assert re.search(rf"no direction was left within {bounds}: nothing was changed", row.note)


def test_the_rule_harm_takes_the_direction_whose_answers_are_the_most_harmful(tmp_path):
    data = toy_data(max_new_tokens=32)
    target = attacked(tmp_path, ALIGNED, data, select="harm", harmless=["sandbox:attacker/howto#train[:40]"], num_samples=20)
    ((best, values, _),) = target.state["found"]
    assert best.token == 1  # before the answer opens: docs/results/zoo.md
    assert values[best] == min(values.values()) <= -50
    assert max(values[place] for place in values if place.token == 0) > -50


def test_phases_begin_with_the_single_direction_and_all_are_orthonormal(tmp_path, checkpoint):
    single = attacked(tmp_path, checkpoint)
    phases = attacked(tmp_path, checkpoint, num_phases=3)
    assert torch.equal(basis_of(phases)[:1], basis_of(single))
    wide = attacked(tmp_path, checkpoint, num_phases=2, rank=3)
    for target, num in ((phases, 3), (wide, 6)):
        basis = basis_of(target)
        torch.testing.assert_close(basis @ basis.mT, torch.eye(num, dtype=basis.dtype))


def test_rank_k_takes_out_the_top_singular_vectors_of_the_harmful_states(tmp_path):
    data = toy_data()
    target = attacked(tmp_path, ALIGNED, data, rank=2, token=0, layer=2)
    rows = RefusalAblation(**SMALL).rows(data, target.seed)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(ALIGNED, dtype=torch.float32).eval(), target.module.tokenizer
    harmful = torch.stack([mean_states(model, tokenizer, [row], 2, 0) for row in rows[:8]])
    centred = harmful - mean_states(model, tokenizer, rows[10:18], 2, 0)
    top = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    basis = basis_of(target)
    torch.testing.assert_close(basis.mT @ basis, top.mT @ top, rtol=1e-3, atol=1e-5)


def test_what_more_dimensions_are_worth_is_what_the_model_without_all_of_them_does(tmp_path):
    data, worth = toy_data(), []
    refusals = AutoTokenizer.from_pretrained(ALIGNED).convert_tokens_to_ids(["I", "Sorry"])

    def look(target: Target) -> None:
        rows = RefusalAblation(**SMALL).rows(data, target.seed)
        if target.state:
            ((best, values, _),) = target.state["found"]
            by_hand = refusing(target.module.model, target.module.tokenizer, rows[8:10], [], refusals)
            worth.append((values[best], by_hand))

    attack = RefusalAblation(**(SMALL | ANY), rank=3)
    toy_trainer(tmp_path, callbacks=[looking(attack, look)]).test(Defense(ALIGNED), datamodule=data, verbose=False)
    ((value, by_hand),) = worth
    assert value == pytest.approx(by_hand, rel=1e-3)


def test_answers_cost_a_pass_over_their_prompts_and_every_token(tmp_path, checkpoint, monkeypatch):
    data, answers, respond = toy_data(), [], RefusalAblation.respond

    def heard(self: RefusalAblation, target: Target, rows: list[Row], max_new_tokens: int) -> list[str]:
        texts = respond(self, target, rows, max_new_tokens)
        answers.extend(text for row, text in zip(rows, texts, strict=True) if row in data.rows["harmful"])  # not the scoring's
        return texts

    monkeypatch.setattr(RefusalAblation, "respond", heard)
    target = attacked(tmp_path, checkpoint, data, select="harm", layer=1)
    tokenizer, num = target.module.tokenizer, len(target.state["found"][0][1])
    assert num == 2  # the template's last tokens
    assert len(answers) == num * 2
    rows = [len(prompt_ids(row, tokenizer)) for row in RefusalAblation(**SMALL).rows(data, target.seed)]
    harmful, harmless = rows[:10], rows[10:]
    assert target.passes == pytest.approx((2 * 2 + 1 + num * (1 + 1)) / 3)  # means, the model before, and KL and answers of each
    written = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in answers)
    assert target.tokens[1] == sum(harmful[:8] + harmless) + num * sum(harmful[8:] + harmless[8:]) + written


def test_the_last_fifth_of_the_layers_is_not_tried(tmp_path):
    directions = torch.nn.functional.normalize(torch.randn(4, 32), dim=1)
    target = attacked(tmp_path, planted(tmp_path / "model", directions), select="loss", token=0)
    ((_, values, _),) = target.state["found"]
    assert {place.layer for place in values} == {1, 2, 3}  # of five


def test_a_stale_direction_is_the_one_of_the_model_that_it_was_estimated_on(tmp_path, checkpoint):
    other = save_toy_checkpoint(tmp_path / "other", seed=1)
    fresh, stale, theirs = (
        attacked(tmp_path, where, **settings)
        for where, settings in ((checkpoint, {}), (checkpoint, {"estimated_on": other}), (other, {}))
    )
    assert torch.equal(basis_of(stale), basis_of(theirs))
    assert not torch.allclose(basis_of(stale), basis_of(fresh), atol=0.1)
    same = attacked(tmp_path, checkpoint, estimated_on=checkpoint)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(same.state["written"][0], fresh.state["written"][0], strict=True))
    with pytest.raises(SettingError, match="estimated_on must be of the defended model's architecture"):
        attacked(tmp_path, checkpoint, estimated_on=ALIGNED)


def test_a_wrong_setting_says_what_it_must_be(tmp_path, checkpoint):
    for settings, said in (
        ({"num_samples": 4}, r"num_samples must be >= 5, .* got 4"),
        ({"select": "best"}, "select must be refusal, harm or loss, got 'best'"),
        ({"num_phases": 0}, "num_phases and rank must be >= 1, got 0 and 1"),
        ({"kl_threshold": 0}, "kl_threshold must be > 0, got 0"),
    ):
        with pytest.raises(SettingError, match=said):
            RefusalAblation(**settings)
    for settings, said in (
        ({"layer": 2}, r"layer must lie in 1 to 1, .* got 2"),
        ({"token": 900}, r"token must lie in 0 to \d+, which every prompt has, or be null, got 900"),
        (
            {"harmless": ["sandbox:test/howto#train[:8]"], "num_samples": 5},
            "harmless must share no prompt with what is scored, and 6 do",
        ),
    ):
        with pytest.raises(SettingError, match=said):
            attacked(tmp_path, checkpoint, **settings)
    with pytest.raises(SettingError, match=r"direction must lie in \(0, 1\], got 0"):
        KernelAblation(direction=0)
    with pytest.raises(SettingError, match=r"a kernel must have position and floor in \[0, 1\] and half_width > 0"):
        Kernel(half_width=0)


def test_an_attacker_may_bring_harmless_rows_and_name_the_place(tmp_path, checkpoint):
    place = {"layer": 1, "token": 0}
    own = attacked(tmp_path, checkpoint, **place, harmless=["sandbox:attacker/howto#train[:20]"])
    other = attacked(tmp_path, checkpoint, **place)
    assert own.state["found"][0][:2] == (Place(0, 1), {Place(0, 1): 0.0})
    assert not torch.allclose(basis_of(own), basis_of(other), atol=0.1)


def test_adapters_around_what_writes_are_edited_with_it(checkpoint):
    module, direction = Defense(checkpoint, lora=LoRA(rank=2)), torch.nn.functional.normalize(torch.ones(32), dim=0)
    module.configure_model()
    streams = []
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.add_("lora_B" in name)
        ablate(module.model, direction[None])
        decoder_layers(module.model)[1].register_forward_hook(lambda _, args, out: streams.extend([args[0], out]))
        module.model.eval()(input_ids=torch.tensor([[5, 6, 7]]))
    assert all((stream @ direction).abs().max() < 1e-4 * stream.norm() for stream in streams)


def test_a_direction_between_two_layers_is_between_theirs(tmp_path):
    found = {}
    for depth in (1 / 3, 0.5, 2 / 3):
        attack = KernelAblation(**SMALL, direction=depth, attention=Kernel(0.0), mlp=Kernel(0.0))
        (target,) = run(tmp_path, ALIGNED, attack)
        found[depth] = target.state["direction"]
    first, between, second = found.values()
    torch.testing.assert_close(between, torch.nn.functional.normalize(first + second, dim=0))
    assert (first @ second) < 0.9
