"""The folder of a run: claimed once, held while the run goes on, and marked when it has come to its end."""

import fcntl
import itertools
import json
import platform
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from casehard.datamodules.fingerprint import Origin
from casehard.metrics.errors import SettingError
from casehard.records.files import DONE, RUN_FOLDER, config_hash, write_whole
from casehard.version import revision, version_of

CONFIG, LAST = "config.yaml", Path("checkpoints", "last.ckpt")  # in a run's folder
OF_A_START = {".lock", CONFIG, "wandb"}  # what a run leaves before it does anything
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


def newest_unfinished(root: str, experiment: str) -> Path:
    """The folder of an experiment's newest run that left a checkpoint and did not come to its end.

    Raises:
        SettingError: there is none.
    """
    runs = Path(root, experiment)
    left = [folder for folder in runs.glob("*") if (folder / LAST).exists() and not (folder / DONE).exists()]
    if not left:
        raise SettingError(
            f"ckpt_path must be a checkpoint, and `last` finds none: {runs} has no run with a {LAST} that did not end. "
            "Leave ckpt_path out to begin anew."
        )
    return max(left, key=lambda folder: (folder / LAST).lstat().st_mtime)


def unfinished_run_of(checkpoint: str) -> Path | None:
    """The folder of the run that wrote a checkpoint, if that run did not come to its end."""
    folder = Path(checkpoint).parent.parent
    is_run = Path(checkpoint).parent.name == LAST.parent.name and (folder / CONFIG).exists()
    return folder if is_run and not (folder / DONE).exists() else None


def drop_failed_start(folder: Path) -> None:
    """Take away the folder of a run that ended before it began, unless anything stands in it that a start does not leave."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= OF_A_START:
        shutil.rmtree(folder, ignore_errors=True)


def line_to_go_on(words: list[str], folder: Path, where: str = "") -> str:
    """The line that goes on with a run that was stopped, or begins it anew where it left no checkpoint.

    Args:
        words: of the line that began it, the command first.
        folder: the run's.
        where: from which step, such as " from step 5 of 6 done".
    """
    option = "--ckpt_path"
    values = {i + 1 for i, word in enumerate(words) if word == option}
    kept = [word for i, word in enumerate(words) if i not in values and word.partition("=")[0] != option]
    if words[0] == "fit" and (folder / LAST).exists():
        return f"To go on{where}: {shlex.join(['casehard', *kept, option, str(folder / LAST)])}"
    return f"To begin anew: {shlex.join(['casehard', *words])}"


def wandb_id(folder: Path) -> str | None:
    """What W&B called the run in its folder when it was last under way."""
    names = [path.name.removeprefix("offline-") for path in (folder / "wandb").glob("*run-*-*")]
    return max(names).rpartition("-")[2] if names else None


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
                f"the run folder must have no other run under way, and {folder} has one. Wait until that run has ended, or leave "
                f"out ckpt_path and {RUN_FOLDER} for a folder of its own."
            ) from error
        except OSError as error:
            rank_zero_warn(f"{folder} cannot be locked ({error.strerror}): see to it that no other run goes on in it.")
        yield


def require_unfinished(folder: Path) -> None:
    """Refuse a folder in which a run has come to its end.

    Raises:
        FileExistsError: it has.
    """
    if (folder / DONE).exists():
        raise FileExistsError(
            f"the run folder must have no finished run, and {folder} has one. Unset {RUN_FOLDER} for a folder of its own."
        )


@rank_zero_only
def keep_metrics(folder: Path) -> str | None:
    """Where a run goes on in its folder Lightning's logger begins a new metrics.csv, and would delete the old one.

    Returns:
        The old one's new name, None where there is none.
    """
    if not (folder / "metrics.csv").exists():
        return None
    name = next(name for n in itertools.count(1) if not (folder / (name := f"metrics_{n}.csv")).exists())
    (folder / "metrics.csv").rename(folder / name)
    return name


def write_marker(folder: Path, config: str, origins: Sequence[Origin], facts: dict[str, Any]) -> None:
    """Leave ``done.json``.

    Args:
        folder: the run's.
        config: resolved, as YAML.
        origins: of its rows.
        facts: the keys of ``records.marker.SHAPE`` that only the run itself knows, such as its steps.
    """
    from casehard.records.marker import leaves, rests_on  # most commands do without

    marker = {
        **facts,
        "config": config_hash(config),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "revision": revision()} | {name: version_of(name) for name in NAMED},
        **rests_on(yaml.safe_load(config), origins, NAMED, STARTED),
        **leaves(folder),
    }
    write_whole(folder / DONE, json.dumps(marker))
