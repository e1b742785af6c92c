"""Answers and their verdicts, as ``generations.jsonl`` keeps them: one a line, each with the number of its evaluation."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from casehard.metrics.columns import Answer
from casehard.metrics.errors import SettingError
from casehard.records.files import whole_lines

AGAIN = "Run it again, or leave it out."
ANSWERS = "generations.jsonl"
KINDS = ("harmful", "benign", "task")  # of prompts, in the order in which they are answered
KEYS = ("evaluation", "defense", "attack", "threat_model", "seed", "num_attack_steps")  # of a row, as its answers repeat them


def lines(answers: Iterable[Answer]) -> str:
    """As they stand in the file."""
    return "".join(f"{json.dumps(answer, ensure_ascii=False, default=str)}\n" for answer in answers)


def read_answers(path: Path) -> dict[int, list[Answer]]:
    """The answers of every evaluation, by its number. A last line without end, which a kill leaves, is left out.

    Raises:
        SettingError: another line is no answer that a run wrote.
    """
    by_evaluation: dict[int, list[Answer]] = {}
    for number, line in enumerate(whole_lines(path).splitlines(), start=1):
        try:
            answer = json.loads(line)
            right = _is_answer(answer)
        except (ValueError, RecursionError):
            right = False
        if not right:
            raise SettingError(f"{path}, line {number} must be an answer that a run wrote, and it is not. {AGAIN}")
        by_evaluation.setdefault(answer["evaluation"], []).append(answer)
    return by_evaluation


def _is_answer(answer: Any) -> bool:
    if not isinstance(answer, dict) or not {*KEYS, "kind", "number", "prompt"} <= answer.keys():
        return False
    numbers = type(answer["number"]) is int and type(answer["evaluation"]) is int
    score = answer.get("score")
    scored = isinstance(score, int | float) and type(score) is not bool and (math.isnan(score) or 0 <= score <= 1)
    flagged = all(type(answer.get(flag)) is bool for flag in ("refused", "degenerate"))
    judged = (answer["kind"] == "task" or flagged) and (answer["kind"] != "harmful" or scored)
    texts = all(isinstance(answer.get(name), str) for name in ("prompt", "response"))
    turns = answer.get("messages", [])
    said = isinstance(turns, list) and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns)
    return numbers and judged and texts and said and answer["kind"] in KINDS
