"""Attention heads, edited where they enter the output projection: scaled, or shifted by a bias of their own (LoFiT)."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from casehard.engine.anatomy import blocks
from casehard.engine.other_adapters import OtherAdapter, alone
from casehard.engine.outputs import uncompiled
from casehard.metrics.errors import SettingError


class HeadEdits(nn.Module):
    """``z <- (1 + scale) * z`` of every head of every layer, and once heads are chosen ``z <- z + bias`` of these alone.

    Args:
        num_layers: of the model.
        num_heads: of a layer.
        dim: of a head.
    """

    chosen: Tensor

    def __init__(self, num_layers: int, num_heads: int, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(num_layers, num_heads, dim))
        self.bias = nn.Parameter(torch.zeros(0, dim), requires_grad=False)
        self.register_buffer("chosen", torch.zeros(0, dtype=torch.long))

    def forward(self, layer: int, states: Tensor) -> Tensor:
        """``states`` ``[..., heads * dim]`` of a layer, edited."""
        shape = self.scale.shape
        bias = self.bias.new_zeros(shape.numel() // shape[-1], shape[-1]).index_copy(0, self.chosen, self.bias).view(shape)
        return (states * (1 + self.scale[layer].flatten()) + bias[layer].flatten()).to(states.dtype)

    def choose(self, number: int) -> None:
        """Keep the heads of largest ``norm(scale)``, set their scales aside, and let a bias of theirs train instead."""
        norms = self.scale.detach().norm(dim=-1).flatten()
        self.chosen = norms.argsort(descending=True, stable=True)[:number]
        self.scale.requires_grad_(False).zero_()
        self.bias = nn.Parameter(self.bias.new_zeros(number, self.scale.shape[-1]))


@dataclass(frozen=True)
class AttentionHeads(OtherAdapter):
    """Edits of the attention heads of every layer (``HeadEdits``), as an adapter."""

    def sizes(self, model: PreTrainedModel) -> tuple[list[nn.Module], int, int]:
        """What the heads enter in every layer, how many heads a layer has, and of how many entries.

        Raises:
            SettingError: a layer without attention, or with other heads than the config says.
        """
        outputs = []
        for block in blocks(model, "attention"):
            inside = set(block.attention.modules())  # type: ignore[union-attr]
            outputs += [writer for writer in block.writers if writer in inside]
        number = model.config.get_text_config().num_attention_heads
        widths = {getattr(output, "in_features", 0) or getattr(output, "nx", 0) for output in outputs}
        if len(widths) != 1 or min(widths) % number:
            raise SettingError(
                f"checkpoint must have {number} attention heads of one size in every layer for this attack, and "
                f"{type(model).__name__} has output projections of {', '.join(map(str, sorted(widths)))} inputs."
            )
        return outputs, number, widths.pop() // number

    def check(self, model: PreTrainedModel) -> None:
        """Raise a SettingError where the model has no attention heads of one size."""
        self.sizes(model)

    @contextmanager
    def added(self, model: PreTrainedModel) -> Iterator[None]:
        """For a block, ``HeadEdits`` is a part of the model, and acts."""
        outputs, number, dim = self.sizes(model)
        edits = HeadEdits(len(outputs), number, dim)

        def edited(_: nn.Module, args: tuple[Tensor, ...], *, layer: int) -> tuple[Tensor, ...]:
            return (edits(layer, args[0]), *args[1:])

        with ExitStack() as stack:
            stack.enter_context(alone(model, edits))
            stack.enter_context(uncompiled(model))
            for layer, output in enumerate(outputs):
                stack.callback(output.register_forward_pre_hook(partial(edited, layer=layer)).remove)
            yield
