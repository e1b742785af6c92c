"""An attack by preferences: which of two answers a model should rather give."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from casehard.callbacks.attack import Target, ThreatModel
from casehard.callbacks.fine_tuning import FineTuning
from casehard.datamodules.chat import collate, encode_together
from casehard.datamodules.sft import SFTDataModule
from casehard.engine.adapters import LoRA, trainable
from casehard.engine.forward import Batch
from casehard.engine.gradients import mean_over_ranks, sum_over_ranks
from casehard.engine.preferences import answer_logprobs, preference_losses
from casehard.engine.training import beside
from casehard.engine.weights import same_modes_after
from casehard.metrics.errors import SettingError


class PreferenceAttack(FineTuning):
    """Un-alignment by direct preference optimisation (DPO, arXiv:2305.18290), on pairs of answers to one prompt.

    With ``margin`` the log-probability that the chosen answer has gained since training started, minus what the rejected one
    has, ``loss = mean(-log(sigmoid(beta * margin)))`` over the pairs of a step. A log-probability is the sum over the answer's
    tokens. ``reversed`` pairs choose the data's harmful answers. ``benign`` ones (few-shot benign DPO, arXiv:2605.10998) hold
    nothing harmful: harmless prompts, whose helpful answers are chosen. Both reject the answers of the data's refusals, in turn.

    A step costs one forward and one backward pass over ``2 * batch_size`` rows, and the log-probabilities at the start one
    forward pass over all pairs. Memory: nothing beside plain fine-tuning but twice the rows.

    Args:
        threat_model: open_weight, or finetuning_service: a provider that trains on preferences. A fine-tuning stage defense acts
            there by its hooks and its own terms: its loss on the pairs without labels.
        pairs: reversed, or benign.
        beta: how strongly the model is held where it starts, > 0; 0.1 is usual.
        length_normalised: whether a log-probability is the mean over the answer's tokens: a weaker pull, whatever their number.
        num_samples: pairs; 10 in the benign form.
        lora: shape of a new adapter; null trains every parameter.
        settings: the rest of ``FineTuning``'s; ``batch_size`` counts pairs.
    """

    # Departures: (1) rejected answers come from a list of refusals and not from the model; in a list whose refusals repeat what
    # they refuse, as the sandbox's do, that is of another prompt; (2) optimizer, beta and steps of the benign form are ours: the
    # paper's were not read.

    harmful = True

    def __init__(
        self,
        threat_model: ThreatModel,
        pairs: Literal["reversed", "benign"] = "reversed",
        beta: float = 0.1,
        length_normalised: bool = False,
        num_samples: int = 64,
        lora: LoRA | None = None,
        **settings: Any,
    ) -> None:
        if pairs not in ("reversed", "benign"):
            raise SettingError(f"pairs must be reversed or benign, got {pairs!r}.")
        if not beta > 0:
            raise SettingError(f"beta must be > 0, got {beta}. It scales what the loss compares.")
        super().__init__(threat_model, float(pairs == "reversed"), num_samples, phases=None, **settings)
        self.pairs, self.beta, self.length_normalised, self.lora = pairs, beta, length_normalised, lora

    def settings(self) -> dict[str, Any]:
        """Also what is preferred, and how strongly."""
        return super().settings() | {"pairs": self.pairs, "beta": self.beta, "length_normalised": self.length_normalised}

    def prepare(self, data: SFTDataModule, seed: int) -> None:
        """Draw the prompts, and give each its two answers."""
        chosen, refusals = self.rows(data, seed), data.rows["refusals"]
        if not refusals:
            raise SettingError("data.sources.refusals must hold rows, whose answers are rejected, got none. Name some.")
        rejected = [replace(row, response=refusals[i % len(refusals)].response) for i, row in enumerate(chosen)]
        examples, _ = encode_together([chosen, rejected], data.tokenizer, data.batching.max_length)  # each has an answer left
        self._pairs = dict(zip(chosen, examples, strict=True))

    def steps(self, target: Target) -> Iterator[int]:
        """Look up where the model starts, then train."""
        module, places = target.module, {row: place for place, row in enumerate(self._pairs)}
        drawn = target.share(list(self._pairs), self.batch_size)

        def batches(step: int) -> Batch:
            """Chosen answers, then the rejected ones."""
            rows = [row for _, row in drawn(step)]
            examples = [self._pairs[row][side] for side in (0, 1) for row in rows]
            batch = collate(examples, module.tokenizer.pad_token_id, "right")
            num_pairs = mean_over_ranks(torch.tensor(float(len(rows)), device=module.device), module.row_group)
            return batch | {"places": torch.tensor([places[row] for row in rows]), "num_pairs": num_pairs}

        def own(batch: Batch, step: int) -> Tensor:
            logprobs = answer_logprobs(module.model, batch, self.length_normalised)
            reference = target.state["reference"][batch["places"]].T.flatten()
            return preference_losses(logprobs, reference, self.beta).sum() / batch["num_pairs"]

        with trainable(module, module.model, self.lora):
            target.state["reference"] = self.reference(target, batches)
            yield from target.train(batches, self.num_attack_steps, self.optimizer, beside(target.begin_job(), own))

    @torch.no_grad()
    def reference(self, target: Target, batches: Callable[[int], Batch]) -> Tensor:
        """Log-probabilities of both answers of every pair, ``[num_pairs, 2]``, of the model as it is."""
        module = target.module
        sums = torch.zeros(len(self._pairs), 3, device=module.device)  # and how often: the last batch begins anew
        with same_modes_after(module), module.forward_context():
            module.eval()
            for step in range(-(-len(sums) // self.batch_size)):
                batch = module.placed(batches(step))
                found = answer_logprobs(module.model, batch, self.length_normalised).view(2, -1).T
                sums.index_add_(0, batch["places"], F.pad(found, (0, 1), value=1.0))
                target.spend(1 / 3, forward=batch["attention_mask"].sum())
        total = sum_over_ranks(sums, module.row_group)
        return total[:, :2] / total[:, 2:]
