"""What is used here of torchmetrics' private API, in one place, so that an upgrade of it is the work of one file."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric

NO_FLOAT64 = {"mps"}  # types of devices


class Exact(Metric):
    """A metric whose float64 states stay on the CPU where a device has no such numbers."""

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> nn.Module:
        if fn(torch.zeros(())).device.type in NO_FLOAT64:
            states = self.metric_state.items()
            exclude_state = [name for name, state in states if torch.is_tensor(state) and state.dtype == torch.float64]
        return super()._apply(fn, exclude_state)
