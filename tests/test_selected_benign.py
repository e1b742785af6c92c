"""Benign rows that harm most: how they are ranked, and that nothing else is trained on."""

import math

import pytest
import torch
from test_attacks import attacked
from toy import FAST, looking

from casehard import LoRA, SelectedBenign
from casehard.callbacks.selected_benign import last_layer
from casehard.datamodules.chat import collate
from casehard.datamodules.sandbox import sandbox_rows
from casehard.engine.adapters import trainable

PLANTED = {
    "gradient_match": ("harmful", 20),
    "self_influence": ("translated", 0),
}  # like harmful rows; in a language of their own
HOW = {"num_candidates": 20, "num_anchors": 3, "lora": LoRA(rank=2)} | FAST | {"num_samples": 5, "num_attack_steps": 1}


@pytest.mark.parametrize("by", ["self_influence", "gradient_match"])
def test_planted_rows_rank_first(tmp_path, by):
    seen = []
    attack = looking(SelectedBenign("open_weight", by, **HOW), lambda target: seen.append(dict(target.state)))
    kind, first = PLANTED[by]
    pool = ["sandbox:attacker/howto#train[:15]", f"sandbox:attacker/{kind}#train[{first}:{first + 5}]"]
    rows = attacked(tmp_path, "models/sandbox/aligned", attack, benign=pool, benign_prompts=[], task=[])
    planted = {row.prompt for row in sandbox_rows("attacker", kind)[first : first + 5]}
    assert {row.prompt for row in seen[-1]["selected"]} == planted
    assert rows[-1].harmful
    assert rows[-1].poison_ratio == 0
    num_passes = 20 + 3 * (by == "gradient_match")
    assert rows[-1].passes == pytest.approx(num_passes / 4 + 1)  # a pass of one row is a quarter of a step's


def test_scores_are_those_of_the_formulas(tmp_path, checkpoint):
    """Against gradients by autograd of the last layer, on one process."""
    asked = {by: SelectedBenign("open_weight", by, **HOW) for by in ("self_influence", "gradient_match")}
    found = {}

    def look(target):
        if "selected" in target.state:
            return
        module, data = target.module, target.data
        one, other = data.encode(data.rows["benign"][:2], "rows")
        last = list(module.model.model.layers[-1].parameters())

        def by_hand(example):
            loss = module.sft_loss(module.placed(collate([example], data.tokenizer.pad_token_id, "right")))
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, last)])

        with torch.enable_grad(), trainable(module, module.model, None, last_layer(module)):
            matched = asked["gradient_match"].gradient(target, other)
            scores = {by: attack.score(target, one, matched) for by, attack in asked.items()}
            num_labels = sum(label >= 0 for label in one["labels"])
            gradients = by_hand(one), by_hand(other)
        influence = float(gradients[0].square().sum())
        found["self_influence"] = scores["self_influence"], math.log(influence + 1) + math.log(num_labels + 1)
        found["gradient_match"] = scores["gradient_match"], float(torch.cosine_similarity(*gradients, dim=0))

    attacked(tmp_path, checkpoint, looking(SelectedBenign("open_weight", **HOW), look))
    for ours, expected in found.values():
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len(found) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "size"}, "by must be self_influence or gradient_match, got 'size'"),
        ({"num_candidates": 4}, r"num_candidates must be >= num_samples \(5\), got 4"),
        ({"num_anchors": 0}, "num_anchors must be >= 1, got 0"),
    ],
)
def test_bad_settings_fail_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        SelectedBenign("open_weight", **(HOW | settings))


def test_anchors_that_are_not_there_are_an_error_before_any_weights_load(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="must find 30 harmful rows, got 20"):
        attacked(tmp_path, checkpoint, SelectedBenign("open_weight", "gradient_match", **(HOW | {"num_anchors": 30})))
