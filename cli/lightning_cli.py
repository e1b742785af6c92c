"""``fit``, ``validate`` and ``test``: Lightning's command line, and what a run leaves in its folder."""

import os
import re
import signal
import sys
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

import casehard
from casehard.callbacks.results import Results
from casehard.cli.defaults import default_files, of_the_sandbox
from casehard.cli.help import known_options
from casehard.cli.machine import check_number_of_devices, finish_wandb, hush_lightning, said_of_machine
from casehard.cli.parsing import ConfigFile, PlainErrors, built, check_one_defense, class_path, refusals
from casehard.cli.private import PrivateCLI, QuietWandbLogger, refusals_of_wandb, whole_numbers_stay
from casehard.cli.run_folder import (
    LAST,
    claim_run_folder,
    drop_failed_start,
    held,
    keep_metrics,
    line_to_go_on,
    newest_unfinished,
    require_unfinished,
    unfinished_run_of,
    wandb_id,
    write_marker,
)
from casehard.cli.run_settings import RunSettings
from casehard.datamodules.sft import SFTDataModule
from casehard.engine.fit_checkpoint import numbers_only, read_notes, require_unharmed
from casehard.engine.training import DivergedError, narrow, runs_behind
from casehard.lightning_modules.defense import Defense
from casehard.lightning_modules.saved import check_made_by
from casehard.metrics.errors import SettingError
from casehard.metrics.names import require_name
from casehard.records.files import RUN_FOLDER, write_whole_bytes
from casehard.records.table import terminal


class ProgressBar(TQDMProgressBar):
    """As the attacks' own bars; also shows where a defense stands, such as its round."""

    def init_train_tqdm(self) -> Any:
        """Lightning's; on a narrow terminal without the bar itself, so that the losses can be read."""
        bar = super().init_train_tqdm()
        bar.set_description(bar.desc, refresh=False)  # with the colon that every later one has
        if narrow(bar):
            bar.bar_format = "{desc}{n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        return bar

    _next_look = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Lightning's; where losses have to be waited for, once a second and at the end."""
        last = trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if runs_behind(trainer.strategy.root_device) and not last and monotonic() < self._next_look:
            return
        super().on_train_batch_end(trainer, *args)
        self._next_look = monotonic() + 1

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
        """Write beside ``path``, reach the disk, then move in one step.

        Lightning would put it together in memory, then in the system's temporary folder.

        Raises:
            OSError: naming ``path``, e.g. when the disk is full; what was there stays.
        """
        if storage_options is not None:
            raise TypeError("storage_options are of other writers of checkpoints; leave them out.")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole_bytes(Path(path), partial(torch.save, checkpoint))


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

    def options(self) -> set[str]:
        """Names of all settings."""
        return known_options()


class Cli(PrivateCLI):
    """``fit``, ``validate`` and ``test`` of a defense on data, with everything that a run leaves in a folder of its own.

    Args:
        args: the command and its settings; None takes those of the process.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        for name in casehard.__all__:  # so that they may stand without `casehard.` too, and --help lists them
            getattr(casehard, name)
        self.words = sys.argv[1:] if args is None else args
        defaults = {"default_config_files": default_files(self.words)}
        with ExitStack() as self.while_it_runs, numbers_only():
            super().__init__(
                Defense,
                SFTDataModule,
                subclass_mode_model=True,
                seed_everything_default=0,
                parser_class=TrainingParser,
                save_config_callback=SaveConfig,
                auto_configure_optimizers=False,  # a defense has its own
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
        whole_numbers_stay(parser)
        parser.add_class_arguments(RunSettings, "run", instantiate=False)

    def config_text(self) -> str:
        """The resolved config of the command, as YAML."""
        command = self.config["subcommand"]
        return str(self.parser_of(command).dump(self.config[command], skip_none=False))

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As Lightning's, which seeds right after it.

        Raises:
            SettingError: a seed that no generator takes.
        """
        super().parse_arguments(parser, args)
        seed = self.config[self.config["subcommand"]].seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise SettingError(f"seed_everything must lie in [0, 2^32), got {seed}.")

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
        if said := of_the_sandbox(yaml.safe_load(self.config_text())):
            rank_zero_warn(said)
        if config.weights_only is False:
            raise SettingError("weights_only must be true or left out, got false: a checkpoint's code would be run.")
        check_number_of_devices(config.trainer)
        if config.ckpt_path == "last":
            config.ckpt_path = str(self._last_checkpoint(config.run, experiment_name(config)))
        if self.subcommand == "validate" and config.trainer.limit_val_batches == 0 and not config.trainer.fast_dev_run:
            raise SettingError(
                "trainer.limit_val_batches must be > 0 for validate, got 0: nothing would be validated. Set it to 1.0, and add "
                "casehard.Evaluate to trainer.callbacks for scores; `test` runs the attacks."
            )

    def _last_checkpoint(self, run: Namespace, experiment: str) -> Path:
        if self.subcommand != "fit":
            raise SettingError(
                f"ckpt_path must be a file for {self.subcommand}, and it is `last`, by which fit goes on. Name a file."
            )
        if RUN_FOLDER in os.environ:
            return Path(os.environ[RUN_FOLDER], LAST)
        if run.version is not None:
            return Path(run.root, experiment, run.version, LAST)
        return newest_unfinished(run.root, experiment) / LAST

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add the run folder's writers to what the config asks for."""
        config = self.config[self.subcommand]
        dry = bool(config.trainer.fast_dev_run)
        if config.ckpt_path is not None:
            notes = read_notes(config.ckpt_path, to_train=self.subcommand == "fit")
            check_made_by(self.model, notes)
            self._check_epochs(config, notes)
            rank_zero_only(require_unharmed)(config.ckpt_path)
        self.folder = self._take_folder(config, dry)
        self._say_what_runs(config)
        self.save_config_kwargs = {"folder": self.folder}
        export = config.run.export and self.subcommand == "fit" and not dry
        scored = config.run.score and self.subcommand == "fit" and not dry
        self.results = Results(str(self.folder), export, config.run.generations, config.run.wandb_generations, scored)
        extra: list[Any] = [self.results]
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

    def _check_epochs(self, config: Namespace, notes: dict[str, Any]) -> None:
        """Refuse to go on to an end that lies behind; Lightning would, but after the run's files have changed."""
        end, epoch = config.trainer.max_epochs, notes.get("epoch")
        if self.subcommand == "fit" and end is not None and isinstance(epoch, int) and epoch > end >= 0:
            raise SettingError(
                f"trainer.max_epochs must be as in the run that goes on, or more: its checkpoint is of epoch {epoch}, and it is "
                f"{end}. Give the run's settings again; they stand in its config.yaml."
            )

    @rank_zero_only
    def _say_what_runs(self, config: Any) -> None:
        if sys.stderr.isatty():
            start = config.ckpt_path or self.model.checkpoint
            sys.stderr.write(f"casehard {self.subcommand}: {type(self.model).__name__} from {start}, in {self.folder}\n")

    def _take_folder(self, config: Any, dry: bool) -> Path:
        """The run's folder, from which other runs are kept out while this one goes on.

        Raises:
            FileExistsError: a run has ended there, or another is under way.
            SettingError: the environment names one and the settings another.
        """
        root, experiment, version = config.run.root, experiment_name(config), config.run.version
        if RUN_FOLDER not in os.environ and not dry:
            os.environ[RUN_FOLDER] = str(self._going_on(config) or self._claimed(root, experiment, version))
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

    def _going_on(self, config: Any) -> Path | None:
        """The folder of the unfinished run that this one continues, unless it is to have another."""
        folder = unfinished_run_of(config.ckpt_path) if self.subcommand == "fit" and config.ckpt_path is not None else None
        if folder is None or config.run.version is None:
            return folder
        named = Path(config.run.root, experiment_name(config), config.run.version)
        return folder if folder.absolute() == named.absolute() else None

    def _claimed(self, root: str, experiment: str, version: str | None) -> Path:
        folder = claim_run_folder(root, experiment, version)

        def drop(kind: type[BaseException] | None, *_: object) -> None:
            if kind is not None and not (hasattr(self, "results") and self.results.began):
                finish_wandb()
                drop_failed_start(folder)

        self.while_it_runs.push(drop)
        return folder

    def run(self, subcommand: str) -> None:
        """Run the command; one that is stopped says what stands, and how it goes on.

        Raises:
            SystemExit: it was stopped.
        """
        try:
            super().run(subcommand)
        except (KeyboardInterrupt, SystemExit, SIGTERMException) as stop:  # the second is how Lightning ends by the first
            if not isinstance(stop, KeyboardInterrupt) and not self.trainer.interrupted:
                raise
            number = signal.SIGTERM if isinstance(stop, SIGTERMException) else signal.SIGINT
            self._say_what_stands("SIGTERM" if number == signal.SIGTERM else "Ctrl-C")
            raise SystemExit(128 + number) from stop

    @rank_zero_only
    def _say_what_stands(self, why: str) -> None:
        if self.results.began:
            terminal().print("\nSo far:" if self.results.rows else "")
            self.results.close(stopped=True)
            last = self.folder / LAST
            where = f" from step {_step_of(last)} of {self.trainer.global_step} done" if last.exists() else ""
            terminal().print(line_to_go_on(self.words, self.folder, where), soft_wrap=True)
        sys.stdout.flush()
        steps = f", after {self.trainer.global_step} steps of training" if self.subcommand == "fit" else ""
        sys.stderr.write(f"stopped by {why}{steps}\n")

    def _loggers(self, config: Any) -> list[Logger]:
        folder = self.folder
        if (earlier := keep_metrics(folder)) is not None:
            step = "" if config.ckpt_path is None else f" from step {_step_of(config.ckpt_path)}"
            sys.stderr.write(f"goes on in {folder}{step}; earlier curves are {earlier}\n")
        number = re.fullmatch(r"version_(\d+)", folder.name)
        loggers: list[Logger] = [CSVLogger(folder.parent.parent, folder.parent.name, int(number[1]) if number else folder.name)]
        if config.run.wandb != "disabled":
            offline = config.run.wandb == "offline"
            name, group = f"{folder.parent.name}-{folder.name}", config.run.group or folder.parent.name
            where = {"save_dir": folder, "project": config.run.project, "offline": offline}
            place = {"group": group, "job_type": self.subcommand, "tags": config.run.tags}
            try:
                wandb = QuietWandbLogger(name=name, version=wandb_id(folder), **where, **place)
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
                self._say_where_on_wandb()
                callback.require_verdicts()
                self._mark(callback.training_seconds)

    @rank_zero_only
    def _say_where_on_wandb(self) -> None:
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger) and logger.experiment.offline:
                terminal().print(
                    f"To W&B, if you want it there: wandb sync {logger.experiment.settings.sync_dir}", soft_wrap=True
                )

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


def _step_of(checkpoint: str | Path) -> int:
    return int(read_notes(checkpoint)["global_step"])


def experiment_name(config: Any) -> str:
    """The name of a run: the one it was given, else that of the first config file but default.yaml."""
    if config.run.experiment:
        return str(config.run.experiment)
    files = [Path(str(path)) for path in config.config or [] if path is not None]  # None: a text
    names = [file.stem for file in files if file.name != "default.yaml"]
    return names[0] if names else "casehard"


def train(args: list[str]) -> Cli:
    """Run ``fit``, ``validate`` or ``test``. Returns the command line, with the run's ``folder`` and ``trainer``.

    Raises:
        SettingError: a setting must be another, or training diverged.
        SystemExit: with the status of a process that Ctrl-C or SIGTERM ended.
    """
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # they are those of the process, or meant
    hush_lightning()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of torch
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # of a run that goes on
    warnings.filterwarnings("ignore", message="Experiment logs directory")  # the folder is this run's own
    warnings.filterwarnings("ignore", message=".*overriding `LightningModule.optimizer_")  # so it is meant
    inherited = RUN_FOLDER in os.environ
    try:
        with refusals():
            return Cli(args)
    except (DivergedError, MisconfigurationException, RuntimeError) as error:
        if sentence := said_of_machine(error):
            raise SettingError(sentence) from error
        raise
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
        raise SettingError(f"every cell must be a command that works, and this one does not: {' '.join(args)} ({stop})") from stop
    raise AssertionError("the resolver stops where the config is read")
