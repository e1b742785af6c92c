"""Attack and defend at the same time: half of the processes each, with ``RolesStrategy``."""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from casehard.engine.forward import Batch
from casehard.engine.weights import Weights, local, reshard
from casehard.lightning_modules.defense import Defense
from casehard.lightning_modules.private import ask_for_sigterm_where, steps_between_checkpoints
from casehard.lightning_modules.roles import ATTACKERS, DEFENDERS, RolesStrategy
from casehard.metrics.errors import SettingError


class TwoRoles(Defense):
    """A defense that trains against inner attacks; with ``parallel`` half of the processes attack while the others train.

    Each half has its own copy of the weights, sharded over its processes. The halves meet where ``exchange_is_due``: attackers
    get the defenders' weights, and defenders what the last attack has found.
    """

    parallel: bool
    attack_every: int  # steps between two exchanges
    num_sft_steps: int  # before the first one

    def exchange_is_due(self) -> bool:
        """Whether the halves meet before the next step."""
        raise NotImplementedError

    # ---- roles

    @property
    def num_roles(self) -> int:  # type: ignore[override]
        """Two in the parallel form."""
        return 2 if self.parallel else 1

    def plays(self, role: int) -> bool:
        """Whether this process has a part, ``DEFENDERS`` or ``ATTACKERS``; without ``parallel`` every process has both."""
        return not self.parallel or self._pair().get_local_rank() == role

    def _pair(self) -> DeviceMesh:
        assert self.device_mesh is not None
        return self.device_mesh["tensor_parallel"]  # a defender and the attacker that holds the same shard

    def configure_model(self) -> None:
        """As for every defense; the parallel form needs its strategy."""
        if self.parallel and not isinstance(self.trainer.strategy, RolesStrategy):
            raise SettingError(
                f"parallel must run under RolesStrategy, and the strategy is "
                f"{type(self.trainer.strategy).__name__}. Add --config experiments/cluster/patcher_parallel.yaml."
            )
        super().configure_model()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The defenders' step. Attackers have attacked before the first one of the interval, and only count the others."""
        if self.plays(DEFENDERS):
            return super().training_step(batch, batch_idx)
        return torch.zeros((), device=self.device, requires_grad=True)

    # ---- where the halves meet

    def on_fit_start(self) -> None:
        """Look at signals and checkpoints where the halves meet anyway: elsewhere one waits for the other."""
        if self.parallel:
            ask_for_sigterm_where(self.trainer, self.exchange_is_due)
            self._warn_of_checkpoints_between_exchanges()

    def _warn_of_checkpoints_between_exchanges(self) -> None:
        for callback in self.trainer.checkpoint_callbacks:
            steps = steps_between_checkpoints(callback)
            if steps == 0 or (steps and (steps % self.attack_every or self.num_sft_steps % self.attack_every)):
                rank_zero_warn(
                    f"run.checkpoint_steps and num_sft_steps should be multiples of attack_every, {self.attack_every}, in the "
                    f"parallel form, and they are {steps or 'one epoch'} and {self.num_sft_steps}: at a checkpoint between two "
                    "exchanges the defenders wait until the attack is over."
                )

    def seconds_waited(self) -> dict[str, float]:
        """For the logs: how long each half has waited for the other since the last exchange; nothing without ``parallel``."""
        if not self.parallel:
            return {}
        defenders, attackers = self.trainer.strategy.seconds_waited()  # type: ignore[attr-defined]
        return {"train/defenders_waited": defenders, "train/attackers_waited": attackers}

    @torch.no_grad()
    def synchronize(self) -> None:
        """In the parallel form, attackers get the defenders' weights, shard by shard."""
        if self.parallel:
            reshard(self)
            for p in self.parameters():
                if p.requires_grad:
                    dist.broadcast(local(p), group=self._pair().get_group(), group_src=DEFENDERS)

    def hand_over(self, weights: Weights, device: str | None) -> Weights:
        """Tensors by parameter name from the attackers to the defenders, shard by shard.

        Args:
            weights: what an attacker hands over; {} on defenders.
            device: where the defenders keep it; None is beside the model.

        Returns:
            The same on defenders; {} on attackers. Without ``parallel``, ``weights``.
        """
        if not self.parallel:
            return weights
        group = self._pair().get_group()
        names = [list(weights)]
        dist.broadcast_object_list(names, group=group, group_src=ATTACKERS)
        parameters, received = dict(self.named_parameters()), {}
        for name in names[0]:
            shard = weights[name].to(self.device).contiguous() if weights else torch.empty_like(local(parameters[name]))
            dist.broadcast(shard, group=group, group_src=ATTACKERS)
            if self.plays(DEFENDERS):
                received[name] = shard.to(device)
        return received

    def on_validation_start(self) -> None:
        """Validate one model."""
        self.synchronize()

    def on_train_end(self) -> None:
        """What comes now, such as attacks, is for all processes."""
        super().on_train_end()
        self.synchronize()

    def saves_folders(self, checkpoint: dict[str, Any]) -> bool:
        """Always in the parallel form, where a role of one process holds whole weights."""
        return self.parallel or super().saves_folders(checkpoint)
