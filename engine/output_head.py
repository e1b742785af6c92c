"""The output head by itself: a copy that trains in its place, where the embedding is tied to it, too."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from casehard.engine.adapters import grouped
from casehard.engine.anatomy import final_norm


def own_copy(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with whole parameters of its own. Where the module's are sharded every rank must call this."""
    whole = {id(p): p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for p in module.parameters()}
    return copy.deepcopy(module, {key: nn.Parameter(tensor) for key, tensor in whole.items()})  # type: ignore[arg-type]


@dataclass(frozen=True)
class OutputHead:
    """A copy of the output head (unembedding) in its place; the hidden states stand still, and so does a tied embedding.

    Memory: the head once more, whole on every rank.

    Args:
        final_norm: whether the norm in front of the head trains, too.
    """

    final_norm: bool = False

    def check(self, model: PreTrainedModel) -> None:
        """Raise a SettingError where the norm is to train and the model declares none."""
        self._chosen(model)

    def _chosen(self, model: PreTrainedModel) -> list[nn.Module]:
        return [model.get_output_embeddings(), *([final_norm(model)] if self.final_norm else [])]

    @contextmanager
    def added(self, model: PreTrainedModel) -> Iterator[None]:
        """For a block, the copies stand in the model and are all that trains."""
        chosen = self._chosen(model)
        places = [(parent, name, part) for parent in model.modules() for name, part in parent.named_children() if part in chosen]
        copies = {part: own_copy(part) for part in chosen}
        model.requires_grad_(False)
        try:
            for parent, name, part in places:
                setattr(parent, name, copies[part].requires_grad_(True))
            yield
        finally:
            for parent, name, part in places:
                setattr(parent, name, part)

    def described(self, model: PreTrainedModel) -> str:
        """Of which parts, and how many parameters."""
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return f"the output head{' and the final norm' if self.final_norm else ''}: {grouped(trained)} parameters"
