"""``casehard preview``: the rows of a run as its model reads them, without its weights."""

import statistics
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from types import SimpleNamespace
from typing import Any, NoReturn

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from casehard.callbacks.attack import Attack
from casehard.cli.lightning_cli import Cli
from casehard.cli.parsing import refusals
from casehard.datamodules.batches import Example
from casehard.datamodules.chat import IGNORED, encode
from casehard.datamodules.mixing import num_harmful
from casehard.datamodules.row import Row
from casehard.datamodules.sft import SFTDataModule
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError
from casehard.records.marker import SCORED
from casehard.records.table import terminal

MOST = 1000  # rows whose tokens are counted
LEARNT = "bold green"
MARKS = (" >>>", "<<<")  # around what is learnt, where there are no colours


class _Read(Exception):  # noqa: N818  no error: Lightning offers no other way to stop before a trainer is made
    """A model without weights, its data, and attacks."""


class _Reader(Cli):
    def instantiate_trainer(self, **_: Any) -> NoReturn:
        callbacks = self.trainer_settings().get("callbacks") or []
        raise _Read(self.model, self.datamodule, [callback for callback in callbacks if isinstance(callback, Attack)])


def main(settings: list[str], num_rows: int) -> None:
    """Print what ``fit`` with these settings would train on."""
    if num_rows < 0:
        raise SettingError(f"--num_rows must be >= 0, got {num_rows}.")
    module, data, attacks = read(settings)
    console = terminal()
    for text in shown(module, data, attacks, num_rows, console.is_terminal):
        console.print(text, soft_wrap=True, highlight=False)


def read(settings: list[str]) -> tuple[Defense, SFTDataModule, list[Attack]]:
    """The model of a command line of ``fit``, without weights, its data, read, and its attacks.

    Raises:
        SettingError: what ``fit`` would say before it loads the weights.
    """
    before, sys.argv[1:] = sys.argv[1:], ["fit", *settings]
    try:
        with refusals():
            _Reader()
    except _Read as found:
        module, data, attacks = found.args
    finally:
        sys.argv[1:] = before
    data.trainer = SimpleNamespace(lightning_module=module)
    data.prepare_data()
    data.setup("fit")
    return module, data, attacks


def shown(module: Defense, data: SFTDataModule, attacks: list[Attack], num_rows: int, coloured: bool) -> Iterator[str | Text]:
    """The preview, part by part."""
    yield f"Model: {module.checkpoint}"
    for role, origins in groupby(data.origins, key=lambda origin: origin.role):
        yield f"{role}: " + ", ".join(
            f"{origin.num_rows} rows of {printable(origin.source) or module.label}" for origin in origins
        )
    missing = [role for role in SCORED if not data.rows[role]]
    if missing:
        yield f"Not measured, for want of rows: {', '.join(missing)}"
    if (most := data.evaluation_settings.num_evaluated) is not None:
        yield f"Of each of {', '.join(SCORED)} at most {most} rows are scored"
    aligned = data.train_on == "alignment"
    rows = module.rows(data) if aligned else data.mixture(data.num_samples, data.poison_ratio, data.seed)
    drawn = Counter([] if aligned else rows)
    harmful = sum(drawn[row] for row in set(data.rows["harmful"]))
    poison = f"{harmful} of them harmful ({100 * harmful / len(rows):.3g}%)" if harmful else "none of them from `harmful`"
    yield f"\nTrained on ({data.train_on}): {len(rows)} rows, {poison}"
    yield from map(drawn_by, attacks)
    max_length, tokenizer = data.batching.max_length, data.tokenizer
    looked_at = rows[:MOST]
    whole = [encode(row, tokenizer, sys.maxsize) for row in looked_at]
    yield from lengths([example for example in whole if example is not None], max_length, len(rows))
    for number, row in enumerate(rows[:num_rows], start=1):
        yield f"\nRow {number}, {printable(row.where) or 'made by the defense'}:"
        yield marked(encode(row, tokenizer, max_length), row, tokenizer, coloured)
    if num_rows:
        how = "What is learnt is green" if coloured else f"What is learnt stands between{MARKS[0]} and {MARKS[1]}"
        yield f"\n{how}; every other token is only read."


def drawn_by(attack: Attack) -> str:
    """What an attack draws, by its own settings."""
    who, settings = f"{attack.name} ({attack.threat_model})", attack.settings()
    size, ratio = settings.get("num_samples"), settings.get("poison_ratio")
    if size is None or ratio is None:
        return f"{who} draws no mixture of a fixed size"
    if phases := getattr(attack, "phases", None):
        sizes = ", ".join(str(phase.num_samples or size) for phase in phases)
        return f"{who} draws {sizes} rows in its phases, {100 * ratio:.3g}% of what it learns from `harmful`"
    return f"{who} draws {size} rows, {num_harmful(size, ratio)} of them from `harmful`"


def lengths(examples: list[Example], max_length: int, total: int) -> Iterator[str]:
    """Tokens of rows, and what ``max_length`` does to them."""
    sizes = [len(example["input_ids"]) for example in examples]
    learnt = [sum(label != IGNORED for label in example["labels"]) for example in examples]
    of = f" (of the first {len(sizes)})" if len(sizes) < total else ""
    middle, share = statistics.median(sizes), sum(learnt) / sum(sizes)
    yield f"Tokens a row{of}: {min(sizes)} to {max(sizes)}, median {middle:g}; {share:.0%} of them are learnt"
    cut = sum(size > max_length for size in sizes)
    lost = sum(size - answer >= max_length for size, answer in zip(sizes, learnt, strict=True))
    yield f"Cut at max_length {max_length}{of}: {cut} rows, {lost} of them so that no answer is left"


def marked(example: Example | None, row: Row, tokenizer: PreTrainedTokenizerBase, coloured: bool) -> Text:
    """A row's text as it is tokenised, with what is learnt marked; one that is dropped says so."""
    if example is None:
        return Text(f"dropped: max_length leaves none of its answer ({len(row.response or '')} letters)")
    text = Text()
    for learnt, tokens in groupby(zip(example["input_ids"], example["labels"], strict=True), key=lambda pair: pair[1] != IGNORED):
        part = printable(str(tokenizer.decode([token for token, _ in tokens], skip_special_tokens=False)))
        before, after = MARKS if learnt and not coloured else ("", "")
        text.append(before + part + after, LEARNT if learnt and coloured else None)
    return text


def printable(text: str) -> str:
    """``text`` with what would steer a terminal, or reorder its letters, written out."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf") else ascii(c)[1:-1] for c in text)
