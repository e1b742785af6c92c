"""Weights that are split over the ranks (FSDP2): how they get there, come back whole, and keep the ranks in step.

Under FSDP2 every forward pass is a collective: all ranks of a mesh must make the same number of them.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from casehard.engine.anatomy import decoder_layers
from casehard.engine.weights import Weights, group_of, local, reshard

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def rebuilt(model: M, weights: Mapping[str, Tensor]) -> M:
    """A copy of ``model`` that holds ``weights`` in place of its own parameters, of which no copy is made; ties stay."""
    memo = {id(p): nn.Parameter(weights[name], p.requires_grad) for name, p in model.named_parameters()}
    return copy.deepcopy(model, memo)  # type: ignore[arg-type]


def on_meta(model: M) -> M:
    """``model`` without its weights: all of its build, buffers and sizes."""
    return rebuilt(model, {name: torch.empty_like(p, device="meta") for name, p in model.named_parameters()})


def from_first(value: T | None, mesh: DeviceMesh) -> T:
    """On every rank of the mesh, what its first rank has."""
    shared = [value]
    dist.broadcast_object_list(shared, group=mesh.get_group(), group_src=0)
    return shared[0]  # type: ignore[return-value]


def shard(model: PreTrainedModel, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Split every parameter over the ranks of ``mesh``; a decoder layer is put together only while it runs.

    On a single rank too, where FSDP2 copies what it puts together: by the root alone all weights would be held twice in a pass.
    """
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def sharded(
    whole: PreTrainedModel | None, mesh: DeviceMesh, device: torch.device, policy: MixedPrecisionPolicy
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model whose weights are split over the ranks, and the same on meta, as it was before (see ``gathered``).

    Args:
        whole: the model, on the mesh's first rank; None on the others, which never hold more than their shard and one parameter.
        mesh: of one dimension.
        device: of the shards.
        policy: what the weights are put together in.
    """
    plain = from_first(None if whole is None else on_meta(whole), mesh)
    model = rebuilt(plain, dict(plain.named_parameters()))
    buffers = {name: b.to(device) for name, b in model.named_buffers()}
    shard(model, mesh, policy)
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    distribute(model, dict((plain if whole is None else whole).named_parameters()))
    return model, plain


@torch.no_grad()
def distribute(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write whole tensors into the parameters of these names, each rank its shard where they are sharded.

    Args:
        module: sharded or not.
        weights: by name. Where a parameter is sharded only the first rank's values count; the others may pass meta tensors.
    """
    reshard(module)
    own = dict(module.named_parameters())
    for name, whole in weights.items():
        local(own[name]).copy_(shard_of(whole.detach(), own[name], source=0))


def shard_of(whole: Tensor, like: Tensor, source: int | None = None) -> Tensor:
    """This rank's part of ``whole``, split as ``like`` is: all of it where that is not sharded.

    Args:
        whole: on every rank.
        like: a parameter.
        source: the only rank of the mesh whose values count, the others may pass a meta tensor; None where all have the same.
    """
    if not isinstance(like, DTensor):
        return whole
    whole = torch.empty(whole.shape, dtype=like.dtype, device=like.device) if whole.is_meta else whole.to(like.device, like.dtype)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=source).to_local()


def gathered(model: M, plain: M) -> M | None:
    """The whole model on the CPU, on the first rank of the mesh; the others take part and get None. Memory: one model there.

    Args:
        model: sharded.
        plain: the same on meta, before it was sharded.
    """
    reshard(model)
    weights = {}
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor)
        whole = p.full_tensor().detach()
        if p.device_mesh.get_local_rank() == 0:
            weights[name] = whole.to("cpu", copy=True)
    return rebuilt(plain, weights) if weights else None


def most(module: nn.Module, number: int) -> int:
    """The largest ``number`` of any rank that must keep step with this one, because a pass through ``module`` is a collective."""
    group = group_of(module)
    if group is None:
        return number
    shared = torch.tensor(number, device=next(module.parameters()).device)
    dist.all_reduce(shared, dist.ReduceOp.MAX, group)
    return int(shared)


# ---- tensors that belong to parameters, such as attack vectors, in checkpoints


def as_saved(module: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """Shards as the DTensors that a sharded checkpoint takes; tensors of parameters that are not sharded stay as they are."""
    reshard(module)
    own = dict(module.named_parameters())
    return {name: _like(own[name], w) for name, w in weights.items()}


def _like(p: Tensor, part: Tensor) -> Tensor:
    if not isinstance(p, DTensor):
        return part
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def saved_in(module: nn.Module, path: str | Path, prefix: str) -> Weights:
    """This rank's shards of what a sharded checkpoint holds under ``prefix``, on any number of ranks, by parameter name."""
    reshard(module)
    own = dict(module.named_parameters())
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    start = f"state_dict.{prefix}"
    wanted = {key: torch.empty_like(own[key.removeprefix(start)]) for key in stored if key.startswith(start)}
    if wanted:
        dcp.load(wanted, checkpoint_id=path)
    return {key.removeprefix(start): local(tensor) for key, tensor in wanted.items()}
