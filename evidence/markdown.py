"""Markdown in which anybody's text is text."""

import re
from typing import Any

from casehard.records.published import clean


class Markdown(str):
    """Text of our own, whose Markdown means what it says; ``escaped`` leaves it alone."""


def escaped(value: Any) -> str:
    """``value`` as text that Markdown and HTML show as it is, in one line: names, licences and sources are anybody's."""
    if isinstance(value, Markdown):
        return value
    return re.sub(r"([\\`*\[\]<|~&$@]|(?<!\w)_|_(?!\w)|(?<=www)\.|:(?=//))", r"\\\1", clean(str(value)))


def code(value: Any) -> Markdown:
    """``value`` as code, also within a table."""
    text = clean(str(value))
    return Markdown(escaped(text) if "`" in text else "`" + text.replace("|", r"\|") + "`")


def fenced(text: str) -> Markdown:
    """YAML as a block of code, which nothing in it can close."""
    fence = "`" * max([2, *map(len, re.findall("`+", text))]) + "`"
    return Markdown(f"{fence}yaml\n{text}{fence}")
