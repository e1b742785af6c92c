"""``casehard.run``: a command from a script or a notebook, whose results come back and whose mistakes are exceptions."""

import inspect
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from casehard.cli.main import TRAINING
from casehard.evidence.found import Found, read
from casehard.metrics.errors import SettingError

COMMANDS = (*TRAINING, "study", "judge")
Config = str | Path | Mapping[str, Any]


def run(command: str, config: Config | list[Config] = (), **settings: Any) -> Found:  # type: ignore[assignment]
    """Run a command of ``casehard``, and return what it came to.

    It leaves nothing behind in the process, neither handlers of signals nor variables of the environment. An interrupt (Ctrl-C, a
    notebook's stop) is a KeyboardInterrupt, as ever.

    Args:
        command: fit, validate, test, study or judge.
        config: as ``--config``: a file, the name of an experiment or a dict of settings, or several in a list; of ``study`` its
            file, of ``judge`` the run's folder.
        settings: all others by their dotted names, ``**{"model.init_args.anchor_weight": 10, "run.root": "mine"}``. A class of
            your own may stand for its path.

    Returns:
        The results, as ``casehard.read`` finds them in the folder of the run or the study.

    Raises:
        SettingError: a setting or a file must be another; ``error:`` on the command line.
    """
    if command not in COMMANDS:
        raise SettingError(f"command must be one of {', '.join(COMMANDS)}, got {command!r}.")
    configs = list(config) if isinstance(config, list | tuple) else [config]
    words = [_word(one) for one in configs]
    if command in TRAINING:
        words = [word for one in words for word in ("--config", one)]
    words += [f"--{name}={_word(value)}" for name, value in settings.items()]
    with _leaving_no_trace():
        if command in TRAINING:
            from casehard.cli.lightning_cli import train

            return read(train([command, *words]))
        from casehard.cli.commands import run as run_command

        return read(run_command(command, words))


def _word(value: Any) -> str:
    """As the command line has it."""
    if isinstance(value, str | Path):
        return str(value)
    plain = _plain(value)
    return yaml.safe_dump(plain) if isinstance(value, Mapping) and not isinstance(plain, str) else json.dumps(plain)


def _plain(value: Any) -> Any:
    """Settings as YAML and JSON have them: a class by its path."""
    if inspect.isclass(value):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


@contextmanager
def _leaving_no_trace() -> Iterator[None]:
    """For a block that runs a command: what Lightning and casehard do to the process is undone, and no exit ends it.

    Raises:
        SettingError: the command would have ended with an error.
        KeyboardInterrupt: Lightning took one for an exit.
    """
    environment = dict(os.environ)
    logging_before = _wandb_run()
    try:
        with warnings.catch_warnings():
            yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise SettingError(str(stop).removeprefix("error: ")) from stop
    finally:
        if (logging := _wandb_run()) is not None and logging is not logging_before:
            logging.finish()  # else the next run's numbers would go there
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def _wandb_run() -> Any:
    """The run that W&B is logging, in this process."""
    return getattr(sys.modules.get("wandb"), "run", None)
