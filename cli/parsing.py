"""How command lines and config files are read, and how what is wrong in them is said: in one sentence."""

import difflib
import itertools
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

import casehard
from casehard.cli.config_files import config_text, require_known
from casehard.metrics.errors import SettingError
from casehard.metrics.names import visible
from casehard.shipped import shipped


class Refused(BaseException):
    """What a constructor raised (its cause), on the way past jsonargparse, which would bury it in a dump of all settings."""


def built(kind: Callable[..., Any], /, *args: Any, **settings: Any) -> Any:
    """``kind(*args, **settings)``; inside ``refusals``."""
    try:
        return kind(*args, **settings)
    except Exception as error:
        raise Refused from error


@contextmanager
def refusals() -> Iterator[None]:
    """For a block that builds objects from settings: a ValueError of a constructor is said in its one sentence.

    Raises:
        SettingError: a constructor raised a ValueError, be it of casehard's, of a library's or of a user's own class.
    """
    error: BaseException | None = None
    try:
        yield
    except Refused as refused:
        error = refused.__cause__
    if isinstance(error, ValueError):
        raise SettingError(str(error)) from error
    if error is not None:
        raise error


NOISE = re.compile(r"Does not validate|Subtypes:|Errors:|Expected a <class 'NoneType'>|Expected a path but")


def plain(message: str) -> str:
    """jsonargparse's message in one line, without the types that it tried and the values, which may be all settings and texts."""
    lines: list[str] = []
    in_value = False
    for line in (line.strip() for line in message.splitlines()):
        in_value = line.startswith("Given value") or (in_value and not line.startswith("- "))
        text = re.sub(r"\. Got value: (.{60,}|\W.*|.*\(.*)", "", line.removeprefix("- "))
        if text.startswith("Not a valid subclass") and any("class_path" in earlier for earlier in lines):
            break  # that class exists, and this is what else might have stood there
        if text and not in_value and not NOISE.match(text):
            lines.append(re.sub(r"<class '([\w.]+)'>", r"\1", text))
    return "; ".join(lines).replace(":; ", ": ") + meant(message)


def meant(message: str) -> str:
    """The class or module that a misspelt one may stand for, as a question; "" where none is near."""
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'|import path string: ()(\w+)", message):
        module, name = sys.modules[found[1] or "casehard"], found[2] or found[4]
        known = {} if module is casehard else {public: f"casehard.{public}" for public in casehard.__all__}
        known |= {part.name: part.name for part in pkgutil.iter_modules(getattr(module, "__path__", []))}
        known |= {key: key for key in dir(module) if key[0].isupper()}
    elif found := re.search(r"No module named '(\w+)'", message):
        name, known = found[1], {"casehard": "casehard"}
    else:
        return ""
    near = difflib.get_close_matches(name, known, n=1)
    return f". Did you mean {known[near[0]]}?" if near else ""


class PlainErrors:
    """For a parser of jsonargparse's: what goes wrong is said in one sentence, without the usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_instantiator(built, object)  # type: ignore[attr-defined]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and leave; parsers of the classes within raise, as they do."""
        if not self.exit_on_error:  # type: ignore[attr-defined]
            super().error(message, ex)  # type: ignore[misc]
        prog = self.prog.replace(" [options]", "")  # type: ignore[attr-defined]
        sys.stderr.write(
            f"{prog} --help lists the settings.\nerror: {visible(plain(message))}\n"
        )  # last: a study shows a log's last line
        sys.exit(2)


class CommandParser(PlainErrors, ArgumentParser):
    """Of the commands that do not train."""


class ConfigFile(ActionConfigFile):
    """A config file whose lists and classes replace those before it, where jsonargparse merges: lists of the same length entry by
    entry, and into a class what another was given under the same names. Two files that name different defenses are refused.
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Forget what the file replaces, then apply it."""
        values = shipped(values)
        text = config_text(values)
        with suppress(yaml.YAMLError):  # which is then said below
            config = yaml.safe_load(text)
            require_known(config, cfg, values)
            for key in _replaced(config, cfg):
                if cfg.get(key) is not None:
                    cfg[key] = None
            if (model := class_path(config, "model")) is not None:
                parser.defenses.append((Path(values).name if text != values else "a config's text", model))
        check_one_defense(parser.defenses)
        super().__call__(parser, cfg, values, option_string)


def _replaced(config: Any, before: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all lists in a config, and of classes that are others than before (the model's: `check_one_defense`)."""
    for key, value in config.items() if isinstance(config, dict) else ():
        name = f"{prefix}{key}"
        was, now = class_path(before, name), class_path(config, key)
        if isinstance(value, list) or (name != "model" and was and now and not _same_class(was, now)):
            yield name
        yield from _replaced(value, before, f"{name}.")


def class_path(config: Any, key: str) -> str | None:
    """The class that a config names under ``key``, if any."""
    value = config.get(key) if isinstance(config, dict | Namespace) else None
    path = value.get("class_path") if isinstance(value, dict | Namespace) else None
    return path if isinstance(path, str) else None


def _same_class(one: str, other: str) -> bool:
    """Whether two names are of one class: a short one, or one of two modules that have it."""
    (module, _, name), (other_module, _, other_name) = one.rpartition("."), other.rpartition(".")
    if name != other_name or not (module and other_module):
        return name == other_name
    try:
        return getattr(import_module(module), name) is getattr(import_module(other_module), name)
    except (ImportError, AttributeError):  # which is then said below
        return one == other


def check_one_defense(named: list[tuple[str, str]]) -> None:
    """Refuse two places that name different defenses, which would mix the settings of both.

    Args:
        named: where each stands, and the class.

    Raises:
        SettingError: two differ.
    """
    for (first, one), (other, two) in itertools.pairwise(named):
        if not _same_class(one, two):
            raise SettingError(
                f"model must be one defense, and {first} names {one} while {other} names {two}: the settings of both "
                "would be mixed. Leave out one of them."
            )
