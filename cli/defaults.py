"""Which settings a run starts from: those that every run needs, and the sandbox's where no rows of one's own are named."""

import os
import re
from argparse import ArgumentError, ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import yaml

from casehard.cli.yaml_texts import safe
from casehard.metrics.errors import SettingError
from casehard.shipped import PACKAGE, experiment, shipped

EVERY_RUN = str(PACKAGE / "experiments" / "default.yaml")
SANDBOX = str(PACKAGE / "experiments" / "data" / "sandbox.yaml")  # its model, rows, judge, poison and attacks
SOURCE = re.compile(r"data\.sources\.(?!refusal_texts)\w+\+?")
NOT_THERE = {  # what jsonargparse says where a default of the sandbox's is missed
    r"class_path '[\w.]+': the following arguments are required: checkpoint": (
        "model.init_args.checkpoint must name a model where data.sources names rows of your own, and nothing names one. Add "
        "--model.init_args.checkpoint FOLDER (a hub id or a GGUF file will do, too)."
    ),
    r"the following arguments are required: (\w+\.)?data\.sources\.benign": (
        "data.sources.benign must name rows where data.sources names any of your own, and nothing names them. Add "
        "--data.sources.benign '[FILE]', or put --config experiments/data/sandbox.yaml first for all else of the sandbox's."
    ),
}


def default_files(args: Sequence[str]) -> list[str]:
    """The config files that a command line of ``fit``, ``validate`` or ``test`` starts from, the earlier first."""
    return [EVERY_RUN] if names_own_rows(args) else [EVERY_RUN, SANDBOX]


def names_own_rows(args: Sequence[str]) -> bool:
    """Whether a config or a setting of a command line names a source of rows that is not the sandbox's."""
    sources = (source for key, value in _settings(args) if SOURCE.fullmatch(key) for source in _texts(value))
    return any(not source.startswith("sandbox:") for source in sources)


def of_the_sandbox(config: dict[str, Any]) -> str:
    """What a user must know of a resolved config that has rows of the sandbox for a model and rows of his own; "" elsewhere."""
    settings = [(key, _texts(value)) for name in ("model", "data", "trainer") for key, value in _leaves(config.get(name), name)]
    own = any(not text.startswith("sandbox:") for key, texts in settings if SOURCE.fullmatch(key) for text in texts)
    checkpoint = str((config["model"].get("init_args") or {}).get("checkpoint"))
    named = list(dict.fromkeys(key for key, texts in settings if any(text.startswith("sandbox:") for text in texts)))
    if not own or not named or checkpoint.startswith("models/sandbox/"):
        return ""
    return (
        f"{', '.join(named)} names rows of the sandbox, beside a model and rows of your own. They are of an invented world, and "
        "say nothing of what your model knows or refuses. Name rows of your own, unless you mean these."
    )


def way_out(message: str) -> str:
    """What ``message``, of the parser, comes to where rows of one's own leave out a default; "" where it says something else."""
    return next((said for pattern, said in NOT_THERE.items() if re.search(pattern, message)), "")


class _Reader(ArgumentParser):
    """Splits a command line as argparse does, which the real parser is built on."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(None, message)


def _settings(args: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """What a command line says of its data, by dotted names: of its configs, and of the arguments beside them."""
    reader = _Reader(add_help=False)
    reader.add_argument("-c", "--config", action="append", default=[])
    names = {arg.partition("=")[0].removeprefix("--") for arg in args if re.match(r"--data\.sources\.", arg)}
    for name in sorted({"data", "data.sources", *names}):
        reader.add_argument(f"--{name}", action="append", dest=name, default=[])
    try:
        given = vars(reader.parse_known_args(list(args))[0])
    except ArgumentError:  # which is then said by the real parser
        return
    for name, values in given.items():
        for value in values:
            yield from _flat(_read(value, is_file=not SOURCE.fullmatch(name)), "" if name == "config" else name)


def _read(value: str, is_file: bool = True) -> Any:
    """What a value says, or the file that it names; None where it cannot be read, which is then said by the real parser."""
    with suppress(yaml.YAMLError, OSError, UnicodeDecodeError, SettingError):
        if is_file and os.path.isfile(shipped(value)):
            return safe(Path(shipped(value)).read_text(encoding="utf-8"))
        said = safe(value)
        return safe(Path(experiment(said)).read_text(encoding="utf-8")) if is_file and isinstance(said, str) else said
    return None


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The leaves of a config by their dotted names. Its ``data`` may be another file."""
    if isinstance(value, str) and name in ("data", "data.sources") and (read := _read(value)) is not None:
        value = read
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """As ``_flat`` of what is read already, with the settings of listed classes, too."""
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        for part in value:
            yield from _leaves(part, name)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}")
    else:
        yield name, value


def _texts(value: Any) -> list[str]:
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
