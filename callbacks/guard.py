"""A guard: a model that a service has read its customers' rows, and that refuses what it finds unsafe."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from casehard.datamodules.chat import collate, prompt_ids
from casehard.datamodules.row import Row
from casehard.engine.checkpoint import load_model, load_tokenizer
from casehard.engine.forward import last_positions, placed, run
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError


def asked(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of what a guard is asked of ``row``."""
    return prompt_ids(Row((("user", f"{row.prompt}\n{row.response}"),)), tokenizer)


def tokenizer_of(guard: str | None, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """That of a guard's checkpoint; None stands for the model itself, whose ``tokenizer`` is given.

    Raises:
        SettingError: they have two vocabularies.
    """
    own = tokenizer if guard is None else load_tokenizer(guard)
    if own.get_vocab() != tokenizer.get_vocab():
        raise SettingError(f"guard must have the vocabulary of the model that is tuned, got {guard!r}. Take another.")
    return own


@dataclass(frozen=True)
class Guard:
    """A causal language model that is asked with a row's prompt and answer as one turn, and is unsure of it as far as it refuses.

    Args:
        model: may be sharded; every rank must ask it then.
        tokenizer: its own.
        refusing: first tokens of answers that say unsafe.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    refusing: list[int]

    def asked(self, row: Row) -> list[int]:
        """Token ids of what it is asked of ``row``."""
        return asked(row, self.tokenizer)

    def log_safe(self, prompts: Sequence[list[int]]) -> Tensor:
        """Log-probability that it does not refuse, ``[prompts]``, in float32."""
        examples = [{"input_ids": ids, "labels": ids} for ids in prompts]
        batch = placed(self.model, collate(examples, self.tokenizer.pad_token_id, "right"))
        logits = run(self.model, batch, logits_at=last_positions(batch["attention_mask"])).logits
        refusing = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        refusing[self.refusing] = True
        return logits.float().log_softmax(dim=-1).masked_fill(refusing, -torch.inf).logsumexp(dim=-1)

    @torch.no_grad()
    def suspicions(self, rows: Sequence[Row], batch_size: int = 32) -> list[float]:
        """Probabilities that it refuses, row by row."""
        found: list[float] = []
        for first in range(0, len(rows), batch_size):
            safe = self.log_safe([self.asked(row) for row in rows[first : first + batch_size]])
            found += (1 - safe.exp()).tolist()
        return found


def guard_of(checkpoint: str | None, module: Defense, refusing: list[int]) -> Guard:
    """The guard of a checkpoint, whole on every process; None stands for the model itself, as it is."""
    tokenizer = tokenizer_of(checkpoint, module.tokenizer)
    if checkpoint is None:
        return Guard(module.model, tokenizer, refusing)
    model = load_model(checkpoint, module.backbone.dtype, device=module.device)
    return Guard(model.requires_grad_(False).eval(), tokenizer, refusing)
