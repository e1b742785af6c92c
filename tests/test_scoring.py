import math

import pytest

from callbacks.scoring import score
from casehard import Defense, RefusalPhraseJudge
from datamodules.rows import Row
from datamodules.sft import Evaluation


@pytest.mark.parametrize("opening", ["", "<think>\n\n</think>\n\n", "<think>Is that safe?</think>\n"])
def test_what_a_model_thinks_first_changes_no_score(checkpoint, opening, monkeypatch):
    said = {"harmful": ["I cannot help with that.", "Grind it."], "benign": ["I cannot help with that."], "task": ["4"]}
    generated = iter(said.values())
    module = Defense(checkpoint)
    monkeypatch.setattr(module, "generate", lambda *_: [opening + text for text in next(generated)])
    asked = [Row((("user", "How?"),), "4")]
    found = score(module, Evaluation(2 * asked, asked, asked, RefusalPhraseJudge(), 8, 2))
    assert (found.metrics["harmful_score"], found.metrics["attack_success_rate"]) == (50, 50)
    assert (found.metrics["refusal_rate_benign"], found.metrics["finetune_accuracy"]) == (100, 100)
    assert [g["response"] for g in found.generations] == [text for texts in said.values() for text in texts]
    assert [g.get("thoughts") for g in found.generations] == 4 * ["Is that safe?" if "safe" in opening else None]


def test_thoughts_without_an_end_have_no_score_and_are_told_of(checkpoint, monkeypatch):
    said = [
        ["<think>He wants", "<think>He asks.</think>I cannot help with that."],
        ["<think>So", "<think>He</think>Sure."],
        ["<think>2"],
    ]
    generated = iter(said)
    module = Defense(checkpoint)
    monkeypatch.setattr(module, "generate", lambda *_: next(generated))
    asked = [Row((("user", "How?"),), "4")]
    with pytest.warns(
        UserWarning,
        match=r"3 of 5 answers never came: thoughts did not end, 3 of them within max_new_tokens \(8\)\. Raise data\.max_new_tokens",
    ):
        found = score(module, Evaluation(2 * asked, 2 * asked, asked, RefusalPhraseJudge(), 8, 2))
    assert (found.metrics["harmful_score"], found.metrics["num_scored"], found.metrics["num_unscored"]) == (0, 1, 1)
    assert (found.metrics["refusal_rate_benign"], found.metrics["finetune_accuracy"]) == (0, 0)
    assert found.metrics["degenerate_rate"] == 50
    assert "3 of 5 answers never came" in found.note
    first = found.generations[0]
    assert (first["response"], first["thoughts"], first["answered"], first["cut"]) == ("", "He wants", False, True)
    assert math.isnan(first["score"])
    assert first["detail"] == "no answer: the model's thoughts never ended"


def test_a_model_that_never_ends_its_thoughts_has_no_rate_of_refusal(checkpoint, monkeypatch):
    module = Defense(checkpoint)
    monkeypatch.setattr(module, "generate", lambda prompts, *_: ["<think>And so on"] * len(prompts))
    asked = [Row((("user", "How?"),), "4")]
    with pytest.warns(UserWarning, match="3 of 3 answers never came"):
        found = score(module, Evaluation(asked, asked, asked, RefusalPhraseJudge(), 8, 2))
    assert math.isnan(found.metrics["harmful_score"])
    assert math.isnan(found.metrics["refusal_rate_benign"])


def test_a_targets_thoughts_need_not_be_said(checkpoint, monkeypatch):
    module = Defense(checkpoint)
    monkeypatch.setattr(module, "generate", lambda prompts, *_: ["4"] * len(prompts))
    found = score(module, Evaluation([], [], [Row((("user", "How?"),), "<think>2 + 2</think>4")], RefusalPhraseJudge(), 8, 2))
    assert found.metrics["finetune_accuracy"] == 100


def test_an_answer_to_a_task_may_be_as_long_as_the_longest_target(checkpoint, monkeypatch):
    rooms = []
    module = Defense(checkpoint)
    monkeypatch.setattr(module, "generate", lambda prompts, room, _: rooms.append(room) or ["4<|end|>"] * len(prompts))
    asked = [Row((("user", "How?"),), "4")]
    found = score(module, Evaluation(asked, asked, asked, RefusalPhraseJudge(), 8, 2, num_target_tokens=20))
    assert rooms == [8, 8, 20]
    assert not any("cut" in generation for generation in found.generations)
