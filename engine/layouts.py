"""Which layout the rows of a batch take for a pass: made for the device that the model runs on."""

from typing import Literal, get_args
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

Layout = Literal["prefix_tree", "varlen", "padded"]
"""``prefix_tree``: no padding, shared prefixes once, an attention mask: a new size and mask at every step, least to compute.
``varlen``: rows end to end without a mask, their total rounded up to few sizes. ``padded``: rows padded to few widths."""

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
_CHOSEN: WeakKeyDictionary[PreTrainedModel, Layout] = WeakKeyDictionary()


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of the model's passes: that which was chosen, else the prefix tree on a CPU and padded rows elsewhere.

    A model that takes no prefix tree gets padded rows in its place (``forward.takes_prefix_trees``).
    """
    return _CHOSEN.get(model, "prefix_tree" if model.device.type == "cpu" else "padded")


def choose(model: PreTrainedModel, layout: Layout) -> None:
    """Have all passes of ``model`` take this layout."""
    _CHOSEN[model] = layout
