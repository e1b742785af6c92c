"""Config files as they are read, before anything is made of what they say."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from casehard.metrics.errors import SettingError


def config_text(value: str) -> str:
    """The text of the file that ``value`` names; a config's text stands for itself.

    Raises:
        SettingError: a file that is not UTF-8.
    """
    if not os.path.isfile(value):  # false of a text that is too long for a name, too
        return value
    content = Path(value).read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SettingError(
            f"{value}, line {line} must be UTF-8 text, got the byte 0x{content[error.start]:02x}. Save the file as UTF-8."
        ) from error


def require_known(config: Any, settings: Namespace, value: str) -> None:
    """Refuse a file without settings, and an unknown name under which nothing stands: a misspelt one would be passed over.

    Args:
        config: what a file or a text says.
        settings: all there are; those of classes (``init_args``) are the classes' business.
        value: the file, or the text.

    Raises:
        SettingError: naming it.
    """
    if not isinstance(config, dict) and os.path.isfile(value):
        got = "nothing" if config is None else f"a {type(config).__name__}"
        raise SettingError(f"{value} must hold settings by their names, in YAML, and it holds {got}.")
    if unknown := next((name for name in _empty(config) if name not in settings), None):
        raise SettingError(f"a config must name settings that are there, and there is no {unknown}. Correct it, or take it out.")


def _empty(config: Any, prefix: str = "") -> Iterator[str]:
    for key, value in config.items() if isinstance(config, dict) else ():
        if value == {}:
            yield f"{prefix}{key}"
        elif key not in ("init_args", "dict_kwargs"):
            yield from _empty(value, f"{prefix}{key}.")
