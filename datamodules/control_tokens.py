"""Control tokens that stand in the text of rows, where only the chat template should write them."""

import re
from collections import Counter
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from casehard.datamodules.row import Row


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches every special token of a tokenizer, such as ``<|im_end|>``. Others that were added, like ``<think>``, are text."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted((name for name in special | {*tokenizer.all_special_tokens} if name.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def found_in(row: Row, tokens: re.Pattern[str]) -> Counter[str]:
    """How often each stands in the turns and the answer of ``row``."""
    return Counter(token for text in (*(text for _, text in row.messages), row.response or "") for token in tokens.findall(text))


def report(name: str, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase) -> str:
    """What a user must know of control tokens in rows: how many, which, and where the first stand; "" where there are none.

    No more of a row's text than its tokens is told.
    """
    tokens = control_tokens(tokenizer)
    hits = [(row, found) for row in rows if (found := found_in(row, tokens))]
    if not hits:
        return ""
    counts = sum((found for _, found in hits), Counter[str]())
    which = ", ".join(f"{token} ({number})" for token, number in counts.most_common(5))
    where = "; ".join(row.where or "a row of the defense's own" for row, _ in hits[:3]) + ("; ..." if len(hits) > 3 else "")
    return (
        f"{name}: {len(hits)} rows have control tokens of the tokenizer in their text: {which}. They are read as the chat "
        f"template's own, so that a row can end a turn and begin another: {where}. Take them out, unless you put them there."
    )
