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
