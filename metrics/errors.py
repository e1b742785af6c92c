"""What goes wrong by a user's hand, told apart from what goes wrong by a bug."""

from importlib.util import find_spec


class SettingError(ValueError):
    """Something that a user can mend: a setting, a file of theirs, an extra that is not installed.

    Its message is one sentence: the setting or the file and line, what it must be, what it was; then the way out. The command
    line prints that sentence alone. Every other ``ValueError`` is a bug and keeps its traceback.
    """


def needs(what: str, package: str, extra: str) -> None:
    """Refuses ``what`` where a package is missing that one of casehard's extras brings."""
    if find_spec(package) is None:
        raise SettingError(f"{what} needs {package}, and it is not installed. Install it: pip install 'casehard[{extra}]'.")
