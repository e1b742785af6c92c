"""One token a row and step, in a shape that does not change: keys and values have room for the longest answer from the start.

A row's token at position ``p`` is written at place ``p`` and sees the places up to there. So nothing depends on how long the row
is but values on the device, and the room beyond is hidden by the mask.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache, PreTrainedModel, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from casehard.engine.anatomy import is_linear
from casehard.engine.decode_graph import Graph, Replayed
from casehard.engine.forward import additive
from casehard.engine.private import VARLEN, attention_of
from casehard.engine.weights import group_of, reshard


class Room:
    """Keys and values of every layer, ``[rows, heads, length, dim]`` each, in the dtype that attention runs in.

    Args:
        rows: that go on at once.
        length: tokens of the longest prompt and answer.
    """

    def __init__(self, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        self.layers: list[list[Tensor]] = []

    def take(self, cache: DynamicCache, first: int) -> None:
        """Copy what a pass over prompts has left, row by row from ``first`` on, and empty it."""
        layer: Any  # mypy takes it for any of transformers' layers, with or without keys
        for number, layer in enumerate(cache.layers):
            parts = layer.keys, layer.values
            if number == len(self.layers):
                self.layers.append([self._empty(part) for part in parts])
            for whole, part in zip(self.layers[number], parts, strict=True):
                whole[first : first + len(part), :, : part.shape[2]] = part
            layer.keys = layer.values = None

    def _empty(self, like: Tensor) -> Tensor:
        device, (_, heads, _, dim) = like.device.type, like.shape
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
        return like.new_zeros((self.rows, heads, self.length, dim), dtype=dtype)  # zeros: what is hidden must be a number

    def keep(self, rows: Tensor) -> None:
        """Move some rows to the front."""
        for layer in self.layers:
            for whole in layer:
                whole[: len(rows)] = whole[rows]


class _Layer(StaticLayer):
    """The first rows and places of a ``Room``, written at one place a row."""

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, places: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.parts, self.rows, self.places = (keys, values), rows, places

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        for part, states in zip(self.parts, (key_states, value_states), strict=True):
            part[self.rows, :, self.places] = states[:, :, 0].to(part.dtype)
        return self.parts


class Step:
    """A pass of one token a row: the first rows of ``room``, which see its first ``length`` places.

    Args:
        model: under ``settled``.
        room: that prompts have been taken into.
        rows: of every call.
        length: that is attended to, above every position.
        graph: by which calls go, if any.
    """

    def __init__(self, model: PreTrainedModel, room: Room, rows: int, length: int, graph: Graph | None = None) -> None:
        self.model = model
        self.ids, self.positions = (torch.zeros(rows, 1, dtype=torch.long, device=model.device) for _ in range(2))
        self.places = torch.arange(length, device=model.device)
        which, at = torch.arange(rows, device=model.device), self.positions[:, 0]
        parts = [[whole[:rows, :, :length] for whole in layer] for layer in room.layers]
        self.cache = Cache(layers=[_Layer(keys, values, which, at) for keys, values in parts])
        self.replayed = None if graph is None else Replayed(graph, model.device.type)  # no circle with it

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits after a token a row, ``[rows, vocab]``; they may change at the next call.

        Args:
            ids: ``[rows, 1]``.
            positions: of these tokens in their rows, ``[rows, 1]``.
        """
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        return self._run() if self.replayed is None else self.replayed(self._run)

    def _run(self) -> Tensor:
        mask = additive((self.places <= self.positions)[:, None], self.model)
        seen = {"attention_mask": mask, "past_key_values": self.cache, "use_cache": True}
        with _no_cast_kept(self.model.device.type):
            out = self.model(input_ids=self.ids, position_ids=self.positions, **seen)
        return out.logits[:, -1]  # type: ignore[no-any-return]


def _no_cast_kept(device: str) -> torch.autocast:
    """Autocast as it is, without its cache of casts."""
    dtype, on = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return torch.autocast(device, dtype=dtype, enabled=on, cache_enabled=False)


# ---- a model that many steps follow on


@contextmanager
def settled(model: PreTrainedModel) -> Iterator[None]:
    """For a block, do once what every step would do again, to the same numbers: casts of weights, copies of shared keys.

    Memory: under autocast, or in the shards of a single process, a copy of the weights in the dtype of passes. No weight may
    change inside the block.
    """
    with _weights_cast(model), _weights_together(model), _keys_uncopied(model):
        yield


@contextmanager
def _weights_together(model: PreTrainedModel) -> Iterator[None]:
    """Leave shards together from pass to pass where one process has them all: no other's memory is saved by splitting them."""
    group = group_of(model)
    if group is None or group.size() > 1:
        yield
        return
    wrapped = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in wrapped:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        reshard(model)
        for module in wrapped:
            module.set_reshard_after_forward(module is not model, recurse=False)  # as FSDP2 has it by itself


@contextmanager
def _weights_cast(model: PreTrainedModel) -> Iterator[None]:
    """Put what autocast makes of the weights of linear layers in their place."""
    device = model.device.type
    if not torch.is_autocast_enabled(device) or group_of(model) is not None:  # shards are cast when they are put together
        yield
        return
    dtype, cast = torch.get_autocast_dtype(device), dict[int, nn.Parameter]()
    replaced = [
        (layer, name, p)
        for layer in model.modules()
        if is_linear(layer)
        for name, p in layer.named_parameters(recurse=False)
        if p.dtype == torch.float32
    ]
    try:
        for layer, name, p in replaced:
            if id(p) not in cast:
                cast[id(p)] = nn.Parameter(p.detach().to(dtype), requires_grad=False)
            setattr(layer, name, cast[id(p)])
        yield
    finally:
        for layer, name, p in replaced:
            setattr(layer, name, p)


GROUPED = "casehard_grouped"


def _grouped(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """transformers' ``sdpa``, but that heads that share keys are one block of queries where a row has a single one.

    Some versions of transformers (5.17) copy all keys for every head that shares them, at every step.
    """
    shared = query.shape[1] // key.shape[1]
    plain = settings.get("position_bias") is None and settings.get("softcap") is None
    if shared == 1 or query.shape[2] > 1 or attention_mask is None or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)  # type: ignore[no-any-return]
    blocks = query[:, :, 0].unflatten(1, (-1, shared))  # [rows, key heads, shared, dim]
    out = F.scaled_dot_product_attention(blocks, key, value, attn_mask=attention_mask, scale=settings.get("scaling"))
    return out.flatten(1, 2)[:, None], None


AttentionInterface.register(GROUPED, _grouped)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


@contextmanager
def _keys_uncopied(model: PreTrainedModel) -> Iterator[None]:
    """Let attention run by ``_grouped`` where it runs by ``sdpa``, or by what leaves such passes to it."""
    before = attention_of(model)
    if before not in ("sdpa", VARLEN):
        yield
        return
    model.set_attn_implementation(GROUPED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
