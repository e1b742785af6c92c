"""Casehard's front door: its public names, and ``main()``, the ``casehard`` (and ``lightning``) command."""

import io
import itertools
import json
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import yaml
from jsonargparse import CLI, ActionConfigFile, ArgumentParser
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from callbacks import Evaluate, FullParameterAttack, LoRAAttack, Results
from callbacks.results import DONE, RUN_FOLDER, config_hash, write_whole
from datamodules import SandboxJudge, SFTDataModule
from datamodules.sandbox import main as sandbox
from lightning_modules import Defense, DivergedError, InnerAttacker, LoRA, Optimizer, PatcherModule, SBRModule
from metrics import (
    AttackSuccessRate,
    FinetuneAccuracy,
    GuardJudge,
    HarmfulScore,
    Judge,
    ModerationJudge,
    RefusalPhraseJudge,
    RefusalRate,
    RubricJudge,
    StrongRejectJudge,
    Verdict,
)

if TYPE_CHECKING:
    from wandb import Settings

__all__ = [
    "AttackSuccessRate",
    "Defense",
    "Evaluate",
    "FinetuneAccuracy",
    "FullParameterAttack",
    "GuardJudge",
    "HarmfulScore",
    "InnerAttacker",
    "Judge",
    "LoRA",
    "LoRAAttack",
    "ModerationJudge",
    "Optimizer",
    "PatcherModule",
    "RefusalPhraseJudge",
    "RefusalRate",
    "Results",
    "RubricJudge",
    "SBRModule",
    "SFTDataModule",
    "SandboxJudge",
    "StrongRejectJudge",
    "Verdict",
    "main",
]

ROOT = Path(__file__).parent
STARTED = time.time()  # of the process: what is edited later is not what it runs
NAMED = ("casehard", "torch", "transformers", "lightning", "peft")  # packages whose versions a run notes


def claim_run_folder(root: str, experiment: str, version: str | None) -> Path:
    """Make the run's folder, ``root/experiment/version``; no two runs ever get the same one.

    Args:
        root: where all runs are kept.
        experiment: its name.
        version: its name within the experiment; by default the next free ``version_N``.

    Raises:
        FileExistsError: a run has the folder that ``version`` names.
    """
    if version is not None:
        folder = Path(root, experiment, version)
        try:
            folder.mkdir(parents=True)
        except FileExistsError as error:
            raise FileExistsError(
                f"the run folder must be new, and {folder} exists: another run has it. "
                "Choose another run.version, or leave it out for the next free one."
            ) from error
        return folder
    number = 0
    while True:
        try:
            return claim_run_folder(root, experiment, f"version_{number}")
        except FileExistsError:
            number += 1


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

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside ``path``, reach the disk, then move in one step."""
        partial = Path(f"{path}.partial")
        super().save_checkpoint(checkpoint, partial, storage_options)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)


class ConfigFile(ActionConfigFile):
    """A config file whose lists replace those before it. jsonargparse merges two of the same length entry by entry."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Forget what the file's lists replace, then apply it."""
        text = Path(values).read_text(encoding="utf-8") if os.path.isfile(values) else values  # a text may be too long for a name
        with suppress(yaml.YAMLError):  # which is then said below
            for key in _lists(yaml.safe_load(text)):
                if cfg.get(key) is not None:
                    cfg[key] = None
        super().__call__(parser, cfg, values, option_string)


def _lists(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all lists in a config."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, list):
            yield f"{prefix}{key}"
        yield from _lists(value, f"{prefix}{key}.")


def wandb_settings() -> "Settings":
    """Nothing of the machine goes to W&B: no name, paths, hardware, command line or console; numbers only."""
    from wandb import Settings

    return Settings(host="casehard", x_disable_meta=True, x_disable_stats=True, disable_git=True, save_code=False, console="off")


@rank_zero_only
def _keep_metrics(folder: Path) -> None:
    """Where a run goes on in its folder Lightning's logger begins a new metrics.csv, and would delete the old one."""
    if (folder / "metrics.csv").exists():
        number = next(n for n in itertools.count(1) if not (folder / f"metrics_{n}.csv").exists())
        (folder / "metrics.csv").rename(folder / f"metrics_{number}.csv")


class Cli(LightningCLI):
    """``fit``, ``validate`` and ``test`` of a defense on data, with everything a run leaves in a folder of its own."""

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

    def before_instantiate_classes(self) -> None:
        """Raise a ValueError where ``validate`` would end before it begins, as by the default config, which spares ``fit`` it."""
        config = self.config[self.subcommand]
        if self.subcommand == "validate" and config.trainer.limit_val_batches == 0 and not config.trainer.fast_dev_run:
            raise ValueError(
                "trainer.limit_val_batches must be > 0 for validate, got 0: nothing would be validated. Set it to 1.0, and add "
                "callbacks.Evaluate to trainer.callbacks for scores; `test` runs the attacks."
            )

    def _experiment(self, config: Any) -> str:
        if config.run.experiment:
            return str(config.run.experiment)
        files = [Path(str(path)) for path in config.config or [] if path is not None]  # None: a text
        own = [file.stem for file in files if file.name != "default.yaml"]
        return own[0] if own else "casehard"

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add the run folder's writers to what the config asks for."""
        config = self.config[self.subcommand]
        dry = bool(config.trainer.fast_dev_run)
        root, experiment, version = config.run.root, self._experiment(config), config.run.version
        if RUN_FOLDER not in os.environ and not dry:
            os.environ[RUN_FOLDER] = str(claim_run_folder(root, experiment, version))
        self.folder = Path(os.environ.get(RUN_FOLDER, Path(root, experiment, "dry")))
        if version is not None and not dry and self.folder.absolute() != Path(root, experiment, version).absolute():
            raise ValueError(
                f"run.version must be left out where {RUN_FOLDER} names the run's folder, and it is {version} while {RUN_FOLDER} "
                f"is {self.folder}. Unset one of the two."
            )
        export = config.run.export and self.subcommand == "fit" and not dry
        extra: list[Any] = [Results(str(self.folder), export, config.run.generations, config.run.wandb_generations)]
        if self.subcommand == "fit" and config.trainer.enable_checkpointing is not False:
            steps = config.run.checkpoint_steps
            # `last` is not linked once more where an epoch ends: processes would meet there
            when = {} if steps is None else {"every_n_train_steps": steps, "save_on_train_epoch_end": False}
            extra.append(ModelCheckpoint(self.folder / "checkpoints", save_last="link", save_top_k=1, **when))
        if config.trainer.enable_progress_bar is not False:
            extra.append(ProgressBar())
        trainer_config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        plugins = trainer_config.get("plugins") or []
        trainer_config["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        if trainer_config.get("logger") is None:
            trainer_config["logger"] = self._loggers(config)
        return self._instantiate_trainer(trainer_config, extra)

    def _loggers(self, config: Any) -> list[Logger]:
        folder = self.folder
        _keep_metrics(folder)
        number = re.fullmatch(r"version_(\d+)", folder.name)
        loggers: list[Logger] = [CSVLogger(folder.parent.parent, folder.parent.name, int(number[1]) if number else folder.name)]
        if config.run.wandb != "disabled":
            offline = config.run.wandb == "offline"
            name, group = f"{folder.parent.name}-{folder.name}", config.run.group or folder.parent.name
            where = {"save_dir": folder, "project": config.run.project, "offline": offline}
            place = {"group": group, "job_type": self.subcommand, "tags": config.run.tags}
            wandb = WandbLogger(name=name, settings=wandb_settings(), **where, **place)
            wandb.experiment.define_metric("attack_step")
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
            from evidence.marker import leaves, rests_on  # most commands do without

            config = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
            marker = {
                "config": config_hash(config),
                "command": self.subcommand,
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                "steps": self.trainer.global_step,
                "passes": self.model.num_passes,
                "seconds": round(seconds, 1),
                "defense": self.model.label,
                "stage": self.model.stage,
                "seed": self.datamodule.seed,
                "versions": {"python": platform.python_version()} | {name: version(name) for name in NAMED},
                **rests_on(yaml.safe_load(config), self.datamodule.origins, NAMED, STARTED),
                **leaves(self.folder),
            }
            write_whole(self.folder / DONE, json.dumps(marker))


def main(args: list[str] | None = None) -> None:
    """The command line: ``fit``, ``validate`` and ``test`` through Lightning's CLI, and casehard's own commands beside them.

    A mistake of the user's ends in its one sentence and exit status 1; ``CASEHARD_TRACEBACK=1`` shows where it was raised.
    """
    args = sys.argv[1:] if args is None else args
    inherited = RUN_FOLDER in os.environ
    try:
        _run(args)
    except (ValueError, OSError, DivergedError) as error:
        if os.environ.get("CASEHARD_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    finally:
        if not inherited:  # it was for this run's processes; another run of this process gets a folder of its own
            os.environ.pop(RUN_FOLDER, None)


def resolved(args: list[str]) -> str:
    """The config that a command line of ``fit`` or ``test`` resolves to, as YAML; nothing is run."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        try:
            _run([*args, "--print_config"])
        except SystemExit as stop:
            if stop.code:
                raise ValueError(f"every cell must be a command that works, and this one does not: {' '.join(args)}") from stop
    return printed.getvalue()


def study(
    file: str,
    *,
    root: str = "runs",
    parallel: int | None = None,
    cluster: str | None = None,
    cluster_settings: dict[str, Any] | None = None,
) -> None:
    """Run every attack on every defense with every seed, as a study file says, and go on where a study was cut off.

    A cell is done when its run's marker carries the hash of its resolved config, what it rested on is the same still (the code,
    casehard's and your own, rows, checkpoints), and so is what it left (its model, its results): that one is not run again, and
    one with other settings gets a folder of its own. Ends with exit status 1 if a cell failed; start again to repeat the failed
    ones only.

    Args:
        file: YAML with defenses, attacks and seeds, such as experiments/studies/sandbox.yaml.
        root: where run folders are made; the study's own is ROOT/NAME.
        parallel: cells at a time; by default one a CUDA device, or one a core. Several that share the cores of a machine without
            CUDA get a thread each (OMP_NUM_THREADS=1, unless you set it); others as many as torch takes.
        cluster: send the cells out through submitit: slurm, local, or auto for what is there. null runs them here.
        cluster_settings: submitit's, such as {timeout_min: 60, slurm_partition: gpu, gpus_per_node: 1}.
    """
    from evidence.study import run_study

    run_study(resolved, file, root, parallel, cluster, cluster_settings or {})


def report(args: list[str]) -> None:
    """``casehard report RUN ...``: one self-contained page, with the CSV and PNG files that it is made of."""
    parser = ArgumentParser(prog="casehard report", description="Write one page on runs, with the CSV and PNG files behind it.")
    parser.add_argument("runs", nargs="+", type=str, help="run folders (also RUN/judged/JUDGE), or a study's")
    parser.add_argument("--out", type=str, default="report", help="folder of the report")
    parser.add_argument("--title", type=str, default="How hard to break", help="of the page")
    settings = parser.parse_args(args)
    from evidence.report import write_report  # with matplotlib and jinja2, an extra

    print(f"Report: {write_report(settings.runs, settings.out, settings.title)}")


def card(args: list[str]) -> None:
    """``casehard card RUN ...``: the model card of what a run exported."""
    parser = ArgumentParser(
        prog="casehard card", description="Write RUN/model/README.md: what the model was made from, and how hard it was to break."
    )
    parser.add_argument("run", type=str, help="folder of a finished `fit` that exported its model")
    parser.add_argument("tests", nargs="*", type=str, help="folders of more runs that attacked this model, such as a study's")
    settings = parser.parse_args(args)
    from evidence.card import write_card  # with matplotlib and jinja2, an extra

    print(f"Card: {write_card(settings.run, settings.tests)}")


def dashboard(args: list[str]) -> None:
    """``casehard dashboard RUN ...``: a saved W&B workspace on what runs logged."""
    parser = ArgumentParser(
        prog="casehard dashboard",
        description="Save a workspace on W&B with panels for all that runs logged: how long each defense held under each attack, "
        "the attacks' curves, and training. It shows the W&B runs of the groups that these runs are in, and averages over the "
        "seeds of a study's. Needs the key of a W&B account (WANDB_API_KEY, or `wandb login`); --dry_run needs neither.",
    )
    parser.add_argument("runs", nargs="+", type=str, help="run folders, or a study's, whose keys get panels")
    parser.add_argument("--project", type=str, default="casehard", help="W&B project that has the runs (run.project)")
    parser.add_argument("--entity", type=str | None, default=None, help="W&B user or team; by default the key's own")
    parser.add_argument("--title", type=str, default="How hard to break", help="of the workspace")
    parser.add_argument("--dry_run", type=bool, default=False, help="print what would be saved, as JSON, and save nothing")
    settings = parser.parse_args(args)
    from evidence.dashboard import make_dashboard

    print(make_dashboard(settings.runs, settings.project, settings.entity, settings.title, settings.dry_run))


def _command(name: str) -> Callable[..., None] | None:
    """A command whose settings are the function's own."""
    if name == "judge":
        from evidence.rejudge import main as judge

        return judge
    commands: dict[str, Callable[..., None]] = {"sandbox": sandbox, "study": study}
    return commands.get(name)


def _run(args: list[str]) -> None:
    name = args[0] if args else ""
    on_runs = {"report": report, "card": card, "dashboard": dashboard}  # any number of run folders
    if name in on_runs:
        on_runs[name](args[1:])
        return
    if command := _command(name):
        CLI(command, args=args[1:], prog=f"casehard {name}")
        return
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of torch
    warnings.filterwarnings("ignore", message="Experiment logs directory")  # the folder is this run's own
    sys.argv[1:] = args  # launchers start further processes by it
    defaults = {"default_config_files": [str(ROOT / "experiments" / "default.yaml")]}
    Cli(
        Defense,
        SFTDataModule,
        subclass_mode_model=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},  # a run has its folder to itself; one that is requeued goes on in it
        parser_kwargs={
            "description": "Hardens open-weight language models and measures how hard they are to break. "
            "`casehard sandbox` prints rows of the embedded data, `casehard judge` scores a run's answers by another judge, "
            "`casehard study` runs defenses x attacks x seeds, `casehard report` writes a page on runs, `casehard card` the card "
            "of an exported model, `casehard dashboard` saves a workspace on W&B.",
            **dict.fromkeys(("fit", "validate", "test"), defaults),
        },
    )


if __name__ == "__main__":
    main()
