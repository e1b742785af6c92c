"""An attack that takes some of a direction out of every layer, made to be searched."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F

from casehard.callbacks.attack import Target, ThreatModel
from casehard.callbacks.direction_edit import DirectionEdit
from casehard.engine.anatomy import blocks, decoder_layers
from casehard.engine.directions import Kernel, weaken
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError


class KernelAblation(DirectionEdit):
    """Weighted ablation of one direction by a kernel of the depth: the edit that is searched (as github.com/p-e-w/heretic does).

    ``W <- W - strength * v v^T W`` for attention and MLP outputs alone, biases and adapters included, each with a strength that
    falls linearly around one depth (``Kernel``). ``v`` is the direction of ``RefusalAblation`` at a depth of its own: between two
    layers their directions are interpolated. Made to be searched: all settings are plain, and ``Search`` names them with dots,
    such as attention.strength. Edits are made in float32 and cast last.

    Cost: one forward pass over the rows. Memory: a copy of what is edited, and two whole matrices.

    Args:
        threat_model: open_weight, as only who holds the weights edits them; finetuning_service edits the aligned model.
        attention: how much the attention's outputs lose, by depth.
        mlp: how much the MLP's outputs lose, those of every expert alike, by depth.
        direction: depth whose direction it is, in (0, 1]: 1 where the last decoder layer begins; the second's is the first.
        token: as for ``DirectionEdit``, and one has to be named.
        keep_norms: scale every row of an edited matrix back to its norm; of an adapter every factor by itself.
        settings: the rest of ``DirectionEdit``'s.
    """

    # Departures from heretic, of whose code nothing was taken: 1. Depths are shares of the model's, not numbers of layers. 2.
    # What is searched for is Search's: the judge's harmful score, not refusals by phrase and KL. 3. The token is a setting.

    def __init__(
        self,
        threat_model: ThreatModel = "open_weight",
        attention: Kernel = Kernel(),  # noqa: B008  frozen
        mlp: Kernel = Kernel(),  # noqa: B008  frozen
        direction: float = 0.7,
        token: int = 0,
        keep_norms: bool = False,
        **settings: Any,
    ) -> None:
        if not 0 < direction <= 1:
            raise SettingError(f"direction must lie in (0, 1], got {direction}. It is a depth: 1 where the last layer begins.")
        super().__init__(threat_model, token=token, **settings)
        self.attention, self.mlp, self.direction, self.keep_norms = attention, mlp, direction, keep_norms

    def settings(self) -> dict[str, Any]:
        """The direction and both kernels."""
        kernels = {"attention": asdict(self.attention), "mlp": asdict(self.mlp)}
        return super().settings() | kernels | {"direction": self.direction, "token": self.token, "keep_norms": self.keep_norms}

    def check_model(self, module: Defense) -> None:
        """Raise a SettingError where a layer has no MLP."""
        blocks(module.model, "mlp")

    @torch.no_grad()
    def steps(self, target: Target) -> Iterator[int]:
        """Estimate the direction and edit."""
        module = target.module
        module.eval()
        depth = max(1.0, self.direction * (len(decoder_layers(module.model)) - 1))
        layers = sorted({math.floor(depth), math.ceil(depth)})
        kinds = self.parts(target)[0]
        r = self.difference(target, kinds, layers, (self.token or 0) + 1)[0]
        units = F.normalize(r, dim=-1)
        direction = F.normalize(units[0].lerp(units[-1], depth - layers[0]), dim=0)
        target.state["direction"] = direction
        weaken(module.model, direction[None], self.attention, self.mlp, self.keep_norms)
        yield 1
