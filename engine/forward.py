"""One lean pass through a causal language model: states and logits only where they are asked for, and no token twice.

The unembedding is a large share of a small model's cost, and labels stand on few tokens. A hook on its input keeps the wanted
positions and drops the rest, so that it works for every architecture, with whatever scaling it applies to its logits.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from casehard.datamodules.chat import IGNORED
from casehard.engine import varlen
from casehard.engine.anatomy import decoder_layers, final_norm
from casehard.engine.layouts import (
    END_TO_END,
    Layout,
    Packed,
    choose,
    end_to_end,
    labels_of,
    layout_of,
    moved,
    once,
    padded,
    widened,
)
from casehard.engine.outputs import changed_outputs, uncompiled
from casehard.engine.prefix_tree import pack
from casehard.engine.private import VARLEN, attention_of, attention_takes_masks
from casehard.engine.weights import reshard, same_modes_after
from casehard.metrics.errors import SettingError

Batch = dict[str, Tensor]
"""``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, seq]``; labels are -100 where nothing is learnt.
``num_labels``, where present, is the number of labels of the *global* batch divided by the number of ranks: what a summed loss is
divided by."""

_TAKES_TREES: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()  # found by ``takes_prefix_trees``
# found by ``takes_rows_end_to_end``: in half precision, and without
_TAKES_VARLEN: WeakKeyDictionary[PreTrainedModel, dict[bool, bool]] = WeakKeyDictionary()


def label_positions(labels: Tensor) -> Tensor:
    """Where a next-token prediction is scored: ``[num_labels]``, places among the batch's flattened tokens.

    Place ``t`` of a row is among them if ``labels[:, t + 1]`` is learnt.
    """
    return labels_of(labels).at


def label_targets(labels: Tensor) -> Tensor:
    """What should be predicted there, ``[num_labels]``."""
    return labels_of(labels).targets


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
    """Each row's last real token, ``[batch]``, places among the batch's flattened tokens, whichever side is padded."""
    rows, width = attention_mask.shape
    position = torch.arange(1, width + 1, device=attention_mask.device)
    last = (attention_mask * position).argmax(dim=1)
    return last + width * torch.arange(rows, device=attention_mask.device)


class Out(NamedTuple):
    """What ``run`` returns, in the order of the rows and then of the positions."""

    states: list[Tensor]  # [num_states, dim], one a layer asked for
    # [num_logits, vocab], then those of states that came along; under a lens [1 + num_lens, num_logits, vocab], the model's first
    logits: Tensor


def run(
    model: PreTrainedModel,
    batch: Batch,
    *,
    logits_at: Tensor | None = None,
    states_at: Tensor | None = None,
    layers: Sequence[int | nn.Module] = (-1,),
    lens: Sequence[int] = (),
    along: Tensor | None = None,
    fold: bool = True,
) -> Out:
    """States and logits, each only where they are asked for, from a single pass.

    Args:
        model: any causal language model of transformers.
        batch: ``input_ids`` and ``attention_mask``, ``[batch, seq]``, padded on either side.
        logits_at: the positions whose logits are returned, none of them padding; None for nowhere. Places among the batch's
            flattened tokens, ``[num_logits]``, or ``[batch, seq]`` bool, for whose number a device is asked.
        states_at: the same for states.
        layers: whose states: -1 for those that enter the unembedding, else an index into transformers' ``hidden_states``, or a
            module of the model, for what it puts out.
        lens: decoder layers, counted from 0, whose states also go through the final norm and the unembedding (logit lens), at
            the same positions as the last ones.
        along: states of other passes, ``[num_states, dim]``, that go through the unembedding with this one's; not with a lens.
        fold: compute shared prefixes once, as a prefix tree, where that is exact and cheaper. False where hooks act on states: a
            token then stands for one row alone, and rows stay in order.
    """
    packed = laid_out(model, batch, fold)
    nowhere = packed.token_index[:0, 0]

    def index(at: Tensor | None) -> Tensor:
        if at is None:
            return nowhere
        return packed.token_index[at] if at.dtype == torch.bool else packed.token_index.flatten()[at]

    return _run(model, packed, index(states_at), index(logits_at), layers, lens, along)


def laid_out(model: PreTrainedModel, batch: Batch, fold: bool = True) -> Packed:
    """The layout of a batch for ``model``: as it was worked out before, else worked out now, and kept while the batch lives.

    Args:
        model: whose layout it is (``layouts.layout_of``).
        batch: ``input_ids`` and ``attention_mask``, ``[batch, seq]``.
        fold: False for padded rows, one a row.
    """
    ids, mask, layout = batch["input_ids"], batch["attention_mask"], layout_of(model)
    if layout == "prefix_tree":
        if not fold or not takes_prefix_trees(model, ids.shape[1]):
            return padded(ids, mask)
        break_even = _break_even_length(model)
        return once(ids, break_even, partial(pack, ids, mask, break_even), mask)
    if not fold:
        return padded(ids, mask, ids.shape[1])
    # of a padded batch ``placed`` knows whether it lies end to end; else it is not asked
    work_out = partial(end_to_end, ids, mask) if layout == "varlen" else partial(padded, ids, mask, ids.shape[1])
    return once(ids, END_TO_END, work_out, mask)


def placed(model: PreTrainedModel, batch: Batch, at_least: int = 0) -> Batch:
    """A batch from the host where the model is. For an accelerator all is worked out first that it would have to be asked for.

    Args:
        model: that the batch is for.
        batch: with ``input_ids``, ``attention_mask`` and ``labels``; an empty one stays empty. Widths are rounded up to few.
        at_least: tokens that rows end to end have together if they are fewer, instead of the next of few sizes.
    """
    if batch and layout_of(model) != "prefix_tree":
        batch = widened(batch, {"input_ids": 0, "attention_mask": 0, "labels": IGNORED})
        labels_of(batch["labels"])
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if any(_TAKES_VARLEN.get(model, {}).values()):
            once(ids, END_TO_END, partial(_in_few_sizes, model, ids, mask, at_least), mask)
    return moved(batch, model.device)


def _in_few_sizes(model: PreTrainedModel, ids: Tensor, mask: Tensor, at_least: int) -> Packed:
    """Rows end to end; for a model of padded rows only where each token, attending to all in vain, costs less than padding."""
    rows, break_even = end_to_end(ids, mask, at_least), _break_even_length(model)
    total, (number, width) = rows.input_ids.shape[1], ids.shape
    cheaper = total * (1 + total / break_even) < number * width * (1 + width / 2 / break_even)
    return rows if layout_of(model) == "varlen" or cheaper else padded(ids, mask, width)


def token_logprobs(model: PreTrainedModel, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Log-probability of every label, ``[num_labels]``, in the order of the rows and then of the positions.

    Args:
        model: any causal language model of transformers.
        batch: with ``labels``, of which those that are not -100 count.
        temperature: that logits are divided by, > 0.
    """
    logits = run(model, batch, logits_at=label_positions(batch["labels"])).logits
    return -F.cross_entropy(logits.float() / temperature, label_targets(batch["labels"]), reduction="none")


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
        return (torch.cat([hidden[logits_index], *(more.to(hidden.dtype) for more in early())])[None],)

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
    along: Tensor | None = None,
    cache: DynamicCache | None = None,
) -> Out:
    """A pass over packed rows; both indices are of flattened tokens."""
    more: dict[str, Any] = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    if packed.attention_mask is not None:
        more |= {"attention_mask": additive(packed.attention_mask, model), "position_ids": packed.positions}
    elif attention_of(model) == VARLEN and (packed.starts is not None or _within_windows(model, packed.input_ids.shape[1])):
        more |= varlen.arguments(packed)
    modules = [layer for layer in layers if isinstance(layer, nn.Module)]
    outputs: dict[nn.Module, Tensor] = {}
    under = [decoder_layers(model)[layer] for layer in lens]
    norm = final_norm(model) if lens else nn.Identity()
    modules += under

    def note(number: int, output: Tensor) -> Tensor:
        outputs[modules[number]] = output.reshape(-1, output.shape[-1])
        return output

    def early() -> list[Tensor]:  # here, where the norm's weights are whole if they are sharded
        return [norm(outputs[layer][logits_index]) for layer in under] if along is None else [along]

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
    return _TAKES_TREES[model] and _within_windows(model, length)


def takes_rows_end_to_end(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> bool:
    """Whether rows come out of ``model`` end to end (``varlen``) as they do one by one; if so it attends by that from now on.

    The first call makes two passes to find out, over rows that are longer than the model's window where it has one. Where the
    model is sharded all ranks must call it.

    Args:
        model: any causal language model of transformers.
        dtype: that it is to attend in: a GPU has a kernel for half precision alone.
    """
    takes, half = _TAKES_VARLEN.setdefault(model, {}), dtype in varlen.HALF
    if half not in takes:
        takes[half] = _takes_mask(model) and varlen.use(model) and _agrees_end_to_end(model, dtype)
        if not any(takes.values()) and attention_of(model) == VARLEN:
            varlen.unuse(model)
    return takes[half]


def _agrees_end_to_end(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    windows = _windows(model)
    length = 3 + min(windows) if windows else 6
    ids = (torch.arange(2 * length) % 8).view(2, length).to(model.device)
    mask = torch.ones_like(ids).index_fill_(1, torch.tensor([0], device=model.device), 0)
    mask[1, 0] = 1  # a row of one token less, and padding
    try:
        return _agree(model, end_to_end(ids.cpu(), mask.cpu()), padded(ids, mask, length), mask.bool(), dtype)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # NotImplementedError is one, and what the kernel says of a head or a GPU that it is not for
        rank_zero_info(f"{type(model).__name__} does not take rows end to end: {str(error).partition(chr(10))[0]}")
        return False


def _windows(model: PreTrainedModel) -> list[int]:
    """How far back attention reaches, of the kinds of layers in which that is limited."""
    config = model.config.get_text_config()
    found = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return [window for window in found if window is not None]


def _within_windows(model: PreTrainedModel, length: int) -> bool:
    return all(length <= window for window in _windows(model))


def use_layout(model: PreTrainedModel, setting: Layout | Literal["auto"], dtype: torch.dtype) -> None:
    """Have all passes of ``model`` take a layout. Where the model is sharded all ranks must call it.

    Args:
        model: any causal language model of transformers.
        setting: ``auto`` takes the prefix tree on a CPU, on an NVIDIA GPU in half precision rows end to end if the model takes
            them, else padded rows.
        dtype: that attention runs in.

    Raises:
        SettingError: rows end to end for a model that does not take them.
    """
    kind = model.device.type
    if setting != "auto":
        layout = setting
    else:
        flash = varlen.HAS_KERNEL and kind == "cuda" and torch.version.cuda is not None and dtype in varlen.HALF
        layout = "prefix_tree" if kind == "cpu" else "varlen" if flash and takes_rows_end_to_end(model, dtype) else "padded"
    if layout != "prefix_tree" and not takes_rows_end_to_end(model, dtype):
        if layout == "varlen":
            raise SettingError(
                f"layout must be auto, prefix_tree or padded for {type(model).__name__}, got varlen: its rows do not come out "
                "end to end as they do one by one."
            )
        if _takes_mask(model):
            varlen.use(model)  # the same attention as before, but nothing is asked of the device
    choose(model, None if setting == "auto" and kind == "cpu" else layout)  # it may be moved from there


def _takes_mask(model: PreTrainedModel) -> bool:
    return attention_takes_masks(model) and "position_ids" in inspect.signature(model.forward).parameters


def _agrees_on_a_tree(model: PreTrainedModel) -> bool:
    """Try it on two short rows that fork."""
    ids = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 6, 7, 3, 4]], device=model.device)
    mask = torch.ones_like(ids)
    return _agree(model, pack(ids, mask, torch.inf), padded(ids, mask), mask.bool())


@torch.no_grad()
def _agree(model: PreTrainedModel, one: Packed, other: Packed, real: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the states of all real tokens are the same in both layouts, up to the rounding of ``dtype``."""
    half = dtype != torch.float32
    with uncompiled(model), same_modes_after(model), torch.autocast(model.device.type, dtype if half else None, enabled=half):
        model.eval()
        ours, others = (
            _run(model, packed, packed.token_index[real], packed.token_index[0, :1]).states[0]
            for packed in (one.to(model.device), other.to(model.device))
        )
    reshard(model)
    tolerance = 1e-3 if ours.dtype == torch.float32 and not half else 5e-2
    return bool((ours - others).norm() <= tolerance * others.norm())
