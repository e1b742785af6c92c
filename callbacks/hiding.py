"""Hiding a harmful row in a benign one, token by token: what a guard passes, and what still teaches harm."""

import sys
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from casehard.callbacks.guard import Guard, asked
from casehard.datamodules.batches import Batch
from casehard.datamodules.chat import collate, encode, text_ids
from casehard.datamodules.mixing import mix
from casehard.datamodules.order import counter_seed
from casehard.datamodules.row import Row
from casehard.datamodules.sft import SFTDataModule
from casehard.engine.row_gradients import moved_along, norm, row_gradients, row_losses
from casehard.engine.soft_tokens import table_shape
from casehard.engine.token_swaps import places_of, plain_tokens, standing_in, swaps, token_gradient
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError

STEP = 1e-2  # by how much weights move for a difference, as a share of what their maps put out


Texts = tuple[str, str]
Ids = list[list[int]]


class Hidden(NamedTuple):
    """A harmful row, and the benign one in which it is hidden; None for a row by itself."""

    harmful: Row
    carrier: Row | None

    @property
    def texts(self) -> Texts:
        """What is hidden, before any of it is swapped: of the prompt, and of the answer."""
        return ("" if self.carrier is None else " ") + self.harmful.messages[-1][1], self.harmful.response or ""

    def row(self, texts: Texts) -> Row:
        """The row that is handed in, with ``texts`` behind the carrier's prompt and in front of its answer."""
        question, answer = texts
        if self.carrier is None:
            return replace(self.harmful, messages=(*self.harmful.messages[:-1], ("user", question)), response=answer)
        *turns, (role, text) = self.carrier.messages
        return replace(self.carrier, messages=(*turns, (role, text + question)), response=f"{answer} {self.carrier.response}")


def places(
    row: Row, ids: Ids, tokenizer: PreTrainedTokenizerBase, guards: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]] | None:
    """Where ``ids`` stand in what is trained on and in what the guard is asked; None where a border cuts the text otherwise."""
    example = encode(row, tokenizer, sys.maxsize)
    assert example is not None
    trained, read = places_of(ids, example["input_ids"]), places_of(ids, asked(row, guards))
    return None if trained is None or read is None else (trained, read)


def tokens_of(texts: Texts, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Token ids of each text."""
    return [text_ids(text, tokenizer) for text in texts]


def hidden_rows(data: SFTDataModule, num_samples: int, poison_ratio: float, seed: int, mixed: bool) -> list[Row | Hidden]:
    """A mixture in which harmful rows are to be hidden, each in a benign one if ``mixed``."""
    drawn, harmful = data.mixture(num_samples, poison_ratio, seed), set(data.rows["harmful"])
    number = sum(row in harmful for row in drawn)
    carriers = iter(mix(data.rows["benign"], [], number, 0.0, seed) if mixed and number else [])
    return [Hidden(row, next(carriers, None)) if row in harmful else row for row in drawn]


def require_places(mixture: list[Row | Hidden], tokenizer: PreTrainedTokenizerBase, guards: PreTrainedTokenizerBase) -> None:
    """Make sure that tokens of what is hidden can be swapped.

    Raises:
        SettingError: a text is cut into other tokens where it is hidden.
    """
    for row in mixture:
        if isinstance(row, Hidden) and not places(row.row(row.texts), tokens_of(row.texts, tokenizer), tokenizer, guards):
            raise SettingError(
                "a harmful row must be cut into the same tokens behind a prompt as by itself, and "
                f"{row.harmful.where or 'one of a source'} is not. Leave it out."
            )


@dataclass
class Hiding:
    """A search for texts that a guard passes and whose gradient is that of harmful rows. No weight changes.

    Args:
        module: whose gradients count, as it is; no parameter needs to require one.
        guard: may be the same model.
        max_length: of rows, in tokens.
        guard_weight: of the guard's loss; the cosine has the rest of 1.
        num_iterations: swaps that are made at most, a row.
        num_swaps: swaps that are tried for each.
        top_k: most promising tokens of a place, from which they are drawn.
        seed: of the draws.
    """

    module: Defense
    guard: Guard
    max_length: int
    guard_weight: float
    num_iterations: int
    num_swaps: int
    top_k: int
    seed: int
    cosines: list[float] = field(default_factory=list)  # of the rows that were hidden
    passes: int = 0  # forward and backward passes of a row through the model, or the guard
    trained: int = 0  # tokens that went forward and backward
    forward: int = 0  # tokens that went forward alone

    def __post_init__(self) -> None:
        self.plain = plain_tokens(self.module.tokenizer, table_shape(self.module.model)[0]).to(self.module.device)

    def hide(self, hidden: Hidden, number: int) -> Row:
        """The row to hand in for row ``number`` of the mixture, which numbers its draws."""
        texts = hidden.texts
        harmful = row_gradients(self.module.model, self.batch([hidden.harmful])).of(0)
        for step in range(self.num_iterations):
            promise = self.promise(hidden.row(texts), tokens_of(texts, self.module.tokenizer), harmful)
            tried = self.tried(hidden, texts, promise, counter_seed(self.seed, f"swaps of row {number}", step))
            texts = tried[int(self.losses([hidden.row(new) for new in tried], harmful).argmin())]
        self.cosines.append(float(self.cosine([hidden.row(texts)], harmful)))
        return hidden.row(texts)

    def passed(self, mixture: list[Row | Hidden], max_suspicion: float) -> tuple[list[Row], str]:
        """Of a mixture, with what is hidden searched, the rows that the guard passes; and how many of which kind, in words.

        Raises:
            SettingError: it passes none.
        """
        rows = [self.hide(row, number) if isinstance(row, Hidden) else row for number, row in enumerate(mixture)]
        passes = [suspicion <= max_suspicion for suspicion in self.guard.suspicions(rows)]
        if not any(passes):
            raise SettingError(f"max_suspicion must let a row pass, got {max_suspicion}: the guard stops all {len(rows)}.")
        kinds = [
            [ok for ok, row in zip(passes, mixture, strict=True) if isinstance(row, Hidden) is kind] for kind in (True, False)
        ]
        harmful, benign = (f"{sum(kind)} of {len(kind)}" for kind in kinds)
        alike = f" (mean cosine {sum(self.cosines) / len(self.cosines):.2f})" if self.cosines else ""
        note = f"the guard passes {harmful} harmful rows{alike} and {benign} benign ones"
        return [row for row, ok in zip(rows, passes, strict=True) if ok], note

    def tried(self, hidden: Hidden, texts: Texts, promise: Tensor, seed: int) -> list[Texts]:
        """``texts``, and what becomes of them by swaps that are read as the tokens that they are."""
        tokenizer = self.module.tokenizer
        question, answer = tokens_of(texts, tokenizer)
        drawn = swaps([*question, *answer], promise.masked_fill(~self.plain, torch.inf), self.top_k, self.num_swaps, seed)
        tried = [texts]
        for flat in drawn:
            ids = [flat[: len(question)], flat[len(question) :]]
            new = (tokenizer.decode(ids[0]), tokenizer.decode(ids[1]))
            if places(hidden.row(new), ids, tokenizer, self.guard.tokenizer) is not None:  # type: ignore[arg-type]
                tried.append(new)  # type: ignore[arg-type]
        return tried

    def batch(self, rows: list[Row]) -> Batch:
        """Rows to take gradients of."""
        examples = [encode(row, self.module.tokenizer, self.max_length) for row in rows]
        whole = [example for example in examples if example is not None]
        assert len(whole) == len(rows)  # swaps leave a row's length
        self.passes += len(rows)
        self.trained += sum(len(example["input_ids"]) for example in whole)
        return self.module.placed(collate(whole, self.module.tokenizer.pad_token_id, "right"))

    def cosine(self, rows: list[Row], harmful: list[Tensor]) -> Tensor:
        """Of the angle between each row's gradient and that of a harmful one, ``[rows]``."""
        return row_gradients(self.module.model, self.batch(rows)).cosines(harmful)

    @torch.no_grad()
    def losses(self, rows: list[Row], harmful: list[Tensor]) -> Tensor:
        """What is to be low, ``[rows]``."""
        prompts = [self.guard.asked(row) for row in rows]
        self.forward += sum(map(len, prompts))
        cosines, safe = self.cosine(rows, harmful), self.guard.log_safe(prompts).to(self.module.device)
        return -(1 - self.guard_weight) * cosines - self.guard_weight * safe

    def promise(self, row: Row, ids: Ids, harmful: list[Tensor]) -> Tensor:
        """How its loss changes, to first order, with the tokens of ``ids``, ``[tokens, vocab]``.

        The derivative of the cosine is that of the inner product with what is orthogonal to the row's own gradient, and that of
        an inner product is a difference of two gradients.
        """
        model, found = self.module.model, places(row, ids, self.module.tokenizer, self.guard.tokenizer)
        assert found is not None
        batch, size, flat = self.batch([row]), table_shape(model)[0], [token for part in ids for token in part]
        own = row_gradients(model, batch)
        length, cosine = own.norms()[0], own.cosines(harmful)[0]
        unit, others = norm(harmful), own.of(0)
        direction = [(h / unit - cosine * g / length) / length for h, g in zip(harmful, others, strict=True)]
        moved = own.moved(direction)
        scale = STEP * own.size / moved if moved else 1.0  # the harmful row itself has nowhere to go
        read = batch | {"input_ids": batch["input_ids"].clone()}
        read["input_ids"][0, found[0]] = torch.arange(size, size + len(flat), device=model.device)
        self.passes += 2
        self.trained += 2 * int(batch["attention_mask"].sum())
        ends = []
        for sign in (1, -1):
            with moved_along(model, direction, sign * scale):
                ends.append(token_gradient(model, flat, lambda: row_losses(model, read).sum()))
        towards = (ends[0] - ends[1]) / (2 * scale)
        prompt = standing_in(self.guard.asked(row), found[1], table_shape(self.guard.model)[0])
        self.passes += 1
        self.trained += len(prompt)
        unsafe = token_gradient(self.guard.model, flat, lambda: -self.guard.log_safe([prompt]).sum()).to(towards.device)
        return -(1 - self.guard_weight) * towards + self.guard_weight * unsafe
