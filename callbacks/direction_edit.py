"""Base of the attacks that edit weights along a direction: what they read of prompts, shared out over the processes."""

import math
from collections.abc import Iterator
from itertools import product, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from casehard.callbacks.attack import Attack, Target, ThreatModel
from casehard.datamodules.batches import share_of
from casehard.datamodules.chat import prompt_ids
from casehard.datamodules.mixing import mix, overlap
from casehard.datamodules.row import Row
from casehard.datamodules.sft import SFTDataModule
from casehard.datamodules.sources import read_rows
from casehard.engine.anatomy import decoder_layers, residual_parameters
from casehard.engine.directions import prompt_states
from casehard.engine.first_token import first_token_logprobs
from casehard.engine.gradients import sum_over_ranks
from casehard.engine.weights import Changes
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError

NOISE = 1e-5  # of the largest difference


class Place(NamedTuple):
    """Where a direction is read: a token of the prompt, counted back from its end, as it enters a decoder layer."""

    token: int
    layer: int


class DirectionEdit(Attack):
    """Base of the edits along a direction that tells harmful prompts from harmless ones.

    Args:
        threat_model: open_weight, as only who holds the weights edits them; finetuning_service edits the aligned model.
        num_samples: harmful rows, and as many harmless ones: four fifths are for the means, and the rest for choices.
        harmless: sources of harmless rows of the attacker's own, best like harmful ones in form; null takes the data's benign.
        batch_size: rows of a pass, over all processes.
        token: of the prompt, whose states are taken, counted back from its end: 0 is the last one; null tries all that prompts
            share, which are the template's.
        settings: the rest of ``Attack``'s.
    """

    def __init__(
        self,
        threat_model: ThreatModel = "open_weight",
        num_samples: int = 160,
        harmless: list[str] | None = None,
        batch_size: int = 32,
        token: int | None = None,
        **settings: Any,
    ) -> None:
        if num_samples < 5:
            raise SettingError(f"num_samples must be >= 5, a fifth of which chooses the direction, got {num_samples}.")
        super().__init__(threat_model, **settings)
        self.num_samples, self.harmless, self.batch_size, self.token = num_samples, harmless, batch_size, token

    def settings(self) -> dict[str, Any]:
        """What a direction is estimated from."""
        own = {} if self.harmless is None else {"harmless": self.harmless}
        return {"num_samples": self.num_samples} | own

    def rows(self, data: SFTDataModule, seed: int) -> list[Row]:
        """Harmful rows, then as many harmless ones, none of which is scored."""
        own = [row for source in self.harmless or [] for row in read_rows(source)]
        harmless = data.rows["benign"] if self.harmless is None else data.instructed(own)
        if shared := overlap(own, data.rows["harmful_prompts"] + data.rows["benign_prompts"] + data.rows["task"]):
            raise SettingError(f"harmless must share no prompt with what is scored, and {len(shared)} do. Take other rows.")
        return mix([], data.rows["harmful"], self.num_samples, 1.0, seed) + mix(harmless, [], self.num_samples, 0.0, seed)

    def prepare(self, data: SFTDataModule, seed: int) -> None:
        """Also find the token in every prompt."""
        super().prepare(data, seed)
        shortest = min(len(prompt_ids(row, data.tokenizer)) for row in self.rows(data, seed))
        if not 0 <= (self.token or 0) < shortest:
            raise SettingError(f"token must lie in 0 to {shortest - 1}, which every prompt has, or be null, got {self.token}.")

    def changes(self, module: Defense) -> Changes:
        """All that writes to the residual stream."""
        written = {id(p) for p, _ in residual_parameters(module.model)}
        return {name for name, p in module.named_parameters() if id(p) in written}.__contains__

    def parts(self, target: Target) -> tuple[list[list[Row]], list[list[Row]]]:
        """Harmful and harmless rows for the means, and those held out."""
        rows, num = self.rows(target.data, target.seed), self.num_samples * 4 // 5
        kinds = [rows[: self.num_samples], rows[self.num_samples :]]
        return [kind[:num] for kind in kinds], [kind[num:] for kind in kinds]

    def share(self, target: Target, rows: list[Row]) -> tuple[list[Row], int]:
        """This process's share of rows whose prompts are about to be read, and how many it reads at once."""
        rank, world_size = share_of(target.trainer)
        share = rows[rank::world_size]
        read = sum(len(prompt_ids(row, target.module.tokenizer)) for row in share)
        target.spend(passes=math.ceil(len(rows) / self.batch_size) / 3, forward=read)
        return share, max(1, self.batch_size // world_size)

    def states(self, target: Target, rows: list[Row], layers: list[int], num_positions: int) -> Iterator[Tensor]:
        """States of the last tokens of this process's share of prompts; see ``prompt_states``."""
        (share, batch_size), module = self.share(target, rows), target.module
        prompts = [prompt_ids(row, module.tokenizer) for row in share]
        with module.forward_context():
            yield from prompt_states(module.model, prompts, layers, num_positions, batch_size)

    def difference(self, target: Target, kinds: list[list[Row]], layers: list[int], num_positions: int) -> Tensor:
        """Mean state of harmful prompts minus that of harmless ones, ``[num_positions, layers, dim]``, the last token last."""
        means = []
        for rows in kinds:
            sums = [states.sum(dim=0) for states in self.states(target, rows, layers, num_positions)]
            means.append(self.summed(target, torch.stack(sums).sum(dim=0)) / len(rows))
        return means[0] - means[1]

    def summed(self, target: Target, value: Tensor) -> Tensor:
        """The sum over the ranks of a tensor on the CPU; the ranks meet on their devices."""
        if share_of(target.trainer)[1] == 1:
            return value
        return sum_over_ranks(value.to(target.module.device), target.module.row_group).cpu()

    def candidates(self, target: Target, kinds: list[list[Row]], layer: int | None) -> dict[Place, Tensor]:
        """The differences of means that are more than rounding, by where they are read."""
        num_layers = len(decoder_layers(target.module.model))
        layers = list(range(1, num_layers - num_layers // 5)) if layer is None else [layer]
        prompts = [prompt_ids(row, target.module.tokenizer)[::-1] for rows in kinds for row in rows]
        shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False)))
        tokens = list(range(max(1, shared))) if self.token is None else [self.token]
        differences = self.difference(target, kinds, layers, max(tokens) + 1).flip(0)
        found = {Place(t, number): differences[t, i] for t, (i, number) in product(tokens, enumerate(layers))}
        least = NOISE * max(float(r.norm()) for r in found.values())
        return {place: r for place, r in found.items() if r.norm() > least}

    def singular_vectors(self, target: Target, kinds: list[list[Row]], place: Place, rank: int) -> Tensor:
        """The top singular vectors of harmful states about the harmless mean, ``[rank, dim]``."""
        harmful, harmless = (
            torch.cat([states[:, 0, 0] for states in self.states(target, rows, [place.layer], place.token + 1)]) for rows in kinds
        )
        centred = harmful - self.summed(target, harmless.sum(dim=0)) / len(kinds[1])
        moments = self.summed(target, centred.mT @ centred)  # whose eigenvectors are the states' singular vectors
        return torch.linalg.eigh(moments).eigenvectors[:, -rank:].mT.flip(0)

    def first(self, target: Target, rows: list[Row]) -> Tensor:
        """Log-probabilities of the first token of an answer to each of this process's share of rows, ``[share, vocab]``."""
        share, batch_size = self.share(target, rows)
        with target.module.forward_context():
            return first_token_logprobs(target.module.model, target.module.tokenizer, share, batch_size)

    def average(self, target: Target, values: Tensor, rows: list[Row]) -> float:
        """The mean over rows of what each process has of its share."""
        return float(self.summed(target, values.cpu().double().sum())) / len(rows)
