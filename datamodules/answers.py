"""What a model wrote, taken apart: its answer, and the thoughts before it, by the marks that models put around them."""

import re
from collections.abc import Collection, Iterable

THOUGHTS = {  # what opens thoughts, and what closes them
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",  # Magistral
    "\u25c1think\u25b7": "\u25c1/think\u25b7",  # Kimi
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command A
    "<|begin_of_thought|>": "<|end_of_thought|>",  # OpenThinker
    "<|channel>thought": "<channel|>",  # Gemma 4
    "<unused94>thought": "<unused95>",  # MedGemma
    "Here are my reasoning steps:": "[BEGIN FINAL RESPONSE]",  # Apriel
    "Here is my thought process:": "Here is my response:",  # Granite
    "<|channel|>analysis<|message|>": "<|end|><|start|>assistant<|channel|>final<|message|>",  # gpt-oss
}
AROUND_ANSWERS = {  # what some models put around the answer that follows their thoughts
    "<response>": "</response>",
    "<answer>": "</answer>",
    "<|begin_of_solution|>": "<|end_of_solution|>",
    "<|START_RESPONSE|>": "<|END_RESPONSE|>",
    "": "[END FINAL RESPONSE]",
}
CHANNEL = "<|channel|>"  # stands in every message of gpt-oss; the one in the channel ``final`` is the answer
_MESSAGE = re.compile(r"<\|channel\|>\s*(\w+)[^<]*<\|message\|>(.*?)(?=<\|(?:channel|start|end|return|call)\|>|\Z)", re.DOTALL)


def _any(marks: Iterable[str]) -> str:
    return "(" + "|".join(map(re.escape, marks)) + ")"


_OPENING = re.compile(rf"\s*{_any(THOUGHTS)}", re.IGNORECASE)
_AT_THE_END = re.compile(rf"{_any(THOUGHTS)}(\s*)\Z", re.IGNORECASE)
_CLOSING = {opening.lower(): re.compile(re.escape(closing), re.IGNORECASE) for opening, closing in THOUGHTS.items()}
_LOWER = {opening.lower(): closing for opening, closing in THOUGHTS.items()}
_PROSE = [opening for opening in _CLOSING if opening[0].isalpha()]  # other models may write it too
_KEPT = " ".join((*THOUGHTS, *THOUGHTS.values(), *AROUND_ANSWERS, *AROUND_ANSWERS.values(), "<|return|>", "<|call|>"))


def answer_and_thoughts(text: str, prompt: str = "", special: Collection[str] = ()) -> tuple[str | None, str]:
    """The answer in what a model wrote, and the thoughts before it. The answer is None where the model never came to one.

    Thoughts stand between marks (``THOUGHTS``), the first of which the chat template may have written, or in the channels of
    gpt-oss. They are no answer. Where they have no end, as ``max_new_tokens`` cuts them off, nobody knows the answer.

    Args:
        text: as the model wrote it, special tokens and all.
        prompt: as the chat template wrote it; its end may open the thoughts.
        special: tokens that are no part of an answer, nor of thoughts.
    """
    text = _without(text, [token for token in special if token not in _KEPT])
    opened = _AT_THE_END.search(prompt)
    if opened:
        text = opened[0] + text
    if CHANNEL in text:
        messages = _MESSAGE.findall(text)
        thoughts = [content for channel, content in messages if channel != "final"]
        final = [content for channel, content in messages if channel == "final"]
        answer = "".join(final).strip() if final else None
    else:
        answer, thoughts = _split(text, opened is not None)
    cleaned = (_without(thought, special).strip() for thought in thoughts)
    return None if answer is None else _without(answer, special), "\n".join(filter(None, cleaned))


def unopened(prompt: str) -> str:
    """What closes, without a thought, the thoughts that the end of a prompt opens; empty where it opens none."""
    opened = _AT_THE_END.search(prompt)
    return opened[2] + _LOWER[opened[1].lower()] + 2 * opened[2] if opened else ""


def _split(text: str, opened: bool) -> tuple[str | None, list[str]]:
    thoughts: list[str] = []
    rest = text
    while opening := _OPENING.match(rest):
        mark, after = opening[1].lower(), rest[opening.end() :]
        closing = _CLOSING[mark].search(after)
        if closing is None and mark in _PROSE and not opened:
            break
        if closing is None:
            return None, [*thoughts, after]
        thoughts.append(after[: closing.start()])
        rest, opened = after[closing.end() :], False
    if not thoughts:  # some models leave out the mark that opens
        closings = [(match, mark) for mark, closing in _CLOSING.items() if mark not in _PROSE and (match := closing.search(text))]
        if not closings:
            return text, []
        closing, mark = min(closings, key=lambda pair: pair[0].start())
        if mark in text[: closing.start()].lower():
            return text, []
        thoughts, rest = [text[: closing.start()]], text[closing.end() :]
    return _bare(rest.lstrip()), thoughts


def _bare(answer: str) -> str:
    for before, after in AROUND_ANSWERS.items():
        if before and answer.startswith(before):  # its end may be cut off
            answer = answer.removeprefix(before).lstrip()
        if answer.rstrip().endswith(after):
            answer = answer.rstrip().removesuffix(after).rstrip()
    return answer


def _without(text: str, tokens: Iterable[str]) -> str:
    for token in tokens:
        text = text.replace(token, "")
    return text
