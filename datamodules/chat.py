"""Rows to token ids, for any chat template: prompt and answer are told apart by their tokens, never by the model's name."""

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from casehard.datamodules.answers import CHANNEL, THOUGHTS, answer_and_thoughts, unopened
from casehard.datamodules.row import Row
from casehard.metrics.errors import SettingError

IGNORED = -100  # the label of a token that nothing is learnt from
SECONDS, LONGEST = 10, 1_000_000  # that a chat template may take for a row, and letters that it may add
PROBE = "casehard"  # stands in for a turn, to see what a template makes of it


class Closing(NamedTuple):
    """What a chat template writes after an answer, and the added tokens in it, in their order."""

    text: str
    tokens: list[int]


_CLOSINGS: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str | None, ...], Closing]] = WeakKeyDictionary()


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse, before anything is encoded, a tokenizer without a chat template or with one that leaves out a turn's text."""
    if not tokenizer.chat_template:
        raise SettingError(
            f"tokenizer {tokenizer.name_or_path!r} must have a chat template, got none. "
            "Take the backbone's chat (instruct) version, or save a chat_template.jinja beside its tokenizer."
        )
    _closing(("user",), tokenizer)


def prompt_ids(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that a model answers from: the turns of ``row`` and the opening of the assistant's.

    Special tokens are the template's business alone, so a BOS that it writes is not doubled by the tokenizer. Templates that can
    let a model think first, such as Qwen3's, are told not to: it answers at once, and is trained to. A template that opens the
    thoughts whatever it is told lets the model think, and rows teach it an answer without a thought.
    """
    return _ids(_render(row, tokenizer), tokenizer)


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of plain text, without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def suffixed_ids(row: Row, suffix: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """``prompt_ids`` with ``suffix`` at the end of what the last turn says, in front of what the template writes after it."""
    *turns, (role, text) = row.messages
    ids, other = (prompt_ids(replace(row, messages=(*turns, (role, said))), tokenizer) for said in (text, text + PROBE))
    num_after = next(i for i, (a, b) in enumerate(zip(reversed(ids), reversed(other), strict=False)) if a != b)
    return [*ids[: len(ids) - num_after], *suffix, *ids[len(ids) - num_after :]]


class Answer(NamedTuple):
    """What a model wrote: its answer (None if it never began one), the thoughts before it, and whether it was cut off."""

    text: str | None
    thoughts: str
    cut: bool


def read_answers(texts: Sequence[str], rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Answer]:
    """The model's answers to ``rows``, from the texts that it wrote, special tokens included.

    A text is cut off if it ends in no special token, or in one that only ends thoughts; see ``answer_and_thoughts``.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = {*added, *tokenizer.all_special_tokens}
    ends = tuple(special - set(THOUGHTS.values()))
    return [
        Answer(*answer_and_thoughts(text, _render(row, tokenizer), special), cut=not text.endswith(ends))
        for text, row in zip(texts, rows, strict=True)
    ]


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token by which the chat template ends an answer, which need not be the tokenizer's end token; None if it has none."""
    if not tokenizer.chat_template:
        return None
    tokens = _closing(("user",), tokenizer).tokens
    if tokens and tokenizer.convert_ids_to_tokens(tokens[0]) == "<|end|>" and CHANNEL in tokenizer.get_vocab():
        return None  # gpt-oss ends every message by it, and a turn has several
    return tokens[0] if tokens else None


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[int]] | None:
    """``row`` as ``input_ids`` and ``labels``, cut on the right to ``max_length``; None where no label is left.

    The ids start with exactly ``prompt_ids(row)``, all labelled -100; the answer follows, with the mark by which the template
    ends it, and then the tokenizer's end token. Thoughts that the prompt opens are closed in front of the answer.
    """
    assert row.response is not None, "a row without a response cannot be trained on"
    if tokenizer.eos_token_id is None:
        raise SettingError(f"tokenizer {tokenizer.name_or_path!r} must have an end token, got none. Set its eos_token.")
    prompt = _render(row, tokenizer)
    before = _ids(prompt, tokenizer)
    answer, closing = _answer(row, prompt, tokenizer)
    learnt = _ids(prompt + answer, tokenizer)
    if learnt[: len(before)] == before:
        learnt = learnt[len(before) :]
    else:  # a token spans the border, and generation will not see it
        learnt = _ids(answer, tokenizer)
    learnt = _with_end_token(learnt, closing.tokens, tokenizer.eos_token_id)
    input_ids, labels = before + learnt, [IGNORED] * len(before) + learnt
    return {"input_ids": input_ids[:max_length], "labels": labels[:max_length]} if len(before) < max_length else None


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[dict[str, list[int]]], int]:
    """Examples of ``rows``, in their order, and how many rows were dropped because ``max_length`` cut off their answer."""
    examples, dropped = encode_together([rows], tokenizer, max_length)
    return [example for (example,) in examples], dropped


def encode_together(
    columns: Sequence[Sequence[Row]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    known: Mapping[Row, dict[str, list[int]] | None] = MappingProxyType({}),
) -> tuple[list[tuple[dict[str, list[int]], ...]], int]:
    """Examples of rows that belong together, and how many tuples of them were dropped.

    Args:
        columns: lists of rows; the i-th rows of all lists belong together.
        tokenizer: encodes them.
        max_length: tokens of a row; where it cuts off the answer of one row, the rows that belong to it are dropped, too.
        known: examples of some rows, encoded before with the same tokenizer and ``max_length``.
    """
    together = list(zip(*columns, strict=True))
    encoded = [[known[row] if row in known else encode(row, tokenizer, max_length) for row in rows] for rows in together]
    examples = [tuple(e for e in parts if e is not None) for parts in encoded if None not in parts]
    if together and not examples:
        needed = 1 + min(max(len(prompt_ids(row, tokenizer)) for row in rows) for rows in together)
        raise SettingError(
            f"max_length must leave room for an answer, got {max_length}, which cuts off every one of {len(together)} rows. "
            f"The shortest needs {needed} for its prompt and one token of its answer."
        )
    return examples, len(together) - len(examples)


def collate(
    examples: Sequence[dict[str, list[int]]], pad_token_id: int, padding_side: Literal["left", "right"]
) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, seq]``, padded to the longest example; on the host.

    Pads are known by an example's length, so a pad token that is also the end token is still learnt where it ends an answer.
    """
    width = max(len(example["input_ids"]) for example in examples)

    def padded(values: list[int], filler: int) -> list[int]:
        pads = [filler] * (width - len(values))
        return pads + values if padding_side == "left" else values + pads

    rows = {
        "input_ids": [padded(example["input_ids"], pad_token_id) for example in examples],
        "attention_mask": [padded([1] * len(example["input_ids"]), 0) for example in examples],
        "labels": [padded(example["labels"], IGNORED) for example in examples],
    }
    return {name: torch.tensor(values, device="cpu") for name, values in rows.items()}


def _render(row: Row, tokenizer: PreTrainedTokenizerBase, answered: bool = False) -> str:
    _closing(tuple(role for role, _ in row.messages), tokenizer)
    return _rendered(row.chat(answered), tokenizer)


def _rendered(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    asked = turns[-1]["role"] != "assistant"
    try:
        with _at_most(SECONDS):
            text: str = tokenizer.apply_chat_template(  # type: ignore[assignment]
                turns, add_generation_prompt=asked, tokenize=False, enable_thinking=False
            )
    except TemplateError as error:
        raise SettingError(
            f"a row with the roles {_roles(turns)} must fit the chat template, which says: {error}. "
            "Leave out the turns that it refuses, or use another template."
        ) from error
    except (TimeoutError, MemoryError, OverflowError) as error:
        raise SettingError(
            f"the chat template of {tokenizer.name_or_path!r} must write a row in {SECONDS} seconds and in the memory that is "
            f"there, and it did not ({type(error).__name__}). Use another template."
        ) from error
    if len(text) > LONGEST + sum(len(turn["content"]) for turn in turns):
        raise SettingError(
            f"the chat template of {tokenizer.name_or_path!r} must add at most {LONGEST:,} letters to a row, got {len(text):,} "
            "in all. Use another template."
        )
    return text


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """End a block that takes longer: a template is code of whoever made the model, and its loops have no end of their own.

    Only in the main thread, to which the system's alarm is sent.

    Raises:
        TimeoutError: it did.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def end(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _roles(turns: list[dict[str, str]]) -> str:
    return ", ".join(turn["role"] for turn in turns)


def _closing(roles: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> Closing:
    """What the template writes after an answer to turns of ``roles``, found by rendering turns of probe text.

    Raises:
        SettingError: the template refuses such turns, leaves one out, or goes on after an answer as if it were asked again.
    """
    known = _CLOSINGS.setdefault(tokenizer, {})
    if (key := (str(tokenizer.chat_template), *roles)) not in known:
        known[key] = _find_closing(roles, tokenizer)
    return known[key]


def _find_closing(roles: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> Closing:
    turns = [{"role": role, "content": f"{PROBE}{i}x"} for i, role in enumerate(roles)]
    answer, more = {"role": "assistant", "content": PROBE + "answer"}, {"role": "user", "content": PROBE + "more"}
    prompt, full = _rendered(turns, tokenizer), _rendered([*turns, answer], tokenizer)
    for turn, text in [*((turn, prompt) for turn in turns), (answer, full)]:
        if turn["content"] not in text:
            raise SettingError(
                f"a row with the roles {_roles([*turns, answer])} must fit the chat template, which leaves out what the "
                f"{turn['role']} says. Leave out the turns that it does not write, or use another template."
            )
    closing = full.rpartition(answer["content"])[2]
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    tokens = [i for i in _ids(closing, tokenizer) if i in added or i == tokenizer.eos_token_id]
    opening = prompt.rpartition(turns[-1]["content"])[2]
    if not tokens and opening.strip() and closing.endswith(opening):
        continuation = _rendered([*turns, answer, more], tokenizer).rpartition(answer["content"])[2]
        if not continuation.startswith(closing):
            raise SettingError(
                "the chat template must open the assistant's turn only where add_generation_prompt asks for it, and it does so "
                "after an answer too, without a token that ends the turn: the opening would be learnt as a part of every answer. "
                "Put it between {% if add_generation_prompt %} and {% endif %}."
            )
    return Closing(closing, tokens)


def _answer(row: Row, prompt: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, Closing]:
    """What the template writes for the answer, closing marks and all."""
    full = _render(row, tokenizer, answered=True)
    closing = _closing(tuple(role for role, _ in row.messages), tokenizer)
    response = row.response or ""
    answer_text, thoughts = answer_and_thoughts(response)
    if full.startswith(prompt):
        answer = full[len(prompt) :]
        if all(part.strip() in answer for part in (answer_text or response, thoughts)):
            return _close_thoughts(answer, answer, prompt), closing
    # The template opens a finished turn in another way than a turn to be generated, for instance without think tags. Look for the
    # answer from the end then, in front of what the template writes after any answer: a short answer may occur in that, too.
    for content in (response, response.strip(), response.lstrip(), response.rstrip()):
        if full.endswith(content + closing.text):
            return _close_thoughts(content + closing.text, content, prompt), closing
    raise SettingError(
        "the chat template must write an answer as it is, but one is missing from what it rendered. "
        "Take out of the answers what the template rewrites, such as think tags, or use another template."
    )


def _close_thoughts(answer: str, content: str, prompt: str) -> str:
    """``answer`` with the thoughts closed that ``prompt`` opens, unless it does so itself."""
    closed = unopened(prompt)
    return answer if not closed or closed.strip() in content else closed + answer


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _with_end_token(ids: list[int], closing: list[int], eos_token_id: int) -> list[int]:
    """``ids`` up to the end token that the template writes after an answer, or up to its own mark and then an end token."""
    end = eos_token_id if eos_token_id in closing or not closing else closing[0]
    places = [i for i, token in enumerate(ids) if token == end]
    if not 0 < closing.count(end) <= len(places):
        return [*ids, eos_token_id]
    kept = ids[: places[-closing.count(end)] + 1]  # counted from the end: an answer may hold such a token too
    return kept if end == eos_token_id else [*kept, eos_token_id]
