"""Gradients as values: by parameter name, each rank its shard, the mean over the ranks that share out the rows of a batch."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from casehard.engine.graphs import keep_gradients
from casehard.engine.private import add_all, copy_all, multiply_all
from casehard.engine.weights import Weights, buckets, copies, group_of, like_parameter, local, reshard


def _num_ranks(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum of a tensor over the ranks of ``group``, of all where it is None; the tensor itself where there is one rank."""
    if _num_ranks(group) == 1:
        return value
    value = value.clone()
    dist.all_reduce(value, group=group)
    return value


def mean_over_ranks(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Mean of a tensor over the ranks of ``group``, of all where it is None; the tensor itself where there is one rank."""
    return value if (size := _num_ranks(group)) == 1 else sum_over_ranks(value, group) / size


def rows_of_all_ranks(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[rows, length, dim]`` of every rank as one tensor, rank after rank: for losses that compare rows with each other.

    Ranks may have other numbers of rows, and shorter ones end in zeros. Gradients flow to the rank's own rows alone, times the
    number of ranks: where every rank takes the loss of all rows, the mean of their gradients is that loss's gradient.
    """
    if (size := _num_ranks(group)) == 1:
        return tensor
    shape = torch.tensor(tensor.shape[:2], device=tensor.device)
    shapes = [torch.empty_like(shape) for _ in range(size)]
    dist.all_gather(shapes, shape, group=group)
    most = torch.stack(shapes).amax(dim=0).tolist()
    own = F.pad(tensor, (0, 0, 0, most[1] - tensor.shape[1], 0, most[0] - tensor.shape[0]))
    parts = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(parts, own.detach().contiguous(), group=group)
    parts[dist.get_rank(group)] = own.detach() + size * (own - own.detach())
    return torch.cat([part[: int(rows)] for part, (rows, _) in zip(parts, shapes, strict=True)])


def average_gradients(parameters: list[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
    """Replace every ``.grad`` by its mean over the ranks of ``group``; those of FSDP2's shards are means already.

    A parameter that no rank has used gets zeros, because a rank knows its own passes only. Memory: one bucket, no copy of all.
    """
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    if not parameters or (size := _num_ranks(group)) == 1:
        return
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in parameters if p.grad is not None]
    for places in buckets(gradients):
        _average([gradients[i] for i in places], size, group)


def _average(bucket: list[Tensor], size: int, group: dist.ProcessGroup | None) -> None:
    mean = torch.cat([g.flatten() for g in bucket])
    dist.all_reduce(mean, group=group)
    mean /= size
    copy_all(bucket, [part.view_as(g) for g, part in zip(bucket, mean.split([g.numel() for g in bucket]), strict=True)])


def loss_and_gradient(
    module: nn.Module, loss: Callable[[], Tensor], group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Weights]:
    """A loss, detached and of this rank's rows, and its gradient with respect to all that requires one.

    ``backward`` is called here, so that it also holds for sharded parameters, which ``torch.autograd.grad`` does not see. What
    waits in ``.grad`` is there again afterwards, after an exception too. Memory: one copy of what requires a gradient.

    Args:
        module: on one process, under DDP inside its forward pass or outside of it, or sharded (FSDP2). Comes back sharded.
        loss: makes the forward pass and returns a scalar, under the caller's autocast.
        group: the ranks that share out the rows; None for all.

    Returns:
        The loss, and by name the gradients of those parameters that it depends on.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    waiting = [p.grad for p in parameters.values()]
    try:
        for p in parameters.values():
            p.grad = None
        with torch.enable_grad():
            value = loss()
            with torch.autocast(value.device.type, enabled=False):
                value.backward()
        keep_gradients(parameters.values())
        average_gradients(list(parameters.values()), group)
        return value.detach(), {name: local(p.grad) for name, p in parameters.items() if p.grad is not None}
    finally:
        for p, g in zip(parameters.values(), waiting, strict=True):
            p.grad = g
        reshard(module)


def gradient(module: nn.Module, loss: Callable[[], Tensor], group: dist.ProcessGroup | None = None) -> Weights:
    """The gradient of a loss, by name; see ``loss_and_gradient``."""
    return loss_and_gradient(module, loss, group)[1]


@torch.no_grad()
def add_to_grad(module: nn.Module, gradient: Weights, weight: float = 1.0) -> None:
    """Add ``weight * gradient`` to what waits in ``.grad``, parameter by parameter.

    ``gradient`` is empty afterwards, so that its tensors go bucket by bucket and no second copy of it is held.

    Raises:
        ValueError: ``module`` lacks one of the names.
    """
    parameters = dict(module.named_parameters())
    if unknown := sorted(set(gradient) - set(parameters)):
        raise ValueError(f"gradients must be named as the module names its parameters, and it has no {unknown[0]!r}.")
    names = list(gradient)
    for bucket in list(buckets(gradient.values())):
        chosen = [parameters[names[i]] for i in bucket]
        parts = multiply_all([gradient.pop(names[i]) for i in bucket], weight)
        parts = [part.to(p.device) for p, part in zip(chosen, parts, strict=True)]
        waiting = [(local(p.grad), part) for p, part in zip(chosen, parts, strict=True) if p.grad is not None]
        for p, part in zip(chosen, parts, strict=True):
            if p.grad is None:
                p.grad = like_parameter(p, part.to(p.dtype))
        if waiting:
            add_all([g for g, _ in waiting], [part for _, part in waiting])


def norm(module: nn.Module, weights: Weights) -> Tensor:
    """Euclidean norm of ``weights`` (a gradient, an attack vector), over all ranks where parameters are sharded; a scalar.

    Raises:
        ValueError: there are none.
    """
    if not weights:
        raise ValueError("weights must hold at least one tensor, got none. A gradient is empty once it has been added.")
    return _over_shards(module, {name: part.detach().float().square().sum() for name, part in weights.items()}).sqrt()


def dot(module: nn.Module, first: Weights, second: Weights) -> Tensor:
    """Inner product over the names of ``first``, over all ranks where parameters are sharded; a scalar."""
    return _over_shards(module, {name: (part.detach().float() * second[name].float()).sum() for name, part in first.items()})


def _over_shards(module: nn.Module, sums: dict[str, Tensor]) -> Tensor:
    """The sum of one number a parameter, by name, each of which this rank has summed over its part alone."""
    group = group_of(module)
    if group is None:
        return torch.stack(list(sums.values())).sum()
    parameters = dict(module.named_parameters())
    device = next(iter(parameters.values())).device
    sharded: list[Tensor] = []
    whole: list[Tensor] = []
    for name, part in sums.items():
        (sharded if isinstance(parameters.get(name), DTensor) else whole).append(part)
    total = torch.stack(sharded).sum().to(device) if sharded else torch.zeros((), device=device)
    dist.all_reduce(total, group=group)
    return total + torch.stack(whole).sum().to(device) if whole else total


def unit(module: nn.Module, weights: Weights) -> Weights:
    """``weights`` at a norm of 1. Memory: one copy."""
    return scaled(weights, 1 / max(float(norm(module, weights)), torch.finfo(torch.float32).tiny))


def cosine(module: nn.Module, first: Weights, second: Weights) -> float:
    """Cosine of the angle between two ``weights``, over all ranks where parameters are sharded. Memory: three copies."""
    return float(norm(module, summed(unit(module, first), unit(module, second)))) ** 2 / 2 - 1


def scaled(weights: Weights, factor: float) -> Weights:
    """``factor * weights``, by name. Memory: one copy."""
    return {name: factor * tensor for name, tensor in weights.items()}


def difference(first: Weights, second: Weights) -> Weights:
    """``first - second``, by name; a name that one of them lacks counts as zero there. Memory: one copy."""
    return summed(first, second, -1.0)


def summed(first: Weights, second: Weights, weight: float = 1.0) -> Weights:
    """``first + weight * second``, by name; a name that one of them lacks counts as zero there. Memory: one copy."""
    total, names = copies(first), list(second)
    for bucket in buckets(second.values()):
        both = [names[i] for i in bucket if names[i] in total]
        if both:
            add_all([total[name] for name in both], [second[name] for name in both], weight)
        total |= {names[i]: weight * second[names[i]] for i in bucket if names[i] not in total}
    return total
