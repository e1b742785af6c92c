"""An attack on the output head alone."""

from typing import Any

from casehard.callbacks.attack import ThreatModel
from casehard.callbacks.fine_tuning import FineTuning
from casehard.engine.output_head import OutputHead
from casehard.engine.weights import NOTHING, borrowed, group_of
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError


class HeadOnly(FineTuning):
    """Harmful fine-tuning of the output head alone: hidden states stay where they are, and so does a tied embedding.

    Adaptive against SBR (arXiv:2605.05995), which holds the states that enter the head: along this attack its loss is zero. The
    head is a linear map of one state, the same on all prompts, so what the attack can say is limited.

    At a service that repairs models a head that was tied is left as it was trained.

    Memory: the head once more, whole on every rank, and no copy of the weights.

    Args:
        threat_model: finetuning_service or open_weight. A service that freezes the head, as SBR's does by default, is refused.
        final_norm: train the norm in front of the head, too. It moves the states that enter the head.
        settings: the rest of ``FineTuning``'s.
    """

    def __init__(self, threat_model: ThreatModel, final_norm: bool = False, **settings: Any) -> None:
        super().__init__(threat_model, **settings)
        self.final_norm = final_norm

    @property
    def adapter(self) -> OutputHead:
        """The head's copy."""
        return OutputHead(self.final_norm)

    def settings(self) -> dict[str, Any]:
        """Also whether the norm trains."""
        return super().settings() | {"final_norm": self.final_norm}

    def check_model(self, module: Defense) -> None:
        """Raise a SettingError where the service trains no head, or would repair a whole one by shards."""
        super().check_model(module)
        if self.threat_model == "open_weight":
            return
        with borrowed(module, NOTHING):
            module.requires_grad_(True)
            module.job().freeze()
            frozen = not all(p.requires_grad for p in module.model.get_output_embeddings().parameters())
        if frozen:
            raise SettingError(
                f"threat_model must be open_weight for {self.name} where the service freezes the output head, got "
                f"finetuning_service and {module.label}. Let the service train the head (SBR: freeze_unembedding false), or hold "
                "the weights."
            )
        tied = module.model.get_output_embeddings().weight is module.model.get_input_embeddings().weight
        if group_of(module) is not None and "post_finetuning" in module.stages and (self.final_norm or not tied):
            raise SettingError(
                f"trainer.strategy must not shard weights for {self.name} where a service ({module.label}) repairs models and "
                "the head is not tied or final_norm is set, got shards. Take ddp."
            )
