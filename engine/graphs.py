"""CUDA graphs of compiled layers (``torch.compile``'s reduce-overhead), whose outputs the next step writes over."""

from collections.abc import Iterable

import torch
from torch import nn

from casehard.engine.weights import copies

_used = False


def use_graphs() -> None:
    """From now on a model of this process has them."""
    global _used
    _used = True


def begin_step() -> None:
    """Let what graphs put out before be written over: a step begins, and no backward pass is to come of an earlier one."""
    if _used:
        torch.compiler.cudagraph_mark_step_begin()


def keep_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """After a backward pass, put gradients where no graph writes; memory, where there are graphs: a second copy for a moment."""
    if _used:
        own = list(parameters)
        for place, grad in copies({str(i): p.grad for i, p in enumerate(own) if p.grad is not None}).items():
            own[int(place)].grad = grad
