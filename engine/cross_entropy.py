"""Cross-entropy of many labels over a large vocabulary, without float32 copies of all logits."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**26  # logits that are looked at together


def summed_cross_entropy(logits: Tensor, targets: Tensor, compile_backend: str | None = None) -> Tensor:
    """Cross-entropy of ``logits`` ``[num_labels, vocab]``, in float32, summed over the labels; a scalar.

    Memory beside the logits: their gradient, in their own dtype, and two float32 copies of ``CHUNK`` of them. Where there are no
    more than that, or a backend compiles it that does not fuse, three float32 copies of all for a moment.

    Args:
        logits: in any dtype.
        targets: ``[num_labels]``.
        compile_backend: of torch.compile, which fuses the passes over the logits; None for none.
    """
    if compile_backend is not None:
        return _compiled(compile_backend)(logits, targets)
    if logits.numel() <= CHUNK:
        return _plain(logits, targets)
    return _Chunked.apply(logits, targets)  # type: ignore[no-any-return, no-untyped-call]


def _plain(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


@cache
def _compiled(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(_plain, backend=backend)


class _Chunked(torch.autograd.Function):
    """Some labels at a time; going back, their probabilities are worked out again."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(logits, targets)
        chunks = zip(*_chunks(logits, targets), strict=True)
        losses = [F.nll_loss(F.log_softmax(part, -1, dtype=torch.float32), at, reduction="none") for part, at in chunks]
        return torch.cat(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        logits, targets = ctx.saved_tensors
        result = torch.empty_like(logits)
        for part, at, into in zip(*_chunks(logits, targets, result), strict=True):
            change = F.softmax(part, -1, dtype=torch.float32)
            change.scatter_add_(1, at[:, None], torch.full_like(at[:, None], -1, dtype=change.dtype))
            into.copy_(change.mul_(gradient))
        return result, None


def _chunks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Each tensor in parts of the same labels: of the first, the logits, at most ``CHUNK`` entries a part, or one label."""
    return [tensor.split(max(1, CHUNK // tensors[0].shape[1])) for tensor in tensors]
