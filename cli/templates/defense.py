"""A defense of your own: a class, a YAML file that names it, and nothing else.

    casehard fit --config my_defense.yaml

    # my_defense.yaml
    model: {class_path: mylab.my_defense.StayClose, init_args: {weight: 0.1}}

What is overridden says in which stage it acts: ``rows``, ``alignment_loss`` and ``harden`` before release, ``job`` while a
service fine-tunes, ``recover`` after that. The docstring of ``casehard.Defense`` says what is called when; docs/add-a-defense.md
has an example of each.
"""

import casehard
from casehard.engine.weights import local, snapshot


class StayClose(casehard.Defense):
    """L2-SP (arXiv:1802.01483), a fine-tuning stage defense: a job is held near the weights where it began.

    ``loss = L_sft + weight * sum((p - start) ** 2)``, over all that trains.

    Args:
        checkpoint: the model to start from.
        weight: of the distance, >= 0; 0 is plain SFT.
        settings: the rest of ``casehard.Defense``'s: optimizer, lora, backbone.
    """

    def __init__(self, checkpoint: str, weight: float = 0.1, **settings) -> None:
        if not weight >= 0:
            raise casehard.SettingError(f"weight must be >= 0, got {weight}. 0 is plain SFT.")
        super().__init__(checkpoint, **settings)
        self.weight = weight

    def job(self) -> "StayCloseJob":
        return StayCloseJob(self)


class StayCloseJob(casehard.Job):
    """One fine-tuning at a service. What it remembers stands in ``state``, which a checkpoint saves."""

    def begin(self) -> None:
        self.state["start"] = snapshot(self.defense)  # a copy of what trains

    def before_step(self, step: int) -> None:
        for name, p in self.defense.named_parameters():
            if p.grad is not None:  # local: this process's part, where weights are sharded
                local(p.grad).add_(local(p) - self.state["start"][name], alpha=2 * self.defense.weight)
