"""One lean pass through a causal language model: states and logits only where they are asked for, and no token twice.

The unembedding is a large share of a small model's cost, and labels stand on few tokens. A hook on its input keeps the wanted
positions and drops the rest, so that it works for every architecture, with whatever scaling it applies to its logits.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from casehard.engine.anatomy import decoder_layers, final_norm
from casehard.engine.outputs import changed_outputs, uncompiled
from casehard.engine.prefix_tree import Packed, pack, padded
from casehard.engine.private import attention_takes_masks
from casehard.engine.weights import reshard, same_modes_after

Batch = dict[str, Tensor]
"""``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, seq]``; labels are -100 where nothing is learnt.
``num_labels``, where present, is the number of labels of the *global* batch divided by the number of ranks: what a summed loss is
divided by."""

_TAKES_TREES: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()  # found by ``takes_prefix_trees``


def label_positions(labels: Tensor) -> Tensor:
    """Where a next-token prediction is scored: ``[batch, seq]`` bool, true at ``t`` if ``labels[:, t + 1]`` is learnt."""
    return F.pad(labels[:, 1:] != -100, (0, 1))


def differing_positions(batch: Batch, other: Batch) -> Tensor:
    """Where a token of ``batch`` is another than the one at its place in the same row of ``other``: ``[batch, seq]`` bool.

    Places are counted from a row's first real token, whichever side is padded; where the other row has ended all tokens differ.
    """
    places = [b["attention_mask"].cumsum(dim=1) - 1 for b in (batch, other)]
    real, others = batch["attention_mask"].bool(), other["attention_mask"].bool()
    ids = torch.full((len(real), max(real.shape[1], others.shape[1])), -1, device=real.device)
    rows = torch.arange(len(real), device=real.device)[:, None].expand_as(others)
    ids[rows[others], places[1][others]] = other["input_ids"][others]
    return real & (batch["input_ids"] != ids.gather(1, places[0].clamp(min=0)))


def last_positions(attention_mask: Tensor) -> Tensor:
    """Each row's last real token, ``[batch, seq]`` bool, whichever side is padded."""
    position = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    last = (attention_mask * position).argmax(dim=1)
    return F.one_hot(last, attention_mask.shape[1]).bool()


class Out(NamedTuple):
    """What ``run`` returns, in the order of the rows and then of the positions."""

    states: list[Tensor]  # [num_states, dim], one a layer asked for
    logits: Tensor  # [num_logits, vocab]; under a lens [1 + num_lens, num_logits, vocab], those of the model first


def run(
    model: PreTrainedModel,
    batch: Batch,
    *,
    logits_at: Tensor | None = None,
    states_at: Tensor | None = None,
    layers: Sequence[int | nn.Module] = (-1,),
    lens: Sequence[int] = (),
    fold: bool = True,
) -> Out:
    """States and logits, each only where they are asked for, from a single pass.

    Args:
        model: any causal language model of transformers.
        batch: ``input_ids`` and ``attention_mask``, ``[batch, seq]``, padded on either side.
        logits_at: ``[batch, seq]`` bool, the positions whose logits are returned, none of them padding; None for nowhere.
        states_at: the same for states.
        layers: whose states: -1 for those that enter the unembedding, else an index into transformers' ``hidden_states``, or a
            module of the model, for what it puts out.
        lens: decoder layers, counted from 0, whose states also go through the final norm and the unembedding (logit lens), at
            the same positions as the last ones.
        fold: compute shared prefixes once, as a prefix tree, where that is exact and cheaper. False where hooks act on states: a
            token then stands for one row alone, and rows stay in order.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    tree = fold and takes_prefix_trees(model, ids.shape[1])
    packed = pack(ids, mask, _break_even_length(model)) if tree else padded(ids, mask)
    nowhere = packed.token_index[:0, 0]
    states_index = nowhere if states_at is None else packed.token_index[states_at]
    return _run(model, packed, states_index, nowhere if logits_at is None else packed.token_index[logits_at], layers, lens)


def token_logprobs(model: PreTrainedModel, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Log-probability of every label, ``[num_labels]``, in the order of the rows and then of the positions.

    Args:
        model: any causal language model of transformers.
        batch: with ``labels``, of which those that are not -100 count.
        temperature: that logits are divided by, > 0.
    """
    logits = run(model, batch, logits_at=label_positions(batch["labels"])).logits
    targets = batch["labels"][:, 1:]
    return -F.cross_entropy(logits.float() / temperature, targets[targets != -100], reduction="none")


@torch.no_grad()
def prefill(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, DynamicCache]:
    """Logits after each row's last token, ``[batch, vocab]``, and the cache with which the rows go on, one token a step.

    Args:
        model: one that ``takes_prefix_trees``.
        batch: ``input_ids`` and ``attention_mask``, ``[batch, seq]``, padded on the left.
    """
    packed = pack(batch["input_ids"], batch["attention_mask"], _break_even_length(model))
    cache, last = DynamicCache(), packed.token_index[:, -1]
    _, logits = _run(model, packed, last[:0], last, cache=cache)
    layer: Any  # mypy takes it for any of transformers' layers, with or without keys
    for layer in cache.layers:
        layer.keys, layer.values = _by_row(layer.keys, packed.token_index), _by_row(layer.values, packed.token_index)
    return logits, cache


@torch.no_grad()
def prefill_padded(model: PreTrainedModel, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, DynamicCache]:
    """The same for rows padded on the right, where no token of a causal model sees the padding: attention gets no mask.

    Args:
        model: any causal language model of transformers whose keys and values are all that it remembers.
        input_ids: ``[rows, width]``, on any device.
        lengths: of the rows, ``[rows]``, on the same. What the cache holds beyond them is of the padding.
    """
    rows, width = input_ids.shape
    last = (torch.arange(rows, device=lengths.device) * width + lengths - 1).to(model.device)
    cache = DynamicCache()
    with _at_unembedding(model, last[:0], last, list):
        out = model(input_ids=input_ids.to(model.device), use_cache=True, past_key_values=cache)
    return out.logits[0], cache


def _by_row(packed: Tensor, index: Tensor) -> Tensor:
    """``[packs, heads, width, dim] -> [batch, heads, seq, dim]``: every row gets what it shares with others."""
    tokens = packed.transpose(1, 2).flatten(2).flatten(0, 1)
    return F.embedding(index, tokens).unflatten(-1, (packed.shape[1], -1)).transpose(1, 2)  # much faster than an index


def _break_even_length(model: PreTrainedModel) -> float:
    """For ``prefix_tree.pack``: a decoder layer has 24 * dim**2 operations a token, and 4 * dim a token that it attends to."""
    return 6 * model.config.get_text_config().hidden_size


@contextmanager
def _at_unembedding(
    model: PreTrainedModel, states_index: Tensor, logits_index: Tensor, early: Callable[[], list[Tensor]]
) -> Iterator[list[Tensor]]:
    """Let the unembedding see the states at ``logits_index`` and ``early`` ones; those at ``states_index`` land in the list."""
    states: list[Tensor] = []

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden = args[0].flatten(0, 1)
        states.append(hidden[states_index])
        return (torch.cat([hidden[logits_index], *early()])[None],)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield states
    finally:
        handle.remove()


def _run(
    model: PreTrainedModel,
    packed: Packed,
    states_index: Tensor,
    logits_index: Tensor,
    layers: Sequence[int | nn.Module] = (-1,),
    lens: Sequence[int] = (),
    cache: DynamicCache | None = None,
) -> Out:
    """A pass over packed rows; both indices are of flattened tokens."""
    more: dict[str, Any] = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    if packed.attention_mask is not None:
        more |= {"attention_mask": additive(packed.attention_mask, model), "position_ids": packed.positions}
    modules = [layer for layer in layers if isinstance(layer, nn.Module)]
    outputs: dict[nn.Module, Tensor] = {}
    under = [decoder_layers(model)[layer] for layer in lens]
    norm = final_norm(model) if lens else nn.Identity()
    modules += under

    def note(number: int, output: Tensor) -> Tensor:
        outputs[modules[number]] = output.reshape(-1, output.shape[-1])
        return output

    def early() -> list[Tensor]:  # here, where the norm's weights are whole if they are sharded
        return [norm(outputs[layer][logits_index]) for layer in under]

    hidden_states = any(layer != -1 for layer in layers if isinstance(layer, int))
    with (
        changed_outputs(model, modules, note) if modules else nullcontext(),
        _at_unembedding(model, states_index, logits_index, early) as last,
    ):
        out = model(input_ids=packed.input_ids, output_hidden_states=hidden_states, **more)
    states = []
    for layer in layers:
        if isinstance(layer, nn.Module):
            states.append(outputs[layer][states_index])
        else:
            states.append(last[0] if layer == -1 else out.hidden_states[layer].flatten(0, 1)[states_index])
    return Out(states, out.logits[0].unflatten(0, (1 + len(lens), -1)) if lens else out.logits[0])


def additive(attention_mask: Tensor, model: PreTrainedModel) -> Tensor:
    """A bool mask as every attention takes it, ``[packs, 1, ...]``: 0 or -inf, in the dtype that attention runs in."""
    device = attention_mask.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    zeros = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    return zeros.masked_fill(~attention_mask, -torch.inf)[:, None]


def takes_prefix_trees(model: PreTrainedModel, length: int) -> bool:
    """Whether rows of up to ``length`` tokens come out of ``model`` packed as a prefix tree as they do one by one.

    Not so for recurrent layers, attention of a limited window, or kernels that take no mask of one's own. The first call makes
    two short passes to find out; ``Defense`` makes it when the model is built, before anybody's hooks are there. Where the model
    is sharded all ranks must call it.
    """
    if model not in _TAKES_TREES:
        _TAKES_TREES[model] = _takes_mask(model) and _agrees_on_a_tree(model)
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return _TAKES_TREES[model] and all(window is None or length <= window for window in windows)


def _takes_mask(model: PreTrainedModel) -> bool:
    return attention_takes_masks(model) and "position_ids" in inspect.signature(model.forward).parameters


@torch.no_grad()
def _agrees_on_a_tree(model: PreTrainedModel) -> bool:
    """Try it on two short rows that fork."""
    ids = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 6, 7, 3, 4]], device=model.device)
    with uncompiled(model), same_modes_after(model), torch.autocast(ids.device.type, enabled=False):
        model.eval()
        layouts = pack(ids, torch.ones_like(ids), torch.inf), padded(ids, torch.ones_like(ids))
        tree, rows = (
            _run(model, packed, packed.token_index.flatten(), packed.token_index[0, :1]).states[0] for packed in layouts
        )
    reshard(model)
    tolerance = 1e-3 if tree.dtype == torch.float32 else 5e-2
    return bool((tree - rows).norm() <= tolerance * rows.norm())
