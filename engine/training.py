"""The one engine behind every attacker: train the weights that are there, under whatever strategy holds them."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import lightning as L
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from casehard.engine.forward import Batch
from casehard.engine.gradients import average_gradients, mean_over_ranks
from casehard.engine.optimizer import Optimizer
from casehard.engine.weights import reshard

WIDE = 110  # columns that a bar takes with everything beside it


class DivergedError(RuntimeError):
    """The loss of a training run is no longer a finite number."""


class Task(Protocol):
    """What ``train_steps`` trains on; ``step`` counts optimizer steps from 0."""

    def loss(self, batch: Batch, step: int) -> Tensor:
        """Loss of a batch, a scalar."""
        ...

    def before_step(self, step: int) -> None:
        """Change the gradients, which are averaged over the ranks and not yet clipped."""

    def after_step(self, step: int) -> None:
        """Change the weights after the optimizer has."""


@dataclass(frozen=True)
class Plain:
    """A loss and nothing around it, a Task, such as plain SFT: ``Plain(defense.sft_loss)``."""

    loss_of: Callable[[Batch], Tensor]

    def loss(self, batch: Batch, step: int) -> Tensor:
        """``loss_of`` the batch, the same at every step."""
        return self.loss_of(batch)

    def before_step(self, step: int) -> None:
        """Nothing."""

    def after_step(self, step: int) -> None:
        """Nothing."""


def train_steps(
    module: nn.Module,
    task: Task,
    batches: Callable[[int], Batch],
    num_steps: int,
    optimizer: Optimizer,
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    group: dist.ProcessGroup | None = None,
) -> Iterator[tuple[int, float]]:
    """Train what requires a gradient in ``module``, one optimizer step at a time; put it into ``weights.borrowed`` to undo it.

    Args:
        module: in the mode (train or eval) that the caller wants between steps; every step runs in train mode.
        task: the loss, and what happens before and after the optimizer's step.
        batches: the batch of a step, from a step number alone (this rank's share of it), counted from 0.
        num_steps: optimizer steps.
        optimizer: built anew over what trains.
        forward_context: entered around every forward pass, e.g. the trainer's precision.
        group: the ranks that share out the rows of a batch; None for all.

    Yields:
        Steps done so far (1 for the first) and that step's loss, after each step.

    Raises:
        DivergedError: a loss that is not finite; the step is not taken.
        ValueError: nothing to train.
    """
    reshard(module)
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("nothing to train: no parameter of the model requires a gradient.")
    opt, schedule = optimizer.build(parameters, num_steps)
    for step in range(num_steps):
        module.train()
        with forward_context():
            value = task.loss(batches(step), step)
        value.backward()
        average_gradients(parameters, group)
        mean = mean_over_ranks(value.detach(), group)
        if not math.isfinite(mean.item()):
            raise DivergedError(
                f"the loss must be finite, and it was {mean.item()} at step {step + 1} of {num_steps}. "
                f"Lower learning_rate ({optimizer.learning_rate}) or check the rows."
            )
        task.before_step(step)
        if optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, optimizer.clip_norm)
        opt.step()
        schedule.step()
        task.after_step(step)
        opt.zero_grad(set_to_none=True)
        yield step + 1, mean.item()


def narrow(bar: tqdm) -> bool:
    """Whether the terminal is too narrow for a bar and what stands beside it: then the bar itself goes."""
    return not bar.disable and 0 < (bar.format_dict["ncols"] or WIDE) < WIDE


def with_progress_bar(
    steps: Iterator[tuple[int, float]], num_steps: int, name: str, trainer: L.Trainer, **bar: Any
) -> Iterator[tuple[int, float, tqdm]]:
    """Wrap the steps of ``train_steps`` in a progress bar; yields step, loss and the bar, so that a caller can add to it.

    Args:
        steps: of ``train_steps``.
        num_steps: how many there will be.
        name: on the bar, and in front of a DivergedError.
        trainer: the bar is visible where this shows one.
        bar: further settings of tqdm.
    """
    visible = trainer.is_global_zero and trainer.progress_bar_callback is not None
    with tqdm(total=num_steps, desc=name, disable=not visible, **bar) as tqdm_bar:
        if narrow(tqdm_bar):
            tqdm_bar.bar_format = "{desc}: {n_fmt}/{total_fmt}{postfix}"
        try:
            for step, loss in steps:
                tqdm_bar.update()
                tqdm_bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                yield step, loss, tqdm_bar
        except DivergedError as error:
            raise DivergedError(f"{name}: {error}") from error
