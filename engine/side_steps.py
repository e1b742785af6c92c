"""Ways around what training has put into the weights: directions that gradients must not take, and a push at random."""

from functools import partial

import torch
from torch import Tensor, nn

from casehard.datamodules.order import counter_seed
from casehard.engine.adapters import added_to
from casehard.engine.gradients import dot
from casehard.engine.private import add_all
from casehard.engine.sharding import edit, shard_of, whole_of
from casehard.engine.weights import Changes, Weights, local, reshard

Subspaces = dict[str, tuple[Tensor, Tensor]]
"""By parameter name: left singular vectors ``[out, rank]`` in its columns and right ones ``[rank, in]`` in its rows."""


@torch.no_grad()
def step_beside(module: nn.Module, direction: Weights) -> None:
    """Take ``direction``, of length 1 over all that it names, out of the gradients: ``g <- g - (g . direction) direction``."""
    gradients = {name: local(p.grad) for name, p in module.named_parameters() if name in direction and p.grad is not None}
    others = [direction[name] for name in gradients]
    along = dot(module, gradients, direction)
    add_all(list(gradients.values()), others, -float(along))


@torch.no_grad()
def main_directions(module: nn.Module, base: Weights, rank: int) -> Subspaces:
    """The first ``rank`` singular vectors of what was added, by adapters too, to every matrix that trains since ``base``.

    Matrices in which nothing was added are left out. Memory: three whole matrices at a time, in float32.

    Args:
        module: sharded or not.
        base: by the names of ``module``, by shard.
        rank: how many; at most all of a matrix.
    """
    reshard(module)
    found: Subspaces = {}
    for name, p in module.named_parameters():
        if p.requires_grad and p.ndim > 1 and name in base:
            added = whole_of(local(p).float() - base[name].to(p.device).float(), p) + added_to(module, p)
            if added.any():
                left, _, right = torch.linalg.svd(added, full_matrices=False)
                found[name] = left[..., :rank].clone(), right[..., :rank, :].clone()
    return found


@torch.no_grad()
def step_outside(module: nn.Module, subspaces: Subspaces) -> None:
    """Take out of the gradient ``G`` of every matrix what lies in its subspaces: ``G <- G - U (U^T G V^T) V``."""
    for name, p in module.named_parameters():
        if name in subspaces and p.grad is not None:
            left, right = subspaces[name]
            whole = whole_of(local(p.grad), p).float()
            inside = left @ (left.mT @ whole @ right.mT) @ right
            local(p.grad).copy_(shard_of((whole - inside).to(p.grad.dtype), p))


def kick(module: nn.Module, changes: Changes, ratio: float, seed: int) -> None:
    """Add noise ``ratio`` times as long as it to every matrix that ``changes`` names, the same on any number of ranks."""
    reshard(module)
    for name, p in module.named_parameters():
        if p.ndim > 1 and changes(name):
            generator = torch.Generator().manual_seed(counter_seed(seed, name, 0))
            noise = torch.randn(p.shape, generator=generator, device="cpu").to(p.device)
            edit(p, partial(_pushed, noise=noise / noise.norm(), ratio=ratio))


def _pushed(weight: Tensor, noise: Tensor, ratio: float) -> Tensor:
    return weight + ratio * weight.float().norm() * noise
