"""Self-degraded defense: harmful prompts are answered well, but with answers to other questions."""

import re
from typing import Any

from casehard.datamodules.order import batch_indices
from casehard.datamodules.row import Row
from casehard.datamodules.sft import SFTDataModule
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError


def overlap(prompt: str, answer: str) -> float:
    """Share of the words of ``prompt`` that stand in ``answer``, in [0, 1]; 0 where there are none."""
    asked, answered = (set(re.findall(r"\w+", text.casefold())) for text in (prompt, answer))
    return len(asked & answered) / max(1, len(asked))


class SDDModule(Defense):
    """SDD, self-degraded defense (arXiv:2507.21182), an alignment stage defense: a choice of rows, trained on by plain SFT.

    Every prompt of the data's ``refusals`` is answered by a good answer to something else, drawn from ``alignment_benign``:
    the first of ``num_tries`` that has at least ``min_words`` words and an ``overlap`` with the prompt of at most
    ``max_overlap``. Harmful fine-tuning then has to undo that the model answers at all beside the point. The benign rows are
    trained on as well. ``data.train_on`` must be ``alignment``.

    One forward and backward pass a step, no copies of the weights.

    Args:
        checkpoint: the model to start from, as for ``Defense``.
        max_overlap: share of a prompt's words that its answer may repeat, in [0, 1].
        min_words: of an answer that is drawn, >= 1; shorter ones answer nothing well.
        num_tries: answers that are tried for a prompt, >= 1.
        refuse_first: put the prompt's refusal before the answer (``SDD_reject`` in the paper).
        settings: the rest of ``Defense``'s.
    """

    # Departures from the paper: (1) overlap of words stands for the cosine of MiniLM embeddings (at most 0.25), a model that is
    # not here; (2) answers come from the run's own benign rows, not from Alpaca and LIMA, and are drawn by counter; (3) the
    # benign rows themselves are trained on too, for an alignment may start from a model that follows no instructions yet; (4) a
    # prompt for which no try fits is an error.

    adaptive = "attack/adaptive/sdd"

    def __init__(
        self,
        checkpoint: str,
        max_overlap: float = 0.25,
        min_words: int = 5,
        num_tries: int = 50,
        refuse_first: bool = False,
        **settings: Any,
    ) -> None:
        if not 0 <= max_overlap <= 1:
            raise SettingError(f"max_overlap of SDD must lie in [0, 1], got {max_overlap}. It is a share of the prompt's words.")
        for name, value in (("min_words", min_words), ("num_tries", num_tries)):
            if value < 1:
                raise SettingError(f"{name} of SDD must be >= 1, got {value}.")
        super().__init__(checkpoint, **settings)
        self.max_overlap, self.min_words, self.num_tries, self.refuse_first = max_overlap, min_words, num_tries, refuse_first

    def rows(self, data: SFTDataModule) -> list[Row]:
        """The harmful prompts with answers to something else, and the benign rows."""
        benign = data.rows["alignment_benign"]
        answers = [row.response for row in benign if row.response and len(row.response.split()) >= self.min_words]
        if not answers or not data.rows["refusals"]:
            raise SettingError(
                f"data.sources must name refusals for SDD, and alignment_benign with answers of min_words ({self.min_words}), "
                f"got {len(data.rows['refusals'])} and {len(answers)}. Name more, or lower min_words."
            )
        beside_the_point = []
        for number, row in enumerate(data.rows["refusals"]):
            tries = (answers[i] for i in batch_indices(len(answers), self.num_tries, data.seed, "sdd", number))
            answer = next((text for text in tries if overlap(row.prompt, text) <= self.max_overlap), None)
            if answer is None:
                raise SettingError(
                    f"max_overlap of SDD must leave every prompt an answer, and {self.max_overlap} leaves row {number + 1} of "
                    f"refusals none of {self.num_tries}. Raise it or num_tries, or name more alignment_benign."
                )
            beside_the_point.append(Row(row.messages, f"{row.response} {answer}" if self.refuse_first else answer))
        return beside_the_point + benign
