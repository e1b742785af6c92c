"""How one direction is chosen among candidates: by what the model does without it, on rows that were held out."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from casehard.callbacks.attack import Target
from casehard.callbacks.direction_edit import DirectionEdit, Place
from casehard.callbacks.scoring import score
from casehard.datamodules.chat import IGNORED, prompt_ids, text_ids
from casehard.datamodules.row import Row
from casehard.datamodules.sft import SFTDataModule
from casehard.engine.anatomy import decoder_layers
from casehard.engine.directions import ablate, orthonormal
from casehard.engine.first_token import kl
from casehard.engine.gradients import mean_over_ranks
from casehard.engine.outputs import changed_outputs
from casehard.engine.weights import Weights, restore
from casehard.metrics.errors import SettingError

Select = Literal["refusal", "harm", "loss"]
TINY = 1e-8  # in log-odds
COMMON = 0.05  # share of the refusals from which their first token counts
NUM_ANSWERED = 16  # held-out prompts whose answers are judged


def require(select: str, kl_threshold: float) -> None:
    """Make sure that there is such a rule, and that its bound leaves room."""
    if select not in get_args(Select):
        raise SettingError(f"select must be refusal, harm or loss, got {select!r}.")
    if not kl_threshold > 0:
        raise SettingError(f"kl_threshold must be > 0, got {kl_threshold}. The paper's is 0.1.")


def described(chosen: list[Place | None], select: Select | None, kl_threshold: float, steering_threshold: float) -> list[str]:
    """What was chosen in every phase, in words; where it was nothing, by which bounds."""
    said = [f"token {place.token}, layer {place.layer}" if place else "none left" for place in chosen]
    steers = f" and steering_threshold ({steering_threshold:g})" if select == "refusal" else ""
    bounds = f" within kl_threshold ({kl_threshold:g}){steers}" if select in ("refusal", "harm") else ""
    none = [] if any(chosen) else [f"no direction was left{bounds}: nothing was changed"]
    return [*none, f"directions of: {'; '.join(said)}"]


@dataclass
class Choice:
    """A rule (``RefusalAblation`` says which there are), with what it needs of a target.

    Args:
        attack: reads prompts.
        target: the model, in eval mode.
        held_out: harmful and harmless rows.
        start: weights of what is ablated, before anything was.
        select: the rule; None where there is nothing to choose.
        kl_threshold: bound of refusal and harm.
        steering_threshold: bound of refusal.
        fitted: harmful and harmless rows from which more than one dimension is estimated.
        rank: dimensions that a candidate takes out.
    """

    attack: DirectionEdit
    target: Target
    held_out: list[list[Row]]
    start: Weights
    select: Select | None
    kl_threshold: float
    steering_threshold: float
    fitted: list[list[Row]]
    rank: int

    def __post_init__(self) -> None:
        self.edits: dict[Place, Tensor] = {}  # what candidates take out, orthonormal and beside the basis
        self.before = self.attack.first(self.target, self.held_out[1])
        self.openings = openings(self.target.data)

    def values(self, candidates: dict[Place, Tensor], basis: Tensor) -> dict[Place, float]:
        """What each candidate is worth, lower being better, once it is out beside ``basis``; inf breaks a bound."""
        values = {}
        for place, r in candidates.items():
            if not len(orthonormal(r[None], basis)) or (self.select == "refusal" and not self.steers(place, r)):
                continue
            wide = r[None] if self.rank == 1 else self.attack.singular_vectors(self.target, self.fitted, place, self.rank)
            self.edits[place] = orthonormal(wide, basis)
            values[place] = 0.0
            if self.select is not None:
                ablate(self.target.module.model, torch.cat([basis, self.edits[place]]))
                values[place] = self.value()
                restore(self.target.module, self.start)
                ablate(self.target.module.model, basis)
        return values

    def best(self, candidates: dict[Place, Tensor], basis: Tensor) -> tuple[Place | None, dict[Place, float]]:
        """The candidate that is chosen, None where none keeps the bounds, and what all are worth."""
        values = self.values(candidates, basis)
        left = [place for place, value in values.items() if value < math.inf]
        return min(left, key=values.__getitem__, default=None), values

    def refusing(self, rows: list[Row]) -> float:
        """Mean log-odds that an answer opens with the first token of a refusal."""
        refused = self.attack.first(self.target, rows)[:, self.openings].exp().sum(dim=-1)
        return self.attack.average(self.target, (refused + TINY).log() - (1 - refused + TINY).log(), rows)

    def steers(self, place: Place, r: Tensor) -> bool:
        """Whether ``r``, added where it is read, makes the model refuse harmless prompts."""
        model = self.target.module.model
        before = decoder_layers(model)[place.layer - 1]
        with changed_outputs(model, [before], lambda _, states: states + r.to(states)):
            return self.refusing(self.held_out[1]) >= self.steering_threshold

    def value(self) -> float:
        """What the model as it is now is worth."""
        harmful, harmless = self.held_out
        if self.select == "loss":
            return self.loss(harmful + harmless)
        divergence = self.attack.average(self.target, kl(self.before, self.attack.first(self.target, harmless)), harmless)
        if not divergence <= self.kl_threshold:
            return math.inf
        if self.select == "refusal":
            return self.refusing(harmful)
        asked = replace(self.target.data.evaluation, harmful=harmful[:NUM_ANSWERED], benign=[], task=[], metrics=[])
        self.target.spend(passes=math.ceil(len(asked.harmful) / self.attack.batch_size) / 3)
        harm = score(self.target.module, asked, self.respond).metrics["coherent_harm"]
        return math.inf if math.isnan(harm) else -harm

    def respond(self, rows: list[Row], max_new_tokens: int) -> list[str]:
        """Answers, whose tokens are counted, and their prompts'."""
        texts, tokenizer = self.attack.respond(self.target, rows, max_new_tokens), self.target.module.tokenizer
        read = sum(len(prompt_ids(row, tokenizer)) for row in rows)
        self.target.spend(forward=read + sum(len(text_ids(text, tokenizer)) for text in texts))
        return texts

    def loss(self, rows: list[Row]) -> float:
        """Of the rows' own answers."""
        batch_size, module = self.attack.batch_size, self.target.module
        drawn = self.target.batches(rows, batch_size, "validation")
        batches = [drawn(step) for step in range(math.ceil(len(rows) / batch_size))]
        self.target.spend(passes=len(batches) / 3, forward=sum(batch["attention_mask"].sum() for batch in batches))
        with module.forward_context():
            losses = torch.stack([module.sft_loss(batch) for batch in batches])
        return float(mean_over_ranks(losses.mean(), module.row_group))


def openings(data: SFTDataModule) -> list[int]:
    """First tokens of the data's refusals."""
    texts = data.rows["refusals"] or [replace(data.rows["harmful"][0], response=text) for text in data.sources.refusal_texts]
    examples = data.encode(texts, "refusals")
    number = Counter(next(label for label in example["labels"] if label != IGNORED) for example in examples)
    return [token for token, times in number.items() if times >= COMMON * len(examples)]
