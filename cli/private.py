"""What ``cli/`` uses of its dependencies although they keep it private, each with what it is needed for."""

from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from casehard.metrics.errors import SettingError

if TYPE_CHECKING:
    from wandb import Settings


class PrivateCLI(LightningCLI):
    """Lightning's command line, with names for the private parts of it that casehard's needs."""

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would take settings from a checkpoint here."""

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:  # of numpy, without the setting's name
            raise SettingError(f"seed_everything must be one that numpy takes, and {error}.") from error

    def parser_of(self, subcommand: str | None) -> LightningArgumentParser:
        """The parser of one command's settings, which dumps them without the command's name around them."""
        return self._parser(subcommand)

    def trainer_settings(self) -> dict[str, Any]:
        """What the config says of the trainer, its classes already made."""
        return dict(self._get(self.config_init, "trainer", default={}))

    def build_trainer(self, settings: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        """A trainer with more callbacks than the config asks for; ``trainer_defaults`` are fixed before it is read."""
        return self._instantiate_trainer(settings, callbacks)


def wandb_settings() -> "Settings":
    """Nothing of the machine goes to W&B: no name, paths, hardware, command line or console; numbers only.

    Settings that begin with ``x_`` are W&B's experimental ones.
    """
    from wandb import Settings

    return Settings(host="casehard", x_disable_meta=True, x_disable_stats=True, disable_git=True, save_code=False, console="off")


def refusals_of_wandb() -> tuple[type[Exception], ...]:
    """What W&B raises where it takes no run; pydantic's are ValueErrors."""
    from wandb import Error

    return Error, ValueError
