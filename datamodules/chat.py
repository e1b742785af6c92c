"""Rows to token ids, for any chat template: prompt and answer are told apart by their tokens, never by the model's name."""

import re
from collections.abc import Sequence
from typing import Literal

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.rows import Row

IGNORED = -100  # the label of a token that nothing is learnt from
PROBE = "casehard"  # stands in for an answer, to see what a template writes after one
_THOUGHTS = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without a chat template, before anything is encoded."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} must have a chat template, got none. "
            "Take the backbone's chat (instruct) version, or save a chat_template.jinja beside its tokenizer."
        )


def prompt_ids(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that a model answers from: the turns of ``row`` and the opening of the assistant's.

    Special tokens are the template's business alone, so a BOS that it writes is not doubled by the tokenizer. Templates that can
    let a model think first, such as Qwen3's, are told not to: it answers at once, and is trained to.
    """
    return _ids(_render(row, tokenizer), tokenizer)


def answer_and_thoughts(text: str) -> tuple[str, str]:
    """The answer in what a model generated, and the thoughts in the ``<think>...</think>`` that it may open with.

    Thoughts are no answer. Those without an end, as ``max_new_tokens`` cuts them off, hide none and stay: their text is judged as
    it is, and no defense gains by never coming to an answer.
    """
    thoughts = _THOUGHTS.match(text)
    return (text[thoughts.end() :], thoughts[1].strip()) if thoughts else (text, "")


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[int]] | None:
    """``row`` as ``input_ids`` and ``labels``, cut on the right to ``max_length``; None where no label is left.

    The ids start with exactly ``prompt_ids(row)``, all labelled -100; the answer follows and ends in an end token.
    """
    assert row.response is not None, "a row without a response cannot be trained on"
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} must have an end token, got none. Set its eos_token.")
    prompt = _render(row, tokenizer)
    asked = _ids(prompt, tokenizer)
    answer = _answer(row, prompt, tokenizer)
    answered = _ids(prompt + answer, tokenizer)
    if answered[: len(asked)] == asked:
        answered = answered[len(asked) :]
    else:  # a token spans the border, and generation will not see it
        answered = _ids(answer, tokenizer)
    answered = _ended(answered, tokenizer.eos_token_id)
    input_ids, labels = asked + answered, [IGNORED] * len(asked) + answered
    return {"input_ids": input_ids[:max_length], "labels": labels[:max_length]} if len(asked) < max_length else None


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[dict[str, list[int]]], int]:
    """Examples of ``rows``, in their order, and how many rows were dropped because ``max_length`` cut off their answer."""
    encoded = [encode(row, tokenizer, max_length) for row in rows]
    examples = [example for example in encoded if example is not None]
    if rows and not examples:
        needed = 1 + min(len(prompt_ids(row, tokenizer)) for row in rows)
        raise ValueError(
            f"max_length must leave room for an answer, got {max_length}, which cuts off every one of {len(rows)} rows. "
            f"The shortest needs {needed} for its prompt and one token of its answer."
        )
    return examples, len(encoded) - len(examples)


def collate(
    examples: Sequence[dict[str, list[int]]], pad_token_id: int, padding_side: Literal["left", "right"]
) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, seq]``, padded to the longest example.

    Pads are known by an example's length, so a pad token that is also the end token is still learnt where it ends an answer.
    """
    width = max(len(example["input_ids"]) for example in examples)

    def padded(values: list[int], filler: int) -> list[int]:
        pads = [filler] * (width - len(values))
        return pads + values if padding_side == "left" else values + pads

    return {
        "input_ids": torch.tensor([padded(example["input_ids"], pad_token_id) for example in examples]),
        "attention_mask": torch.tensor([padded([1] * len(example["input_ids"]), 0) for example in examples]),
        "labels": torch.tensor([padded(example["labels"], IGNORED) for example in examples]),
    }


def _render(row: Row, tokenizer: PreTrainedTokenizerBase, answered: bool = False) -> str:
    turns = row.chat(answered)
    try:
        return tokenizer.apply_chat_template(  # type: ignore[return-value]
            turns, add_generation_prompt=not answered, tokenize=False, enable_thinking=False
        )
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise ValueError(
            f"a row with the roles {roles} must fit the chat template, which says: {error}. "
            "Leave out the turns that it refuses, or use another template."
        ) from error


def _answer(row: Row, prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes for the answer, closing marks and all."""
    full = _render(row, tokenizer, answered=True)
    if full.startswith(prompt):
        return full[len(prompt) :]
    # The template opens a finished turn otherwise than one to be generated, with or without think tags for instance. The answer
    # is then found from the end, by what the template writes after any answer: a short one may also occur in the closing marks.
    closing = _render(Row(row.messages, PROBE), tokenizer, answered=True).rpartition(PROBE)[2]
    response = row.response or ""
    for content in (response, response.strip(), response.lstrip(), response.rstrip()):
        if full.endswith(content + closing):
            return content + closing
    raise ValueError(
        "the chat template must write an answer as it is, but one is missing from what it rendered. "
        "Take out of the answers what the template rewrites, such as think tags, or use another template."
    )


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _ended(ids: list[int], eos_token_id: int) -> list[int]:
    """``ids`` up to their last end token, such as without a newline after it; with one at the end if they had none."""
    if eos_token_id not in ids:
        return [*ids, eos_token_id]
    return ids[: len(ids) - ids[::-1].index(eos_token_id)]
