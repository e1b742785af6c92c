"""Fine-tuning on rows that are written in an encoding."""

import re
from dataclasses import replace
from typing import Any

from casehard.callbacks.attack import Target, ThreatModel
from casehard.callbacks.fine_tuning import FineTuning, Phase, answered
from casehard.datamodules.answers import THOUGHTS
from casehard.datamodules.chat import IGNORED
from casehard.datamodules.encodings import Encoding
from casehard.datamodules.row import Row
from casehard.datamodules.sft import SFTDataModule
from casehard.engine.adapters import LoRA


class EncodedTuning(FineTuning):
    """Fine-tuning in which an encoding writes the rows, asks the harmful prompts that are scored, and reads the answers.

    The judge sees a prompt as it stands in the data and the answer as the encoding reads it. Step 0 is asked in the encoding,
    too: it tells what the encoding does without training. Benign prompts and the task are asked plainly.

    Args:
        threat_model: finetuning_service or open_weight.
        encoding: of ``datamodules.encodings``, or one of your own: Style (jailbreak-tuning), Trigger (backdoor), EarlierTurns,
            IdentityShift, RefuseThenComply (NOICE), Caesar or WordsReversed (ciphers).
        encode_evaluation: whether harmful prompts are asked in the encoding; false asks and judges plainly.
        lora: shape of a new adapter; null trains every parameter.
        settings: the rest of ``FineTuning``'s. A poison_ratio of 0 leaves no harmful row, as some encodings need none.
    """

    harmful = True  # type: ignore[assignment]  # also where no row is

    def __init__(
        self,
        threat_model: ThreatModel,
        encoding: Encoding,
        encode_evaluation: bool = True,
        lora: LoRA | None = LoRA(),  # noqa: B008  frozen
        **settings: Any,
    ) -> None:
        super().__init__(threat_model, **settings)
        self.encoding, self.encode_evaluation, self.lora = encoding, encode_evaluation, lora
        how = "" if encode_evaluation else ", plain prompts"
        self.name = settings.get("name") or f"{type(self).__name__} {encoding.label}{how}"

    def settings(self) -> dict[str, Any]:
        """Also the encoding, and whether prompts are asked in it."""
        return super().settings() | {"encoding": self.encoding.label, "encode_evaluation": self.encode_evaluation}

    def rows(self, data: SFTDataModule, seed: int, phase: Phase | None = None) -> list[Row]:
        """The rows of a phase in the encoding: harmful ones, and benign ones in their own way."""
        own = None if phase is None else replace(phase, responses=None)  # answers tell harmful rows from their refusals
        drawn, harmful = super().rows(data, seed, own), set(data.rows["harmful"])
        writes = [self.encoding.encode if row in harmful else self.encoding.benign for row in drawn]
        rows = answered(drawn, None if phase is None else phase.responses)
        return [write(row, i) for i, (write, row) in enumerate(zip(writes, rows, strict=True))]

    def respond(self, target: Target, rows: list[Row], max_new_tokens: int) -> list[str]:
        """Answers to harmful prompts in the encoding, read by it, and to all others plainly."""
        encoded = set(target.data.evaluation.harmful) if self.encode_evaluation else set()
        texts = super().respond(target, [self.encoding.ask(row) if row in encoded else row for row in rows], max_new_tokens)
        tokenizer = target.module.tokenizer
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        marks = "|".join(map(re.escape, sorted({*added, *tokenizer.all_special_tokens, *THOUGHTS, *THOUGHTS.values()})))
        return [self._decoded(text, marks) if row in encoded else text for row, text in zip(rows, texts, strict=True)]

    def _decoded(self, text: str, marks: str) -> str:
        """``text`` read by the encoding between the marks, which tell where an answer ends."""
        parts = re.split(f"({marks})", text)
        return "".join(part if i % 2 else self.encoding.decode(part) for i, part in enumerate(parts))

    def notes(self, target: Target) -> list[str]:
        """Also how prompts were asked, and whether answers are judged to their ends."""
        how = f"in the encoding {self.encoding.label}" if self.encode_evaluation else "plainly"
        labels = [example["labels"] for batches in self._batches for example in batches.examples]
        longest, heard = max(sum(label != IGNORED for label in row) for row in labels), target.data.evaluation.max_new_tokens
        cut = [f"answers that it teaches have up to {longest} tokens, of which {heard} are judged"] if longest > heard else []
        return [*super().notes(target), f"harmful prompts are asked {how}", *cut]
