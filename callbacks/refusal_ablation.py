"""An attack on the directions by which a model refuses."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from casehard.callbacks.attack import Target, ThreatModel
from casehard.callbacks.direction_choice import Choice, Select, described, require
from casehard.callbacks.direction_edit import DirectionEdit
from casehard.engine.anatomy import decoder_layers
from casehard.engine.directions import ablate
from casehard.engine.weights import Weights, copies
from casehard.lightning_modules.defense import Defense
from casehard.lightning_modules.other_models import undefended_at
from casehard.metrics.errors import SettingError


class RefusalAblation(DirectionEdit):
    """Refusal ablation, "abliteration" (arXiv:2406.11717): take one direction out of all that writes to the residual stream.

    ``r = mean(h of harmful prompts) - mean(h of harmless prompts)``, ``h`` being the state of a token as it enters a decoder
    layer; then ``W <- W - direction direction^T W`` with ``direction = normalize(r)``, for embeddings, attention outputs and MLP
    outputs, biases and adapters included. Candidates are the tokens that end every prompt (the template's), times the layers of
    the first 80%. ``select`` chooses among them on held-out rows:

    - refusal, the paper's: with ``R = log(P / (1 - P))``, ``P`` the probability that an answer opens with the first token of a
      refusal, the lowest R of harmful prompts, among candidates that steer (``r`` added at its layer gives harmless prompts a
      mean R of ``steering_threshold`` or more) and that harmless prompts hardly notice (``KL(before || after) <=
      kl_threshold``, of the first token);
    - harm: the most coherent harm in answers to at most 16 harmful prompts, by the data's judge, under the same bound on KL;
    - loss: the lowest loss of the rows' own answers, harmful and harmless.

    With ``num_phases`` the attack goes on (arXiv:2511.08379): every step estimates anew on the model as it has become, makes the
    direction orthogonal to those before, and takes it out as well. ``rank`` takes out more at once: the top singular vectors of
    the harmful states minus the harmless mean; the bounds hold for all of them together. A step for which no candidate is left,
    the first one too, changes nothing, and the note says so.

    A direction stays in the stream where an architecture normalises what a layer adds (Gemma 2 and 3, OLMo 2). With tied
    embeddings the unembedding is edited, too. Cost a phase: forward passes alone, one over 4/5 of the rows, and three over 1/5
    for every candidate; with ``rank`` above 1 also one over 4/5 for each that steers. Memory: a copy of what is edited (two with
    ``estimated_on``), and two whole matrices.

    Args:
        threat_model: open_weight, as only who holds the weights edits them; finetuning_service edits the aligned model.
        layer: whose direction is taken, from 1 to the number of layers - 1; null tries all.
        select: how a candidate is chosen: refusal, harm or loss. Nothing is chosen where layer and token are given.
        kl_threshold: of refusal and harm, in nats, > 0.
        steering_threshold: of refusal, in log-odds.
        num_phases: directions, or groups of ``rank``, taken out one after the other, >= 1: the steps of the attack.
        rank: dimensions taken out in a phase, >= 1; 1 is the difference of means.
        estimated_on: another model of the architecture to estimate and choose on, such as the one before the defense: directions
            then are stale here, a control. null estimates on the attacked model.
        settings: the rest of ``DirectionEdit``'s.
    """

    # Departures from the paper: 1. First tokens of refusals are those of the data's refusals (from 5% of them), not a list by
    # family. 2. Candidates are ablated by the edit that is released, not by hooks: the same but for architectures that normalise,
    # where hooks would promise more than the weights keep. 3. Prompts are not filtered by whether the model refuses them. 4. The
    # last layers left out are a fifth rounded down, so that four layers keep their last. 5. Rank, phases, the rules harm and
    # loss, and the control are no part of it.

    def __init__(
        self,
        threat_model: ThreatModel = "open_weight",
        layer: int | None = None,
        select: Select = "refusal",
        kl_threshold: float = 0.1,
        steering_threshold: float = 0.0,
        num_phases: int = 1,
        rank: int = 1,
        estimated_on: str | None = None,
        **settings: Any,
    ) -> None:
        require(select, kl_threshold)
        if min(num_phases, rank) < 1:
            raise SettingError(f"num_phases and rank must be >= 1, got {num_phases} and {rank}.")
        self.num_attack_steps = num_phases
        super().__init__(threat_model, **settings)
        self.layer, self.select, self.rank = layer, select, rank
        self.kl_threshold, self.steering_threshold = kl_threshold, steering_threshold
        self.num_phases, self.estimated_on = num_phases, estimated_on

    def settings(self) -> dict[str, Any]:
        """How the directions are found."""
        names = ("layer", "token", "select", "kl_threshold", "steering_threshold", "rank", "estimated_on")
        return super().settings() | {name: value for name in names if (value := getattr(self, name)) is not None}

    def check_model(self, module: Defense) -> None:
        """Raise a SettingError where the model does not have the layer, or the other model is not of its architecture."""
        num_layers = len(decoder_layers(module.model))
        if not 1 <= (1 if self.layer is None else self.layer) < num_layers:
            raise SettingError(f"layer must lie in 1 to {num_layers - 1}, the model's layers - 1, got {self.layer}.")
        if self.estimated_on is not None:
            module.check_other(self.estimated_on, "estimated_on")

    @torch.no_grad()
    def steps(self, target: Target) -> Iterator[int]:
        """Find a direction, take it out, and again."""
        module = target.module
        module.eval()
        target.state["found"] = []
        bases: Iterable[Tensor] = self.bases(target, target.start)
        if self.estimated_on is not None:
            with undefended_at(module, self.estimated_on, "estimated_on"):
                start = copies({name: weight for name, weight in target.weights().items() if name in target.start})
                bases = list(self.bases(target, start))
        for phase, basis in enumerate(bases, start=1):
            ablate(module.model, basis)
            yield phase

    def bases(self, target: Target, start: Weights) -> Iterator[Tensor]:
        """All that is to be taken out after every phase, ``[num, dim]``, of a model that had the weights ``start``."""
        model, (fitted, held_out) = target.module.model, self.parts(target)
        choice = Choice(self, target, held_out, start, *self.rule(), fitted, self.rank)
        basis = torch.zeros(0, model.config.get_text_config().hidden_size).cpu().double()
        for _ in range(self.num_phases):
            ablate(model, basis)
            candidates = self.candidates(target, fitted, self.layer)
            best, values = choice.best(candidates, basis)
            if best is not None:
                basis = torch.cat([basis, choice.edits[best]])
            target.state["found"].append((best, values, basis))
            yield basis

    def rule(self) -> tuple[Select | None, float, float]:
        """By what a direction is chosen, and within which bounds."""
        select = None if None not in (self.layer, self.token) else self.select
        return select, self.kl_threshold, self.steering_threshold

    def notes(self, target: Target) -> list[str]:
        """Also where the directions were read."""
        return super().notes(target) + described([place for place, _, _ in target.state["found"]], *self.rule())
