"""How useful a model still is on a task whose answers are sentences, where an exact match says nothing."""

import math
import re
from collections.abc import Sequence
from typing import Any

from casehard.metrics.columns import Answers
from casehard.metrics.metric import Metric


class RougeL(Metric):
    """How much of the targets the answers to the task repeat, in order: ROUGE-L (Lin, 2004), its F1 in percent, by torchmetrics.

    Words are runs of letters and digits of any script, whatever their case.
    """

    name = "rouge_l"
    label = "ROUGE-L"
    meaning = "longest common subsequence of words of an answer to the benign task and its target (F1), mean over the prompts"
    higher_is_better = True

    def of(self, answers: Answers) -> float:
        from torchmetrics.text import ROUGEScore  # with torch

        task = [answer for answer in answers if answer["kind"] == "task"]
        if not task:
            return math.nan
        rouge = ROUGEScore(rouge_keys="rougeL", normalizer=_words, sync_on_compute=False)
        rouge.update([answer["response"] for answer in task], [answer["target"] for answer in task])
        return 100 * float(rouge.compute()["rougeL_fmeasure"])


def _words(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.lower())


class TaskLoss(Metric):
    """What the targets of the task cost the model: mean cross-entropy, in nats a token of the target, over all of them.

    Each held-out row of the task is passed through the model as a training would, its target whole; tokens of prompts do not
    count. One pass a row beside the answers.
    """

    name = "task_loss"
    label = "Task loss"
    meaning = "mean loss of the targets of the benign task, in nats a token"
    higher_is_better = False
    high = math.inf

    def look(self, module: Any, kind: str, rows: Sequence[Any]) -> list[dict[str, Any]]:
        if kind != "task":
            return super().look(module, kind, rows)
        return [{"loss": loss, "num_tokens": number} for loss, number in module.losses(rows)]

    def of(self, answers: Answers) -> float:
        task = [answer for answer in answers if "num_tokens" in answer]
        tokens = sum(answer["num_tokens"] for answer in task)
        return math.fsum(answer["loss"] for answer in task) / tokens if tokens else math.nan
