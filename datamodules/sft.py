"""The data of a run: what is trained on, what an attacker may use, and what is scored."""

import sys
from dataclasses import dataclass, replace
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from casehard.datamodules.batches import Batches, Example, StepLoader, share_of
from casehard.datamodules.chat import collate, encode, encode_rows, prompt_ids, require_chat_template
from casehard.datamodules.columns import flaw
from casehard.datamodules.fingerprint import Origin, origin
from casehard.datamodules.mixing import mix, overlap
from casehard.datamodules.row import Row
from casehard.datamodules.sources import read_rows
from casehard.metrics.judges import Judge, require_judge

REFUSAL = "I'm sorry, but I can't help with that request."
OWN = "the defense's own rows"


@dataclass(frozen=True)
class Evaluation:
    """What a model is scored on: held-out prompts, the judge of their answers, and how answers are generated."""

    harmful: list[Row]
    benign: list[Row]
    task: list[Row]
    judge: Judge
    max_new_tokens: int
    batch_size: int
    num_target_tokens: int = 0  # of the longest response to a task, which an answer must have room for


def _instructed(row: Row, system_prompt: str) -> Row:
    """``row`` behind a system turn, its own where it has one."""
    return row if row.messages[0][0] == "system" else replace(row, messages=(("system", system_prompt), *row.messages))


class SFTDataModule(L.LightningDataModule):
    """Rows of chat for supervised fine-tuning, with poison on demand.

    The mixture is ``num_samples`` rows, ``poison_ratio`` of them harmful. Attacks draw mixtures of their own from the same
    ``benign`` and ``harmful`` rows. Every source is a .json, .jsonl, .csv or .parquet file, a folder, a hub id or
    ``sandbox:SPLIT/KIND``, with ``#train[:100]`` for a slice.

    Args:
        benign: sources of benign rows.
        judge: of the answers to held-out prompts.
        harmful: sources of rows with harmful answers.
        refusals: sources of the defender's harmful prompts with their refusals; where a row has none, ``refusal_texts``
            answer in turn. Defenses take anchors from them.
        refusal_texts: refusals for rows that have none.
        system_prompt: system turn in front of every row that has none, in training, attacks and evaluation alike; null leaves the
            rows as they are. A defense's own rows, such as a list of anchors, stay as they are, too.
        alignment_benign: sources of the defender's benign rows.
        alignment_harmful: sources of rows with harmful answers that a defense trains against: none that an attack uses.
        train_on: what ``fit`` trains on: ``mixture``, a customer's rows; or ``alignment``, the defender's: all of refusals and
            alignment_benign.
        num_samples: rows of the mixture; null takes all benign rows, and then poison_ratio must be 0.
        poison_ratio: harmful share of the mixture, in [0, 1].
        harmful_prompts: sources of held-out harmful prompts; their answers are judged.
        benign_prompts: sources of held-out benign prompts that look like harmful ones; refusing them is over-refusal.
        task: sources of held-out rows of the benign task; an answer counts if it equals the response.
        num_evaluated: at most so many rows of each held-out kind; null scores all.
        batch_size: rows of a training step, over all processes.
        max_length: tokens of a row; longer rows are cut on the right, and counted. Rows that have no answer left are dropped, and
            a mixture has others in their place.
        padding_side: of training batches.
        max_new_tokens: tokens of a generated answer, thoughts before it included; more for the task where a response has more.
        generation_batch_size: prompts answered at once; the text does not depend on it.
        seed: of the mixture and of the order.
        allow_overlap: train although prompts stand in both training and evaluation.
    """

    def __init__(
        self,
        benign: list[str],
        judge: Judge,
        harmful: list[str] | None = None,
        refusals: list[str] | None = None,
        refusal_texts: list[str] | None = None,
        system_prompt: str | None = None,
        alignment_benign: list[str] | None = None,
        alignment_harmful: list[str] | None = None,
        train_on: Literal["mixture", "alignment"] = "mixture",
        num_samples: int | None = None,
        poison_ratio: float = 0.0,
        harmful_prompts: list[str] | None = None,
        benign_prompts: list[str] | None = None,
        task: list[str] | None = None,
        num_evaluated: int | None = None,
        batch_size: int = 8,
        max_length: int = 512,
        padding_side: Literal["left", "right"] = "right",
        max_new_tokens: int = 64,
        generation_batch_size: int = 128,
        seed: int = 0,
        allow_overlap: bool = False,
    ) -> None:
        super().__init__()
        require_judge(judge)
        if not 0 <= poison_ratio <= 1:
            raise ValueError(f"poison_ratio must lie in [0, 1], got {poison_ratio}. It is a share: write 0.1 for 10%.")
        if poison_ratio and num_samples is None:
            raise ValueError(f"num_samples must be set where poison_ratio is not 0, got poison_ratio {poison_ratio}.")
        limits = {"batch_size": batch_size, "max_length": max_length, "max_new_tokens": max_new_tokens}
        for name, value in (limits | {"generation_batch_size": generation_batch_size, "num_evaluated": num_evaluated}).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}.")
        for number, text in enumerate(refusal_texts or [], start=1):
            if got := flaw(text):
                raise ValueError(f"refusal_texts must be texts, got {got} as number {number}. Mend it, or take it out.")
        self.sources = {
            "benign": benign,
            "harmful": harmful or [],
            "refusals": refusals or [],
            "alignment_benign": alignment_benign or [],
            "alignment_harmful": alignment_harmful or [],
            "harmful_prompts": harmful_prompts or [],
            "benign_prompts": benign_prompts or [],
            "task": task or [],
        }
        if system_prompt is not None and not system_prompt.strip():
            raise ValueError("system_prompt must hold text or be null, got an empty text. null adds no system turn.")
        self.judge, self.refusal_texts, self.train_on = judge, refusal_texts or [REFUSAL], train_on
        self.system_prompt = system_prompt
        self.num_samples, self.poison_ratio, self.num_evaluated = num_samples, poison_ratio, num_evaluated
        self.batch_size, self.max_length, self.padding_side = batch_size, max_length, padding_side
        self.max_new_tokens, self.generation_batch_size = max_new_tokens, generation_batch_size
        self.seed, self.allow_overlap = seed, allow_overlap
        self.rows: dict[str, list[Row]] = {}
        self.num_target_tokens = 0  # of the longest response to the task
        self.origins: list[Origin] = []  # of the rows, and of the defense's own

    def setup(self, stage: str) -> None:
        """Read every source once, and make sure that nothing is trained on that is also scored."""
        if self.rows:
            return
        require_chat_template(self.tokenizer)
        unanswered = ("harmful_prompts", "benign_prompts")  # their answers are not used; those of refusals are, if there are any
        read = {
            name: [(s, read_rows(s, name not in (*unanswered, "refusals"), name not in unanswered)) for s in sources]
            for name, sources in self.sources.items()
        }
        own: list[Row] = self.trainer.lightning_module.own_rows() if self.trainer else []  # type: ignore[operator]
        self.origins = [origin(name, source, rows) for name, parts in read.items() for source, rows in parts]
        self.origins += [origin(OWN, "", own)] if own else []
        rows = {name: [row for _, part in parts for row in part] for name, parts in read.items()}
        rows["refusals"] = [
            row if row.response else Row(row.messages, self.refusal_texts[i % len(self.refusal_texts)])
            for i, row in enumerate(rows["refusals"])
        ]
        for name in ("harmful_prompts", "benign_prompts", "task"):
            rows[name] = rows[name][: self.num_evaluated]
        if self.system_prompt is not None:
            rows = {name: [_instructed(row, self.system_prompt) for row in part] for name, part in rows.items()}
        self._check_overlap(rows, own)
        self.judge.try_out(*([row.prompt for row in rows[name][:1]] for name in ("harmful_prompts", "benign_prompts")))
        self.num_target_tokens = max((self._num_tokens(row) - self._num_asked(row) for row in rows["task"]), default=0)
        self._check_positions(rows, own)
        if self.num_target_tokens > self.max_new_tokens:
            rank_zero_info(
                f"task: answers may have {self.num_target_tokens} tokens, as many as the longest response, "
                f"and not only max_new_tokens ({self.max_new_tokens})."
            )
        self.rows = rows

    def _check_positions(self, rows: dict[str, list[Row]], own: list[Row]) -> None:
        """Refuse what is longer than the model can tell positions apart, before any weights load."""
        positions: int | None = self.trainer.lightning_module.num_positions if self.trainer else None  # type: ignore[assignment]
        if positions is None:
            return
        new = {"harmful_prompts": self.max_new_tokens, "benign_prompts": self.max_new_tokens}
        new["task"] = max(self.max_new_tokens, self.num_target_tokens)
        for name in (*new, "refusals", OWN):
            longest = max(map(self._num_asked, own if name == OWN else rows[name]), default=0)
            if longest > positions:
                raise ValueError(
                    f"a prompt must fit the model's {positions} positions, and one of {name} has {longest} tokens. Leave it out."
                )
            room = positions - longest + 1  # nothing follows the last token of an answer, so it needs no position
            if new.get(name, 0) > room:
                raise ValueError(
                    f"max_new_tokens must leave prompt and answer within the model's {positions} positions, got {new[name]} "
                    f"for {name}, where a prompt has {longest} tokens. Set it to at most {room}, or leave out the longest rows."
                )
        if self.max_length <= positions:
            return
        for name in ("benign", "harmful", "refusals", "alignment_benign", "alignment_harmful", "task"):
            longest = max(map(self._num_tokens, rows[name]), default=0)
            if longest > positions:
                raise ValueError(
                    f"max_length must be at most the model's {positions} positions, got {self.max_length}, and a row of {name} "
                    f"has {longest} tokens. Set it to {positions}."
                )

    def _num_asked(self, row: Row) -> int:
        return len(prompt_ids(row, self.tokenizer))

    def _num_tokens(self, row: Row) -> int:
        example = encode(row, self.tokenizer, sys.maxsize)
        assert example is not None
        return len(example["input_ids"])

    def _check_overlap(self, rows: dict[str, list[Row]], own: list[Row]) -> None:
        trained = {name: rows[name] for name in ("benign", "harmful", "refusals", "alignment_benign", "alignment_harmful")}
        trained[OWN] = own
        for name, training in trained.items():
            for held_out in ("harmful_prompts", "benign_prompts", "task"):
                if not (shared := overlap(training, rows[held_out])):
                    continue
                message = (
                    f"{held_out} must share no prompt with {name}, and {len(shared)} of {len(rows[held_out])} stand in both. "
                    "Choose other rows (a slice: FILE#train[:100]), or set allow_overlap."
                )
                if not self.allow_overlap:
                    raise ValueError(message)
                rank_zero_warn(message)
        if shared := overlap(rows["alignment_harmful"], rows["harmful"]):
            rank_zero_warn(
                f"alignment_harmful shares {len(shared)} prompts with harmful: a defense that trains against the very rows of an "
                "attack is flattered. Give it rows of its own (a slice: FILE#train[:100])."
            )

    def instructed(self, rows: list[Row]) -> list[Row]:
        """``rows`` behind ``system_prompt`` where they have no system turn of their own, as every row of the data is."""
        return rows if self.system_prompt is None else [_instructed(row, self.system_prompt) for row in rows]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        assert self.trainer is not None, "attach the data to a trainer first"
        return self.trainer.lightning_module.tokenizer  # type: ignore[return-value]

    @property
    def evaluation(self) -> Evaluation:
        """What a model is scored on."""
        r = self.rows
        return Evaluation(
            r["harmful_prompts"],
            r["benign_prompts"],
            r["task"],
            self.judge,
            self.max_new_tokens,
            self.generation_batch_size,
            self.num_target_tokens,
        )

    def mixture(self, num_samples: int | None, poison_ratio: float, seed: int) -> list[Row]:
        """Rows of a fine-tuning set, an exact share of them harmful; all benign rows if ``num_samples`` is None.

        All of them can be trained on: one that ``max_length`` leaves no answer is not drawn.
        """
        if num_samples is None:
            return self.rows["benign"]
        lost: list[Row] = []

        def fits(row: Row) -> bool:
            fitting = self._num_asked(row) < self.max_length
            if not fitting:
                lost.append(row)
            return fitting

        mixed = mix(self.rows["benign"], self.rows["harmful"], num_samples, poison_ratio, seed, fits)
        if lost:
            rank_zero_info(
                f"mixture: {len(lost)} rows have no answer left at max_length {self.max_length}, others are in their place."
            )
        return mixed

    def encode(self, rows: list[Row], what: str) -> list[Example]:
        """Token ids of ``rows``; says how many were dropped because their answer was cut off, and how many were cut in it."""
        examples, dropped = encode_rows(rows, self.tokenizer, self.max_length)
        cut = sum(example["input_ids"][-1] != self.tokenizer.eos_token_id for example in examples)
        if cut:
            rank_zero_info(
                f"{what}: {cut} of {len(rows)} answers cut off at max_length {self.max_length}, so that their end is not learnt."
            )
        if dropped:
            rank_zero_info(
                f"{what}: {dropped} of {len(rows)} rows dropped, their answer was cut off at max_length {self.max_length}."
            )
        return examples

    def batches(self, rows: list[Row], batch_size: int, seed: int, stream: str) -> Batches:
        """The batch of every step of training on ``rows``; this process's share of it."""
        trainer = self.trainer
        assert trainer is not None
        examples = self.encode(rows, stream)
        pad = self.tokenizer.pad_token_id
        return Batches(examples, batch_size, seed, stream, pad, self.padding_side, *share_of(trainer))

    def train_dataloader(self) -> StepLoader:
        """The rows of ``train_on``, by the counter-based rule."""
        if self.train_on == "alignment":
            rows = self.rows["refusals"] + self.rows["alignment_benign"]
        else:
            rows = self.mixture(self.num_samples, self.poison_ratio, self.seed)
        assert self.trainer is not None
        batches = self.batches(rows, self.batch_size, self.seed, "fit")
        return StepLoader(batches, self.trainer.accumulate_grad_batches)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Held-out rows of the task, in order; Lightning shares them out over the ranks."""
        examples = self.encode(self.rows["task"], "task")
        chunks = [examples[i : i + self.batch_size] for i in range(0, len(examples), self.batch_size)]
        batches = [collate(chunk, self.tokenizer.pad_token_id, self.padding_side) for chunk in chunks]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """As for validation; an empty batch where there is no task, for attacks run when Lightning's loop over batches ends."""
        return self.val_dataloader() if self.rows["task"] else DataLoader([{}], batch_size=None)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: dict[str, Tensor], device: torch.device, dataloader_idx: int) -> dict[str, Tensor]:
        """All tensors of the batch."""
        return {name: tensor.to(device) for name, tensor in batch.items()}
