"""One lean pass through a causal language model: states and logits only where they are asked for, and no token twice.

The unembedding is a large share of a small model's cost, and labels stand on few tokens. A hook on its input keeps the wanted
positions and drops the rest, so that it works for every architecture, with whatever scaling it applies to its logits.
"""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from casehard.engine.prefix_tree import Packed, pack, padded
from casehard.engine.private import attention_takes_masks, runs_compiled
from casehard.engine.weights import same_modes_after

Batch = dict[str, Tensor]
"""``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, seq]``; labels are -100 where nothing is learnt.
``num_labels``, where present, is the number of labels of the *global* batch divided by the number of ranks: what a summed loss is
divided by."""

_FOLDABLE: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()  # what ``foldable`` has found


def uncompiled(model: PreTrainedModel) -> AbstractContextManager[object]:
    """Run compiled layers eagerly inside the block: generation sees a new shape at every step and would compile for each."""
    compiled = any(runs_compiled(module) for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def label_positions(labels: Tensor) -> Tensor:
    """Where a next-token prediction is scored: ``[batch, seq]`` bool, true at ``t`` if ``labels[:, t + 1]`` is learnt."""
    return F.pad(labels[:, 1:] != -100, (0, 1))


def last_positions(attention_mask: Tensor) -> Tensor:
    """Each row's last real token, ``[batch, seq]`` bool, whichever side is padded."""
    position = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    last = (attention_mask * position).argmax(dim=1)
    return F.one_hot(last, attention_mask.shape[1]).bool()


def states_and_logits(
    model: PreTrainedModel, batch: Batch, with_states: Tensor, with_logits: Tensor, layer: int = -1
) -> tuple[Tensor, Tensor]:
    """The states that enter the unembedding, and its logits, each only where they are asked for, from a single pass.

    Args:
        model: any causal language model of transformers.
        batch: ``input_ids`` and ``attention_mask``, ``[batch, seq]``, padded on either side.
        with_states: ``[batch, seq]`` bool, the positions whose state is returned, none of them padding.
        with_logits: ``[batch, seq]`` bool, the positions whose logits are returned, none of them padding.
        layer: whose states: -1 for those that enter the unembedding, else an index into transformers' ``hidden_states``.

    Returns:
        States ``[num_states, dim]`` and logits ``[num_logits, vocab]``, both in the order of the rows and then of the positions.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    packed = pack(ids, mask, _reach(model)) if foldable(model, ids.shape[1]) else padded(ids, mask)
    return _run(model, packed, packed.place[with_states], packed.place[with_logits], layer)


@torch.no_grad()
def prefill(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, DynamicCache]:
    """Logits after each row's last token, ``[batch, vocab]``, and the cache with which the rows go on, one token a step.

    Args:
        model: a ``foldable`` one.
        batch: ``input_ids`` and ``attention_mask``, ``[batch, seq]``, padded on the left.
    """
    packed = pack(batch["input_ids"], batch["attention_mask"], _reach(model))
    cache, last = DynamicCache(), packed.place[:, -1]
    _, logits = _run(model, packed, last[:0], last, cache=cache)
    layer: Any  # mypy takes it for any of transformers' layers, with or without keys
    for layer in cache.layers:
        layer.keys, layer.values = _unfolded(layer.keys, packed.place), _unfolded(layer.values, packed.place)
    return logits, cache


def _unfolded(folded: Tensor, place: Tensor) -> Tensor:
    """``[packs, heads, width, dim] -> [batch, heads, seq, dim]``: every row gets what it had in common with others."""
    tokens = folded.transpose(1, 2).flatten(2).flatten(0, 1)
    return F.embedding(place, tokens).unflatten(-1, (folded.shape[1], -1)).transpose(1, 2)  # much faster than an index


def _reach(model: PreTrainedModel) -> float:
    """For ``packing.pack``, from a decoder layer's 24 * dim**2 operations a token and 4 * dim a token that it attends to."""
    return 6 * model.config.get_text_config().hidden_size


@contextmanager
def _at_unembedding(model: PreTrainedModel, asked: Tensor, scored: Tensor) -> Iterator[list[Tensor]]:
    """Let the unembedding see only the states at ``scored``; those at ``asked`` land in the list. Both index flattened tokens."""
    states: list[Tensor] = []

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden = args[0].flatten(0, 1)
        states.append(hidden[asked])
        return (hidden[scored][None],)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield states
    finally:
        handle.remove()


def _run(
    model: PreTrainedModel, packed: Packed, asked: Tensor, scored: Tensor, layer: int = -1, cache: DynamicCache | None = None
) -> tuple[Tensor, Tensor]:
    more: dict[str, Any] = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    if packed.sight is not None:
        more |= {"attention_mask": additive(packed.sight, model), "position_ids": packed.positions}
    with _at_unembedding(model, asked, scored) as states:
        out = model(input_ids=packed.input_ids, output_hidden_states=layer != -1, **more)
    return states[0] if layer == -1 else out.hidden_states[layer].flatten(0, 1)[asked], out.logits[0]


def additive(sight: Tensor, model: PreTrainedModel) -> Tensor:
    """``sight`` as every attention takes it, ``[packs, 1, ...]``, already in the dtype that attention runs in."""
    device = sight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    return torch.zeros(sight.shape, dtype=dtype, device=sight.device).masked_fill(~sight, -torch.inf)[:, None]


def foldable(model: PreTrainedModel, length: int) -> bool:
    """Whether folded rows of up to ``length`` tokens come out of ``model`` as they would one by one.

    Not so for recurrent layers, attention of a limited window, or kernels that take no mask of one's own.
    """
    if model not in _FOLDABLE:
        _FOLDABLE[model] = _takes_mask(model) and _folds(model)
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return _FOLDABLE[model] and all(window is None or length <= window for window in windows)


def _takes_mask(model: PreTrainedModel) -> bool:
    return attention_takes_masks(model) and "position_ids" in inspect.signature(model.forward).parameters


@torch.no_grad()
def _folds(model: PreTrainedModel) -> bool:
    """Try it on two short rows that fork."""
    ids = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 6, 7, 3, 4]], device=model.device)
    with uncompiled(model), same_modes_after(model), torch.autocast(ids.device.type, enabled=False):
        model.eval()
        layouts = pack(ids, torch.ones_like(ids), torch.inf), padded(ids, torch.ones_like(ids))
        folded, alone = (_run(model, packed, packed.place.flatten(), packed.place[0, :1])[0] for packed in layouts)
    tolerance = 1e-3 if folded.dtype == torch.float32 else 5e-2
    return bool((folded - alone).norm() <= tolerance * alone.norm())
