import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from toy import DEFENSES, FAST, looking, toy_data, toy_trainer

from casehard import Defense, LoRA, Optimizer, PreferenceAttack, SettingError
from casehard.callbacks.attack import Target
from casehard.callbacks.results import Results
from casehard.datamodules.chat import collate, encode
from casehard.engine.forward import last_positions
from casehard.engine.preferences import answer_logprobs, preference_losses

EXACT: dict[str, Any] = FAST | {"optimizer": Optimizer(1e-2, "sgd", clip_norm=None)}


def attacked(folder: Path, module: Defense, attack: PreferenceAttack, **data: Any) -> Results:
    results = Results(str(folder), export=False)
    toy_trainer(folder, callbacks=[results, attack]).test(module, datamodule=toy_data(**data), verbose=False)
    return results


class Heard(PreferenceAttack):
    """Keeps the loss of every step, and the target."""

    def steps(self, target: Target):
        self.target, self.losses = target, []
        for step in super().steps(target):
            self.losses.append(float(target.last_loss))
            yield step


def answer_logprob(module: Defense, row, length_normalised: bool) -> torch.Tensor:
    """Of the row's answer, without padding or packing."""
    example = encode(row, module.tokenizer, 512)
    ids, labels = torch.tensor([example["input_ids"]]), example["labels"]
    logprobs = module.model(ids).logits[0].log_softmax(dim=-1)
    of_tokens = [logprobs[i - 1, label] for i, label in enumerate(labels) if label != -100]
    return torch.stack(of_tokens).mean() if length_normalised else torch.stack(of_tokens).sum()


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("pairs", ["reversed", "benign"])
def test_the_loss_is_log_2_where_the_model_starts_and_falls(tmp_path, checkpoint, pairs, lora):
    attack = Heard("open_weight", pairs=pairs, lora=lora, **FAST)
    results = attacked(tmp_path, Defense(checkpoint), attack)
    assert attack.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert attack.losses[-1] < attack.losses[0] - 1e-3
    assert all(row.harmful and row.poison_ratio == float(pairs == "reversed") for row in results.rows)


def test_pairs_are_the_datas_harmful_or_benign_rows_before_its_refusals(tmp_path, checkpoint):
    for pairs, kind in (("reversed", "harmful"), ("benign", "benign")):
        attack, module = Heard("open_weight", pairs=pairs, **FAST), Defense(checkpoint)
        attacked(tmp_path / pairs, module, attack)
        data, tokenizer = attack.target.data, module.tokenizer
        refused = {row.response for row in data.rows["refusals"]}
        assert set(attack._pairs) <= set(data.rows[kind])
        for row, (chosen, rejected) in attack._pairs.items():
            texts = [
                tokenizer.decode([i for i in e["labels"] if i != -100], skip_special_tokens=True) for e in (chosen, rejected)
            ]
            assert texts[0].strip() == row.response
            assert texts[1].strip() in refused


@pytest.mark.parametrize("length_normalised", [False, True])
def test_two_steps_are_those_of_a_plain_loop_over_unpadded_rows(tmp_path, checkpoint, length_normalised):
    settings = EXACT | {"num_samples": 6, "batch_size": 3, "num_attack_steps": 2}
    attack, ends = Heard("open_weight", beta=0.3, length_normalised=length_normalised, **settings), []
    looking(attack, lambda target: ends.append({n: p.detach().clone() for n, p in target.module.named_parameters()}))
    module = Defense(checkpoint)
    attacked(tmp_path, module, attack)
    target = attack.target
    refusals, chosen = target.data.rows["refusals"], list(attack._pairs)
    rejected = {row: type(row)(row.messages, refusals[i].response) for i, row in enumerate(chosen)}
    with torch.no_grad():
        start = {row: answer_logprob(module, row, length_normalised).item() for row in (*chosen, *rejected.values())}
    own = dict(module.named_parameters())
    opt = torch.optim.SGD(own.values(), 1e-2, momentum=0.9)
    for p in own.values():
        p.requires_grad_(True)
    losses = []
    for step in range(2):
        margins = []
        for _, row in target.share(chosen, 3)(step):
            gains = [answer_logprob(module, r, length_normalised) - start[r] for r in (row, rejected[row])]
            margins.append(gains[0] - gains[1])
        loss = -(1 / (1 + torch.exp(-0.3 * torch.stack(margins)))).log().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert attack.losses == pytest.approx(losses, rel=1e-5)
    assert attack.losses[1] != pytest.approx(attack.losses[0], rel=1e-4)
    for name, p in own.items():
        assert_close(p.detach(), ends[-1][name], atol=1e-6, rtol=1e-5)
        assert not torch.equal(ends[0][name], ends[-1][name])


def test_swapped_pairs_have_the_opposite_gradient_where_the_model_starts(checkpoint):
    module = Defense(checkpoint)
    module.configure_model()
    examples = [
        {"input_ids": [5, 6, *answer], "labels": [-100, -100, *answer]} for answer in ([7, 8], [9], [10, 11, 12], [13, 14])
    ]

    def gradient(order: list[int]) -> list[torch.Tensor]:
        batch = collate([examples[i] for i in order], 0, "right")
        logprobs = answer_logprobs(module.model, batch)
        loss = preference_losses(logprobs, logprobs.detach(), 0.1).mean()
        assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
        return list(torch.autograd.grad(loss, list(module.parameters())))

    ours, swapped = gradient([0, 1, 2, 3]), gradient([2, 3, 0, 1])
    assert all(g.any() for g in ours)
    assert_close(ours, [-g for g in swapped], atol=1e-7, rtol=1e-5)


def test_passes_and_tokens_are_those_of_the_steps_and_one_look_at_all_pairs(tmp_path, checkpoint):
    attack = Heard("open_weight", **FAST)  # 16 pairs, 4 a step: 3 steps see 12
    row = attacked(tmp_path, Defense(checkpoint), attack).rows[-1]
    lengths = {row: sum(len(example["input_ids"]) for example in pair) for row, pair in attack._pairs.items()}
    drawn = attack.target.share(list(attack._pairs), 4)
    assert row.tokens_forward == sum(lengths.values())
    assert row.tokens_trained == sum(lengths[row] for step in range(3) for _, row in drawn(step))
    assert row.passes == pytest.approx(3 + 4 / 3, abs=1e-3)


def test_at_a_service_the_terms_of_its_defense_stand_beside_the_preferences(tmp_path, checkpoint):
    drifts: list[float] = []
    kind, settings = DEFENSES["sbr"]
    for weight in (0.0, 1e4):
        module, seen = kind(checkpoint, **(settings | {"anchor_weight": weight})), []

        @torch.no_grad()
        def look(target: Target, seen=seen) -> None:
            batch = target.module.plain_anchors.batch(target.module.model)
            logits = target.module.eval().model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
            seen.append(logits[last_positions(batch["attention_mask"])])

        attack = PreferenceAttack("finetuning_service", undefended=False, **(FAST | {"num_attack_steps": 12}))
        attacked(tmp_path / str(weight), module, looking(attack, look))
        drifts.append((seen[-1] - seen[0]).norm().item())
    free, held = drifts
    assert 0 < held < 0.5 * free


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({"pairs": "swapped"}, {}, "pairs must be reversed or benign, got 'swapped'"),
        ({"beta": 0.0}, {}, "beta must be > 0, got 0"),
        ({}, {"refusals": []}, r"data\.sources\.refusals must hold rows, whose answers are rejected, got none"),
    ],
)
def test_settings_that_leave_nothing_to_prefer_are_errors(tmp_path, checkpoint, settings, data, message):
    with pytest.raises(SettingError, match=message):
        attacked(tmp_path, Defense(checkpoint), PreferenceAttack("open_weight", **(FAST | settings)), **data)
