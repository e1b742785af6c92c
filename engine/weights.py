"""Exact weight operations: what an attack or an inner attacker changes comes back bit for bit.

Copies, never add-then-subtract: ``p + d - d`` differs from ``p`` in 7% of the entries in bfloat16. Everything is written in
place, shard by shard where a parameter is sharded: swapping the storage a parameter points to shifts nothing under FSDP2, whose
all-gather reads its own view of the shard.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from casehard.engine.private import add_all, copy_all, subtract_all
from casehard.metrics.errors import SettingError

Weights = dict[str, Tensor]
"""Tensors by parameter name, each a shard where the parameter is sharded."""


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that this rank holds: itself, or the shard of a DTensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_parameter(p: Tensor, part: Tensor) -> Tensor:
    """``part``, this rank's part of a tensor laid out as ``p``, as a tensor of the kind that ``p`` is: a DTensor if it is one."""
    if not isinstance(p, DTensor):
        return part
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def group_of(module: nn.Module) -> dist.ProcessGroup | None:
    """The ranks over which the parameters are sharded; None where they are not."""
    return next((p.device_mesh.get_group() for p in module.parameters() if isinstance(p, DTensor)), None)


def reshard(module: nn.Module) -> None:
    """Under FSDP2, back to shards: a forward pass leaves whole parameters in their place, which later passes would read."""
    for m in module.modules():
        if isinstance(m, FSDPModule):
            m.reshard()


BUCKET = 2**25  # entries that are worked on in one call


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[int]]:
    """Places of neighbours that have one dtype and device, at most ``BUCKET`` entries together (a larger tensor is alone).

    A pass over all weights is then few kernels on an accelerator, where every kernel has its price, and holds no copy of all.
    """
    last: list[int] = []
    kind, room = None, 0
    for place, tensor in enumerate(tensors):
        room -= tensor.numel()
        if last and (kind != (tensor.dtype, tensor.device) or room < 0):
            yield last
            last = []
        if not last:
            kind, room = (tensor.dtype, tensor.device), BUCKET - tensor.numel()
        last.append(place)
    if last:
        yield last


@torch.no_grad()
def copies(tensors: Mapping[str, Tensor], device: str | None = None) -> Weights:
    """A copy of every tensor, by name, on ``device`` (default: beside the original)."""
    new = {name: torch.empty_like(tensor, device=device or tensor.device) for name, tensor in tensors.items()}
    _write([(new[name], tensor) for name, tensor in tensors.items()])
    return new


def _write(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair into the first."""
    for bucket in buckets(part for part, _ in pairs):
        copy_all([pairs[i][0] for i in bucket], [pairs[i][1] for i in bucket])


def _match(tensors: Mapping[str, Tensor], module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Pairs of (this rank's part of the parameter or buffer, tensor) by name; an unmatched name is an error."""
    reshard(module)
    tensors_of_module = dict(module.named_parameters()) | dict(module.named_buffers())
    if unknown := sorted(set(tensors) - set(tensors_of_module)):
        raise ValueError(f"weights must be named as the module names them, and it has no {', '.join(map(repr, unknown[:3]))}.")
    return [(local(tensors_of_module[name]), tensor) for name, tensor in tensors.items()]


def snapshot(module: nn.Module, device: str | None = None) -> Weights:
    """Copy the parameters that train (``requires_grad``).

    Memory: one copy of what trains, on ``device`` (default: beside the original).
    """
    reshard(module)
    return copies({n: local(p) for n, p in module.named_parameters() if p.requires_grad}, device)


@torch.no_grad()
def restore(module: nn.Module, weights: Weights) -> None:
    """Write a snapshot back in place, bit for bit.

    Raises:
        ValueError: ``module`` lacks one of the names.
    """
    _write(_match(weights, module))


@torch.no_grad()
def attack_vector(module: nn.Module, start: Weights) -> Weights:
    """Attacked minus starting weights, by name: what an attack that began at the snapshot ``start`` has added."""
    pairs, vector = _match(start, module), []
    for bucket in buckets(part for part, _ in pairs):
        parts = [pairs[i][0] for i in bucket]
        vector += subtract_all(parts, [pairs[i][1].to(parts[0].device) for i in bucket])
    return dict(zip(start, vector, strict=True))


@contextmanager
def shifted(module: nn.Module, vector: Weights, scale: float = 1.0, one_backward: bool = False) -> Iterator[None]:
    """Let a block run at ``weights + scale * vector``; gradients land on the parameters, whose bits come back.

    Memory: one copy of what ``vector`` names, for the block.

    Args:
        module: sharded or not.
        vector: what to add, by parameter name.
        scale: times ``vector``.
        one_backward: the block ends with its only backward pass. A parameter then comes back, and its copy goes, the moment its
            gradient is there: copies and gradients together are one copy of the weights, not two. (Shards wait for the end.)

    Raises:
        ValueError: ``module`` lacks one of the names.
    """
    pairs = _match(vector, module)
    parameters = dict(module.named_parameters())
    saved = copies({name: part for name, (part, _) in zip(vector, pairs, strict=True)})

    def put_back(p: Tensor, name: str) -> None:
        local(p).copy_(saved.pop(name))

    early = [(name, p) for name in vector if one_backward and not isinstance(p := parameters.get(name), DTensor | None)]
    hooks = [p.register_post_accumulate_grad_hook(partial(put_back, name=name)) for name, p in early if p.requires_grad]
    try:
        with torch.no_grad():
            for bucket in buckets(part for part, _ in pairs):
                parts = [pairs[i][0] for i in bucket]
                add_all(parts, [pairs[i][1].to(parts[0].device) for i in bucket], scale)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        reshard(module)  # what was put together in the block is shifted
        restore(module, saved)


def check_device(device: str | None) -> None:
    """Make sure that weights can wait on ``device`` (a setting ``copy_device``) and come back.

    Raises:
        SettingError: it is not there, or keeps no values.
    """
    try:
        torch.zeros(1).to(device).cpu()
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        raise SettingError(
            f"copy_device must be a device of this machine that keeps values, such as cpu, or null, got {device!r} ({why})."
        ) from error


@contextmanager
def same_modes_after(module: nn.Module) -> Iterator[None]:
    """Let a block change train and eval modes, then put each back."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


@contextmanager
def _same_rng_after() -> Iterator[None]:
    """Put the generators back after an exception too, where ``isolate_rng`` by itself leaves them as they are."""
    isolation = isolate_rng()
    isolation.__enter__()
    try:
        yield
    finally:
        isolation.__exit__(None, None, None)


Changes = Callable[[str], bool]
"""Which parameters a block may change: by name, in the model as it is before the block adds any adapter."""


def _every(name: str) -> bool:
    return True


def _none(name: str) -> bool:
    return False


EVERYTHING: Changes = _every
NOTHING: Changes = _none
CHECKED = "CASEHARD_CHECK_BORROWED"  # environment variable: make sure that a borrower changed nothing else; set by the tests


def _fingerprint(parameter: Tensor) -> bytes:
    """Hash of the bytes of this rank's part of a parameter, nan and signed zeros included."""
    data = local(parameter).reshape(-1).contiguous().view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(data.tobytes()).digest()


@contextmanager
def borrowed(module: nn.Module, changes: Changes = EVERYTHING, device: str | None = None) -> Iterator[Weights]:
    """Let a block train or edit ``module``, then put everything back bit for bit, after an exception or Ctrl-C too.

    Back come the parameters named by ``changes``, all buffers, gradients, ``requires_grad`` flags, train/eval modes and random
    number generators. The copy is made before the block begins, whatever is frozen then. Inside the block no parameter has a
    gradient. Adapters that the block adds are the block's to remove.

    Memory: one copy of what may change, and of the buffers. Gradients that wait for a step are set aside, not copied.

    Args:
        module: what is borrowed.
        changes: which parameters the block may change. **Others are not saved, so the block must not change them.**
        device: where the copy is kept, e.g. ``cpu``; by default beside the original.

    Yields:
        The copy: the weights where the block starts, by name.

    Raises:
        RuntimeError: the block changed a parameter outside ``changes``. Checked only where ``CASEHARD_CHECK_BORROWED`` is set.
    """
    reshard(module)
    named = dict(module.named_parameters())
    parameters = list(named.values())
    flags = [p.requires_grad for p in parameters]
    gradients = [p.grad for p in parameters]
    buffers = copies({n: local(b) for n, b in module.named_buffers()})
    weights = copies({n: local(p) for n, p in named.items() if changes(n)}, device)
    checked = {n: _fingerprint(p) for n, p in named.items() if n not in weights} if os.environ.get(CHECKED) else {}
    with same_modes_after(module), _same_rng_after():
        try:
            for p in parameters:
                p.grad = None
            yield weights
            reshard(module)
            if changed := [n for n, before in checked.items() if _fingerprint(named[n]) != before]:
                raise RuntimeError(f"changes must name every parameter that a borrower changes, and {changed[0]} was not named.")
        finally:
            restore(module, weights | buffers)
            for p, flag, gradient in zip(parameters, flags, gradients, strict=True):
                p.requires_grad_(flag)
                p.grad = gradient
