"""``fit``, ``validate`` and ``test``: Lightning's command line, and what a run leaves in its folder."""

import os
import re
import signal
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import lightning as L
from jsonargparse import Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

import casehard
from casehard.callbacks.results import Results
from casehard.cli.parsing import ConfigFile, PlainErrors, built, check_one_defense, class_path, refusals
from casehard.cli.private import PrivateCLI, refusals_of_wandb, wandb_settings
from casehard.cli.run_folder import claim_run_folder, held, keep_metrics, require_unfinished, write_marker
from casehard.datamodules.sft import SFTDataModule
from casehard.engine.fit_checkpoint import numbers_only, read_notes, require_unharmed
from casehard.engine.training import DivergedError
from casehard.lightning_modules.defense import Defense
from casehard.lightning_modules.saved import check_made_by
from casehard.metrics.errors import SettingError
from casehard.metrics.names import require_name
from casehard.records.files import RUN_FOLDER
from casehard.shipped import PACKAGE

NO_ROOM = re.compile(r"can't allocate memory|out of memory", re.IGNORECASE)  # as torch says it
LOST = re.compile(r"(closed|reset) by peer|Broken pipe.*(gloo|nccl)|remote process exited", re.IGNORECASE)  # as torch says it


class ProgressBar(TQDMProgressBar):
    """As the attacks' own bars; also shows where a defense stands, such as its round."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Lightning's, under their short names."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {**getattr(pl_module, "progress", {}), **{k.removeprefix("train/"): v for k, v in metrics.items()}}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, whole or not there: a kill in the middle of writing leaves the one before.

    Sharded ones are folders, which no rename makes whole: there ``last.ckpt`` links to the newest that was finished.
    """

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read numbers alone, whoever asks for more: Lightning would run what stands in a pickle from an address."""
        return super().load_checkpoint(path, map_location or (lambda storage, _: storage), weights_only=True)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside ``path``, reach the disk, then move in one step."""
        partial = Path(f"{path}.partial")
        super().save_checkpoint(checkpoint, partial, storage_options)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)


class SaveConfig(SaveConfigCallback):
    """The resolved config in the run's folder, whatever loggers there are."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, folder: Path) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder = folder

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write it; a run that goes on writes its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, self.folder / "config.yaml", skip_none=False, overwrite=True, multifile=False)


class TrainingParser(PlainErrors, LightningArgumentParser):
    """Of ``fit``, ``validate`` and ``test``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.defenses: list[tuple[str, str]] = []  # files of the command line that name a model's class, and which


class Cli(PrivateCLI):
    """``fit``, ``validate`` and ``test`` of a defense on data, with everything that a run leaves in a folder of its own.

    Args:
        args: the command and its settings; None takes those of the process.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        for name in casehard.__all__:  # so that they may stand without `casehard.` too, and --help lists them
            getattr(casehard, name)
        defaults = {"default_config_files": [str(PACKAGE / "experiments" / "default.yaml")]}
        with ExitStack() as self.while_it_runs, numbers_only():
            super().__init__(
                Defense,
                SFTDataModule,
                subclass_mode_model=True,
                seed_everything_default=0,
                parser_class=TrainingParser,
                save_config_callback=SaveConfig,
                parser_kwargs={"prog": "casehard", **dict.fromkeys(("fit", "validate", "test"), defaults)},
                args=args,
            )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without ``predict``: there is nothing to predict on."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Lightning's, with lists that replace."""
        parser = self.parser_class(**kwargs)
        parser.add_argument("-c", "--config", action=ConfigFile, help="path to a configuration file (YAML), or its text")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run.experiment", type=str | None, default=None, help="name of the run; by default the first --config's"
        )
        parser.add_argument(
            "--run.version", type=str | None, default=None, help="name of the run's folder; by default the next number"
        )
        parser.add_argument("--run.root", type=str, default="runs", help="where run folders are made")
        parser.add_argument("--run.wandb", type=Literal["offline", "online", "disabled"], default="offline", help="W&B logging")
        parser.add_argument("--run.project", type=str, default="casehard", help="W&B project")
        parser.add_argument("--run.group", type=str, default="", help="W&B group of the run; by default its experiment's name")
        parser.add_argument("--run.tags", type=list[str], default=[], help="W&B tags of the run")
        parser.add_argument("--run.export", type=bool, default=True, help="write the trained model in Hugging Face format")
        parser.add_argument(
            "--run.checkpoint_steps",
            type=int | None,
            default=None,
            help="optimizer steps between checkpoints, from which --ckpt_path goes on; by default one an epoch",
        )
        parser.add_argument("--run.generations", type=bool, default=True, help="write generated answers to generations.jsonl")
        parser.add_argument(
            "--run.wandb_generations",
            type=bool,
            default=False,
            help="also send generated answers to W&B, a table an evaluation; with real data they are harmful texts",
        )

    def config_text(self) -> str:
        """The resolved config of the command, as YAML."""
        command = self.config["subcommand"]
        return str(self.parser_of(command).dump(self.config[command], skip_none=False))

    def before_instantiate_classes(self) -> None:
        """Check what can be known from the settings alone.

        Raises:
            SettingError: two defenses, a run with a name that is none, or ``validate`` would end before it begins, as by the
                default config.
        """
        config = self.config[self.subcommand]
        if named := self.parser_of(self.subcommand).defenses:  # type: ignore[attr-defined]
            check_one_defense([*named, ("the command line", class_path(config, "model") or "none")])
        require_name("run.experiment", experiment_name(config), folder=True)
        if config.run.version is not None:
            require_name("run.version", config.run.version, folder=True)
        if config.weights_only is False:
            raise SettingError("weights_only must be true or left out, got false: a checkpoint's code would be run.")
        if self.subcommand == "validate" and config.trainer.limit_val_batches == 0 and not config.trainer.fast_dev_run:
            raise SettingError(
                "trainer.limit_val_batches must be > 0 for validate, got 0: nothing would be validated. Set it to 1.0, and add "
                "casehard.Evaluate to trainer.callbacks for scores; `test` runs the attacks."
            )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add the run folder's writers to what the config asks for."""
        config = self.config[self.subcommand]
        dry = bool(config.trainer.fast_dev_run)
        if config.ckpt_path is not None:
            check_made_by(self.model, read_notes(config.ckpt_path, to_train=self.subcommand == "fit"))
            rank_zero_only(require_unharmed)(config.ckpt_path)
        self.folder = self._take_folder(config, dry)
        self.save_config_kwargs = {"folder": self.folder}
        export = config.run.export and self.subcommand == "fit" and not dry
        extra: list[Any] = [Results(str(self.folder), export, config.run.generations, config.run.wandb_generations)]
        if self.subcommand == "fit" and config.trainer.enable_checkpointing is not False:
            steps = config.run.checkpoint_steps
            # `last` is not linked once more where an epoch ends: processes would meet there
            when = {} if steps is None else {"every_n_train_steps": steps, "save_on_train_epoch_end": False}
            extra.append(ModelCheckpoint(self.folder / "checkpoints", save_last="link", save_top_k=1, **when))
        if config.trainer.enable_progress_bar is not False:
            extra.append(ProgressBar())
        settings = self.trainer_settings() | kwargs
        plugins = settings.get("plugins") or []
        settings["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        if settings.get("logger") is None:
            settings["logger"] = self._loggers(config)
        trainer: L.Trainer = built(self.build_trainer, settings, extra)
        return trainer

    def _take_folder(self, config: Any, dry: bool) -> Path:
        """The run's folder, from which other runs are kept out while this one goes on.

        Raises:
            FileExistsError: a run has ended there, or another is under way.
            SettingError: the environment names one and the settings another.
        """
        root, experiment, version = config.run.root, experiment_name(config), config.run.version
        if RUN_FOLDER not in os.environ and not dry:
            os.environ[RUN_FOLDER] = str(claim_run_folder(root, experiment, version))
        folder = Path(os.environ.get(RUN_FOLDER, Path(root, experiment, "dry")))
        if version is not None and not dry and folder.absolute() != Path(root, experiment, version).absolute():
            raise SettingError(
                f"run.version must be left out where {RUN_FOLDER} names the run's folder, and it is {version} while {RUN_FOLDER} "
                f"is {folder}. Unset one of the two."
            )
        if RUN_FOLDER in os.environ:
            require_unfinished(folder)
            if getattr(rank_zero_only, "rank", 0) == 0 and os.environ.get("NODE_RANK", "0") == "0":
                self.while_it_runs.enter_context(held(folder))  # the run's other processes share it
        return folder

    def _loggers(self, config: Any) -> list[Logger]:
        folder = self.folder
        keep_metrics(folder)
        number = re.fullmatch(r"version_(\d+)", folder.name)
        loggers: list[Logger] = [CSVLogger(folder.parent.parent, folder.parent.name, int(number[1]) if number else folder.name)]
        if config.run.wandb != "disabled":
            offline = config.run.wandb == "offline"
            name, group = f"{folder.parent.name}-{folder.name}", config.run.group or folder.parent.name
            where = {"save_dir": folder, "project": config.run.project, "offline": offline}
            place = {"group": group, "job_type": self.subcommand, "tags": config.run.tags}
            try:
                wandb = WandbLogger(name=name, settings=wandb_settings(), **where, **place)
                wandb.experiment.define_metric("attack_step")
            except refusals_of_wandb() as error:
                raise SettingError(
                    f"run.wandb, run.project, run.group and run.tags must be such that W&B takes the run, and it says: "
                    f"{' '.join(str(error).split())[:300]}. Correct that, or set run.wandb to offline, or to disabled."
                ) from error
            wandb.experiment.define_metric("attack/*", step_metric="attack_step")
            loggers.append(wandb)
        return loggers

    def after_fit(self) -> None:
        """The closing table, and the marker of a run that came to its end."""
        self._close()

    def after_test(self) -> None:
        """The closing table, and the marker of a run that came to its end."""
        self._close()

    def _close(self) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Results):
                callback.close()
                callback.require_verdicts()
                self._mark(callback.training_seconds)

    def _mark(self, seconds: float) -> None:
        """Leave the marker; ``seconds`` are those of training, attacks not counted."""
        if self.trainer.is_global_zero and self.trainer.state.finished and self.folder.is_dir():
            facts = {
                "command": self.subcommand,
                "steps": self.trainer.global_step,
                "passes": self.model.num_passes,
                "seconds": round(seconds, 1),
                "defense": self.model.label,
                "stage": self.model.stage,
                "seed": self.datamodule.seed,
            }
            write_marker(self.folder, self.config_text(), self.datamodule.origins, facts)


def experiment_name(config: Any) -> str:
    """The name of a run: the one it was given, else that of the first config file but default.yaml."""
    if config.run.experiment:
        return str(config.run.experiment)
    files = [Path(str(path)) for path in config.config or [] if path is not None]  # None: a text
    names = [file.stem for file in files if file.name != "default.yaml"]
    return names[0] if names else "casehard"


def train(args: list[str]) -> None:
    """Run ``fit``, ``validate`` or ``test``.

    Raises:
        SettingError: a setting must be another, or training diverged.
        SystemExit: with the status of a process that SIGTERM ended.
    """
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of torch
    warnings.filterwarnings("ignore", message="Experiment logs directory")  # the folder is this run's own
    warnings.filterwarnings("ignore", message=".*overriding `LightningModule.optimizer_")  # so it is meant
    sys.argv[1:] = args  # launchers start further processes by it
    inherited = RUN_FOLDER in os.environ
    try:
        with refusals():
            Cli()
    except (DivergedError, MisconfigurationException) as error:
        raise SettingError(str(error)) from error
    except RuntimeError as error:
        if NO_ROOM.search(str(error)):
            raise SettingError(
                "a run must have room in memory, and there was too little: lower the batch sizes, max_length or the rank of "
                f"adapters, or take a smaller model ({' '.join(str(error).split())[:200]})."
            ) from error
        if not LOST.search(str(error)):
            raise
        raise SettingError(
            "all processes of a run must live to its end, and another one has ended, or cannot be reached. Its last lines say "
            "why; `fit` goes on from RUN/checkpoints/last.ckpt by --ckpt_path."
        ) from error
    except SIGTERMException:  # from an attack, or from Lightning's training loop between two batches
        sys.stderr.write("ended by SIGTERM; `fit` goes on from RUN/checkpoints/last.ckpt by --ckpt_path\n")
        sys.exit(128 + signal.SIGTERM)
    finally:
        if not inherited:  # it was for this run's processes; another run of this process gets a folder of its own
            os.environ.pop(RUN_FOLDER, None)


class _Resolved(Exception):  # noqa: N818  no error: Lightning offers no other way to stop once the config is read
    """The resolved config of a command line, as YAML."""


class _Resolver(Cli):
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        raise _Resolved(self.config_text())


def resolved(args: list[str]) -> str:
    """The config that a command line of ``fit`` or ``test`` resolves to, as YAML; nothing is run.

    Raises:
        SettingError: it does not parse.
    """
    try:
        with refusals():
            _Resolver(args)
    except _Resolved as text:
        return str(text)
    except SystemExit as stop:
        raise SettingError(f"every cell must be a command that works, and this one does not: {' '.join(args)}") from stop
    raise AssertionError("the resolver stops where the config is read")
