"""What given answers cost a model."""

from collections.abc import Sequence
from sys import maxsize

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from casehard.datamodules.chat import IGNORED, collate, encode
from casehard.datamodules.row import Row
from casehard.engine.forward import placed, token_logprobs, uncompiled
from casehard.engine.sharding import max_over_ranks
from casehard.engine.weights import same_modes_after


@torch.no_grad()
def losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], batch_size: int = 8
) -> list[tuple[float, int]]:
    """Cross-entropy of the answer of every row, summed, in nats, and how many tokens it has, end tokens included.

    Where the model is sharded every rank must call it, with rows or without: it makes as many passes as the busiest one.

    Args:
        model: put into eval mode for the call, and back.
        tokenizer: of the model.
        rows: with responses.
        batch_size: rows at once; the sums do not depend on it but for rounding.
    """
    examples = [example for row in rows if (example := encode(row, tokenizer, maxsize))]  # which drops none
    order = sorted(range(len(rows)), key=lambda i: len(examples[i]["input_ids"]))
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    found: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    pad = tokenizer.pad_token_id
    with uncompiled(model), same_modes_after(model):
        model.eval()
        for number in range(max_over_ranks(model, len(chunks))):
            chunk = chunks[number] if number < len(chunks) else []
            batch = [examples[i] for i in chunk] or [{"input_ids": [pad] * 2, "labels": [IGNORED, pad]}]  # to keep step with
            per_token = iter((-token_logprobs(model, placed(model, collate(batch, pad, "right")))).tolist())
            for i, example in zip(chunk, batch, strict=False):
                of_row = [next(per_token) for label in example["labels"][1:] if label != IGNORED]
                found[i] = sum(of_row), len(of_row)
    return found
