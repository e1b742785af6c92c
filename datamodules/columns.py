"""The columns of one record, in any of the forms that people have, as the turns of a conversation.

A column whose name stands in ``KNOWN`` carries text of the conversation: it is used, or its text stands in the row already, or
the row is refused with the column's name. Every other column (id, source, category, label, score, ...) is about the row and is
left alone. Names count without their case and the spaces around them.

* **What is asked** is one column of ``ASKING``: a text, or a list of turns. ``input`` is what is asked where nothing else is.
* **Its material** (``MATERIAL``) follows an instruction, a question or a query after an empty line, as Alpaca's template has it.
* **The answer** is one column of ``ANSWERING`` (of chosen and rejected, chosen), unless the turns that ask end in an answer. A
  list of turns as the answer follows the prompt, or is the whole conversation where it starts with another role.
* **Before them** stand the system text (``SYSTEM``) and the turns of ``history``: pairs of question and answer, or turns.
* **Only the last answer is learnt.** Earlier ones are part of the prompt.
* **No value** is null, NaN (a gap in a pandas frame), and empty or blank text, list or object.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from casehard.metrics.errors import SettingError

CONVERSATIONS = ("messages", "conversations", "conversation")
ASKING = (*CONVERSATIONS, "prompt", "instruction", "question", "query")
ANSWERING = ("response", "output", "answer", "completion", "chosen")
PAIRS = (("prompt", "response"), ("instruction", "output"), ("question", "answer"))  # where a row has more than one pair
MATERIAL = ("input", "context")
SYSTEM = ("system", "system_prompt")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
UNUSED = ("text", "tools", "functions", "choices", "options", "passage", "document", "documents", *MEDIA)
KNOWN = {*ASKING, *ANSWERING, *MATERIAL, *SYSTEM, "history", *UNUSED}
ALTERNATIVES = re.compile("rejected|(answer|response|completion|output)(s|_[a-z0-9])")  # answers of which none is the row's

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
BESIDE_CONTENT = ("tool_calls", "tool_call", "function_call", "reasoning_content", "reasoning", "thinking", "thoughts", *MEDIA)
FLAGS = ("weight", "train", "training", "loss")  # of a turn: whether it is learnt
FORMS = (
    "prompt and response, completion or chosen, instruction (with input) and output, question and answer, "
    "messages, or conversations"
)

Turn = tuple[str, Any]


class Doubled(NamedTuple):
    """Stands for a JSON object that names a key twice, of which a reader would keep one value in silence."""

    key: str


def turns_of(record: dict[str, Any], where: str, uses_response: bool) -> list[Turn]:
    """Role and content of each turn of ``record``; contents are not checked.

    ``where`` names the row in errors, which show types and names and never a text: rows may be harmful.
    """
    held = _held(record, where)
    asked = next((column for column in (*ASKING, "input") if column in held), None)
    answered = next((column for column in ANSWERING if column in held), None)
    if asked not in CONVERSATIONS:
        asked, answered = next((pair for pair in PAIRS if pair[0] in held and pair[1] in held), (asked, answered))
    if not asked and not answered and not any(_known(column) in ASKING + ANSWERING for column in record):
        raise SettingError(
            f"{where} must have columns that are known, got {names_in_error(record)}. Accepted are {FORMS}: rename the columns."
        )
    turns, used = [], []
    if asked:
        used.append(asked)
        turns = _prompt_turns(held, asked, used, where)
    if answered and not (turns and turns[-1][0] == "assistant"):
        answer = _turns_under(answered, held, "assistant", where)
        if answer and answer[0][0] != "assistant":  # the whole conversation
            turns, used = answer, []
        else:
            turns += answer
        used.append(answered)
    if not turns:
        return turns
    turns = _earlier_turns(held, used, turns, where) + turns
    for column in [column for column in held if column not in used]:
        if ALTERNATIVES.fullmatch(column) and (turns[-1][0] == "assistant" or not uses_response):
            continue
        if not _is_redundant(column, held, used, turns):
            raise SettingError(
                f"{where} must be used whole, but its column {column} would be left out beside {' and '.join(used)}. "
                "Write what it says into the others, or take it out."
            )
    return turns


def flaw(text: Any) -> str | None:
    """What keeps ``text`` from being a turn, in words; None if nothing does."""
    if not isinstance(text, str):
        return kind(text)
    if not text.strip():
        return "empty text"
    if "\0" in text:
        return "a NUL character"
    return "half of a surrogate pair" if re.search(r"[\ud800-\udfff]", text) else None


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, Doubled):
        return f"an object that has {names_in_error([value.key])} twice"
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "true or false", int: "a number"}
    return names.get(type(value), "a number" if isinstance(value, float) else type(value).__name__)


def names_in_error(names: Any) -> str:
    """Names of columns, keys or roles for an error; what does not look like a name may be a text, and is not names_in_error."""
    plain = [str(name) if re.fullmatch(r"[\w./:;|-]{1,40}", str(name)) else "a longer name" for name in names]
    return ", ".join(plain[:20] + ["..."] * (len(plain) > 20)) or "no columns"


def empty(value: Any) -> bool:
    """Whether a column or key holds nothing."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value != value or (isinstance(value, list | dict) and not value)


@lru_cache
def _known(column: str) -> str | None:
    """The name of a column that carries text of the conversation; None of any other."""
    name = column.strip().lower()
    return name if name in KNOWN or ALTERNATIVES.fullmatch(name) else None


def _held(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The columns of the conversation that hold something."""
    held: dict[str, Any] = {}
    for column, value in record.items():
        name = _known(column)
        if name is None or empty(value):
            continue
        if name in held:
            raise SettingError(f"{where} must have one column {name}, got several. Take all but one out.")
        held[name] = value
    return held


def _prompt_turns(held: dict[str, Any], asked: str, used: list[str], where: str) -> list[Turn]:
    """The turns of the column that asks, with its material; adds to ``used`` what it took besides."""
    turns = _turns_under(asked, held, "user", where)
    material = next((column for column in MATERIAL if column in held), None)
    if material and asked in ("instruction", "question", "query") and not isinstance(held[asked], list):
        used.append(material)
        if isinstance(held[asked], str):
            return [("user", f"{held[asked]}\n\n{_text(held, material, where)}")]
    return turns


def _earlier_turns(held: dict[str, Any], used: list[str], turns: list[Turn], where: str) -> list[Turn]:
    """The system turn and the history of a record; adds to ``used`` what it took."""
    before: list[Turn] = []
    if (system := next((column for column in SYSTEM if column in held), None)) and turns[0][0] != "system":
        used.append(system)
        before.append(("system", _text(held, system, where)))
    if "history" in held and not any(isinstance(held[column], list) for column in used):
        used.append("history")
        before += _history(held["history"], where)
    return before


def _history(history: Any, where: str) -> Iterator[Turn]:
    for item in history if isinstance(history, list) else [history]:
        if isinstance(item, dict):
            yield _turn(item, where)
        elif isinstance(item, list) and len(item) == 2:
            yield from zip(("user", "assistant"), item, strict=True)
        else:
            raise SettingError(
                f"{where} must have pairs of question and answer under history, got {kind(item)}. Write it as a list."
            )


def _text(held: dict[str, Any], column: str, where: str) -> str:
    if not isinstance(held[column], str):
        raise SettingError(f"{where} must have text under {column}, got {kind(held[column])}. Write it as a string.")
    return held[column]


def _turns_under(column: str, held: dict[str, Any], role: str, where: str) -> list[Turn]:
    """The turns that a column lists, or its text as the one turn of ``role``."""
    value = held[column]
    if not isinstance(value, list):
        if column not in CONVERSATIONS:
            return [(role, value)]
        raise SettingError(f"{where} must have a list of turns under {column}, got {kind(value)}. Write them as a list.")
    turns = [_turn(turn, where) for turn in value]
    if turns and turns[-1][0] == "assistant":
        off = [flag for flag in FLAGS if not empty(value[-1].get(flag)) and value[-1][flag] != 1]
        if off:
            raise SettingError(
                f"{where} must be learnt from its last answer, but {off[0]} says otherwise there. Take the flag or the row out."
            )
    return turns


def _turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, dict):
        raise SettingError(f"{where} must have turns with role and content, got {kind(turn)}. Write each as an object.")
    role, content = (_either(turn, keys, where) for keys in (("role", "from"), ("content", "value")))
    if not isinstance(role, str) or role not in ROLES:
        got = f"{names_in_error([role])!r}" if isinstance(role, str) else kind(role)
        raise SettingError(
            f"{where} must have turns of the roles {', '.join(ROLES)}, got {got}. Rename the role, or drop the turn."
        )
    if beside := next((key for key in BESIDE_CONTENT if not empty(turn.get(key))), None):
        raise SettingError(
            f"{where} must have turns of role and content alone, got {beside} from the {ROLES[role]}. "
            "Write it into the content, or take the row out."
        )
    return ROLES[role], content


def _either(turn: dict[str, Any], keys: tuple[str, str], where: str) -> Any:
    """The value of two keys that mean the same."""
    values = [turn[key] for key in keys if turn.get(key) is not None]
    if len(values) == 2 and values[0] != values[1]:
        raise SettingError(f"{where} must have one of {' and '.join(keys)} in a turn, got two that differ. Take one out.")
    return values[0] if values else None


def _is_redundant(column: str, held: dict[str, Any], used: list[str], turns: list[Turn]) -> bool:
    """Whether a row says without ``column`` what stands there: as a turn, within its prompt, or as all of it in a template."""
    texts = list(_texts(held[column]))
    contents = [content.strip() for _, content in turns if isinstance(content, str)]
    prompts = contents[:-1] if turns[-1][0] == "assistant" else contents
    if column in ANSWERING:
        return bool(texts) and all(text in contents for text in texts)
    if texts and all(any(text in prompt for prompt in prompts) or text in contents for text in texts):
        return True
    return isinstance(held[column], str) and all(text in held[column] for name in used for text in _texts(held[name]))


def _texts(value: Any, levels: int = 3) -> Iterator[str]:
    """The texts of a column: itself, those of a list or of its pairs, the contents of its turns."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, list) and levels:
        for item in value:
            yield from _texts(item, levels - 1)
    elif isinstance(value, dict) and levels:
        yield from _texts(value.get("content") or value.get("value"), levels - 1)
