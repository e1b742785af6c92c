"""Processes that play different roles: half of them defend while the others attack."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from casehard.engine.fit_checkpoint import numbers_only, read_notes
from casehard.lightning_modules.private import set_data_parallel_size
from casehard.metrics.errors import SettingError

T = TypeVar("T")
DEFENDERS, ATTACKERS = 0, 1  # columns of the mesh


class RolesStrategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy for two roles; the weights of each are sharded over its processes (FSDP2).

    Its mesh has a row for every pair of a defender and an attacker with the same shard, which are neighbours, and a column for
    each role (where Lightning has tensor parallelism). With one process per role nothing is sharded: FSDP2 would
    double the memory and save none.
    Checkpoints are sharded folders of the defenders' weights and optimizer.

    Args:
        process_group_backend: nccl, gloo; null takes the device's own.
        timeout: how long one role waits for the other.
    """

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta = default_pg_timeout) -> None:
        super().__init__(tensor_parallel_size=2, process_group_backend=process_group_backend, timeout=timeout)
        self.waited = 0.0  # seconds, for other processes

    @property
    def role(self) -> int:
        """``DEFENDERS`` or ``ATTACKERS``: this process's."""
        return self.device_mesh["tensor_parallel"].get_local_rank()

    def setup_environment(self) -> None:
        """Share the processes out.

        Raises:
            SettingError: an odd number of them.
        """
        processes = self.num_processes * self.num_nodes
        if processes % 2:
            raise SettingError(
                f"devices * num_nodes must be even, as many processes attack as defend, and it is {processes}. "
                "Take one more or one fewer."
            )
        set_data_parallel_size(self, processes // 2)
        super().setup_environment()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        if self.root_device.type != "cpu":
            torch.accelerator.synchronize()  # what this process has queued itself is no waiting
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def barrier(self, name: str | None = None) -> None:
        """Wait for all processes."""
        with self._counted():
            super().barrier(name)

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Lightning's; the sender does not wait for the others."""
        with self._counted():
            return super().broadcast(obj, src)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Lightning's, in which all processes take part."""
        with self._counted():
            return super().reduce_boolean_decision(decision, all)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's, in which all processes take part."""
        self.barrier()
        super().save_checkpoint(*args, **kwargs)

    def seconds_waited(self) -> tuple[float, float]:
        """How long this process and its neighbour in the other role have waited since this was last asked; defenders first."""
        pair = self.device_mesh["tensor_parallel"]
        waited = torch.zeros(2, device=self.root_device)
        waited[self.role], self.waited = self.waited, 0.0
        dist.all_reduce(waited, group=pair.get_group())
        defender, attacker = waited.tolist()
        return defender, attacker

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What defenders hold; nothing on the others."""
        return super().lightning_module_state_dict() if self.role == DEFENDERS else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Of the defenders; attackers do not step it, and it is not to be laid out there."""
        return super().optimizer_state(optimizer) if self.role == DEFENDERS else {}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """As Lightning does, which takes sharded weights only: weights on all processes, and the optimizer on defenders.

        Raises:
            SettingError: a checkpoint in a single file.
        """
        path = Path(self.broadcast(checkpoint_path))
        if not path.is_dir():
            raise SettingError(
                f"ckpt_path must be a sharded checkpoint under RolesStrategy, and {path} is no folder. "
                "Go on without the parallel form, which gives the same weights at the same vector_age."
            )
        rest = read_notes(path)
        model, optimizers = self.model, self.optimizers if self.role == DEFENDERS else []
        assert model is not None
        state: dict[str, Any] = {"state_dict": get_model_state_dict(model)}
        state |= {f"optimizer_{i}": get_optimizer_state_dict(model, optimizer) for i, optimizer in enumerate(optimizers)}
        with numbers_only():
            dcp.load(state, checkpoint_id=path)
        set_model_state_dict(model, state["state_dict"])
        for i, optimizer in enumerate(optimizers):
            set_optimizer_state_dict(model, optimizer, state[f"optimizer_{i}"])
        return rest
