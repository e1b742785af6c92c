"""Every use of a private API of torch, transformers or peft in this room; an upgrade of one of them is this file's work.

``tests/test_private.py`` fails with the dependency's name where one of these is gone.
"""

from typing import Any

import torch
from torch import Tensor, nn
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


def attention_takes_masks(model: PreTrainedModel) -> bool:
    """Whether the attention runs on any mask of ``[batch, 1, seq, seq]`` that it is given (transformers)."""
    return getattr(model, "_supports_attention_backend", False) and model.config._attn_implementation in ("eager", "sdpa", VARLEN)


def forget_quantisation(model: PreTrainedModel) -> None:
    """Drop what transformers notes on a model that it read from quantised weights; it would refuse to save it."""
    _drop(model, _QUANTISATION)


def forget_adapters(model: PreTrainedModel) -> None:
    """Drop what peft notes on a model (transformers); it would be saved as an adapter."""
    _drop(model, _ADAPTERS)


def _drop(model: PreTrainedModel, names: tuple[str, ...]) -> None:
    for name in names:
        model.__dict__.pop(name, None)


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """A module's own parameters, to be reordered (torch)."""
    return module._parameters


def clip_unscaled(optimizer: torch.optim.Optimizer) -> None:
    """Say that a fused optimizer does not unscale gradients itself (torch): else Lightning refuses to clip under bf16-mixed."""
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to in place (torch); 0 under inference mode, where that is not counted."""
    return 0 if tensor.is_inference() else tensor._version


def attention_of(model: PreTrainedModel) -> str:
    """The name of the attention that the model runs (transformers)."""
    return str(model.config._attn_implementation)
