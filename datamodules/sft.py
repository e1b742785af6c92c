"""The data of a run: what is trained on, what an attacker may use, and what is scored."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from casehard.datamodules import control_tokens
from casehard.datamodules.batches import Batch, Batches, Example, StepLoader, share_of
from casehard.datamodules.chat import IGNORED, collate, encode, encode_together, prompt_ids, require_chat_template
from casehard.datamodules.fingerprint import Origin, origin
from casehard.datamodules.mixing import mix, overlap
from casehard.datamodules.order import require_seed
from casehard.datamodules.row import Row
from casehard.datamodules.settings import Batching, EvaluationSettings, Sources
from casehard.datamodules.sources import fetch, read_rows
from casehard.metrics.errors import SettingError
from casehard.metrics.judges import Judge, require_judge
from casehard.metrics.metric import Metric, try_out

DEFENSE_ROWS = "the defense's own rows"


class Model(Protocol):
    """What the data asks of the module that it is read for, as ``Defense`` has it."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def num_positions(self) -> int | None: ...

    def own_rows(self) -> list[Row]: ...

    def placed(self, batch: Batch) -> Batch: ...


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
    metrics: list[Metric] = field(default_factory=list)  # of one's own


def _with_system_turn(row: Row, system_prompt: str) -> Row:
    """``row`` with a system turn in front, unless it has one."""
    return row if row.messages[0][0] == "system" else replace(row, messages=(("system", system_prompt), *row.messages))


def _num_labels(example: Example) -> int:
    return sum(label != IGNORED for label in example["labels"])


class SFTDataModule(L.LightningDataModule):
    """Rows of chat for supervised fine-tuning, with poison on demand.

    The mixture is ``num_samples`` rows, ``poison_ratio`` of them harmful. Attacks draw mixtures of their own from the same
    ``benign`` and ``harmful`` rows. Every source is a .json, .jsonl, .csv or .parquet file, a folder, a hub id or
    ``sandbox:SPLIT/KIND``, with ``#train[:100]`` for a slice.

    Args:
        sources: what is read.
        judge: of the answers to held-out prompts.
        evaluation: how a model is scored.
        batching: how rows become batches.
        system_prompt: system turn in front of every row that has none, in training, attacks and evaluation alike; null leaves the
            rows as they are. A defense's own rows, such as a list of anchors, stay as they are, too.
        train_on: what ``fit`` trains on: ``mixture``, a customer's rows; or ``alignment``, the defender's: all of refusals and
            alignment_benign.
        num_samples: rows of the mixture; null takes all benign rows, and then poison_ratio must be 0.
        poison_ratio: harmful share of the mixture, in [0, 1].
        seed: of the mixture and of the order.
        allow_overlap: train although prompts stand in both training and evaluation.
    """

    def __init__(
        self,
        sources: Sources,
        judge: Judge,
        evaluation: EvaluationSettings = EvaluationSettings(),  # noqa: B008  frozen
        batching: Batching = Batching(),  # noqa: B008  frozen
        system_prompt: str | None = None,
        train_on: Literal["mixture", "alignment"] = "mixture",
        num_samples: int | None = None,
        poison_ratio: float = 0.0,
        seed: int = 0,
        allow_overlap: bool = False,
    ) -> None:
        super().__init__()
        require_judge(judge)
        require_seed(seed)
        if not 0 <= poison_ratio <= 1:
            raise SettingError(f"poison_ratio must lie in [0, 1], got {poison_ratio}. It is a share: write 0.1 for 10%.")
        if poison_ratio and num_samples is None:
            raise SettingError(f"num_samples must be set where poison_ratio is not 0, got poison_ratio {poison_ratio}.")
        if system_prompt is not None and not system_prompt.strip():
            raise SettingError("system_prompt must hold text or be null, got an empty text. null adds no system turn.")
        self.sources, self.judge, self.evaluation_settings, self.batching = sources, judge, evaluation, batching
        self.system_prompt, self.train_on = system_prompt, train_on
        self.num_samples, self.poison_ratio = num_samples, poison_ratio
        self.seed, self.allow_overlap = seed, allow_overlap
        self.rows: dict[str, list[Row]] = {}
        self.num_target_tokens = 0  # of the longest response to the task
        self.origins: list[Origin] = []  # of the rows, and of the defense's own
        self._encoded: dict[int, dict[Row, Example | None]] = {}  # of the last mixture's rows, by max_length
        self._loader: StepLoader | None = None  # of `fit`
        self._first = 0  # its first batch: later than 0 where a run goes on

    def prepare_data(self) -> None:
        """Download the hub's sources into the cache, in one process; every process reads them in ``setup``."""
        if self.rows:
            return
        for source in dict.fromkeys(source for sources in self.sources.by_role().values() for source in sources):
            fetch(source)

    def setup(self, stage: str) -> None:
        """Read every source once, and refuse training prompts that are also scored."""
        self._encoded = {}
        if self.rows:
            return
        require_chat_template(self.tokenizer)
        unanswered = ("harmful_prompts", "benign_prompts")  # their answers are not used; those of refusals are, if there are any
        read = {
            name: [(s, read_rows(s, name not in (*unanswered, "refusals"), name not in unanswered)) for s in sources]
            for name, sources in self.sources.by_role().items()
        }
        defense_rows = self.model.own_rows()
        self.origins = [origin(name, source, rows) for name, parts in read.items() for source, rows in parts]
        self.origins += [origin(DEFENSE_ROWS, "", defense_rows)] if defense_rows else []
        rows = {name: [row for _, part in parts for row in part] for name, parts in read.items()}
        refusal_texts = self.sources.refusal_texts
        rows["refusals"] = [
            row if row.response else replace(row, response=refusal_texts[i % len(refusal_texts)])
            for i, row in enumerate(rows["refusals"])
        ]
        for name in ("harmful_prompts", "benign_prompts", "task"):
            rows[name] = rows[name][: self.evaluation_settings.num_evaluated]
        for name, part in {**rows, DEFENSE_ROWS: defense_rows}.items():
            if said := control_tokens.report(name, part, self.tokenizer):
                rank_zero_warn(said)
        rows = {name: self.instructed(part) for name, part in rows.items()}
        self._check_overlap(rows, defense_rows)
        self.judge.try_out(*([row.prompt for row in rows[name][:1]] for name in ("harmful_prompts", "benign_prompts")))
        scored = {"harmful": "harmful_prompts", "benign": "benign_prompts", "task": "task"}
        try_out(self.evaluation_settings.metrics, [kind for kind, name in scored.items() if rows[name]])
        self.num_target_tokens = self.longest_target(rows["task"])
        self._check_positions(rows, defense_rows)
        if self.num_target_tokens > self.evaluation_settings.max_new_tokens:
            rank_zero_info(
                f"task: answers may have {self.num_target_tokens} tokens, as many as the longest response, "
                f"and not only max_new_tokens ({self.evaluation_settings.max_new_tokens})."
            )
        self.rows = rows

    def _check_positions(self, rows: dict[str, list[Row]], defense_rows: list[Row]) -> None:
        """Refuse rows that are longer than the model has positions for, before any weights load."""
        positions = self.model.num_positions
        if positions is None:
            return
        max_new_tokens = self.evaluation_settings.max_new_tokens
        new = {"harmful_prompts": max_new_tokens, "benign_prompts": max_new_tokens}
        new["task"] = max(max_new_tokens, self.num_target_tokens)
        for name in (*new, "refusals", DEFENSE_ROWS):
            longest = max(map(self._prompt_length, defense_rows if name == DEFENSE_ROWS else rows[name]), default=0)
            if longest > positions:
                raise SettingError(
                    f"a prompt must fit the model's {positions} positions, and one of {name} has {longest} tokens. Leave it out."
                )
            room = positions - longest + 1  # nothing follows the last token of an answer, so it needs no position
            if new.get(name, 0) > room:
                raise SettingError(
                    f"max_new_tokens must leave prompt and answer within the model's {positions} positions, got {new[name]} "
                    f"for {name}, where a prompt has {longest} tokens. Set it to at most {room}, or leave out the longest rows."
                )
        max_length = self.batching.max_length
        if max_length <= positions:
            return
        for name in ("benign", "harmful", "refusals", "alignment_benign", "alignment_harmful", "task"):
            longest = max((len(self._encode_whole(row)["input_ids"]) for row in rows[name]), default=0)
            if longest > positions:
                raise SettingError(
                    f"max_length must be at most the model's {positions} positions, got {max_length}, and a row of {name} "
                    f"has {longest} tokens. Set it to {positions}."
                )

    def longest_target(self, rows: list[Row]) -> int:
        """Tokens of the longest response."""
        return max((_num_labels(self._encode_whole(row)) for row in rows), default=0)

    def _prompt_length(self, row: Row) -> int:
        return len(prompt_ids(row, self.tokenizer))

    def _encode_whole(self, row: Row) -> Example:
        example = encode(row, self.tokenizer, sys.maxsize)
        assert example is not None
        return example

    def _check_overlap(self, rows: dict[str, list[Row]], defense_rows: list[Row]) -> None:
        trained = {name: rows[name] for name in ("benign", "harmful", "refusals", "alignment_benign", "alignment_harmful")}
        trained[DEFENSE_ROWS] = defense_rows
        for name, training in trained.items():
            for held_out in ("harmful_prompts", "benign_prompts", "task"):
                if not (shared := overlap(training, rows[held_out])):
                    continue
                message = (
                    f"{held_out} must share no prompt with {name}, and {len(shared)} of {len(rows[held_out])} stand in both. "
                    "Choose other rows (a slice: FILE#train[:100]), or set allow_overlap."
                )
                if not self.allow_overlap:
                    raise SettingError(message)
                rank_zero_warn(message)
        if shared := overlap(rows["alignment_harmful"], rows["harmful"]):
            rank_zero_warn(
                f"alignment_harmful shares {len(shared)} prompts with harmful: a defense that trains against the very rows of an "
                "attack is flattered. Give it rows of its own (a slice: FILE#train[:100])."
            )

    def instructed(self, rows: list[Row]) -> list[Row]:
        """``rows`` behind ``system_prompt`` where they have no system turn of their own, as every row of the data is."""
        return rows if self.system_prompt is None else [_with_system_turn(row, self.system_prompt) for row in rows]

    @property
    def model(self) -> Model:
        """The module of the trainer that the data is attached to."""
        assert self.trainer is not None, "attach the data to a trainer first"
        return cast(Model, self.trainer.lightning_module)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.model.tokenizer

    @property
    def evaluation(self) -> Evaluation:
        """What a model is scored on."""
        r = self.rows
        return Evaluation(
            r["harmful_prompts"],
            r["benign_prompts"],
            r["task"],
            self.judge,
            self.evaluation_settings.max_new_tokens,
            self.evaluation_settings.generation_batch_size,
            self.num_target_tokens,
            self.evaluation_settings.metrics,
        )

    def further(self, sources: list[str], setting: str, answered: bool = True) -> list[Row]:
        """Rows of sources that an attack names itself, behind ``system_prompt`` as every row of the data is.

        Raises:
            SettingError: rows that cannot be trained on (unless not ``answered``), or whose prompts are scored.
        """
        rows = self.instructed([row for source in sources for row in read_rows(source, answered)])
        scored = [row for name in ("harmful_prompts", "benign_prompts", "task") for row in self.rows[name]]
        if (shared := overlap(rows, scored)) and not self.allow_overlap:
            raise SettingError(f"{setting} must share no prompt with what is scored, and {len(shared)} do. Take other rows.")
        return rows

    def mixture(self, num_samples: int | None, poison_ratio: float, seed: int, benign: list[Row] | None = None) -> list[Row]:
        """Rows of a fine-tuning set, an exact share of them harmful; all benign rows if ``num_samples`` is None.

        All of them can be trained on: one that ``max_length`` leaves no answer is not drawn. ``benign`` stands in for the data's.
        """
        benign = self.rows["benign"] if benign is None else benign
        if num_samples is None:
            return benign
        max_length, tokenizer = self.batching.max_length, self.tokenizer
        encoded: dict[Row, Example | None] = {}

        def fits(row: Row) -> bool:
            encoded[row] = encode(row, tokenizer, max_length)
            return encoded[row] is not None

        mixed = mix(benign, self.rows["harmful"], num_samples, poison_ratio, seed, fits)
        self._encoded = {max_length: encoded}
        if lost := sum(example is None for example in encoded.values()):
            rank_zero_info(f"mixture: {lost} rows have no answer left at max_length {max_length}, others are in their place.")
        return mixed

    def encode(self, rows: list[Row], what: str) -> list[Example]:
        """Token ids of ``rows``. Logs how many lost their answer at ``max_length`` and are left out, and how many its end."""
        return [example for (example,) in self._encode([rows], what, "rows")]

    def _encode(self, columns: list[list[Row]], what: str, unit: str) -> list[tuple[Example, ...]]:
        max_length = self.batching.max_length
        examples, dropped = encode_together(columns, self.tokenizer, max_length, self._encoded.get(max_length, {}))
        end = self.tokenizer.eos_token_id
        cut = sum(example["input_ids"][-1] != end for together in examples for example in together)
        if cut:
            answers = sum(map(len, columns))
            rank_zero_info(
                f"{what}: {cut} of {answers} answers cut off at max_length {max_length}, so that their end is not learnt."
            )
        if dropped:
            total = len(columns[0])
            rank_zero_info(f"{what}: {dropped} of {total} {unit} dropped, their answer was cut off at max_length {max_length}.")
        return examples

    def batches(self, rows: list[Row], batch_size: int, seed: int, stream: str) -> Batches:
        """This process's share of the batch of every step of training on ``rows``."""
        return self._batches(self.encode(rows, stream), batch_size, seed, stream)

    def pairs(
        self, first: list[Row], second: list[Row], batch_size: int, seed: int, stream: str
    ) -> Callable[[int], tuple[Batch, Batch]]:
        """Two batches of every step, of ``first`` and of ``second``, whose rows belong together one by one (``mixing.paired``).

        Where one row of a pair has no answer left at ``max_length``, both are dropped.
        """
        examples = self._encode([first, second], stream, "pairs")
        one, other = (self._batches([pair[side] for pair in examples], batch_size, seed, stream) for side in (0, 1))
        return lambda step: (one(step), other(step))

    def _batches(self, examples: list[Example], batch_size: int, seed: int, stream: str) -> Batches:
        assert self.trainer is not None
        pad = self.tokenizer.pad_token_id
        return Batches(examples, batch_size, seed, stream, pad, self.batching.padding_side, *share_of(self.trainer))

    def training_rows(self) -> list[Row]:
        """The rows of ``train_on``."""
        if self.train_on == "alignment":
            assert self.trainer is not None
            return self.trainer.lightning_module.rows(self)  # type: ignore[operator, return-value]
        return self.mixture(self.num_samples, self.poison_ratio, self.seed)

    def train_dataloader(self) -> StepLoader:
        """Those, by the counter-based rule."""
        rows = self.training_rows()
        assert self.trainer is not None
        batches = self.batches(rows, self.batching.batch_size, self.seed, "fit")
        self._loader = StepLoader(batches, self.trainer.accumulate_grad_batches)  # type: ignore[arg-type]
        self._loader.step = self._first
        return self._loader

    def state_dict(self) -> dict[str, Any]:
        """The number of the next batch.

        Lightning keeps the loader's own, but does not give it back where the loader was made before, as by a schedule that asks
        how many steps ``max_epochs`` come to.
        """
        return {"step": self._first if self._loader is None else self._loader.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with that batch, whether or not the loader is there yet."""
        self._first = state_dict["step"]
        if self._loader is not None:
            self._loader.step = self._first

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Held-out rows of the task, in order; Lightning shares them out over the ranks."""
        examples = self.encode(self.rows["task"], "task")
        batch_size = self.batching.batch_size
        chunks = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
        batches = [collate(chunk, self.tokenizer.pad_token_id, self.batching.padding_side) for chunk in chunks]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """As for validation. An empty batch where there is no task: attacks run when Lightning's loop over batches ends."""
        return self.val_dataloader() if self.rows["task"] else DataLoader([{}], batch_size=None)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """All of the batch, laid out as the model's device wants it."""
        return self.model.placed(batch)
