"""Fused kernels of liger-kernel for norms, rotations and gated MLPs, on a model that is there already.

Liger swaps classes and functions of a whole architecture, and its kernels run on a GPU alone. Here they act for one model, and
for what lies on a GPU: a copy of it on the CPU, and other models of the architecture, compute as they did.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel

from casehard.engine.anatomy import decoder_layers
from casehard.metrics.errors import SettingError

GATES = {"swiglu": ("silu", "swish"), "geglu": ("gelu_pytorch_tanh",)}  # the activations that the fused MLPs know
_FUSED: ContextVar[bool] = ContextVar("in a decoder layer of a model with fused kernels", default=False)


def require_installed() -> None:
    """Make sure that liger-kernel is there.

    Raises:
        SettingError: it is not.
    """
    if find_spec("liger_kernel") is None:
        raise SettingError(
            "kernels: liger needs liger-kernel, and it is not installed. Install it: pip install 'casehard[cuda]'."
        )


def require_device(device: torch.device) -> None:
    """Make sure that the kernels run on ``device``.

    Raises:
        SettingError: they do not.
    """
    if not runs_on(device):
        raise SettingError(f"kernels must be null where the model does not run on a CUDA device, got liger on {device.type}.")


def runs_on(device: torch.device) -> bool:
    """Whether the kernels do."""
    return device.type == "cuda"


def fuse(model: PreTrainedModel) -> None:
    """Have ``model`` use Liger's kernels of its architecture, from now on and in place; its parameters and names stay.

    Raises:
        SettingError: Liger has none for the architecture.
    """
    config = model.config.get_text_config()
    liger = importlib.import_module("liger_kernel.transformers")
    apply = getattr(liger, f"apply_liger_kernel_to_{config.model_type}", None)
    if apply is None:
        raise SettingError(
            f"kernels must be null for {type(model).__name__}, got liger: it has none for the architecture {config.model_type}."
        )
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    settings = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # logits are taken at the labels alone
    settings |= {name: activation in known for name, known in GATES.items()}
    modeling = sys.modules[type(model).__module__]
    before = dict(vars(modeling))
    apply(model=model, **{name: value for name, value in settings.items() if name in inspect.signature(apply).parameters})
    for name, value in before.items():
        if (new := getattr(modeling, name)) is not value:
            setattr(modeling, name, value if isinstance(value, type) else _either(new, value))
    module: Any
    for module in model.modules():
        if "forward" in vars(module):
            module.fused_forward, module.forward = module.forward, MethodType(_forward, module)
            if hasattr(module, "in_place"):
                module.in_place = False  # else the gradient of a norm's output is overwritten, which a hook may hold
    layer: Any
    for layer in decoder_layers(model):
        layer.forward = MethodType(_layer_forward, layer)


def _either(fused: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """A function of an architecture's module: fused inside a decoder layer of a model that was, on a GPU."""
    plain = getattr(plain, "__wrapped__", plain)  # of another model that was fused

    @functools.wraps(plain)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (fused if _FUSED.get() and runs_on(args[0].device) else plain)(*args, **kwargs)

    return either


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Of a fused module; bound to it, so that a copy of the model has its own."""
    return self.fused_forward(x, *args, **kwargs) if runs_on(x.device) else type(self).forward(self, x, *args, **kwargs)


def _layer_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    mark = _FUSED.set(True)
    try:
        return type(self).forward(self, *args, **kwargs)
    finally:
        _FUSED.reset(mark)
