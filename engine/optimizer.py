"""One optimizer and schedule for every trainer here, so that a defense, its baseline and every attacker are matched."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from casehard.engine.private import clip_unscaled
from casehard.engine.weights import beside, parked
from casehard.metrics.errors import SettingError


@dataclass(frozen=True)
class Optimizer:
    """How a model is trained.

    Args:
        learning_rate: at its highest, > 0.
        name: adamw (betas 0.9 and 0.999), sgd (momentum 0.9) or adafactor (which torch cannot step on FSDP2 shards).
        schedule: constant, linear (to zero) or cosine (to zero), after the warm-up.
        num_warmup_steps: steps over which the learning rate rises from zero.
        weight_decay: >= 0.
        clip_norm: largest norm of the gradient, over all that trains; null for none.
    """

    learning_rate: float = 1e-4
    name: Literal["adamw", "sgd", "adafactor"] = "adamw"
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    num_warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise SettingError(f"learning_rate must be > 0, got {self.learning_rate}.")
        for name, choices in (("name", ("adamw", "sgd", "adafactor")), ("schedule", ("constant", "linear", "cosine"))):
            if getattr(self, name) not in choices:
                raise SettingError(f"optimizer {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name in ("weight_decay", "num_warmup_steps"):
            if getattr(self, name) < 0:
                raise SettingError(f"{name} must be >= 0, got {getattr(self, name)}.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise SettingError(f"clip_norm must be > 0 or null, got {self.clip_norm}. null does not clip.")

    def build(self, parameters: Iterable[nn.Parameter], num_steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
        """The optimizer over ``parameters`` and its schedule over ``num_steps`` steps."""
        parameters = list(parameters)
        optimizer: torch.optim.Optimizer
        if self.name == "adamw":  # fused runs on CPU too, and halves the optimizer's share of a step
            optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay, fused=True)
            clip_unscaled(optimizer)
        elif self.name == "sgd":
            optimizer = torch.optim.SGD(parameters, lr=self.learning_rate, momentum=0.9, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.Adafactor(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        schedule = (
            "constant_with_warmup" if self.schedule == "constant" else self.schedule
        )  # transformers' constant knows no warm-up
        return optimizer, get_scheduler(schedule, optimizer, self.num_warmup_steps, num_steps)


@contextmanager
def offloaded(optimizer: torch.optim.Optimizer, device: str | None) -> Iterator[None]:
    """For a block in which it does not step, keep the optimizer's state (such as moments) on ``device``; None leaves it."""
    home = [
        (state, key, value.device) for state in optimizer.state.values() for key, value in state.items() if torch.is_tensor(value)
    ]
    try:
        for state, key, _ in home if device is not None else []:
            value = state[key]
            state[key] = value.to(device) if isinstance(value, DTensor) else parked({key: value}, device)[key]
        yield
    finally:
        for state, key, own in home:
            (state[key],) = beside([state[key]], own)
