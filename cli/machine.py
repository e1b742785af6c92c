"""What the machine and the libraries on it have to say: the chatter is kept back, and what goes wrong is one sentence."""

import logging
import re
import sys
from pathlib import Path

import lightning
import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException

from casehard.cli.parsing import class_path
from casehard.engine.training import DivergedError
from casehard.metrics.errors import SettingError

LIGHTNING = Path(lightning.__file__).parent
LOST = re.compile(r"(closed|reset) by peer|Broken pipe.*(gloo|nccl)|remote process exited", re.IGNORECASE)  # as torch says it


def hush_lightning() -> None:
    """Let Lightning say warnings alone; the rest are accelerators that are not there, and advertisements."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(is_news)


def is_news(record: logging.LogRecord) -> bool:
    """Whether a log record is a warning, or casehard's own."""
    return record.levelno > logging.INFO or not Path(record.pathname).is_relative_to(LIGHTNING)


def finish_wandb() -> None:
    """Let W&B end the run that is under way, if it knows of one; it writes into the run's folder until then."""
    if "wandb" in sys.modules and (run := sys.modules["wandb"].run) is not None:
        run.finish(exit_code=1)


def check_number_of_devices(trainer: Namespace) -> None:
    """Refuse a sharded run that states two numbers of processes.

    Raises:
        SettingError: it does.
    """
    path, devices = class_path(trainer, "strategy"), trainer.devices
    number = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 0
    if not number or not (path or "").endswith("ModelParallelStrategy"):
        return
    data, tensor = (trainer.strategy.init_args.get(f"{part}_parallel_size") for part in ("data", "tensor"))
    if isinstance(data, int) and isinstance(tensor, int) and data * tensor != number * trainer.num_nodes:  # auto fits
        raise SettingError(
            f"data_parallel_size x tensor_parallel_size must be devices x num_nodes, the number of processes, and {data} x "
            f"{tensor} is not {number} x {trainer.num_nodes}. Set both to the GPUs that there are."
        )


def said_of_machine(error: Exception) -> str | None:
    """What a user is told where the machine or a setting of Lightning's is the reason; None where it is a bug."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        wanted = re.search(r"allocate ([\d.]+ \w+)", str(error))
        return (
            f"the model and its batches must fit the memory, and {wanted[1] if wanted else 'what came last'} more did not. "
            "Lower data.batching.batch_size, max_length or lora.rank, or take a machine with more memory."
        )
    if LOST.search(str(error)):
        return (
            "all processes of a run must live to its end, and another one has ended, or cannot be reached. Its last lines say "
            "why; `fit` goes on from RUN/checkpoints/last.ckpt by --ckpt_path."
        )
    if "backend found" in str(error):
        return f"trainer.accelerator must be one that this machine has: {error}"
    return str(error) if isinstance(error, DivergedError | MisconfigurationException) else None
