"""How the rows of a batch are laid out for a pass: made for the device, from ids and mask alone.

A CPU pays for tokens: there the rows form a prefix tree (``prefix_tree``), of another size and mask at every step. An accelerator
pays for every new size, for which attention and compiler make a plan, and for every question that the host asks it: there rows
have few sizes and no mask, and all that the host must know is worked out before a batch is sent.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar, get_args
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from casehard.datamodules.chat import IGNORED
from casehard.engine.private import version_of

Layout = Literal["prefix_tree", "varlen", "padded"]
"""``prefix_tree``: no padding, shared prefixes once, a mask: least to compute, another size at every step. ``varlen``: rows end
to end without a mask, their total rounded up to few sizes. ``padded``: rows side by side, padded on the right to few widths; or
end to end under a mask, where that is less to compute."""

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
END_TO_END = "end to end"  # how ``end_to_end`` lays rows out, for ``known`` and ``remember``
_CHOSEN: WeakKeyDictionary[PreTrainedModel, Layout] = WeakKeyDictionary()


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of the model's passes: that which was chosen, else the prefix tree on a CPU and padded rows elsewhere.

    A model that takes no prefix tree gets padded rows in its place (``forward.takes_prefix_trees``).
    """
    return _CHOSEN.get(model, "prefix_tree" if model.device.type == "cpu" else "padded")


def choose(model: PreTrainedModel, layout: Layout | None) -> None:
    """Have all passes of ``model`` take this layout, or None for that of its device; ``forward.use_layout`` also tries it."""
    _CHOSEN.pop(model, None)
    if layout is not None:
        _CHOSEN[model] = layout


# ---- rows


class Packed(NamedTuple):
    """What a model runs on, and where each token of the batch has gone."""

    input_ids: Tensor  # [packs, width]
    positions: Tensor  # [packs, width], of a token in its row
    attention_mask: Tensor | None  # [packs, width, width] bool, true where a token (dim 1) attends to another; None: causal
    token_index: Tensor  # [batch, seq], of each token in the flattened ``input_ids``; 0 for padding
    starts: Tensor | None = None  # [rows + 2] int32, where rows that lie end to end begin and the last ends; then of the padding
    longest: int = 0  # tokens of the longest of those rows, rounded up

    def to(self, device: torch.device, non_blocking: bool = False) -> "Packed":
        """The same on ``device``."""
        parts: dict[str, Any] = {
            name: t.to(device, non_blocking=non_blocking) for name, t in self._asdict().items() if isinstance(t, Tensor)
        }
        return self._replace(**parts)


def rounded_up(number: int) -> int:
    """The next of few sizes, of which six stand between a number and its double: at most 14% more, 6% in the mean.

    Powers of two are among them, all are multiples of 8, and larger ones of more, which matrix products like.
    """
    sixths = math.floor(6 * math.log2(max(8, number))) - 1
    while (size := _size(sixths)) < number:
        sixths += 1
    return size


def _size(sixths: int) -> int:
    multiple = max(8, 2 ** (sixths // 6 - 5))
    return int(math.ceil(2 ** (sixths / 6) / multiple - 1e-9) * multiple)


def padded(input_ids: Tensor, attention_mask: Tensor, width: int | None = None) -> Packed:
    """Every row by itself and padded on the right, where no token of a causal model sees the padding.

    Args:
        input_ids: ``[batch, seq]``.
        attention_mask: ``[batch, seq]``, 1 for real tokens, wherever they stand.
        width: of the rows, at least the longest's; None takes the longest's, which a device is asked for.
    """
    mask = attention_mask.bool()
    lengths = mask.sum(dim=1, keepdim=True)
    width = int(lengths.max()) if width is None else width
    positions = torch.arange(width, device=mask.device).expand(len(mask), -1)
    start = torch.arange(len(mask), device=mask.device)[:, None] * width
    index = torch.where(mask, start + mask.cumsum(dim=1) - 1, 0)
    spare = len(mask) * width  # where padding lands, and is cut off
    ids = input_ids.new_zeros(spare + 1).scatter(0, torch.where(mask, index, spare).flatten(), input_ids.flatten())
    return Packed(ids[:spare].view(len(mask), width), positions, None, index)


def end_to_end(input_ids: Tensor, attention_mask: Tensor, at_least: int = 0) -> Packed:
    """Rows one after the other without padding between them, then padding up to one of few sizes. To be called on the host.

    Args:
        input_ids: ``[batch, seq]``.
        attention_mask: ``[batch, seq]``, 1 for real tokens, wherever they stand.
        at_least: tokens that the result has if the rows have fewer, instead of the next size.
    """
    mask = attention_mask.bool()
    lengths = mask.sum(dim=1)
    total, longest = int(lengths.sum()), int(lengths.max())
    size = at_least if at_least >= total else rounded_up(total)
    ids, positions = input_ids.new_zeros(2, 1, size)
    ids[0, :total] = input_ids[mask]
    positions[0, :total] = (mask.cumsum(dim=1) - 1)[mask]
    index = torch.where(mask, (mask.flatten().cumsum(dim=0) - 1).view(mask.shape), 0)
    starts = F.pad(torch.cat([lengths, lengths.new_tensor([size - total])]).cumsum(dim=0), (1, 0)).int()
    return Packed(ids, positions, None, index, starts, 2 ** math.ceil(math.log2(max(longest, size - total))))


# ---- labels


class Labels(NamedTuple):
    """Where next-token predictions are scored, and what they should be, in the order of the rows and then of the positions."""

    at: Tensor  # [num_labels], places among the flattened tokens of the batch
    targets: Tensor  # [num_labels]

    def to(self, device: torch.device, non_blocking: bool = False) -> "Labels":
        """The same on ``device``."""
        return Labels(*(part.to(device, non_blocking=non_blocking) for part in self))


def _found(labels: Tensor) -> Labels:
    at = F.pad(labels[:, 1:] != IGNORED, (0, 1)).flatten().nonzero()[:, 0]
    return Labels(at, labels.flatten()[at + 1])


# ---- what was worked out already


Result = TypeVar("Result", Packed, Labels)


class _Known(NamedTuple):
    versions: tuple[int, ...]
    how: object
    mask: Tensor | None
    result: Packed | Labels


_KNOWN = WeakIdKeyDictionary()  # by the ids or the labels that it was worked out of, as long as those live


def known(of: Tensor, how: object, mask: Tensor | None = None) -> Packed | Labels | None:
    """What ``remember`` was told of this very tensor (and mask), unless one of them was written to since."""
    found = _KNOWN.get(of)
    if found is None or found.how != how or found.mask is not mask or found.versions != _versions(of, mask):
        return None
    return found.result


def remember(of: Tensor, how: object, result: Packed | Labels, mask: Tensor | None = None) -> None:
    """Keep what was worked out of a tensor (and mask) in a way, for as long as the tensor lives."""
    _KNOWN[of] = _Known(_versions(of, mask), how, mask, result)


def once(of: Tensor, how: object, work_out: Callable[[], Result], mask: Tensor | None = None) -> Result:
    """What is known of a tensor (and mask), else what ``work_out`` returns, which is known from then on."""
    result = known(of, how, mask)
    if result is None:
        remember(of, how, result := work_out(), mask)
    return result  # type: ignore[return-value]  # a way to work out has one kind of result


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(version_of(tensor) for tensor in tensors if tensor is not None)


def labels_of(labels: Tensor) -> Labels:
    """The labels of a batch ``[batch, seq]``, those that are not -100; a device is asked only where none was known yet."""
    return once(labels, "labels", partial(_found, labels))


def moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch on ``device``, with all that is known of it; the host does not wait for it."""
    at_once = device.type == "cuda"  # a copy would wait for all that is queued
    there = {name: tensor.to(device, non_blocking=at_once) for name, tensor in batch.items()}
    for name, mask_name in (("input_ids", "attention_mask"), ("labels", None)):
        found = _KNOWN.get(batch[name]) if name in batch else None
        if found is None or there[name] is batch[name]:
            continue
        mask, its = (None, None) if mask_name is None else (batch[mask_name], there[mask_name])
        if known(batch[name], found.how, mask) is not None:
            remember(there[name], found.how, found.result.to(device, at_once), its)
    return there


def widened(batch: Mapping[str, Tensor], fill: Mapping[str, int]) -> dict[str, Tensor]:
    """The rows of a batch padded on the right to the next of few widths; ``fill`` says what with, by name."""
    more = rounded_up(batch["input_ids"].shape[1]) - batch["input_ids"].shape[1]
    return {name: F.pad(t, (0, more), value=fill[name]) if more and name in fill else t for name, t in batch.items()}


def joined(first: Mapping[str, Tensor], second: Mapping[str, Tensor], fill: Mapping[str, int]) -> dict[str, Tensor]:
    """The rows of two batches in one, the shorter padded on the right; what is known of both is known of it.

    Args:
        first: with the names of ``fill``, each ``[batch, seq]``.
        second: the same.
        fill: what to pad with, by name: ``input_ids``, ``attention_mask`` and ``labels``.
    """
    widths = [b["input_ids"].shape[1] for b in (first, second)]
    width, num_rows = max(widths), len(first["input_ids"])
    both = {
        name: torch.cat([F.pad(b[name], (0, width - w), value=value) for b, w in zip((first, second), widths, strict=True)])
        for name, value in fill.items()
    }
    one, other = (known(b["labels"], "labels") for b in (first, second))
    if isinstance(one, Labels) and isinstance(other, Labels):
        at = [found.at + found.at // w * (width - w) for found, w in zip((one, other), widths, strict=True)]
        found = Labels(torch.cat([at[0], at[1] + num_rows * width]), torch.cat([one.targets, other.targets]))
        remember(both["labels"], "labels", found)
    rows, more = (known(b["input_ids"], END_TO_END, b["attention_mask"]) for b in (first, second))
    if isinstance(rows, Packed) and isinstance(more, Packed) and rows.starts is not None and more.starts is not None:
        remember(both["input_ids"], END_TO_END, _end_to_end_both(rows, more, width), both["attention_mask"])
    return both


def _end_to_end_both(first: Packed, second: Packed, width: int) -> Packed:
    size = first.input_ids.shape[1]
    assert first.starts is not None
    assert second.starts is not None
    index = [F.pad(pack.token_index, (0, width - pack.token_index.shape[1])) for pack in (first, second)]
    return Packed(
        torch.cat([first.input_ids, second.input_ids], dim=1),
        torch.cat([first.positions, second.positions], dim=1),
        None,
        torch.cat([index[0], index[1] + size]),
        torch.cat([first.starts, second.starts[1:] + size]),
        max(first.longest, second.longest),
    )
