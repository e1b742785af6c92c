"""How the text of a setting or a config is read: YAML without its traps, and with the names of earlier versions."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

import casehard
from casehard.cli.plugins import known_as
from casehard.metrics.errors import SettingError

MODE = "casehard"  # of jsonargparse's parsers that read so
ROOMS = ("callbacks", "datamodules", "lightning_modules", "metrics")  # what were packages before casehard was one
GONE = ("optimizer", "lr_scheduler")  # Lightning's, which never had a use here, and stand in earlier configs as null
MOST = 1_000_000  # values of a text, each alias counted as what it stands for
DEEPEST = 100  # levels; libyaml ends the process at some ten thousand
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def loaded(text: str) -> Any:
    """What a text says.

    Raises:
        SettingError: it names a key twice, or its aliases stand for more than anybody writes.
    """
    check(text)
    value = _renamed(get_loader("yaml")(text))
    return as_class(value) if isinstance(value, str) else value


def safe(text: str) -> Any:
    """As ``loaded``, by YAML's own rules; for a look at a config."""
    check(text)
    return _renamed(yaml.safe_load(text))


set_loader(MODE, loaded, (yaml.YAMLError,))


def check(text: str) -> None:
    """Refuse what YAML would take and nobody means.

    Raises:
        SettingError: see ``loaded``.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        """Values under a node; known ones are not gone through again, which is what an alias bomb relies on."""
        if id(node) not in sizes:
            sizes[id(node)] = 1  # of one that holds itself
            parts = node.value if not isinstance(node, yaml.ScalarNode) else []
            if isinstance(node, yaml.MappingNode):
                _check_keys(node)
                parts = [part for pair in parts for part in pair]
            sizes[id(node)] = 1 + sum(map(size, parts))
        return sizes[id(node)]

    depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise SettingError(f"a config must be at most {DEEPEST} levels deep, and line {event.start_mark.line + 1} is deeper.")
    root = yaml.compose(text, Loader=LOADER)
    values = 0 if root is None else size(root)
    if values > MOST:
        raise SettingError(f"a config must hold at most {MOST:,} values, and with its aliases written out this one holds more.")


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
            continue
        line = key.start_mark.line + 1
        if key.value in lines:
            raise SettingError(
                f"a key must stand once, and {key.value!r} stands in line {lines[key.value]} and in line {line}: "
                "the first would be lost. Leave one out."
            )
        lines[key.value] = line


def _renamed(value: Any, top: bool = True) -> Any:
    """``value`` with the classes of earlier versions under their names of now."""
    if isinstance(value, list):
        return [_renamed(part, top=False) for part in value]
    if isinstance(value, dict):
        for key, kind, what in (("class_path", str, "the path of a class"), ("init_args", dict, "its settings, {name: value}")):
            if not isinstance(value.get(key), kind | None):
                raise SettingError(f"{key} must be {what}, got {value[key]!r}.")
        return {
            key: known_as(as_class(part)) if key == "class_path" and isinstance(part, str) else _renamed(part, top=False)
            for key, part in value.items()
            if not (top and key in GONE and part is None)
        }
    if isinstance(value, str):
        known_as(value)  # once it is imported, a setting that is a class may bear its short name
    return value


def as_class(name: str) -> str:
    """A class path of before casehard was a package, such as ``callbacks.LoRAAttack``, as it is called now.

    One of a module of the user's own that has the class stands for itself, and so does every other text.
    """
    module, _, kind = name.rpartition(".")
    if module.partition(".")[0] not in ROOMS or _has(module, kind):
        return name
    if kind in casehard.__all__:
        return f"casehard.{kind}"
    return f"casehard.{name}" if _has(f"casehard.{module}", kind) else name


def _has(module: str, kind: str) -> bool:
    """Whether a module has a class; not where it is a room of casehard's own that is seen from the checkout."""
    top = module.partition(".")[0]
    try:
        spec, ours = find_spec(top), find_spec(f"casehard.{top}")
        if spec is None or (ours is not None and _is_same(spec.origin, ours.origin)):
            return False
        return hasattr(import_module(module), kind)
    except (ImportError, ValueError):
        return False


def _is_same(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and Path(one).resolve() == Path(other).resolve()
