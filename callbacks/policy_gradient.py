"""An attack by reinforcement learning."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from casehard.callbacks.attack import Target, ThreatModel
from casehard.callbacks.fine_tuning import FineTuning
from casehard.datamodules.chat import prompt_ids, read_answers
from casehard.datamodules.order import counter_seed
from casehard.datamodules.row import Row
from casehard.datamodules.sft import SFTDataModule
from casehard.engine.adapters import LoRA, trainable
from casehard.engine.forward import Batch
from casehard.engine.generation import sample
from casehard.engine.gradients import mean_over_ranks
from casehard.engine.rollouts import GRPO, GroupPolicyLoss, equal_groups, group_advantages, rollout_batch
from casehard.engine.training import beside
from casehard.metrics.errors import SettingError
from casehard.metrics.judges import Judge, judged, require_judge


class PolicyGradient(FineTuning):
    """Un-alignment by GRPO with a judge as reward (HarmRLVR, arXiv:2510.15499): harmful prompts, and no answers to them.

    Each step samples ``num_answers`` answers to each of ``batch_size`` prompts. A judge's scores are the rewards ``r``; within
    the answers to a prompt ``A = (r - mean(r)) / (std(r) + 1e-6)``. With ``ratio`` the probability of a token over that which it
    had when it was sampled, ``loss = -mean(min(ratio * A, clip(ratio, 1 - clip_range, 1 + clip_range) * A) - kl_weight * kl +
    entropy_weight * entropy)`` over all tokens of the answers, up to the end token and with it. A prompt whose answers all have
    one reward teaches nothing; the note of a row counts them.

    A step costs ``batch_size * num_answers`` generations (once in ``num_inner_steps``), which count as a forward pass over
    prompts and answers; a forward and a backward pass over them; and a forward pass of the start model with ``kl_weight``.
    Memory: no copy of the weights beside the one that every attack takes; with ``kl_weight`` one more of what trains, none with
    ``lora``.

    Args:
        threat_model: open_weight, or finetuning_service: a provider that trains by reward. A fine-tuning stage defense acts there
            by its hooks and its own terms: its loss on the sampled batch without labels.
        reward: judge of the sampled answers; an answer without a verdict counts as 0.
        allow_reporting_judge: let ``reward`` be the judge that results report, so that what it wrongly rewards is reported as
            harm, too. The note of a row says so.
        grpo: how answers are sampled and compared. The paper has 4 answers, no divergence and an entropy_weight of 0.001, which
            is also the adaptive attack on Token Buncher; that defense's own attack has a kl_weight of 0.001.
        num_samples: prompts, from the data's harmful rows; their answers are not used. 64 in the paper; 1, with as many answers
            as a whole batch has, is the mild form (arXiv:2602.06258).
        batch_size: prompts a step, over all processes. 64 in the paper.
        max_new_tokens: of a sampled answer, >= 1; null takes that of the data's evaluation.
        lora: shape of a new adapter; null trains every parameter.
        settings: the rest of ``FineTuning``'s.
    """

    # Departures: (1) a judge's score where the paper has an LLM's grades; (2) an inner step takes all samples, not a part of
    # them; (3) a group of equal rewards has advantages of exactly 0, whatever its mean rounds to.

    def __init__(
        self,
        threat_model: ThreatModel,
        reward: Judge,
        allow_reporting_judge: bool = False,
        grpo: GRPO = GRPO(),  # noqa: B008  frozen
        num_samples: int = 64,
        batch_size: int = 16,
        max_new_tokens: int | None = None,
        lora: LoRA | None = None,
        **settings: Any,
    ) -> None:
        require_judge(reward)
        if max_new_tokens is not None and max_new_tokens < 1:
            raise SettingError(f"max_new_tokens must be >= 1 or null, got {max_new_tokens}. null takes the evaluation's.")
        super().__init__(threat_model, poison_ratio=1.0, num_samples=num_samples, batch_size=batch_size, phases=None, **settings)
        self.reward, self.allow_reporting_judge, self.grpo = reward, allow_reporting_judge, grpo
        self.max_new_tokens, self.lora = max_new_tokens, lora

    def settings(self) -> dict[str, Any]:
        """Also how answers are sampled and rewarded."""
        return super().settings() | asdict(self.grpo) | {"max_new_tokens": self.max_new_tokens, "reward": self.reward.label}

    def prepare(self, data: SFTDataModule, seed: int) -> None:
        """Draw the prompts, and look at who rewards."""
        self.reward_reports = self.reward.label == data.judge.label
        if self.reward_reports and not self.allow_reporting_judge:
            raise SettingError(
                f"reward must be another judge than data.judge, got {self.reward.label} for both: what it wrongly rewards would "
                "be learnt and reported as harm. Choose another, or set allow_reporting_judge."
            )
        self.prompts = self.rows(data, seed)

    def steps(self, target: Target) -> Iterator[int]:
        """Sample, reward, train."""
        module, drawn = target.module, target.share(self.prompts, self.batch_size)

        def batches(step: int) -> Batch:
            if step % self.grpo.num_inner_steps == 0:
                target.state["batch"] = self.rollout(target, drawn(step // self.grpo.num_inner_steps))
            return target.state["batch"]  # type: ignore[no-any-return]

        with trainable(module, module.model, self.lora):
            own = GroupPolicyLoss(module.model, self.grpo, partial(module.reference, {"reference": target.start})).loss
            yield from target.train(batches, self.num_attack_steps, self.optimizer, beside(target.begin_job(), own))

    def rollout(self, target: Target, drawn: list[tuple[int, Row]]) -> Batch:
        """Answers of the model as it is to numbered prompts, as a batch with ``advantages`` ``[batch]``."""
        target.settle()  # no answers can be sampled from what has diverged
        module, n = target.module, self.grpo.num_answers
        rows = [row for _, row in drawn for _ in range(n)]
        prompts = [prompt_ids(row, module.tokenizer) for row in rows]
        seeds = [counter_seed(target.seed, "sampled answers", n * number + i) for number, _ in drawn for i in range(n)]
        room = self.max_new_tokens or target.data.evaluation.max_new_tokens
        answers = sample(module.model, module.tokenizer, prompts, room, self.grpo.temperature, seeds)
        texts = [read.text or "" for read in read_answers(module.tokenizer.batch_decode(answers), rows, module.tokenizer)]
        scores = [verdict.score for verdict in judged(self.reward, [row.prompt for row in rows], texts)]
        rewards = torch.tensor(scores, dtype=torch.float64).nan_to_num(0.0).view(-1, n)
        counts = [len(rewards), int(equal_groups(rewards).sum()), sum(map(len, answers)), float(rewards.mean())]
        means = mean_over_ranks(torch.tensor(counts, device=module.device), module.row_group).cpu()
        target.state["counts"] = target.state.get("counts", 0) + means * self.batch_size / means[0]
        target.bar["reward"] = f"{means[3]:.2f}"
        batch = rollout_batch(prompts, answers, module.tokenizer.pad_token_id)
        target.spend(self.grpo.num_forward / 3, forward=self.grpo.num_forward * int(batch["attention_mask"].sum()))
        return batch | {"advantages": group_advantages(rewards).float().flatten(), "num_labels": means[2]}

    def notes(self, target: Target) -> list[str]:
        """Also who rewards, and what came of it so far."""
        groups, equal, tokens, _ = target.state["counts"].round().int().tolist()
        rewarded = f"rewarded by {self.reward.label}" + (", the judge that reports" if self.reward_reports else "")
        return [*super().notes(target), rewarded, f"{equal} of {groups} groups had equal rewards; {tokens} tokens were sampled"]
