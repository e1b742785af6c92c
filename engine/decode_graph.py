"""A step of decoding as a CUDA graph: what a device is told hundreds of times a token is told once, and then replayed.

A graph repeats kernels on the addresses that they had when it was captured, and nothing of Python. So what it is captured from
may read and write only tensors that stay where they are, ask the device for nothing, and draw no random number. Nor may it find
a weight in autocast's cache, which is not there to stay. A graph lasts for one generation: weights may have moved after it.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor

from casehard.engine.private import Unasked


class GraphError(RuntimeError):
    """A step cannot go by a graph."""


class Graph(Protocol):
    """A function that was captured, and is replayed on the same tensors."""

    def warm_up(self, function: Callable[[], Tensor]) -> Tensor:
        """What the function returns, after all that is done once, such as loading kernels, has been done."""
        ...

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        """Where every replay leaves what the function returns. Its values are not there yet."""
        ...

    def replay(self) -> None:
        """Do again all that the function did on the device."""
        ...


class CudaGraph:
    """The graph of torch.cuda, with memory of its own, which is free again when nobody holds this.

    Args:
        device: of all tensors that the function meets.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.graph, self.stream = device, torch.cuda.CUDAGraph(), _side_stream(device)

    def warm_up(self, function: Callable[[], Tensor]) -> Tensor:
        with torch.cuda.device(self.device):
            before = torch.cuda.current_stream()
            self.stream.wait_stream(before)
            with torch.cuda.stream(self.stream):
                out = function()
            before.wait_stream(self.stream)
        return out

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        # of this thread alone: NCCL's watchdog and a loader's pinning thread go on meanwhile
        with (
            torch.cuda.device(self.device),
            torch.cuda.stream(torch.cuda.current_stream(self.device)),  # which comes back also where the capture fails
            torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"),
        ):
            return function()

    def replay(self) -> None:
        with torch.cuda.device(self.device):
            self.graph.replay()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one that graphs are captured on: cuBLAS keeps tens of MiB for every stream that it has met."""
    return torch.cuda.Stream(device)


PLAIN_CALLS = 3  # before a graph is captured, which costs a few: many answers are shorter


class Replayed:
    """A function of no arguments that is captured in one call, held against its graph in the next, and replayed from then on.

    Not held against it in the first: inputs that a graph has taken for constants are right in the call that captured it.

    Args:
        graph: that has captured nothing.
        device: the type of the device of all that the function computes on.
    """

    def __init__(self, graph: Graph, device: str) -> None:
        self.graph, self.device = graph, device
        self.plain_calls = 0
        self.output: Tensor | None = None
        self.trusted = False

    def __call__(self, function: Callable[[], Tensor]) -> Tensor:
        """What the function returns; the next call may overwrite it.

        Args:
            function: the same at every call, on tensors that stay where they are. Computing twice must do what computing once
                does.

        Raises:
            GraphError: the function cannot be captured, or the graph does not do what it does.
        """
        if self.plain_calls < PLAIN_CALLS:
            self.plain_calls += 1
            return function()
        if self.output is None:
            try:
                first = self.graph.warm_up(partial(self._unasked, function))
                self.output = self.graph.capture(function)
            except RuntimeError as error:
                why, *_ = [*str(error).splitlines(), type(error).__name__]
                raise GraphError(f"a step cannot be captured ({why})") from error
            return first
        self.graph.replay()
        if not self.trusted:
            expected = function()
            if not _alike(self.output, expected):
                raise GraphError("a replayed step had other logits than the step itself")
            self.trusted = True
        return self.output

    def _unasked(self, function: Callable[[], Tensor]) -> Tensor:
        with Unasked(self.device):  # torch is left in disorder by a capture that was broken off
            return function()


def _alike(logits: Tensor, others: Tensor) -> bool:
    """Up to rounding; where one is not a number the other must be none either."""
    tolerance = 1e-4 if others.dtype == torch.float32 else 1e-2
    a, b = logits.float().nan_to_num(), others.float().nan_to_num()
    return bool((a - b).norm() <= tolerance * b.norm())
