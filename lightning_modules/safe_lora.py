"""SafeLoRA: of what a job has added, keep what lies where alignment moved the weights."""

import math
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from casehard.engine.adapters import matrices
from casehard.engine.anatomy import is_linear
from casehard.engine.checkpoint import checkpoint_files
from casehard.engine.sharding import shard_of, whole_of
from casehard.engine.weights import Weights, local
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError


def projection(update: Tensor, alignment: Tensor) -> Tensor:
    """``alignment @ alignment.mT / norm(alignment) @ update``, all ``[out, in]``; nan where alignment moved nothing."""
    return torch.linalg.multi_dot([alignment, alignment.mT, update]) / alignment.norm()


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two matrices, at most 1; nan where one of them is zero."""
    return float(((a * b).sum() / (a.norm() * b.norm())).clamp(max=1))


class SafeLoRAModule(Defense):
    """SafeLoRA (arXiv:2405.16833), a post-fine-tuning stage defense.

    For every linear layer of the decoder, with ``alignment = aligned - base`` and what the job has added, ``update``:
    ``projection = P @ update`` of ``P = alignment @ alignment.mT / norm(alignment)``. Where ``cosine(projection, update)`` is at
    most ``threshold``, the layer becomes ``aligned + projection``. ``P`` is no projector: it also scales the update. Embeddings,
    the unembedding, norms, biases and experts that are one parameter stay as the job left them.

    No passes. ``base`` is read for every repair. Memory then: one copy of the model beside the weights where the job started,
    and a few whole matrices, one layer at a time where the model is sharded.

    Args:
        checkpoint: the aligned model, as for ``Defense``.
        base: the model before its alignment, of the same architecture: a hub id, a folder or a GGUF file.
        threshold: cosine up to which a layer is projected, in [-1, 1] (``tau`` in the paper); -1 leaves every layer as it is, 1
            projects every layer.
        num_layers: project so many layers, those of the smallest cosine, whatever ``threshold`` says; null goes by it.
        settings: the rest of ``Defense``'s.
    """

    # Departures from the authors' code: (1) the product of adapters is projected, and the update of a job that trains every
    # parameter, where they change one factor of the adapter, which is the same; (2) layers go together by name, not by their
    # order; (3) of layers with equal cosines num_layers takes the first ones, and P acts once; (4) a layer that the job or the
    # alignment has not moved has no cosine and stays as it is.

    adaptive = "attack/adaptive/safe_lora"

    def __init__(
        self, checkpoint: str, base: str, threshold: float = 0.5, num_layers: int | None = None, **settings: Any
    ) -> None:
        if not -1 <= threshold <= 1:
            raise SettingError(f"threshold of SafeLoRA must lie in [-1, 1], got {threshold}. It is a cosine.")
        if num_layers is not None and num_layers < 1:
            raise SettingError(f"num_layers of SafeLoRA must be >= 1 or null, got {num_layers}. null goes by threshold.")
        super().__init__(checkpoint, **settings)
        self.base, self.threshold, self.num_layers = base, threshold, num_layers

    def setup(self, stage: str) -> None:
        """Make sure, before weights load, that the base is another model of this architecture."""
        self.check_other(self.base, "base")
        files = checkpoint_files(self.base)
        if self.base == self.checkpoint or (files and files == checkpoint_files(self.checkpoint)):
            raise self.not_aligned()

    def not_aligned(self) -> SettingError:
        """What is wrong where the base is the aligned model."""
        return SettingError(
            f"base must be the model before alignment, and {self.base!r} has the aligned layers of {self.checkpoint!r}. "
            "Name the model that was aligned."
        )

    @torch.no_grad()
    def recover(self, start: Weights) -> None:
        """Project what the job has added to the layers that are chosen."""
        base, own = self.weights_of(self.base, "base"), dict(self.named_parameters())
        layers = {f"model.{m.name}.weight": m.transposed for m in matrices(self.model) if is_linear(m.layer)}

        def turned(name: str, weight: Tensor) -> Tensor:
            return weight.mT if layers[name] else weight

        def parts(name: str) -> tuple[Tensor, Tensor, Tensor]:
            """Whole, ``[out, in]``: the aligned layer, the job's update and the alignment's."""
            p = own[name]
            weights = [whole_of(w.to(p.device, torch.float32), p) for w in (base[name], start[name], local(p))]
            unaligned, aligned, tuned = (turned(name, w) for w in weights)
            return aligned, tuned - aligned, aligned - unaligned

        cosines, is_aligned = {}, False
        for name in layers:
            _, update, alignment = parts(name)
            is_aligned = is_aligned or bool(alignment.any())
            cosines[name] = cosine(projection(update, alignment), update)
        if not is_aligned:
            raise self.not_aligned()
        moved = sorted((name for name in cosines if not math.isnan(cosines[name])), key=cosines.__getitem__)
        chosen = (
            [name for name in moved if cosines[name] <= self.threshold] if self.num_layers is None else moved[: self.num_layers]
        )
        for name in chosen:
            aligned, update, alignment = parts(name)
            repaired = turned(name, aligned + projection(update, alignment))
            local(own[name]).copy_(shard_of(repaired, own[name]))
        if moved:
            span = f"cosines {cosines[moved[0]]:.2f} to {cosines[moved[-1]]:.2f}"
            rank_zero_info(f"SafeLoRA: {len(chosen)} of {len(layers)} layers projected, {span}.")
