"""Direct preference optimisation: what is trained on pairs of answers to one prompt."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from casehard.engine.forward import Batch, label_positions, token_logprobs


def answer_logprobs(model: PreTrainedModel, batch: Batch, length_normalised: bool = False) -> Tensor:
    """Log-probability of the answer of every row, ``[batch]``: the sum over its labels, or their mean where normalised."""
    labels = batch["labels"]
    row, rows = label_positions(labels) // labels.shape[1], len(labels)
    logprobs = token_logprobs(model, batch)
    total = logprobs.new_zeros(rows).index_add(0, row, logprobs)
    return total / torch.bincount(row, minlength=rows) if length_normalised else total


def preference_losses(logprobs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """``-log(sigmoid(beta * margin))`` of every pair, ``[num_pairs]`` (DPO, arXiv:2305.18290).

    ``margin`` is what the chosen answer has gained on the reference's log-probability, minus what the rejected one has.

    Args:
        logprobs: of the chosen answers, then of the rejected ones, in the same order, ``[2 * num_pairs]``.
        reference: the same of the model that the trained one is held to.
        beta: how strongly it is held there.
    """
    chosen, rejected = (logprobs - reference).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected))
