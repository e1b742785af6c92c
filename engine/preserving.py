"""A task beside which a model is held to what it can do on general rows."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from casehard.engine.forward import Batch, label_positions, label_targets, run
from casehard.engine.training import Around


@dataclass
class Preserving(Around):
    """A task's loss plus ``benign_weight * cross_entropy + kl_weight * KL(p_reference || p)``, means over general labels.

    One more forward and backward pass a step, and with ``kl_weight`` a forward pass of the reference. The task by itself where
    both weights are 0.

    Args:
        task: whose hooks act, too.
        model: that is trained.
        general: the batch of every step from 0 on which the model is held, on its device; None where both weights are 0.
        reference: for a block without gradients, the model where training started.
        benign_weight: of the cross-entropy, >= 0.
        kl_weight: of the divergence, >= 0.
        project: changes the gradients of every step, last.
        spend: told of the passes, as ``Target.spend``.
    """

    model: PreTrainedModel
    general: Callable[[int], Batch] | None
    reference: Callable[[], AbstractContextManager[PreTrainedModel]]
    benign_weight: float
    kl_weight: float
    project: Callable[[], None]
    spend: Callable[..., None]

    def loss(self, batch: Batch, step: int) -> Tensor:
        """The task's and the terms."""
        if self.general is None:
            return super().loss(batch, step)
        general, holds = self.general(step), bool(self.kl_weight)
        labels, tokens = general["labels"], general["attention_mask"].sum()
        self.spend(1 + holds / 3, trained=tokens, forward=tokens * holds)
        held = None
        if holds:  # before anything else: the weights may change for it
            with self.reference() as reference:
                held = _logprobs(reference.eval(), general)
        loss, own = super().loss(batch, step), _logprobs(self.model, general)
        total = self.benign_weight * F.nll_loss(own, label_targets(labels), reduction="sum")
        if held is not None:
            total = total + self.kl_weight * F.kl_div(own, held, reduction="sum", log_target=True)
        return loss + total / general["num_labels"]

    def before_step(self, step: int) -> None:
        """The task's, then the projection."""
        super().before_step(step)
        self.project()


def _logprobs(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Of every token where a label stands, ``[num_labels, vocab]``."""
    return run(model, batch, logits_at=label_positions(batch["labels"])).logits.float().log_softmax(dim=-1)
