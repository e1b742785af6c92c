"""The settings of ``SFTDataModule`` in groups: what is read, how a model is scored, and how rows become batches."""

from dataclasses import dataclass, field, fields
from typing import Literal

from casehard.datamodules.columns import flaw
from casehard.metrics.errors import SettingError
from casehard.metrics.metric import Metric, require_metrics

REFUSAL = "I'm sorry, but I can't help with that request."


@dataclass(frozen=True)
class Sources:
    """What is read. A source is a file, a folder, a hub id or ``sandbox:SPLIT/KIND``, with ``#train[:100]`` for a slice.

    Args:
        benign: sources of benign rows.
        harmful: sources of rows with harmful answers.
        refusals: sources of the defender's harmful prompts with their refusals; where a row has none, ``refusal_texts``
            answer in turn. Defenses take anchors from them.
        refusal_texts: refusals for rows that have none.
        alignment_benign: sources of the defender's benign rows.
        alignment_harmful: sources of rows with harmful answers that a defense trains against: none that an attack uses.
        harmful_prompts: sources of held-out harmful prompts; their answers are judged.
        benign_prompts: sources of held-out benign prompts that look like harmful ones; refusing them is over-refusal.
        task: sources of held-out rows of the benign task; an answer counts if it equals the response.
    """

    benign: list[str]
    harmful: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    refusal_texts: list[str] = field(default_factory=lambda: [REFUSAL])
    alignment_benign: list[str] = field(default_factory=list)
    alignment_harmful: list[str] = field(default_factory=list)
    harmful_prompts: list[str] = field(default_factory=list)
    benign_prompts: list[str] = field(default_factory=list)
    task: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.refusal_texts:
            raise SettingError("refusal_texts must hold at least one text, got none. Leave it out for the default refusal.")
        for number, text in enumerate(self.refusal_texts, start=1):
            if got := flaw(text):
                raise SettingError(f"refusal_texts must be texts, got {got} as number {number}. Mend it, or take it out.")

    def by_role(self) -> dict[str, list[str]]:
        """The sources of every role: of every setting that names sources."""
        return {role.name: getattr(self, role.name) for role in fields(self) if role.name != "refusal_texts"}


@dataclass(frozen=True)
class EvaluationSettings:
    """How a model is scored.

    Args:
        num_evaluated: at most so many rows of each held-out kind; null scores all.
        max_new_tokens: tokens of a generated answer, thoughts before it included; more for the task where a response has more.
        generation_batch_size: prompts answered at once; the text does not depend on it.
        metrics: more columns of results, by class path: casehard.RougeL, casehard.TaskLoss, or a metric of your own.
    """

    num_evaluated: int | None = None
    max_new_tokens: int = 64
    generation_batch_size: int = 128
    metrics: list[Metric] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_metrics(self.metrics, "data.evaluation.metrics")
        _at_least_one(self, "num_evaluated", "max_new_tokens", "generation_batch_size")


@dataclass(frozen=True)
class Batching:
    """How rows become batches.

    Args:
        batch_size: rows of a training step, over all processes.
        max_length: tokens of a row; longer rows are cut on the right, and counted. Rows that have no answer left are dropped, and
            a mixture has others in their place.
        padding_side: of training batches.
    """

    batch_size: int = 8
    max_length: int = 512
    padding_side: Literal["left", "right"] = "right"

    def __post_init__(self) -> None:
        _at_least_one(self, "batch_size", "max_length")


def _at_least_one(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise SettingError(f"{name} must be >= 1, got {value}.")
