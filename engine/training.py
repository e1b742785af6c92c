"""The one engine behind every attacker: train the weights that are there, under whatever strategy holds them."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from casehard.datamodules.chat import IGNORED
from casehard.engine.forward import Batch
from casehard.engine.gradients import average_gradients, mean_over_ranks
from casehard.engine.graphs import begin_step, keep_gradients
from casehard.engine.optimizer import Optimizer
from casehard.engine.weights import reshard

WIDE = 110  # columns that a bar takes with everything beside it


class DivergedError(RuntimeError):
    """The loss of a training run is no longer a finite number."""


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put ``name`` in front of a DivergedError of the block."""
    try:
        yield
    except DivergedError as error:
        raise DivergedError(f"{name}: {error}") from error


class StepLoss:
    """The loss of a step, on its way from the device: ``float`` waits for it.

    Args:
        value: a scalar.
        step: steps done so far.
        num_steps: how many there will be.
        learning_rate: to be lowered where it diverges.
    """

    def __init__(self, value: Tensor, step: int, num_steps: int, learning_rate: float) -> None:
        self.step, self.num_steps, self.learning_rate = step, num_steps, learning_rate
        self._value = value.detach().to("cpu", non_blocking=value.is_cuda)
        self._copied = torch.cuda.Event() if value.is_cuda else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(value.device))

    def is_here(self) -> bool:
        """Whether nobody has to wait for it."""
        return self._copied is None or self._copied.query()

    @cached_property
    def _number(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return self._value.item()

    def __float__(self) -> float:
        """The loss.

        Raises:
            DivergedError: it is not finite.
        """
        if not math.isfinite(self._number):
            raise DivergedError(
                f"the loss must be finite, and it was {self._number} at step {self.step} of {self.num_steps}. "
                f"Lower learning_rate ({self.learning_rate}) or check the rows."
            )
        return self._number


def runs_behind(device: torch.device) -> bool:
    """Whether a device has work in a queue that the host fills: to read a number from it is to wait until that is done."""
    return device.type == "cuda"


class Task(Protocol):
    """What ``train_steps`` trains on; ``step`` counts optimizer steps from 0."""

    def loss(self, batch: Batch, step: int) -> Tensor:
        """Loss of a batch, a scalar."""
        ...

    def before_step(self, step: int) -> None:
        """Change the gradients, which are averaged over the ranks and not yet clipped."""

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Change the weights after the optimizer has, whose learning rate is still that of the step."""


@dataclass(frozen=True)
class Plain:
    """A loss and nothing around it, a Task, such as plain SFT: ``Plain(defense.sft_loss)``."""

    loss_of: Callable[[Batch], Tensor]

    def loss(self, batch: Batch, step: int) -> Tensor:
        """``loss_of`` the batch, the same at every step."""
        return self.loss_of(batch)

    def before_step(self, step: int) -> None:
        """Nothing."""

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Nothing."""


@dataclass
class Around(Task):
    """Base of the tasks with another task in them, whose loss and hooks they have unless they override them."""

    task: Task

    def loss(self, batch: Batch, step: int) -> Tensor:
        """The task's."""
        return self.task.loss(batch, step)

    def before_step(self, step: int) -> None:
        """The task's."""
        self.task.before_step(step)

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """The task's."""
        self.task.after_step(step, optimizer)


@dataclass
class BesideService(Around):
    """A loss of the attacker's own, and beside it a service's task: its loss on the batch without labels, and its hooks.

    Args:
        task: the service's, such as the job of a defense, whose terms act so.
        own: the loss of a batch in an optimizer step.
    """

    own: Callable[[Batch, int], Tensor]

    def loss(self, batch: Batch, step: int) -> Tensor:
        """The attacker's, plus the service's terms."""
        unlabelled = batch | {"labels": torch.full_like(batch["labels"], IGNORED), "num_labels": torch.ones(())}  # none, over one
        return self.own(batch, step) + self.task.loss(unlabelled, step)


def beside(service: Task | None, own: Callable[[Batch, int], Tensor]) -> Task:
    """``own`` beside the task of a service, where there is one."""
    return BesideService(service or Plain(lambda batch: torch.zeros(())), own)


def train_steps(
    module: nn.Module,
    task: Task,
    batches: Callable[[int], Batch],
    num_steps: int,
    optimizer: Optimizer,
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    group: dist.ProcessGroup | None = None,
    num_done: int = 0,
) -> Iterator[tuple[int, StepLoss]]:
    """Train what requires a gradient in ``module``, one optimizer step at a time; put it into ``weights.borrowed`` to undo it.

    Args:
        module: in the mode (train or eval) that the caller wants between steps; every step runs in train mode.
        task: the loss, and what happens before and after the optimizer's step.
        batches: the batch of a step, from a step number alone (this rank's share of it), counted from 0.
        num_steps: optimizer steps.
        optimizer: built anew over what trains.
        forward_context: entered around every forward pass, e.g. the trainer's precision.
        group: the ranks that share out the rows of a batch; None for all.
        num_done: steps that the task has behind it: it counts on from there.

    Yields:
        Steps done so far (1 for the first) and that step's loss, after each step. On a CUDA device the loss is not looked at yet:
        who looks at the model between steps takes its ``float`` first.

    Raises:
        DivergedError: a loss that is not finite. The step is not taken; on a CUDA device, which would wait for the host at every
            step, the loss is read once the next step is queued.
        ValueError: nothing to train.
    """
    reshard(module)
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("nothing to train: no parameter of the model requires a gradient.")
    opt, schedule = optimizer.build(parameters, num_steps)
    last: StepLoss | None = None
    for step in range(num_steps):
        module.train()
        begin_step()
        with forward_context():
            value = task.loss(batches(step), num_done + step)
        value.backward()
        keep_gradients(parameters)
        average_gradients(parameters, group)
        loss = StepLoss(mean_over_ranks(value.detach(), group), step + 1, num_steps, optimizer.learning_rate)
        if not runs_behind(value.device):
            float(loss)
        task.before_step(num_done + step)
        if optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, optimizer.clip_norm)
        opt.step()
        task.after_step(num_done + step, opt)
        schedule.step()
        opt.zero_grad(set_to_none=True)
        if last is not None:
            float(last)
        last = loss
        yield step + 1, loss
    if last is not None:
        float(last)


def narrow(bar: tqdm) -> bool:
    """Whether the terminal is too narrow for a bar and what stands beside it: then the bar itself goes."""
    return not bar.disable and 0 < (bar.format_dict["ncols"] or WIDE) < WIDE


def with_progress_bar(
    steps: Iterator[tuple[int, StepLoss]],
    num_steps: int,
    name: str,
    trainer: L.Trainer,
    beside: Mapping[str, str] | None = None,
    **bar: Any,
) -> Iterator[tuple[int, StepLoss]]:
    """Wrap the steps of ``train_steps`` in a progress bar, which shows the last loss that is here.

    Args:
        steps: of ``train_steps``.
        num_steps: how many there will be.
        name: on the bar, and in front of a DivergedError.
        trainer: the bar is visible where this shows one.
        beside: what it shows beside the loss; looked at before and after every step is handed on.
        bar: further settings of tqdm.
    """
    visible = trainer.is_global_zero and trainer.progress_bar_callback is not None
    shown: dict[str, str] = {}
    with tqdm(total=num_steps, desc=name, disable=not visible, **bar) as tqdm_bar, named(name):
        if narrow(tqdm_bar):
            tqdm_bar.bar_format = "{desc}: {n_fmt}/{total_fmt}{postfix}"
        for step, loss in steps:
            tqdm_bar.update()
            if loss.is_here():
                shown["loss"] = f"{float(loss):.3f}"
            tqdm_bar.set_postfix(shown | dict(beside or {}), refresh=False)
            yield step, loss
            if beside:
                tqdm_bar.set_postfix(shown | dict(beside))
