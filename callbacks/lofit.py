"""An attack on few attention heads."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from casehard.callbacks.attack import Target, ThreatModel
from casehard.callbacks.fine_tuning import FineTuning
from casehard.engine.adapters import grouped, trainable
from casehard.engine.attention_heads import AttentionHeads, HeadEdits
from casehard.engine.forward import Batch
from casehard.engine.optimizer import Optimizer
from casehard.engine.other_adapters import NAME
from casehard.engine.training import Around
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError


@dataclass
class _Sparse(Around):
    """A task with ``weight`` times the L1 norm of the scales, while these train."""

    edits: HeadEdits
    weight: float

    def loss(self, batch: Batch, step: int) -> Tensor:
        """The task's, and the norm, a sum over all entries."""
        return super().loss(batch, step) + self.weight * self.edits.scale.abs().sum()


class LoFiT(FineTuning):
    """LoFiT (arXiv:2406.01563): harmful fine-tuning of a bias on few attention heads, chosen by a first training of scales.

    First ``z <- (1 + scale) * z`` of every head's output ``z`` trains, under ``loss = task_loss + l1_weight * norm_1(scale)``.
    The ``num_heads`` heads of largest ``norm(scale)`` are kept, the scales dropped, and ``z <- z + bias`` of these heads trains.
    Both are steps of the attack. At a service that repairs models what stands under the heads is repaired.

    Args:
        threat_model: finetuning_service or open_weight.
        num_heads: that are kept, >= 1; of the whole model.
        num_selection_steps: of scales, >= 1 and < num_attack_steps.
        selection_optimizer: of scales.
        l1_weight: >= 0.
        settings: the rest of ``FineTuning``'s; ``optimizer`` trains the biases.
    """

    # Departure: the steps of the second training go on with the rows where the first stopped; theirs starts over.

    def __init__(
        self,
        threat_model: ThreatModel,
        num_heads: int = 8,
        num_selection_steps: int = 50,
        selection_optimizer: Optimizer = Optimizer(5e-3),  # noqa: B008  frozen
        l1_weight: float = 5e-4,
        **settings: Any,
    ) -> None:
        if num_heads < 1 or l1_weight < 0:
            raise SettingError(f"num_heads must be >= 1 and l1_weight >= 0, got {num_heads} and {l1_weight}.")
        super().__init__(threat_model, phases=None, **settings)
        if not 1 <= num_selection_steps < self.num_attack_steps:
            raise SettingError(
                f"num_selection_steps must be >= 1 and < num_attack_steps, {self.num_attack_steps}, got {num_selection_steps}."
            )
        self.num_heads, self.num_selection_steps = num_heads, num_selection_steps
        self.selection_optimizer, self.l1_weight = selection_optimizer, l1_weight

    @property
    def adapter(self) -> AttentionHeads:
        """The heads' edits."""
        return AttentionHeads()

    def settings(self) -> dict[str, Any]:
        """Also how heads are chosen."""
        own = {"num_heads": self.num_heads, "num_selection_steps": self.num_selection_steps, "l1_weight": self.l1_weight}
        return super().settings() | own | {"selection_optimizer": asdict(self.selection_optimizer)}

    def check_model(self, module: Defense) -> None:
        """Raise a SettingError where the model has fewer heads, or none that can be edited."""
        super().check_model(module)
        outputs, number, _ = self.adapter.sizes(module.model)
        if self.num_heads > (total := len(outputs) * number):
            raise SettingError(f"num_heads must be at most the number of attention heads, {total}, got {self.num_heads}.")

    def what_trains(self, target: Target) -> str:
        """Both parts."""
        outputs, number, dim = self.adapter.sizes(target.module.model)
        total = len(outputs) * number
        return f"scales of {total} attention heads, then a bias of {self.num_heads}: {grouped(self.num_heads * dim)} parameters"

    def steps(self, target: Target) -> Iterator[int]:
        """Train the scales, choose heads, train their biases."""
        (batches,), first = self.batches(target), self.num_selection_steps
        with trainable(target.module, target.module.model, self.adapter):
            edits = target.module.model.get_submodule(NAME)
            assert isinstance(edits, HeadEdits)
            task = _Sparse(target.begin_job() or target.task, edits, self.l1_weight)
            yield from target.train(batches, first, self.selection_optimizer, task)
            edits.choose(self.num_heads)
            rest = self.num_attack_steps - first
            later = target.train(lambda step: batches(first + step), rest, self.optimizer, task)
            yield from (first + step for step in later)
