"""Names that people give to attacks, judges, runs and a study's parts: tables, CSV files, folders and terminals show them."""

import difflib
from collections.abc import Iterable

from casehard.metrics.errors import SettingError

FORMULA = tuple("=+-@")  # a spreadsheet takes a cell that begins so for a formula
LONGEST = 80  # letters
LONGEST_FOLDER = 200  # file systems take 255 bytes


def require_name(what: str, name: str, folder: bool = False) -> None:
    """Refuse a name that a terminal, a spreadsheet or a file system would take for more than a name.

    Args:
        what: the setting.
        name: what it was set to.
        folder: whether a folder bears the name.

    Raises:
        SettingError: an end of line or another character that is not seen, such as those that move a cursor or turn the order of
            letters; the begin of a formula; too long; of a folder, a path.
    """
    if not name.strip() or name != name.strip():
        wrong = "a text without blanks around it"
    elif not name.isprintable():
        wrong = "of letters that can be seen, in one line"
    elif name.startswith(FORMULA):
        wrong = f"no formula to a spreadsheet, so begin with none of {' '.join(FORMULA)}"
    elif len(name) > (longest := LONGEST_FOLDER if folder else LONGEST):
        wrong = f"of at most {longest} letters"
    elif folder and ("/" in name or "\\" in name or name in (".", "..")):
        wrong = "the name of one folder, without a path"
    else:
        return
    got = ascii(name) if len(name) <= LONGEST else f"one of {len(name)} letters"
    raise SettingError(f"{what} must be {wrong}, got {got}. Choose another name.")


def plain(text: str) -> str:
    """``text`` in one line of letters that can be seen, and no formula to a spreadsheet."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split()).lstrip("".join(FORMULA) + " ")


def visible(text: str) -> str:
    """``text`` with letters that a terminal would act on written out, such as ``\\x1b``; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def seen(text: str) -> str:
    """``text`` as it is.

    Raises:
        ValueError: it has letters that cannot be seen, or several lines.
    """
    if not text.isprintable():
        raise ValueError("letters that cannot be seen")
    return text


def guess(name: str, known: Iterable[str]) -> str:
    """The known name that a misspelt one may stand for, as a question behind a sentence; "" where none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}?" if near else ""
