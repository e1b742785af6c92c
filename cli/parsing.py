"""How command lines and config files are read, and how what is wrong in them is said: in one sentence."""

import difflib
import inspect
import itertools
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

import casehard
from casehard.cli.config_files import config_text, require_known
from casehard.cli.defaults import way_out
from casehard.cli.plugins import plugins
from casehard.cli.signatures import find
from casehard.cli.yaml_texts import MODE, as_class, safe
from casehard.metrics.errors import Misread, SettingError
from casehard.metrics.names import guess, visible
from casehard.shipped import experiment, shipped


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


NOISE = re.compile(
    r"Does not validate|Subtypes:|Errors:|Expected a <class 'NoneType'>|Expected a path but"
    r"|Subclass types expect|a class path \(|a dict with"
)
PLAINER = [  # what jsonargparse says, and how it is said here
    (r"<class '([\w.]+)'>", r"\1"),
    (r"Expected a typing\.Literal\[(.*?)\]", r"Expected one of \1"),
    (r"Unable to load config .*", "Expected settings, {name: value}, or a file with them"),
    (r"Not a valid subclass of (\w+).*", r"Expected a \1 by its class_path, and its settings as init_args"),
]
OPTION = re.compile(r".*class_path '([\w.]+)': (?:.*: )?(?:Group '(\w+)' does not accept option|Option) '([\w.]+)'")


def plain(message: str, options: Collection[str] = ()) -> str:
    """jsonargparse's message in one line, without the types that it tried and the values, which may be all settings and texts.

    Args:
        message: jsonargparse's.
        options: names of the parser's settings, of which one may be meant.
    """
    lines: list[str] = []
    in_value = False
    for line in (line.strip() for line in message.splitlines()):
        in_value = line.startswith("Given value") or (in_value and not line.startswith("- "))
        text = re.sub(r"\. Got value: (.{60,}|\W.*|.*\(.*)", "", line.removeprefix("- "))
        if text.startswith("Not a valid subclass") and any("class_path" in line or "Import path" in line for line in lines):
            break  # that class exists, and this is what else might have stood there
        if text and not in_value and not NOISE.match(text):
            for theirs, plainer in PLAINER:
                text = re.sub(theirs, plainer, text)
            lines.append(text)
    text = re.sub(r'(Parser key "[^"]+": [^;]+); \1', r"\1", "; ".join(dict.fromkeys(lines)).replace(":; ", ": "))
    return text + meant(text, options)


def meant(message: str, options: Collection[str] = ()) -> str:
    """What a misspelt class, module or setting may stand for, as a question, or how a module is found; "" where nobody knows."""
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'|import path string: ()(\w+)", message):
        module, name = sys.modules[found[1] or "casehard"], found[2] or found[4]
        known = {} if module is casehard else {public: f"casehard.{public}" for public in casehard.__all__}
        known |= {part.name: part.name for part in pkgutil.iter_modules(getattr(module, "__path__", []))}
        known |= {key: key for key in dir(module) if key[0].isupper()}
        known |= {} if found[1] else {name: name for name in plugins()}
    elif found := re.search(r"No module named '([\w.]+)'", message):
        name, known = found[1], {"casehard": "casehard"}
    elif found := re.search(
        r".*class_path '([\w.]+)': (?:.*: )?(?:Group '(\w+)' does not accept option|Option) '([\w.]+)'", message
    ):
        name, known = found[3], {setting: setting for setting in settings_of(found[1])}
        if found[2]:
            name = f"{found[2]}.{name}"
    elif found := re.search(r"unrecognized arguments: ([^-\s]\S*)$", message):
        return f". Did you mean --config {found[1]}?" if "config" in options else ""
    elif found := re.search(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message):
        name, known = found[1] or found[2], {option: option for option in options}
    else:
        return ""
    near = nearest(name, known)
    if not near and "No module named" in message:
        return f". Install {name.partition('.')[0]}, or name the folder that has it in PYTHONPATH."
    return f". Did you mean {known[near]}?" if near else ""


def nearest(name: str, known: Collection[str]) -> str | None:
    """The name that is meant: one that ends the same, as settings do that moved into a group, or that is spelt nearly so."""
    ends = [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2] and "." in other]
    if ends:
        return min(ends, key=len)
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def settings_of(path: str) -> Iterator[str]:
    """Names of what a class takes, those in a group with its name before them; the class is one that can be imported."""
    module, _, name = path.rpartition(".")
    if source := find(casehard.MODULES.get(name, "") if module == "casehard" else module, name):
        yield from source.names()
        return
    for kind in getattr(import_module(module), name).__mro__:
        yield from (p.name for p in inspect.signature(kind.__init__).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD)


class PlainErrors:
    """For a parser of jsonargparse's: what goes wrong is said in one sentence, without the usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"parser_mode": MODE} | kwargs)
        self.add_instantiator(built, object)  # type: ignore[attr-defined]

    def parse_args(self, args: Any = None, *more: Any, **settings: Any) -> Any:
        """As jsonargparse's, of words that may name classes as earlier versions did."""
        words = [self._renamed(word) for word in (sys.argv[1:] if args is None else args)]
        self.command = words[0] if words else ""
        return super().parse_args(words, *more, **settings)  # type: ignore[misc]

    def options(self) -> set[str]:
        """Names of all settings."""
        return set(re.findall(r"--([\w.]+)", self.format_help()))  # type: ignore[attr-defined]

    @staticmethod
    def _renamed(word: str) -> str:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        return f"{option}{equals}{as_class(value)}"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Leave with the sentence; parsers of the classes within raise, as they do."""
        if not self.exit_on_error:  # type: ignore[attr-defined]
            super().error(message, ex)  # type: ignore[misc]
        prog = self.prog.replace(" [options]", "")  # type: ignore[attr-defined]
        if prog == "casehard":  # of the parser over those of the commands
            prog = f"{prog} {self.command}"
        text = plain(message, self.options())
        raise Misread(visible(way_out(text) or text), prog)


class CommandParser(PlainErrors, ArgumentParser):
    """Of the commands that do not train."""


TEXT = "a config's text"


def read(name: str, text: str) -> Any:
    """What a config says, by YAML's own rules.

    Raises:
        SettingError: it must be another, and ``name`` says which it is.
    """
    try:
        return safe(text)
    except SettingError as error:
        raise SettingError(f"{name}: {error}") from error


class ConfigFile(ActionConfigFile):
    """A config file whose lists and classes replace those before it, where jsonargparse merges: lists of the same length entry by
    entry, and into a class what another was given under the same names. Two files that name different defenses are refused.
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Forget what the file replaces, then apply it."""
        values = self._file(values)
        text = config_text(values)
        name = Path(values).name if text != values else TEXT
        with suppress(yaml.YAMLError):  # which is then said below
            config = read(name, text)
            check_top(name, config, vars(cfg))
            require_known(config, cfg, values)
            for key in _replaced(config, cfg):
                if cfg.get(key) is not None:
                    cfg[key] = None
            if (model := class_path(config, "model")) is not None:
                parser.defenses.append((name, model))
        check_one_defense(parser.defenses)
        super().__call__(parser, cfg, values, option_string)

    @staticmethod
    def _file(value: str) -> str:
        """The file that a value names; a config's text stands for itself."""
        if os.path.isfile(shipped(value)):  # also false of a text that is too long for a name
            return shipped(value)
        try:
            is_name = isinstance(read(TEXT, value), str)
        except yaml.YAMLError:
            is_name = "\n" not in value
        return experiment(value) if is_name else value


GROUPS = ("trainer", "model", "data", "run")


def check_top(name: str, config: Any, settings: Collection[str]) -> None:
    """Refuse a key at the top of a config that is no setting, also where nothing stands under it.

    Raises:
        SettingError: there is one.
    """
    for key in config if isinstance(config, dict) else ():
        if key not in settings:
            raise SettingError(f"{name}: {key!r} must be a setting, and it is none.{guess(str(key), settings)}")
        if key in GROUPS and not isinstance(config[key], dict | str | None):
            raise SettingError(f"{name}: {key} must hold settings, {{name: value}}, got {config[key]!r}.")


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
