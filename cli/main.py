"""Casehard's front door: its public names, and ``main()``, the ``casehard`` (and ``lightning``) command."""

import difflib
import fcntl
import io
import itertools
import json
import os
import platform
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import lightning as L
import yaml
from jsonargparse import CLI, ActionConfigFile, ArgumentParser, Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from casehard.callbacks import Results
from casehard.cli.sandbox import main as sandbox
from casehard.datamodules import SFTDataModule
from casehard.engine.fit_checkpoint import numbers_only, read_notes
from casehard.lightning_modules import Defense, DivergedError
from casehard.records.files import DONE, RUN_FOLDER, config_hash, write_whole

if TYPE_CHECKING:
    from wandb import Settings

ROOT = Path(__file__).parents[2]
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


class Refused(BaseException):
    """What a constructor raised (its cause), on the way past jsonargparse, which would bury it in a dump of all settings."""


def _built(kind: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    try:
        return kind(*args, **settings)
    except Exception as error:
        raise Refused from error


NOISE = re.compile(r"Does not validate|Subtypes:|Errors:|Expected a <class 'NoneType'>|Expected a path but")


def plain(message: str) -> str:
    """jsonargparse's message in one line, without the types that it tried and the values, which may be all settings and texts."""
    lines: list[str] = []
    in_value = False
    for line in (line.strip() for line in message.splitlines()):
        in_value = line.startswith("Given value") or (in_value and not line.startswith("- "))
        text = re.sub(r"\. Got value: (.{60,}|\W.*|.*\(.*)", "", line.removeprefix("- "))
        if text.startswith("Not a valid subclass") and any("class_path" in said for said in lines):
            break  # that class was found, and this is what else might have stood there
        if text and not in_value and not NOISE.match(text):
            lines.append(re.sub(r"<class '([\w.]+)'>", r"\1", text))
    return "; ".join(lines).replace(":; ", ": ") + _meant(message)


def _meant(message: str) -> str:
    """The class that a misspelt one may stand for."""
    found = re.search(r"module '([\w.]+)' has no attribute '(\w+)'|import path string: ()(\w+)", message)
    if found is None:
        return ""
    module, name = found[1], found[2] or found[4]
    near = difflib.get_close_matches(name, [key for key in dir(sys.modules[module or "casehard"]) if key[0].isupper()], n=1)
    return f". Did you mean {near[0]}?" if near else ""


class PlainErrors:
    """For a parser of jsonargparse's: what goes wrong is said in one sentence, without the usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_instantiator(_built, object)  # type: ignore[attr-defined]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and leave; parsers of the classes within raise, as they do."""
        if not self.exit_on_error:  # type: ignore[attr-defined]
            super().error(message, ex)  # type: ignore[misc]
        prog = self.prog.replace(" [options]", "")  # type: ignore[attr-defined]
        sys.stderr.write(f"{prog} --help lists the settings.\nerror: {plain(message)}\n")  # last: a study shows a log's last line
        sys.exit(2)


class TrainingParser(PlainErrors, LightningArgumentParser):
    """Of ``fit``, ``validate`` and ``test``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.defenses: list[tuple[str, str]] = []  # files of the command line that name a model's class, and which


class CommandParser(PlainErrors, ArgumentParser):
    """Of the other commands."""


class ConfigFile(ActionConfigFile):
    """A config file whose lists and classes replace those before it, where jsonargparse merges: lists of the same length entry by
    entry, and into a class what another was given under the same names. Two files that name different defenses are refused.
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Forget what the file replaces, then apply it."""
        text = Path(values).read_text(encoding="utf-8") if os.path.isfile(values) else values  # a text may be too long for a name
        with suppress(yaml.YAMLError):  # which is then said below
            config = yaml.safe_load(text)
            for key in _replaced(config, cfg):
                if cfg.get(key) is not None:
                    cfg[key] = None
            if (model := _class_path(config, "model")) is not None:
                parser.defenses.append((Path(values).name if text != values else "a config's text", model))
        check_one_defense(parser.defenses)
        super().__call__(parser, cfg, values, option_string)


def _replaced(config: Any, before: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all lists in a config, and of classes that are others than before (the model's: `check_one_defense`)."""
    for key, value in config.items() if isinstance(config, dict) else ():
        name = f"{prefix}{key}"
        was, now = _class_path(before, name), _class_path(config, key)
        if isinstance(value, list) or (name != "model" and was and now and not _same_class(was, now)):
            yield name
        yield from _replaced(value, before, f"{name}.")


def _class_path(config: Any, key: str) -> str | None:
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
    """Raise a ValueError where two places name different defenses, which would mix the settings of both."""
    for (first, one), (other, two) in itertools.pairwise(named):
        if not _same_class(one, two):
            raise ValueError(
                f"model must be one defense, and {first} names {one} while {other} names {two}: the settings of both "
                "would be mixed. Leave out one of them."
            )


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


class SaveConfig(SaveConfigCallback):
    """The resolved config in the run's folder, whatever loggers there are."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, folder: Path) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder = folder

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write it; a run that goes on writes its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, self.folder / "config.yaml", skip_none=False, overwrite=True, multifile=False)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a run's folder for this process, to which a lock belongs as long as it lives.

    Raises:
        FileExistsError: another run is under way in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(
                f"the run folder must have no other run under way, and {folder} has one. Unset {RUN_FOLDER} for a folder of its "
                "own, or wait until that run has ended."
            ) from error
        except OSError as error:
            rank_zero_warn(f"{folder} cannot be locked ({error.strerror}): see to it that no other run goes on in it.")
        yield


class Cli(LightningCLI):
    """``fit``, ``validate`` and ``test`` of a defense on data, with everything a run leaves in a folder of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with ExitStack() as self.while_it_runs, numbers_only():
            super().__init__(*args, **kwargs)

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

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would take settings from a checkpoint here."""

    def before_instantiate_classes(self) -> None:
        """Check what can be known from the settings alone.

        Raises:
            ValueError: ``validate`` would end before it begins, as by the default config, which spares ``fit`` it; two defenses.
        """
        config = self.config[self.subcommand]
        if named := self._parser(self.subcommand).defenses:  # type: ignore[attr-defined]
            check_one_defense([*named, ("the command line", _class_path(config, "model") or "none")])
        if config.weights_only is False:
            raise ValueError("weights_only must be true or left out, got false: a checkpoint's code would be run.")
        if self.subcommand == "validate" and config.trainer.limit_val_batches == 0 and not config.trainer.fast_dev_run:
            raise ValueError(
                "trainer.limit_val_batches must be > 0 for validate, got 0: nothing would be validated. Set it to 1.0, and add "
                "casehard.Evaluate to trainer.callbacks for scores; `test` runs the attacks."
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
        if config.ckpt_path is not None:
            self.model.check_made_by(read_notes(config.ckpt_path))
        if RUN_FOLDER not in os.environ and not dry:
            os.environ[RUN_FOLDER] = str(claim_run_folder(root, experiment, version))
        self.folder = Path(os.environ.get(RUN_FOLDER, Path(root, experiment, "dry")))
        if version is not None and not dry and self.folder.absolute() != Path(root, experiment, version).absolute():
            raise ValueError(
                f"run.version must be left out where {RUN_FOLDER} names the run's folder, and it is {version} while {RUN_FOLDER} "
                f"is {self.folder}. Unset one of the two."
            )
        if RUN_FOLDER in os.environ:
            self._take_folder()
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
        trainer_config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        plugins = trainer_config.get("plugins") or []
        trainer_config["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        if trainer_config.get("logger") is None:
            trainer_config["logger"] = self._loggers(config)
        return self._instantiate_trainer(trainer_config, extra)

    def _take_folder(self) -> None:
        """Keep other runs out of the folder while this one goes on.

        Raises:
            FileExistsError: a run has ended there, or another is under way.
        """
        if (self.folder / DONE).exists():
            raise FileExistsError(
                f"the run folder must have no finished run, and {self.folder} has one. "
                f"Unset {RUN_FOLDER} for a folder of its own."
            )
        if (
            getattr(rank_zero_only, "rank", 0) == 0 and os.environ.get("NODE_RANK", "0") == "0"
        ):  # the run's other processes share it
            self.while_it_runs.enter_context(held(self.folder))

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
            from casehard.records.marker import leaves, rests_on  # most commands do without

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
        try:
            _run(args)
        except Refused as refused:
            raise refused.__cause__ or refused from None
    except (ValueError, OSError, DivergedError, MisconfigurationException) as error:
        if os.environ.get("CASEHARD_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # Lightning ends a run of its own accord
        sys.stderr.write("interrupted\n")
        sys.exit(128 + signal.SIGINT)
    except SIGTERMException:  # from an attack, or from Lightning's training loop between two batches
        sys.stderr.write("ended by SIGTERM; `fit` goes on from RUN/checkpoints/last.ckpt by --ckpt_path\n")
        sys.exit(128 + signal.SIGTERM)
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
    from casehard.evidence.study import run_study

    run_study(resolved, file, root, parallel, cluster, cluster_settings or {})


def report(args: list[str]) -> None:
    """``casehard report RUN ...``: one self-contained page, with the CSV and PNG files that it is made of."""
    parser = CommandParser(prog="casehard report", description="Write one page on runs, with the CSV and PNG files behind it.")
    parser.add_argument("runs", nargs="+", type=str, help="run folders (also RUN/judged/JUDGE), or a study's")
    parser.add_argument("--out", type=str, default="report", help="folder of the report")
    parser.add_argument("--title", type=str, default="How hard to break", help="of the page")
    settings = parser.parse_args(args)
    from casehard.evidence.report import write_report  # with matplotlib and jinja2, an extra

    print(f"Report: {write_report(settings.runs, settings.out, settings.title)}")


def card(args: list[str]) -> None:
    """``casehard card RUN ...``: the model card of what a run exported."""
    parser = CommandParser(
        prog="casehard card", description="Write RUN/model/README.md: what the model was made from, and how hard it was to break."
    )
    parser.add_argument("run", type=str, help="folder of a finished `fit` that exported its model")
    parser.add_argument("tests", nargs="*", type=str, help="folders of more runs that attacked this model, such as a study's")
    settings = parser.parse_args(args)
    from casehard.evidence.card import write_card  # with matplotlib and jinja2, an extra

    print(f"Card: {write_card(settings.run, settings.tests)}")


def dashboard(args: list[str]) -> None:
    """``casehard dashboard RUN ...``: a saved W&B workspace on what runs logged."""
    parser = CommandParser(
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
    from casehard.evidence.dashboard import make_dashboard

    print(make_dashboard(settings.runs, settings.project, settings.entity, settings.title, settings.dry_run))


def _command(name: str) -> Callable[..., None] | None:
    """A command whose settings are the function's own."""
    if name == "judge":
        from casehard.evidence.rejudge import main as judge

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
        CLI(command, args=args[1:], prog=f"casehard {name}", parser_class=CommandParser)
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
        parser_class=TrainingParser,
        save_config_callback=SaveConfig,
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
