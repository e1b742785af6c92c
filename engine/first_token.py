"""What a model would say first."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from casehard.datamodules.chat import collate, prompt_ids
from casehard.datamodules.row import Row
from casehard.engine.forward import last_positions, placed, run, uncompiled
from casehard.engine.sharding import max_over_ranks
from casehard.engine.weights import same_modes_after


@torch.no_grad()
def first_token_logprobs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], batch_size: int = 32
) -> Tensor:
    """Log-probabilities of the first token of the answer to each prompt, ``[rows, vocab]``, in float32.

    Where the model is sharded every rank must call it, with rows or without: it makes as many passes as the busiest one.

    Args:
        model: put into eval mode for the call, and back.
        tokenizer: of the model.
        rows: whose prompts are read.
        batch_size: rows at once.
    """
    prompts = [prompt_ids(row, tokenizer) for row in rows]
    chunks = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    pad = tokenizer.pad_token_id
    found = [torch.empty(0, model.config.get_text_config().vocab_size, device=model.device)]
    with uncompiled(model), same_modes_after(model):
        model.eval()
        for number in range(max_over_ranks(model, len(chunks))):
            chunk = chunks[number] if number < len(chunks) else []
            examples = [{"input_ids": ids, "labels": ids} for ids in chunk or [[pad]]]  # to keep step with
            batch = placed(model, collate(examples, pad, "right"))
            logits = run(model, batch, logits_at=last_positions(batch["attention_mask"])).logits[: len(chunk)]
            found.append(logits.float().log_softmax(dim=-1))
    return torch.cat(found)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """``KL(p || q)`` in nats of each row, ``[rows]``, both being log-probabilities, ``[rows, vocab]``."""
    return (p.exp() * (p - q)).sum(dim=-1)
