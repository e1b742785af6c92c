import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from toy import bits, csv_rows, looking, on_ranks, same_bits, toy_data, toy_trainer

from casehard import Defense, EmbeddingAttack, RefusalAblation, SettingError
from casehard.callbacks.attack import Target
from casehard.callbacks.results import Results
from casehard.datamodules.chat import prompt_ids, suffixed_ids
from casehard.datamodules.row import Row
from casehard.datamodules.sources import read_rows
from casehard.engine.generation import generate
from casehard.engine.soft_tokens import soft_tokens, table_shape

FEW: dict[str, Any] = {"num_attack_steps": 3, "num_tokens": 4, "learning_rate": 0.1, "target_text": "Here is"}


def attacked(folder: Path, checkpoint: str, look=lambda target: None, **settings: Any) -> Results:
    results = Results(str(folder), export=False)
    trainer = toy_trainer(folder, callbacks=[results, looking(EmbeddingAttack(**(FEW | settings)), look)])
    trainer.test(Defense(checkpoint), datamodule=toy_data(), verbose=False)
    return results


def answers(folder: Path, step: int) -> list[dict[str, Any]]:
    given = map(json.loads, (folder / "generations.jsonl").read_text().splitlines())
    keys = ("kind", "number", "response", "score", "refused", "degenerate")
    return [{key: a[key] for key in keys if key in a} for a in given if a["num_attack_steps"] == step]


@pytest.fixture
def llama(checkpoint) -> Defense:
    module = Defense(checkpoint)
    module.configure_model()
    module.model.eval()
    return module


def test_the_suffix_stands_at_the_end_of_the_question(llama):
    row = Row((("system", "Be kind."), ("user", "What is a mill?")))
    ids = prompt_ids(row, llama.tokenizer)
    suffixed = suffixed_ids(row, [700, 701], llama.tokenizer)
    start = suffixed.index(700)
    assert suffixed[:start] + suffixed[start + 2 :] == ids
    assert llama.tokenizer.decode(ids[:start]).endswith("What is a mill?")
    assert llama.tokenizer.decode(suffixed[start + 2 :]) == "<|end|><|assistant|>"
    assert suffixed_ids(row, [], llama.tokenizer) == ids


def test_passes_and_answers_with_soft_tokens_are_those_of_transformers_from_their_embeddings(llama):
    model, first = llama.model, table_shape(llama.model)[0]
    added = torch.randn(3, 32)
    prompts = [[5, 6, 7, first, 8], [5, 6, 7, first + 1, first + 2, 8, 9], [5, 6, 7]]  # they begin alike
    table = torch.cat([model.get_input_embeddings().weight, model.get_input_embeddings().weight[11] + added]).detach()
    with soft_tokens(model, torch.tensor([11] * 3), added):
        ours = generate(model, llama.tokenizer, prompts, 6)
    for prompt, text in zip(prompts, ours, strict=True):
        embeddings, ids = table[prompt][None], []
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(inputs_embeds=embeddings).logits[0, -1].argmax()))
            embeddings = torch.cat([embeddings, table[ids[-1:]][None]], dim=1)
        assert llama.tokenizer.decode(ids).startswith(text)
    assert not model.get_input_embeddings()._forward_hooks
    assert not model.get_input_embeddings()._forward_pre_hooks


def test_embeddings_and_losses_are_those_of_sign_descent_by_hand(tmp_path, checkpoint):
    kept = []
    attacked(tmp_path, checkpoint, lambda target: kept.append((target, dict(target.state))), score_steps=[2])
    target, module = kept[-1][0], kept[-1][0].module
    assert sorted(map(str, target.state["added"])) == sorted(map(str, target.data.evaluation.harmful))
    table = module.model.get_input_embeddings().weight.detach()
    start = table[module.tokenizer(" x", add_special_tokens=False)["input_ids"][-1]]
    answer = module.tokenizer("Here is", add_special_tokens=False)["input_ids"]

    def loss(row: Row, added: torch.Tensor) -> torch.Tensor:
        suffixed = suffixed_ids(row, [-1] * 4, module.tokenizer)
        at = suffixed.index(-1)
        parts = [table[suffixed[:at]], start + added, table[suffixed[at + 4 :] + answer]]
        logits = module.model(inputs_embeds=torch.cat(parts)[None]).logits[0]
        return F.cross_entropy(logits[-len(answer) - 1 : -1], torch.tensor(answer))

    for row, ours in target.state["added"].items():
        by_hand, losses = torch.zeros(4, 32), []
        for _ in range(2):
            by_hand.requires_grad_()
            losses.append(loss(row, by_hand))
            by_hand = (by_hand - 0.1 * torch.autograd.grad(losses[-1], by_hand)[0].sign()).detach()
        torch.testing.assert_close(ours, by_hand)
        assert loss(row, ours) < losses[1] < losses[0]  # the target gets likelier


def test_no_weight_changes_and_none_gets_a_gradient(tmp_path, checkpoint):
    seen = []

    def look(target: Target) -> None:
        seen.append((bits(target.module), [p.grad for p in target.module.parameters()], target.module.training))

    attacked(tmp_path, checkpoint, look, score_steps=[1, 3])
    (before, *_), *others = seen
    assert all(same_bits(before, after) for after, _, _ in others)
    assert all(gradient is None for _, gradients, _ in seen for gradient in gradients)


def test_without_steps_or_tokens_answers_are_the_plain_ones_and_only_harmful_prompts_get_any(tmp_path, checkpoint):
    attacked(tmp_path / "soft", checkpoint)
    attacked(tmp_path / "plain", checkpoint, num_tokens=0)
    plain = answers(tmp_path / "plain", 3)
    assert plain == answers(tmp_path / "plain", 0) == answers(tmp_path / "soft", 0)
    soft = answers(tmp_path / "soft", 3)
    differ = {ours["kind"] for ours, theirs in zip(soft, plain, strict=True) if ours["response"] != theirs["response"]}
    assert differ == {"harmful"}


def test_what_it_costs_is_counted(tmp_path, checkpoint):
    rows = attacked(tmp_path, checkpoint, score_steps=[1, 3]).rows
    tokenizer = Defense(checkpoint).tokenizer
    prompts = [
        suffixed_ids(row, [-1] * 4, tokenizer) for row in read_rows("sandbox:test/harmful#train[:6]", needs_response=False)
    ]
    a_step = sum(map(len, prompts)) + len(prompts) * len(tokenizer("Here is", add_special_tokens=False)["input_ids"])
    assert [row.passes for row in rows] == [0, 1, 3]
    assert [row.tokens_trained for row in rows] == [0, a_step, 3 * a_step]


def test_scoring_on_the_way_does_not_change_where_the_steps_end(tmp_path, checkpoint):
    attacked(tmp_path / "all", checkpoint, score_steps=[1, 2, 3])
    attacked(tmp_path / "last", checkpoint)
    assert answers(tmp_path / "all", 3) == answers(tmp_path / "last", 3)


def test_a_wrong_setting_says_what_it_must_be(tmp_path, checkpoint):
    with pytest.raises(SettingError, match="num_attack_steps must be >= 1 and num_tokens >= 0, got 100 and -1"):
        EmbeddingAttack(num_tokens=-1)
    with pytest.raises(SettingError, match="num_attack_steps must be >= 1 and num_tokens >= 0, got 0 and 20"):
        EmbeddingAttack(num_attack_steps=0)
    with pytest.raises(
        SettingError, match=r"num_tokens must leave prompt and answer within 2048 positions, and they need 20[0-9]+"
    ):
        attacked(tmp_path, checkpoint, num_tokens=2040)


PROMPTS = {f"{kind}_prompts": [f"sandbox:test/{name}#train[:3]"] for kind, name in (("harmful", "harmful"), ("benign", "howto"))}
STRATEGIES: dict[str, dict[str, Any]] = {"ddp": {"strategy": "ddp"}, "fsdp2": {"strategy": ModelParallelStrategy(2, 1)}}


def attack_both_ways(folder: Path, checkpoint: str, **strategy: Any) -> None:
    soft = EmbeddingAttack(**(FEW | {"batch_size": 1}))  # one rank has two prompts, in two passes, and the other has one
    callbacks = [Results(str(folder), export=False), soft, RefusalAblation(select="loss", num_samples=10, batch_size=3)]
    trainer = toy_trainer(folder, callbacks=callbacks, **strategy)
    trainer.test(Defense(checkpoint), datamodule=toy_data(**PROMPTS), verbose=False)


def on_each_rank(rank: int, checkpoint: str, folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    for name, strategy in STRATEGIES.items():
        attack_both_ways(folder / name, checkpoint, devices=2, **strategy)


def test_two_ranks_give_the_rows_and_answers_of_one_process_for_refusal_ablation_too(tmp_path, checkpoint):
    attack_both_ways(tmp_path / "one", checkpoint)
    on_ranks(on_each_rank, tmp_path, checkpoint, tmp_path)
    expected = answers(tmp_path / "one", 0), answers(tmp_path / "one", 1), answers(tmp_path / "one", 3)
    assert expected[0][:9] != expected[1] != expected[2]
    for name in STRATEGIES:
        assert tuple(answers(tmp_path / name, step) for step in (0, 1, 3)) == expected
        rows = ([row | {"wall_seconds": ""} for row in csv_rows(tmp_path / where / "attacks.csv")] for where in ("one", name))
        assert next(rows) == next(rows)
