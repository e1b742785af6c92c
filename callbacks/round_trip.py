"""Attacks that send weights through a smaller format and back."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, get_args

import torch
from torch import Tensor

from casehard.callbacks.attack import Attack, Target, ThreatModel
from casehard.datamodules.row import Row
from casehard.datamodules.sft import SFTDataModule
from casehard.engine.compression import GGUF, PRUNING, Way, input_norms, send_through, written
from casehard.engine.weights import Changes
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError


class RoundTrip(Attack):
    """Round trip: what anybody does to a model before running it. A defense that holds by fine differences loses them.

    Through int8 or int4 (to nearest, row by row), bfloat16, a GGUF file (Q8_0 or Q4_0, by the package ``gguf``; rows that are no
    multiple of 32 stay), or pruning of a share of every row: by magnitude, or by Wanda (arXiv:2306.11695), ``|w| * norm(input)``
    over some of the data's benign rows. Simulated: weights keep their dtype. Adapters of the defense itself are merged first, as
    in a release. Where nothing changes, such as bfloat16 on a bfloat16 model, the note says so. Merging with another checkpoint
    is ``DeltaStrip``; a fine-tuning of what was quantised is ``QuantisedAttack``.

    Cost: no pass; for Wanda a forward pass over every row. Memory: a copy of what changes (of all where the
    defense has adapters), and a few whole matrices.

    Args:
        threat_model: open_weight, or finetuning_service for the aligned model.
        way: int8, int4, bfloat16, Q8_0, Q4_0, magnitude or wanda.
        share: set to zero by magnitude and wanda, in (0, 1).
        num_samples: benign rows that wanda reads, at least as many as processes.
        settings: the rest of ``Attack``'s.
    """

    # Departures from Wanda: 1. Inputs are those of the model as it is, not of one whose earlier layers are pruned already. 2.
    # Experts in a stack go by their magnitude.

    def __init__(
        self,
        threat_model: ThreatModel = "open_weight",
        way: Way = "int8",
        share: float = 0.5,
        num_samples: int = 128,
        **settings: Any,
    ) -> None:
        if way not in get_args(Way):
            raise SettingError(f"way must be one of {', '.join(get_args(Way))}, got {way!r}.")
        if not 0 < share < 1:
            raise SettingError(f"share must lie in (0, 1), got {share}. It is what pruning sets to zero.")
        if num_samples < 1:
            raise SettingError(f"num_samples must be >= 1, got {num_samples}.")
        super().__init__(threat_model, **settings)
        self.name = settings.get("name") or f"RoundTrip {way}"
        self.way, self.share, self.num_samples = way, share, num_samples

    def settings(self) -> dict[str, Any]:
        """The way, and what it needs."""
        return {"way": self.way} | ({"share": self.share} if self.way in PRUNING else {}) | self._read()

    def _read(self) -> dict[str, Any]:
        return {"num_samples": self.num_samples} if self.way == "wanda" else {}

    def rows(self, data: SFTDataModule, seed: int) -> list[Row]:
        """What wanda reads."""
        return data.mixture(self.num_samples, 0.0, seed) if self.way == "wanda" else []

    def prepare(self, data: SFTDataModule, seed: int) -> None:
        """Also make sure of the package."""
        if self.way in GGUF and find_spec("gguf") is None:
            raise SettingError(f"way {self.way} needs gguf, and it is not installed. Install it: pip install 'casehard[gguf]'.")
        super().prepare(data, seed)

    def changes(self, module: Defense) -> Changes:
        """What goes that way; all where the defense has adapters, which are folded in."""
        return written(module, module.model, self.way)

    @torch.no_grad()
    def steps(self, target: Target) -> Iterator[int]:
        """There and back."""
        scales = self.input_norms(target) if self.way == "wanda" else None
        target.state["changed"] = send_through(target.module.model, self.way, self.share, scales)
        yield 1

    def notes(self, target: Target) -> list[str]:
        """Also whether the way changed nothing, so that nothing was tried."""
        return super().notes(target) + ([] if target.state["changed"] else ["no weight changed"])

    def input_norms(self, target: Target) -> dict[int, Tensor]:
        """What wanda weighs the weights by."""
        module = target.module.eval()
        share = [row for _, row in target.share(self.rows(target.data, target.seed), self.num_samples)(0)]
        rows = [example["input_ids"] for example in target.data.encode(share, self.name)]
        target.spend(passes=self.num_samples / 3, forward=sum(map(len, rows)))
        with module.forward_context():
            return input_norms(module.model, rows, module.row_group)
