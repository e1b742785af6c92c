"""What ``cli/`` uses of its dependencies although they keep it private, each with what it is needed for."""

from functools import reduce
from operator import or_
from typing import Any, Union, get_args, get_origin

import lightning as L
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger


class PrivateCLI(LightningCLI):
    """Lightning's command line, with names for the private parts of it that casehard's needs."""

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would take settings from a checkpoint here."""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "test":  # casehard's own tables say what came of it; `validate` has no others
            parser.set_defaults(verbose=False)
        return parser

    def _run_subcommand(self, subcommand: str) -> None:
        self.run(subcommand)

    def run(self, subcommand: str) -> None:
        """Fit, validate or test, between the hooks around it."""
        super()._run_subcommand(subcommand)

    def parser_of(self, subcommand: str | None) -> LightningArgumentParser:
        """The parser of one command's settings, which dumps them without the command's name around them."""
        return self._parser(subcommand)

    def trainer_settings(self) -> dict[str, Any]:
        """What the config says of the trainer, its classes already made."""
        return dict(self._get(self.config_init, "trainer", default={}))

    def build_trainer(self, settings: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        """A trainer with more callbacks than the config asks for; ``trainer_defaults`` are fixed before it is read."""
        return self._instantiate_trainer(settings, callbacks)


def whole_numbers_stay(parser: ArgumentParser) -> None:
    """Let settings that are an int or a float try the int first: ``limit_val_batches`` is one batch at 1, and all of them at 1.0.

    Python takes ``Union[int, float]`` and ``Union[float, int]`` for one, and gives all the order of whoever was imported first.
    """
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if get_origin(hint) is Union and {int, float} <= {*get_args(hint)}:
            action._typehint = reduce(or_, sorted(get_args(hint), key=lambda kind: kind is float))  # type: ignore[attr-defined]


class QuietWandbLogger(WandbLogger):
    """Lightning's, without the setting that W&B gave up and warns of at every start; nothing of the machine goes to W&B.

    No name, paths, hardware, command line or console, numbers only. Settings that begin with ``x_`` are W&B's experimental ones.
    Offline it has nothing to say; online it says where the run is, and what goes wrong on the way there.
    """

    def __init__(self, offline: bool, **settings: Any) -> None:
        from wandb import Settings

        numbers = Settings(
            host="casehard", x_disable_meta=True, x_disable_stats=True, disable_git=True, save_code=False, console="off"
        )
        numbers.silent, numbers.quiet = offline, not offline
        super().__init__(offline=offline, settings=numbers, **settings)
        self._wandb_init.pop("anonymous", None)


def refusals_of_wandb() -> tuple[type[Exception], ...]:
    """What W&B raises where it takes no run; pydantic's are ValueErrors."""
    from wandb import Error

    return Error, ValueError
