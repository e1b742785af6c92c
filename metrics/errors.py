"""What goes wrong by a user's hand, told apart from what goes wrong by a bug."""

import traceback
from importlib.util import find_spec
from pathlib import Path


class SettingError(ValueError):
    """Something that a user can mend: a setting, a file of theirs, an extra that is not installed.

    Its message is one sentence: the setting or the file and line, what it must be, what it was; then the way out. The command
    line prints that sentence alone. Every other ``ValueError`` is a bug and keeps its traceback.
    """


def needs(what: str, package: str, extra: str) -> None:
    """Refuses ``what`` where a package is missing that one of casehard's extras brings."""
    if find_spec(package) is None:
        raise SettingError(f"{what} needs {package}, and it is not installed. Install it: pip install 'casehard[{extra}]'.")


class Misread(SystemExit):
    """A command line or a config that cannot be read, on its way past whoever catches a ValueError; exit status 2.

    Args:
        sentence: what is wrong.
        prog: the command.
    """

    def __init__(self, sentence: str, prog: str) -> None:
        super().__init__(2)
        self.sentence, self.prog = sentence, prog

    def __str__(self) -> str:
        return self.sentence


def raised_by(whose: str, error: Exception) -> SettingError:
    """What a user's own code raised, in a sentence. Not what the error says, which may repeat an answer.

    Args:
        whose: the object and what it must do.
        error: of that code.
    """
    last = traceback.extract_tb(error.__traceback__)[-1]
    return SettingError(
        f"{whose}, and raised {type(error).__name__} in line {last.lineno} of {Path(last.filename).name}. Mend it; "
        "CASEHARD_TRACEBACK=1 shows the way there."
    )
