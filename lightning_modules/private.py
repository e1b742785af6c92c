"""What is used here of Lightning's private API, in one place, so that an upgrade of Lightning is the work of one file."""

from collections.abc import Callable

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy

from casehard.metrics.errors import SettingError


def ask_for_sigterm_where(trainer: L.Trainer, is_due: Callable[[], bool]) -> None:
    """Have Lightning ask all ranks for SIGTERM only where ``is_due()``, and not before every batch.

    It broadcasts what rank 0 knows, which every other rank waits for. Lightning 2.6 has no setting for it
    (Lightning-AI/pytorch-lightning#21487).

    Raises:
        SettingError: a Lightning that asks in another way.
    """
    loop = trainer.fit_loop.epoch_loop
    ask = getattr(loop, "_broadcast_sigterm_tensor", None)
    if ask is None:
        raise SettingError(
            f"parallel must be false under lightning {L.__version__}, whose training loop has no _broadcast_sigterm_tensor: "
            "unless that is replaced, defenders wait for attackers. Leave vector_age at 1 for the same weights, or install "
            "lightning 2.6."
        )

    def ask_if_due() -> None:
        if is_due():
            trainer.strategy.barrier()
            ask()

    loop._broadcast_sigterm_tensor = ask_if_due  # type: ignore[method-assign]


def steps_between_checkpoints(callback: L.Callback) -> int | None:
    """Training steps between two checkpoints of a ``ModelCheckpoint``; 0 for one an epoch, None for other callbacks."""
    return getattr(callback, "_every_n_train_steps", None)


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Ranks along the mesh's first dimension, once the number of processes is known."""
    strategy._data_parallel_size = size


def trainer_of(module: L.LightningModule) -> L.Trainer | None:
    """The trainer that ``module`` is attached to, or None; ``module.trainer`` raises where there is none."""
    return module._trainer
