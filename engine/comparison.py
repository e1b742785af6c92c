"""Whether two models are the same: what they answer, told by their logits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from casehard.engine.forward import uncompiled
from casehard.engine.weights import same_modes_after


def rounding(dtype: torch.dtype) -> float:
    """How far logits may be off where sums are taken in another order in ``dtype``: a thousandth in float32, else a tenth."""
    return 1e-3 if dtype == torch.float32 else 1e-1


def num_embedded(model: PreTrainedModel) -> int:
    """Rows of the embedding: tokens that the model can read."""
    table: Any = model.get_input_embeddings()
    return int(table.weight.shape[0])


def some_ids(model: PreTrainedModel) -> list[list[int]]:
    """Two short rows of tokens from all over the vocabulary."""
    size = num_embedded(model)
    return torch.arange(0, size, max(1, size // 16))[:16].view(2, -1).tolist()


@torch.no_grad()
def logits_of(model: PreTrainedModel, rows: Sequence[list[int]]) -> Tensor:
    """Logits after every token of the rows, each read alone, ``[tokens, vocab]``, on the CPU; dropout does not act."""
    with uncompiled(model), same_modes_after(model), torch.autocast(model.device.type, enabled=False):
        model.eval()
        logits = [model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0].cpu() for row in rows]
    return torch.cat(logits)


def distance(ours: Tensor, others: Tensor) -> float:
    """How far ``ours`` are off ``others``, relative to their size."""
    ours, others = ours.cpu().double(), others.cpu().double()
    return float((ours - others).norm() / others.norm())
