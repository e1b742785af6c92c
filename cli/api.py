"""``casehard.run``: a command from a script or a notebook, whose results come back and whose mistakes are exceptions."""

import inspect
import json
import os
import signal
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
_shared = False  # whether a run had several processes
Config = str | Path | Mapping[str, Any]


def run(command: str, config: Config | list[Config] = (), **settings: Any) -> Found:  # type: ignore[assignment]
    """Run a command of ``casehard``, and return what it came to.

    It leaves nothing behind in the process, neither handlers of signals nor variables of the environment. An interrupt (Ctrl-C, a
    notebook's stop) is a KeyboardInterrupt, as ever.

    Args:
        command: fit, validate, test, study or judge.
        config: as ``--config``: a file, the name of an experiment or a dict of settings, or several in a list; of ``study`` its
            file, of ``judge`` the run's folder.
        settings: all others by their dotted names, ``**{"model.init_args.anchor_rate": 0.5, "run.root": "mine"}``. A class of
            your own may stand for its path.

    Returns:
        The results, as ``casehard.read`` finds them in the folder of the run or the study.

    Raises:
        SettingError: a setting or a file must be another (``error:`` on the command line); or an earlier run of this script had
            several processes.
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
            return read(_trained([command, *words]))
        from casehard.cli.commands import run as run_command

        return read(run_command(command, words))


def _trained(args: list[str]) -> Path:
    """The folder of a run; the first on several processes is the last of this one, as each of them runs the whole script."""
    global _shared
    from casehard.cli.lightning_cli import train

    if _shared:
        raise SettingError(
            "a script must make at most one run on several processes, and it has made one: each of them goes through the whole "
            "script. Make a script of each run, or use the command line."
        )
    done = train(args)
    _shared = done.trainer.world_size > 1
    return done.folder


def _word(value: Any) -> str:
    """As the command line has it."""
    if isinstance(value, str | Path):
        return str(value)
    plain = _plain(value)
    return yaml.safe_dump(plain) if isinstance(value, Mapping) and not isinstance(plain, str) else json.dumps(plain)


def _plain(value: Any) -> Any:
    """Settings as YAML and JSON have them: a class by its path.

    Raises:
        SettingError: a class that has none.
    """
    if inspect.isclass(value):
        path = f"{value.__module__}.{value.__qualname__}"
        if getattr(sys.modules.get(value.__module__), value.__qualname__, None) is not value:
            raise SettingError(
                f"a class must stand in a module or a notebook's cell by itself, and {path} does not. Move it there."
            )
        return path
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
        KeyboardInterrupt: one stopped the command.
        SystemExit: SIGTERM did.
    """
    environment = dict(os.environ)
    logging_before = _wandb_run()
    try:
        with warnings.catch_warnings():
            yield
    except SystemExit as stop:
        if stop.code == 128 + signal.SIGINT:
            raise KeyboardInterrupt from None
        if stop.code == 128 + signal.SIGTERM:  # whoever asks a script to end means all of it
            raise
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
