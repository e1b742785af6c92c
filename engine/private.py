"""Every use of a private API of torch, transformers or peft in this room; an upgrade of one of them is this file's work.

``tests/test_private.py`` fails with the dependency's name where one of these is gone.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

_QUANTISATION = ("quantization_method", "is_quantized", "hf_quantizer")
VARLEN = "casehard_varlen"  # the name of ``varlen.attention`` among transformers' own
_ADAPTERS = ("peft_config", "_hf_peft_config_loaded")


def layer_classes(model: PreTrainedModel) -> frozenset[str]:
    """Names of the classes of the decoder's layers (transformers)."""
    return frozenset(model._no_split_modules or ())


def runs_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called (torch)."""
    return module._compiled_call_impl is not None


def attention_of(model: PreTrainedModel) -> str:
    """The name of the attention that the model runs (transformers)."""
    return str(model.config._attn_implementation)


def attention_takes_masks(model: PreTrainedModel) -> bool:
    """Whether the attention runs on any mask of ``[batch, 1, seq, seq]`` that it is given (transformers)."""
    return getattr(model, "_supports_attention_backend", False) and attention_of(model) in ("eager", "sdpa", VARLEN)


def forget_quantisation(model: PreTrainedModel) -> None:
    """Drop what transformers notes on a model that it read from quantised weights; it would refuse to save it."""
    _drop(model, _QUANTISATION)


def forget_adapters(model: PreTrainedModel) -> None:
    """Drop what peft notes on a model (transformers); it would be saved as an adapter."""
    _drop(model, _ADAPTERS)


def _drop(model: PreTrainedModel, names: tuple[str, ...]) -> None:
    for name in names:
        model.__dict__.pop(name, None)


def copy_all(into: list[Tensor], tensors: list[Tensor]) -> None:
    """``into[i].copy_(tensors[i])``; on an accelerator in few kernels (torch)."""
    torch._foreach_copy_(into, tensors)


def add_all(into: list[Tensor], tensors: list[Tensor], weight: float = 1.0) -> None:
    """``into[i].add_(tensors[i], alpha=weight)``; on an accelerator in few kernels (torch)."""
    torch._foreach_add_(into, tensors, alpha=weight)


def subtract_all(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """``first[i] - second[i]``; on an accelerator in few kernels (torch)."""
    return list(torch._foreach_sub(first, second))


def multiply_all(tensors: list[Tensor], factor: float) -> list[Tensor]:
    """``factor * tensors[i]``; on an accelerator in few kernels (torch)."""
    return list(torch._foreach_mul(tensors, factor))


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """A module's own parameters, to be reordered (torch)."""
    return module._parameters


def clip_unscaled(optimizer: torch.optim.Optimizer) -> None:
    """Say that a fused optimizer does not unscale gradients itself (torch): else Lightning refuses to clip under bf16-mixed."""
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to in place (torch); 0 under inference mode, where that is not counted."""
    return 0 if tensor.is_inference() else tensor._version


class Unasked(TorchDispatchMode):
    """For a block, refuse what makes the host wait for a number on a device, or that copies from one to the other (torch).

    Args:
        device: its type.

    Raises:
        RuntimeError: by the operation that waits.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out, aten = func(*args, **(kwargs or {})), torch.ops.aten
        kinds = {each.device.type for each in (out, *args) if isinstance(each, Tensor)}
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            waits = any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
        elif func.overloadpacket in (aten._to_copy, aten.copy_):
            waits = len(kinds) > 1
        else:
            waits = bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))
        if waits and self.device in kinds:
            self.refuse(str(func))
        return out

    def refuse(self, operation: str) -> None:
        raise RuntimeError(f"{operation} makes the host wait for a number")
