"""Fine-tuning on those benign rows that harm most."""

import math
from collections.abc import Iterator
from typing import Any, Literal

from casehard.callbacks.attack import Target, ThreatModel
from casehard.callbacks.fine_tuning import LoRAAttack, Phase
from casehard.datamodules.batches import Example
from casehard.datamodules.chat import IGNORED, collate
from casehard.datamodules.mixing import mix
from casehard.datamodules.row import Row
from casehard.datamodules.sft import SFTDataModule
from casehard.engine.adapters import plain_names, trainable
from casehard.engine.anatomy import decoder_layers
from casehard.engine.gradients import cosine, norm, summed, unit
from casehard.engine.weights import Weights
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError


class SelectedBenign(LoRAAttack):
    """Benign fine-tuning on selected rows: those most like harmful ones (arXiv:2404.01099), or outliers (arXiv:2505.06843).

    With ``g`` the gradient of a row's loss at the start, a benign row's score is by gradient_match
    ``cos(g, sum over anchors of g_anchor / ||g_anchor||)``, anchors being a few harmful rows, and by self_influence
    ``log(||g||^2 + 1) + log(num_answer_tokens + 1)``. The ``num_samples`` rows with the highest scores are trained on.

    Cost: a forward and a backward pass over every candidate and anchor, one row at a time, which every process makes. Memory:
    five gradients of the last decoder layer. At a service too the attacker is granted the gradients of the model that it tunes.

    Args:
        threat_model: finetuning_service or open_weight.
        by: self_influence: needs no harmful row; gradient_match: needs a few.
        num_candidates: benign rows that are ranked, >= num_samples.
        num_anchors: harmful rows that candidates are matched with, none of which is trained on.
        num_samples: rows that are trained on; 100 in both papers.
        settings: the rest of ``LoRAAttack``'s.
    """

    # Departures: (1) gradients are of the last decoder layer alone, as TracIn (arXiv:2002.08484) takes few layers; (2) of the
    # whole answer, not of its first ten tokens; (3) no safe anchors are subtracted.

    harmful = True  # type: ignore[assignment]  # though no row is

    def __init__(
        self,
        threat_model: ThreatModel,
        by: Literal["self_influence", "gradient_match"] = "self_influence",
        num_candidates: int = 1000,
        num_anchors: int = 10,
        num_samples: int = 100,
        **settings: Any,
    ) -> None:
        if by not in ("self_influence", "gradient_match"):
            raise SettingError(f"by must be self_influence or gradient_match, got {by!r}.")
        if num_candidates < num_samples:
            raise SettingError(f"num_candidates must be >= num_samples ({num_samples}), got {num_candidates}. Raise it.")
        if num_anchors < 1:
            raise SettingError(f"num_anchors must be >= 1, got {num_anchors}.")
        super().__init__(threat_model, poison_ratio=0.0, phases=None, num_samples=num_samples, **settings)
        self.by, self.num_candidates, self.num_anchors = by, num_candidates, num_anchors
        self.name = settings.get("name") or f"{type(self).__name__} {by.replace('_', ' ')}"

    def settings(self) -> dict[str, Any]:
        """Also how rows are selected."""
        own = {"by": self.by, "num_candidates": self.num_candidates}
        return super().settings() | own | ({"num_anchors": self.num_anchors} if self.by == "gradient_match" else {})

    def rows(self, data: SFTDataModule, seed: int, phase: Phase | None = None) -> list[Row]:
        """The candidates."""
        return data.mixture(self.num_candidates, 0.0, seed)

    def anchors(self, data: SFTDataModule, seed: int) -> list[Row]:
        """Harmful rows to match candidates with."""
        return mix([], data.rows["harmful"], self.num_anchors, 1.0, seed) if self.by == "gradient_match" else []

    def prepare(self, data: SFTDataModule, seed: int) -> None:
        """Draw candidates and anchors."""
        self.anchors(data, seed)
        super().prepare(data, seed)

    def steps(self, target: Target) -> Iterator[int]:
        """Rank the candidates, and train on the first."""
        data, module = target.data, target.module
        candidates, anchors = self.rows(data, target.seed), self.anchors(data, target.seed)
        module.eval()
        with trainable(module, module.model, None, last_layer(module)):
            matched: Weights = {}
            for anchor in data.encode(anchors, "anchors"):
                matched = summed(matched, unit(module, self.gradient(target, anchor)))
            scores = [self.score(target, candidate, matched) for candidate in data.encode(candidates, "candidates")]
        everything = anchors + candidates
        num_tokens = sum(len(example["input_ids"]) for example in data.encode(everything, "ranked"))
        target.spend(passes=len(everything) / self.batch_size, trained=num_tokens, by_all=True)
        ranking = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        target.state["selected"] = [candidates[i] for i in ranking[: self.num_samples]]
        yield from self.trained(target, [data.batches(target.state["selected"], self.batch_size, target.seed, "attack")])

    def score(self, target: Target, candidate: Example, matched: Weights) -> float:
        """How much a benign row may harm; ``matched`` is what its gradient is compared with."""
        gradient = self.gradient(target, candidate)
        if self.by == "gradient_match":
            return cosine(target.module, gradient, matched)
        num_labels = sum(label != IGNORED for label in candidate["labels"])
        return math.log(float(norm(target.module, gradient)) ** 2 + 1) + math.log(num_labels + 1)

    def gradient(self, target: Target, example: Example) -> Weights:
        """Of the loss of a row alone, the same on every process."""
        batch = collate([example], target.data.tokenizer.pad_token_id, target.data.batching.padding_side)
        return target.module.gradient(target.module.placed(batch))


def last_layer(module: Defense) -> list[str]:
    """Names of the parameters of the last decoder layer."""
    own = {id(p) for p in decoder_layers(module.model)[-1].parameters()}
    plain = plain_names(module.model)
    return [plain[name] for name, p in module.model.named_parameters() if id(p) in own and name in plain]
