"""What modules put out, for a block: looked at, or changed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from casehard.engine.private import runs_compiled


def uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """Run compiled layers eagerly inside the block: generation sees a new shape at every step and would compile for each."""
    compiled = any(runs_compiled(module) for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def changed_maps(
    model: nn.Module, modules: Sequence[nn.Module], change: Callable[[int, Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """For a block, let ``change(number, input, output)`` stand in for what a module puts out; see ``changed_outputs``."""

    def hook(_: nn.Module, args: Any, output: Any, *, number: int) -> Any:
        entered: Any = args[0] if args else None  # of a module that is called with names
        return (change(number, entered, output[0]), *output[1:]) if isinstance(output, tuple) else change(number, entered, output)

    with ExitStack() as stack:
        stack.enter_context(uncompiled(model))
        for number, module in enumerate(modules):
            stack.callback(module.register_forward_hook(partial(hook, number=number)).remove)
        yield


def changed_outputs(
    model: nn.Module, modules: Sequence[nn.Module], change: Callable[[int, Tensor], Tensor]
) -> AbstractContextManager[None]:
    """For a block, let ``change(number, output)`` stand in for what module ``number`` puts out; the first of several outputs.

    A layer that is computed again in the backward pass calls ``change`` again, as long as the block lasts. Inside the block
    compiled layers run as they are: what is compiled does not look for hooks.

    Args:
        model: that the modules belong to.
        modules: such as the attention of every layer (``anatomy.blocks``).
        change: returns a tensor of the output's shape, or the output itself.
    """
    return changed_maps(model, modules, lambda number, _, output: change(number, output))
