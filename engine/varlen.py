"""Attention within rows that lie end to end: flash attention on a GPU, the same sums under a mask elsewhere.

It stands among transformers' attention functions under a name of its own. A pass that says where rows begin (``cu_seq_lens_q``)
gets attention within them; every other pass gets transformers' ``sdpa``, masks and all.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from casehard.engine.layouts import Packed
from casehard.engine.private import VARLEN, attention_of

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    _TAKEN = frozenset[str]()
else:
    _TAKEN = frozenset(inspect.signature(varlen_attn).parameters)

HAS_KERNEL = {"scale", "window_size"} <= _TAKEN  # since torch 2.11
_TAKES_GROUPS = "enable_gqa" in _TAKEN  # since torch 2.12
HALF = (torch.bfloat16, torch.float16)  # all that the kernel takes


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Causal attention, as transformers asks for it.

    Args:
        module: the attention layer.
        query: ``[1, heads, tokens, head_dim]``.
        key: the same, of as many heads or fewer, each for a group of the query's.
        value: as ``key``.
        attention_mask: as sdpa takes it; an empty one is none, and without a meaning where ``cu_seq_lens_q`` is given.
        scaling: of the products; None for ``head_dim ** -0.5``.
        dropout: of the weights; must be 0 where ``cu_seq_lens_q`` is given.
        sliding_window: how many tokens a token attends to at most, itself among them.
        cu_seq_lens_q: ``[rows + 1]``, where each row begins and the last ends.
        max_length_q: tokens of the longest row, or more.
        settings: whatever else the architecture says.

    Returns:
        ``[1, tokens, heads, head_dim]``, and no weights.

    Raises:
        NotImplementedError: rows end to end under dropout, capped scores or attention sinks, none of which the kernel has.
    """
    if cu_seq_lens_q is None:
        attention_mask = None if attention_mask is not None and not attention_mask.numel() else attention_mask
        more = settings | {"sliding_window": sliding_window}
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        out: tuple[Tensor, None] = sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)
        return out
    if dropout or any(settings.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("attention within rows that lie end to end has no dropout, capped scores, sinks or biases.")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, head_dim]
    kernel = HAS_KERNEL and query.is_cuda and query.dtype in HALF
    if q.shape[1] != k.shape[1] and not (kernel and _TAKES_GROUPS):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if not kernel:
        return _masked(q, k, v, cu_seq_lens_q, scaling, sliding_window)[None], None
    asked: dict[str, Any] = {"scale": scaling, "window_size": (-1 if sliding_window is None else sliding_window - 1, 0)}
    asked |= {"enable_gqa": True} if _TAKES_GROUPS else {}
    within = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **asked)
    assert isinstance(within, Tensor)
    return within[None], None


def _masked(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """The kernel's sums, ``[tokens, heads, head_dim]``, where it does not run: over a mask of all tokens by all."""
    place = torch.arange(len(query), device=starts.device)
    row = torch.searchsorted(starts, place, right=True)
    back = place[:, None] - place
    mask = (row[:, None] == row) & (back >= 0)
    if window is not None:
        mask &= back < window
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)[0].transpose(0, 1)


ALL_ATTENTION_FUNCTIONS.register(VARLEN, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(VARLEN, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def use(model: PreTrainedModel) -> bool:
    """Have ``model`` attend by ``attention`` instead of sdpa; False, and nothing changed, where it runs another attention."""
    if attention_of(model) == VARLEN:
        return True
    if attention_of(model) != "sdpa":
        return False
    model.set_attn_implementation(VARLEN)
    return True


def unuse(model: PreTrainedModel) -> None:
    """Back to sdpa."""
    model.set_attn_implementation("sdpa")


def arguments(packed: Packed) -> dict[str, Any]:
    """What the forward pass of a model that attends by ``attention`` is given, beside ids, where no mask is needed.

    For no mask at all transformers would ask the device whether positions start anew. One of four dimensions is handed on.
    """
    empty = {"attention_mask": torch.empty(1, 1, 0, 0, device=packed.input_ids.device)}
    if packed.starts is None:
        return empty
    rows = {f"cu_seq_lens_{side}": packed.starts for side in "qk"} | {f"max_length_{side}": packed.longest for side in "qk"}
    return empty | rows | {"position_ids": packed.positions}
