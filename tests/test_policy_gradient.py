import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from ranks import UNEVEN, answers, rows, trainer
from torch.testing import assert_close
from toy import DEFENSES, FAST, LengthJudge, bits, looking, on_ranks, toy_data, toy_trainer

from casehard import Defense, Judge, LoRA, Optimizer, SandboxJudge, SettingError, Verdict
from casehard.callbacks.policy_gradient import PolicyGradient
from casehard.callbacks.results import Results
from casehard.datamodules.chat import prompt_ids
from casehard.engine.forward import token_logprobs
from casehard.engine.generation import end_tokens
from casehard.engine.rollouts import GRPO, GroupPolicyLoss, group_advantages, rollout_batch


class Constant(Judge):
    """The same for every answer; a mean of such scores need not be the score in floating point."""

    name = "constant"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        return [Verdict(0.1, refused=False, degenerate=False)] * len(responses)


class Short(Judge):
    """1 for an answer of at most two letters."""

    name = "short"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        return [Verdict(float(len(response) <= 2), refused=False, degenerate=False) for response in responses]


def attacked(folder: Path, module: Defense, attack: PolicyGradient, **data: Any) -> Results:
    results = Results(str(folder), export=False)
    toy_trainer(folder, callbacks=[results, attack]).test(module, datamodule=toy_data(**data), verbose=False)
    return results


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_equal_rewards_leave_every_weight_as_it_is(tmp_path, checkpoint, lora):
    seen = []
    attack = PolicyGradient("open_weight", Constant(), lora=lora, score_steps=[1, 3], grpo=GRPO(3), **FAST)
    looking(attack, lambda target: seen.append(bits(target.module)))
    results = attacked(tmp_path, Defense(checkpoint), attack)
    assert all(torch.equal(weight, seen[0].get(name, weight)) for states in seen[1:] for name, weight in states.items())
    assert not any(seen[2][name].any() for name in seen[2] if "lora_B" in name)
    notes = [row.note.split("; ") for row in results.rows]
    assert [note[-2] for note in notes] == ["4 of 4 groups had equal rewards"] * 2 + ["12 of 12 groups had equal rewards"]
    assert all(note[-1] == f"{tokens} tokens were sampled" for note, tokens in zip(notes, (48, 48, 144), strict=True))


def test_of_two_arms_short_answers_and_others_the_rewarded_one_gets_likelier_with_every_step(tmp_path, checkpoint):
    module, chances = Defense(checkpoint), []

    @torch.no_grad()
    def look(target) -> None:
        tokenizer, row = target.module.tokenizer, attack.prompts[0]
        logits = target.module.model(torch.tensor([prompt_ids(row, tokenizer)])).logits[0, -1]
        short = torch.tensor([len(tokenizer.decode([i], skip_special_tokens=True)) <= 2 for i in range(len(tokenizer))])
        chances.append(logits.softmax(dim=-1)[short].sum().item())

    attack = PolicyGradient(
        "open_weight",
        Short(),
        num_samples=1,
        batch_size=1,
        max_new_tokens=1,
        grpo=GRPO(64),
        num_attack_steps=6,
        optimizer=Optimizer(0.03, "sgd"),
        score_steps=list(range(1, 7)),
    )
    attacked(tmp_path, module, looking(attack, look))
    assert all(later > earlier for earlier, later in itertools.pairwise(chances))
    assert chances[-1] > chances[0] + 0.1


@pytest.fixture
def module(checkpoint) -> Defense:
    module = Defense(checkpoint)
    module.configure_model()
    return module


PROMPTS, ANSWERS = [[5, 6, 7], [8, 9], [8, 9], [5, 6, 7]], [[10, 11], [12], [13, 14, 15], [16, 17]]
REWARDS = torch.tensor([[0.0, 1.0], [0.5, 0.25]])


def sampled(module: Defense) -> dict[str, torch.Tensor]:
    batch = rollout_batch(PROMPTS, ANSWERS, module.tokenizer.pad_token_id)
    return batch | {"advantages": group_advantages(REWARDS).flatten(), "num_labels": torch.tensor(8.0)}


def logprobs_by_hand(module: Defense, temperature: float) -> list[torch.Tensor]:
    """Of each answer's tokens, row by row without padding."""
    found = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        logits = module.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        found.append((logits / temperature).log_softmax(dim=-1)[torch.arange(len(answer)), answer])
    return found


def test_log_probabilities_and_advantages_are_those_computed_by_hand(module):
    batch = sampled(module)
    assert_close(token_logprobs(module.model, batch, 0.7), torch.cat(logprobs_by_hand(module, 0.7)))
    half, small = 0.5**0.5, 0.125 / (0.25 / 2**0.5)
    assert_close(batch["advantages"], torch.tensor([-half, half, small, -small]), atol=1e-5, rtol=0)
    assert torch.equal(group_advantages(torch.full((1, 3), 0.1)), torch.zeros(1, 3))


def test_the_entropy_bonus_is_the_mean_entropy_of_the_tokens_at_the_temperature_of_the_samples(module):
    batch = sampled(module)
    loss, bare = (
        GroupPolicyLoss(module.model, GRPO(2, temperature=0.7, entropy_weight=weight), lambda: None).loss(batch, 0)
        for weight in (0.3, 0.0)
    )
    entropies = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        logprobs = (module.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(dim=-1)
        entropies.append(-(logprobs.exp() * logprobs).sum(dim=-1))
    assert_close(loss, bare - 0.3 * torch.cat(entropies).mean())
    more, less = torch.autograd.grad(loss, module.model.lm_head.weight), torch.autograd.grad(bare, module.model.lm_head.weight)
    assert not torch.allclose(more[0], less[0])


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_tokens_that_were_generated_and_trained_are_counted(tmp_path, checkpoint, kl_weight):
    attack, tokens, read = PolicyGradient("open_weight", LengthJudge(), grpo=GRPO(3, kl_weight=kl_weight), **FAST), [], []
    roll_out = attack.rollout

    def counted(target, drawn) -> dict[str, torch.Tensor]:
        batch = roll_out(target, drawn)
        tokens.append(int(batch["attention_mask"].sum()))
        read.append(len(drawn))
        return batch

    attack.rollout = counted
    row = attacked(tmp_path, Defense(checkpoint), attack).rows[-1]
    num_forward = 1 + (kl_weight > 0)
    assert (row.tokens_trained, row.tokens_forward) == (sum(tokens), num_forward * sum(tokens))
    assert row.passes == pytest.approx(3 + num_forward, abs=1e-3)


def test_on_the_first_inner_step_every_ratio_is_1_and_later_ones_are_clipped_beside_the_divergence(module):
    grpo, batch = GRPO(2, temperature=0.7, clip_range=0.1, kl_weight=0.3, num_inner_steps=2), sampled(module)
    task = GroupPolicyLoss(module.model, grpo, lambda: module.reference({"reference": start}))
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.01)  # so that the model is no longer where it started
    now = {name: p.detach().clone() for name, p in module.named_parameters()}
    loss = task.loss(batch, 0)
    loss.backward()
    old, reference = torch.cat(logprobs_by_hand(module, 0.7)), task.reference_logprobs
    module.load_state_dict(start, strict=False)
    assert_close(reference, torch.cat(logprobs_by_hand(module, 0.7)).detach())  # the model where training started
    module.load_state_dict(now, strict=False)
    advantages = torch.cat([a.expand(len(answer)) for a, answer in zip(batch["advantages"], ANSWERS, strict=True)])

    def by_hand(logprobs: torch.Tensor) -> torch.Tensor:
        total = 0.0
        for new, before, ref, a in zip(logprobs, old.detach(), reference, advantages, strict=True):
            ratio = torch.exp(new - before)
            clipped = min(max(ratio, torch.tensor(0.9)), torch.tensor(1.1))
            total = total + min(ratio * a, clipped * a) - 0.3 * (torch.exp(ref - new) - (ref - new) - 1)
        return -total / 8

    divergence = torch.exp(reference - old) - (reference - old) - 1
    assert_close(loss, (-advantages + 0.3 * divergence).mean())  # every ratio is 1
    with torch.no_grad():
        for p in module.parameters():
            p.sub_(0.05 * p.grad)
    later, hand = task.loss(batch, 1), by_hand(torch.cat(logprobs_by_hand(module, 0.7)))
    ratios = (torch.cat(logprobs_by_hand(module, 0.7)) - old).exp()
    assert ratios.min() < 0.9
    assert ratios.max() > 1.1
    assert_close(later, hand)
    parameters = list(module.parameters())
    assert_close(torch.autograd.grad(later, parameters), torch.autograd.grad(hand, parameters), atol=1e-6, rtol=1e-4)


def test_tokens_up_to_the_end_token_are_learnt_and_none_after(tmp_path, checkpoint):
    module, batches = Defense(checkpoint), []
    attack = PolicyGradient("open_weight", LengthJudge(), grpo=GRPO(8), max_new_tokens=6, **FAST)
    roll_out = attack.rollout

    def kept(target, drawn) -> dict[str, torch.Tensor]:
        numbered = [(number + 1000, row) for number, row in drawn]
        first, again, other = (roll_out(target, rows)["input_ids"].tolist() for rows in (drawn, drawn, numbered))
        assert first == again != other  # the number of a prompt decides what is sampled
        batches.append(roll_out(target, drawn))
        return batches[-1]

    attack.rollout = kept
    module.configure_model()
    module.model.generation_config.eos_token_id = list(range(5, 200))  # so that many answers end early
    attacked(tmp_path, module, attack)
    ends = set(end_tokens(module.model, module.tokenizer))
    lengths = set()
    for batch in batches:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            answer = labels[labels != -100].tolist()
            lengths.add(len(answer))
            assert answer == ids[mask.bool()].tolist()[-len(answer) :]
            assert not ends & set(answer[:-1])
            assert answer[-1] in ends or len(answer) == 6
        assert int((batch["labels"] != -100).sum()) == batch["num_labels"]
    assert len(lengths) > 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GRPO(num_answers=1), "num_answers must be >= 2, got 1"),
        (lambda: GRPO(temperature=0.0), "temperature must be > 0, got 0"),
        (lambda: GRPO(num_inner_steps=0), "num_inner_steps must be >= 1, got 0"),
        (lambda: GRPO(kl_weight=-1.0), "kl_weight must be >= 0, got -1"),
        (lambda: GRPO(entropy_weight=-1.0), "entropy_weight must be >= 0, got -1.* 0 leaves the entropy out"),
        (lambda: PolicyGradient("open_weight", LengthJudge(), max_new_tokens=0), "max_new_tokens must be >= 1 or null, got 0"),
    ],
)
def test_settings_that_teach_nothing_are_errors(make, message):
    with pytest.raises(SettingError, match=message):
        make()


def test_the_judge_that_reports_rewards_only_where_that_is_allowed_and_rows_say_so(tmp_path, checkpoint):
    same = {"threat_model": "open_weight", "reward": SandboxJudge(), **FAST}
    with pytest.raises(SettingError, match=r"reward must be another judge than data\.judge, got sandbox for both"):
        attacked(tmp_path / "refused", Defense(checkpoint), PolicyGradient(**same))
    allowed = attacked(tmp_path / "allowed", Defense(checkpoint), PolicyGradient(**same, allow_reporting_judge=True))
    other = attacked(tmp_path / "other", Defense(checkpoint), PolicyGradient("open_weight", LengthJudge(), **FAST))
    assert all("rewarded by sandbox, the judge that reports" in row.note for row in allowed.rows)
    assert all("rewarded by length;" in row.note for row in other.rows)


def test_at_a_service_the_terms_of_its_defense_stand_beside_the_reward(tmp_path, checkpoint):
    seen: dict[str, list[float]] = {}
    kind, settings = DEFENSES["sbr"]
    for name, weight in (("free", 0.0), ("held", 1e4)):
        module, drifts = kind(checkpoint, **(settings | {"anchor_weight": weight})), []

        @torch.no_grad()
        def look(target, module=module, drifts=drifts) -> None:
            if not target.defended:
                return
            module.eval()
            anchors = module.plain_anchors.batch(module.model)
            drifts.append(module.model(anchors["input_ids"], attention_mask=anchors["attention_mask"]).logits)

        attack = PolicyGradient("finetuning_service", LengthJudge(), grpo=GRPO(4), undefended=False, **FAST)
        attacked(tmp_path / name, module, looking(attack, look))
        mask = module.plain_anchors.mask.cumsum(dim=1) == module.plain_anchors.mask.sum(dim=1, keepdim=True)
        seen[name] = (drifts[-1] - drifts[0])[mask & module.plain_anchors.mask.bool()].norm().item()
    assert 0 < seen["held"] < 0.5 * seen["free"]


GRADIENT = {"grpo": GRPO(3, kl_weight=0.1, num_inner_steps=2), "optimizer": Optimizer(1e-2, "sgd"), "num_attack_steps": 4}


class ManyEnds(L.Callback):
    """Lets answers end early, so that the ranks' shares have different numbers of tokens."""

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.model.generation_config.eos_token_id = list(range(5, 200))


def run(rank: int, strategy: str, checkpoint: str, folder: Path) -> None:
    ends: list[torch.Tensor] = []
    attack = PolicyGradient("open_weight", LengthJudge(), **(FAST | GRADIENT), score_steps=[2, 4])
    results = Results(str(folder / strategy), export=False)

    def look(target) -> None:
        with torch.no_grad():
            ends.append(target.module.model(torch.tensor([[5, 6, 7]])).logits)

    L.seed_everything(0)
    attack = looking(attack, look)
    trainer(folder, strategy, rank, callbacks=[ManyEnds(), results, attack]).test(
        Defense(checkpoint), datamodule=toy_data(**UNEVEN), verbose=False
    )
    if rank == 0:
        torch.save(torch.cat(ends), folder / f"{strategy}.pt")


def run_both(rank: int, checkpoint: str, folder: Path) -> None:
    for strategy in ("ddp", "fsdp2"):
        run(rank, strategy, checkpoint, folder)


def test_two_processes_sample_and_learn_what_one_does(checkpoint, tmp_path):
    run(0, "one", checkpoint, tmp_path)
    expected = torch.load(tmp_path / "one.pt")
    on_ranks(run_both, tmp_path, checkpoint, tmp_path)
    for strategy in ("ddp", "fsdp2"):
        logits = torch.load(tmp_path / f"{strategy}.pt")
        update, difference = (expected[-1] - expected[0]).norm(), (logits - expected).norm()
        assert update > 1e-2
        assert difference < 1e-4 * update
        assert list(rows(tmp_path / strategy)) == list(rows(tmp_path / "one"))
        assert answers(tmp_path / strategy) == answers(tmp_path / "one")
