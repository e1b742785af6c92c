"""Reinforcement learning on sampled answers (GRPO): the batch that they make, and what is trained on it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical
from transformers import PreTrainedModel

from casehard.datamodules.chat import IGNORED, collate
from casehard.engine.forward import Batch, label_positions, label_targets, run, token_logprobs
from casehard.metrics.errors import SettingError


@dataclass(frozen=True)
class GRPO:
    """Group relative policy optimisation (arXiv:2402.03300).

    Args:
        num_answers: sampled to each prompt, >= 2: the group within which rewards are compared (``G``).
        temperature: of the samples, and of the probabilities that are trained, > 0. A model that refuses finds nothing else
            below 1.
        clip_range: how far a token's probability counts beyond that which it was sampled with, as a ratio, > 0 (``epsilon``).
        kl_weight: of the divergence from the model where training starts, >= 0 (``beta``).
        entropy_weight: of the entropy of the tokens' distributions, which is raised, >= 0.
        num_inner_steps: optimizer steps on the same samples, >= 1 (``mu``).
    """

    num_answers: int = 4
    temperature: float = 1.0
    clip_range: float = 0.2
    kl_weight: float = 0.0
    entropy_weight: float = 0.0
    num_inner_steps: int = 1

    def __post_init__(self) -> None:
        if self.num_answers < 2:
            raise SettingError(f"num_answers must be >= 2, got {self.num_answers}: a reward counts beside others of its prompt.")
        for name in ("temperature", "clip_range"):
            if not getattr(self, name) > 0:
                raise SettingError(f"{name} must be > 0, got {getattr(self, name)}.")
        for name, term in (("kl_weight", "divergence"), ("entropy_weight", "entropy")):
            if not getattr(self, name) >= 0:
                raise SettingError(f"{name} must be >= 0, got {getattr(self, name)}. 0 leaves the {term} out.")
        if self.num_inner_steps < 1:
            raise SettingError(f"num_inner_steps must be >= 1, got {self.num_inner_steps}.")

    @property
    def num_forward(self) -> int:
        """Forward passes over a new set of samples that nothing is learnt from: its generation, and that of the reference."""
        return 1 + (self.kl_weight > 0)


def rollout_batch(prompts: Sequence[list[int]], answers: Sequence[list[int]], pad_token_id: int) -> Batch:
    """Prompts with the answers that a model gave to them; labels are on the answers' tokens, the end token among them."""
    examples = [
        {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return collate(examples, pad_token_id, "right")


def group_advantages(rewards: Tensor) -> Tensor:
    """``(reward - mean) / (std + 1e-6)`` over each group, ``[num_groups, num_answers]``; exactly 0 in a group of equal rewards.

    The standard deviation is that of a sample.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    advantages = centred / (rewards.std(dim=1, keepdim=True) + 1e-6)
    return advantages.masked_fill(equal_groups(rewards)[:, None], 0.0)


def equal_groups(rewards: Tensor) -> Tensor:
    """Which groups of ``[num_groups, num_answers]`` have one reward for all of their answers, ``[num_groups]`` bool."""
    return rewards.amax(dim=1) == rewards.amin(dim=1)


def by_token(values: Tensor, labels: Tensor) -> Tensor:
    """``values`` ``[batch]`` of the rows, repeated for each of their labels: ``[num_labels]``, as ``token_logprobs`` has them."""
    return values[label_positions(labels) // labels.shape[1]]


def clipped_gain(logprobs: Tensor, old: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """``min(ratio * A, clip(ratio, 1 - clip_range, 1 + clip_range) * A)``, all ``[num_labels]`` (PPO, arXiv:1707.06347).

    ``ratio = exp(logprobs - old)``, ``old`` being the log-probabilities of the model that gave the answers.
    """
    ratio = (logprobs - old).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def kl_estimate(logprobs: Tensor, reference: Tensor) -> Tensor:
    """``exp(reference - logprobs) - (reference - logprobs) - 1``, whose mean over sampled tokens is KL(model, reference)."""
    difference = reference - logprobs
    return difference.exp() - difference - 1


class GroupPolicyLoss:
    """Minus the mean over all sampled tokens of ``clipped_gain - kl_weight * kl_estimate + entropy_weight * entropy``.

    Batches are those of ``rollout_batch`` with ``advantages`` ``[batch]``, the same for the inner steps on one set of samples.
    One forward and one backward pass a step, and one forward pass of the reference for every new set where ``kl_weight`` is
    above 0.

    Args:
        model: that gave the answers and is trained.
        settings: of the loss.
        reference: for a block without gradients, the model where training started.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: GRPO,
        reference: Callable[[], AbstractContextManager[PreTrainedModel]],
    ) -> None:
        self.model, self.settings, self.reference = model, settings, reference
        self.old_logprobs = self.reference_logprobs = torch.empty(0)  # of the samples that are trained on

    def loss(self, batch: Batch, step: int) -> Tensor:
        """Its value; the first of the inner steps keeps what the later ones compare with."""
        new_samples, grpo = step % self.settings.num_inner_steps == 0, self.settings
        if grpo.kl_weight and new_samples:
            with self.reference() as reference:
                self.reference_logprobs = token_logprobs(reference.eval(), batch, grpo.temperature)
        logits = run(self.model, batch, logits_at=label_positions(batch["labels"])).logits.float() / grpo.temperature
        logprobs = -F.cross_entropy(logits, label_targets(batch["labels"]), reduction="none")
        if new_samples:
            self.old_logprobs = logprobs.detach()
        gain = clipped_gain(logprobs, self.old_logprobs, by_token(batch["advantages"], batch["labels"]), grpo.clip_range)
        if grpo.kl_weight:
            gain = gain - grpo.kl_weight * kl_estimate(logprobs, self.reference_logprobs)
        if grpo.entropy_weight:
            gain = gain + grpo.entropy_weight * Categorical(logits=logits, validate_args=False).entropy()
        return -gain.sum() / batch["num_labels"]
