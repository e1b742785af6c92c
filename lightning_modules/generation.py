"""Greedy answers to many prompts at once."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the tokenizer's and those that the model's generation config adds."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    return sorted({*ids, tokenizer.eos_token_id} - {None})


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 64,
) -> list[str]:
    """Greedy answers, batched by length and left-padded; the text does not depend on the batch size.

    Args:
        model: put into eval mode for the call, and back.
        tokenizer: gives padding and end tokens, and turns ids back into text.
        prompts: token ids of each prompt, generation prompt included.
        max_new_tokens: an answer is cut there if no end token came.
        batch_size: prompts at once; memory grows with it, the text stays the same.

    Returns:
        An answer a prompt, without special tokens.
    """
    ends = end_tokens(model, tokenizer)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, use_cache=True
    )
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    shipped, model.generation_config = model.generation_config, GenerationConfig()  # else its penalties and beams act here too
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    try:
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            ids = [torch.tensor(prompts[i]) for i in chunk]
            padded = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id, padding_side="left")
            mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True, padding_side="left")
            out = model.generate(  # type: ignore[operator]
                input_ids=padded.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                tokenizer=tokenizer,
            )
            texts = tokenizer.batch_decode(out[:, padded.shape[1] :], skip_special_tokens=True)
            for i, text in zip(chunk, texts, strict=True):
                answers[i] = text
    finally:
        model.generation_config = shipped
        for module, training in modes:
            module.training = training
    return answers
