"""Examples to batches by the counter-based rule: a step number says which rows, on any number of ranks."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from casehard.datamodules.chat import IGNORED, collate
from casehard.datamodules.order import batch_indices
from casehard.metrics.errors import SettingError

Example = dict[str, list[int]]
Batch = dict[str, Tensor]


class Batches:
    """The batch of any step, from its number alone.

    Args:
        examples: encoded rows.
        batch_size: rows of a step over all ranks, which share them out evenly.
        seed: of the order.
        stream: name of what draws; streams are independent.
        pad_token_id: fills short rows.
        padding_side: where it fills them.
        rank: which share of the batch is this process's.
        world_size: how many shares there are.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        stream: str,
        pad_token_id: int,
        padding_side: Literal["left", "right"] = "right",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < world_size:
            raise SettingError(f"batch_size must be at least the number of processes, {world_size}, got {batch_size}.")
        self.examples, self.batch_size, self.seed, self.stream = examples, batch_size, seed, stream
        self.pad_token_id, self.padding_side = pad_token_id, padding_side
        self.rank, self.world_size = rank, world_size

    def __call__(self, step: int) -> Batch:
        """This rank's share of batch ``step`` (from 0); ``num_labels`` lets the ranks' mean be the global batch's mean."""
        batch = collate(self.rows(step)[self.rank :: self.world_size], self.pad_token_id, self.padding_side)
        return batch | {"num_labels": torch.tensor(self.num_labels(step) / self.world_size, device="cpu")}

    def rows(self, step: int) -> list[Example]:
        """All rows of batch ``step``, over all ranks."""
        return [self.examples[i] for i in batch_indices(len(self.examples), self.batch_size, self.seed, self.stream, step)]

    def num_labels(self, step: int) -> int:
        """Labels of batch ``step``, over all ranks."""
        return sum(label != IGNORED for row in self.rows(step) for label in row["labels"])


def share_of(trainer: L.Trainer) -> tuple[int, int]:
    """Which share of every batch this process has, and how many shares there are, as Lightning's strategy says."""
    shares = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    return shares["rank"], shares["num_replicas"]


class StepLoader:
    """``Batches`` as a loader that resumes in the middle of an epoch, too.

    Args:
        batches: by their number.
        num_accumulated: batches that Lightning accumulates into one step. No epoch ends among them, and ``num_labels`` is a share
            of the labels of all of them, so that the mean of their losses is the mean over all their labels.
    """

    def __init__(self, batches: Batches, num_accumulated: int = 1) -> None:
        self.batches, self.num_accumulated, self.step = batches, num_accumulated, 0

    def __len__(self) -> int:
        return max(1, len(self.batches.examples) // (self.batches.batch_size * self.num_accumulated)) * self.num_accumulated

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(len(self) - self.step % len(self)):
            self.step += 1
            yield self.batches(self.step - 1) | {"num_labels": torch.tensor(self._share(self.step - 1), device="cpu")}

    def _share(self, step: int) -> float:
        """This rank's share of the labels of the batches that make one step with batch ``step``, per batch."""
        first = step - step % self.num_accumulated
        total = sum(self.batches.num_labels(number) for number in range(first, first + self.num_accumulated))
        return total / (self.num_accumulated * self.batches.world_size)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
