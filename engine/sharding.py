"""Weights that are split over the ranks (FSDP2): how they get there, come back whole, and keep the ranks in step.

Every rank builds the model from its config, without weights; these come from the first rank, one parameter at a time.

Under FSDP2 every forward pass is a collective: all ranks of a mesh must make the same number of them.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from casehard.engine.anatomy import decoder_layers
from casehard.engine.weights import group_of, like_parameter, local, reshard

T = TypeVar("T")


class Blueprint(NamedTuple):
    """A model without its weights, as one rank tells the others: no module is sent, whose hooks could not be pickled."""

    config: PreTrainedConfig
    generation_config: GenerationConfig | None
    dtypes: dict[str, torch.dtype]  # of parameters, by name

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Blueprint":
        """Of a model that is prepared already, on its rank; weights narrower than its config says are to be widened."""
        said: Any = model.config.dtype  # None of one that was made by hand
        dtypes = {name: torch.promote_types(p.dtype, said or p.dtype) for name, p in model.named_parameters()}
        return cls(model.config, model.generation_config, dtypes)

    def empty(self, prepare: Callable[[PreTrainedModel], None]) -> PreTrainedModel:
        """The model with its parameters on meta, in train mode; its buffers have the values that the config gives.

        Args:
            prepare: what was done to the original after it was loaded, e.g. adding adapters.
        """
        with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(self.config)).train()
        model.tie_weights()  # on meta every name got a parameter of its own
        with init_empty_weights(include_buffers=False):
            prepare(model)
        model.generation_config = copy.deepcopy(self.generation_config)  # type: ignore[assignment]  # None where it cannot write
        tensors = dict(model.named_parameters())
        if names := sorted(tensors.keys() ^ self.dtypes.keys()):
            raise RuntimeError(f"{type(model).__name__} must have the same parameters on every rank, and {names[0]} is on one.")
        fill(model, {name: tensors[name].to(dtype) for name, dtype in self.dtypes.items()})
        return model


def fill(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of all parameters, without a copy; parameters that are tied stay so."""
    new = {id(p): nn.Parameter(weights[name].detach(), p.requires_grad) for name, p in model.named_parameters()}
    for name, p in list(model.named_parameters(remove_duplicate=False)):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new[id(p)])


def broadcast(value: T | None, mesh: DeviceMesh) -> T:
    """On every rank of the mesh, what its first rank has: plain data, which is pickled."""
    shared = [value]
    dist.broadcast_object_list(shared, group=mesh.get_group(), group_src=0)
    return shared[0]  # type: ignore[return-value]


def shard(model: PreTrainedModel, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Split every parameter over the ranks of ``mesh``; a decoder layer is put together only while it runs.

    On a single rank too, where FSDP2 copies what it puts together: by the root alone all weights would be held twice in a pass.

    Raises:
        SettingError: the architecture does not declare its layers.
    """
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def sharded(
    whole: PreTrainedModel | None,
    mesh: DeviceMesh,
    device: torch.device,
    policy: MixedPrecisionPolicy,
    prepare: Callable[[PreTrainedModel], None] = lambda model: None,
) -> tuple[PreTrainedModel, Callable[[], PreTrainedModel]]:
    """A model whose weights are split over the ranks, and what builds the same on meta (see ``gathered``).

    Args:
        whole: the model, on the mesh's first rank; None on the others, which never hold more than their shard and one parameter.
        mesh: of one dimension.
        device: of the shards.
        policy: what the weights are put together in.
        prepare: what was done to ``whole`` after it was loaded, such as adding adapters; every rank does it to its own.
    """
    blueprint = broadcast(None if whole is None else Blueprint.of(whole), mesh)
    model = blueprint.empty(prepare)
    sizes = dict(model.named_parameters())  # on meta
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    if whole is not None:  # the others follow from the config, in the precision that the model is to have
        stored = model.state_dict().keys()
        buffers |= {name: buffer for name, buffer in whole.named_buffers() if name in stored}
    shard(model, mesh, policy)
    model.to_empty(device=device)
    distribute(model, sizes if whole is None else dict(whole.named_parameters()))
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
        dist.broadcast(buffer, group=mesh.get_group(), group_src=0)
    return model, partial(blueprint.empty, prepare)


@torch.no_grad()
def distribute(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write whole tensors into the parameters of these names, each rank its shard where they are sharded.

    Args:
        module: sharded or not.
        weights: by name. Where a parameter is sharded only the first rank's values count; the others may pass meta tensors.
    """
    reshard(module)
    parameters = dict(module.named_parameters())
    for name, whole in weights.items():
        local(parameters[name]).copy_(shard_of(whole.detach(), parameters[name], source=0))


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


@torch.no_grad()
def edit(parameter: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Replace a parameter, sharded or not, by ``change`` of the whole of it, in place. Memory: one whole parameter or two.

    Where it is sharded every rank must call this, and none may leave it put together (``weights.reshard``).
    """
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    local(parameter).copy_(shard_of(change(whole.detach()), parameter))


def whole_of(part: Tensor, like: Tensor) -> Tensor:
    """The whole of a tensor that is split as ``like`` is; ``part`` itself where that is not sharded. Undoes ``shard_of``.

    Args:
        part: this rank's. Where ``like`` is sharded every rank must call this, in the same order, and gets the whole.
        like: a parameter.
    """
    tensor = like_parameter(like, part)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(model: PreTrainedModel, empty: Callable[[], PreTrainedModel]) -> PreTrainedModel | None:
    """The whole model on the CPU, on the first rank of the mesh; the others take part and get None. Memory: one model there.

    Args:
        model: sharded.
        empty: builds the same on meta, not sharded.
    """
    reshard(model)
    weights = {}
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor)
        whole = p.full_tensor().detach()
        if p.device_mesh.get_local_rank() == 0:
            weights[name] = whole.to("cpu", copy=True)
    if not weights:
        return None
    result, buffers = empty(), dict(model.named_buffers())
    fill(result, weights)
    for name, buffer in result.named_buffers():
        buffer.copy_(buffers[name])
    return result


def max_over_ranks(module: nn.Module, number: int) -> int:
    """Maximum of ``number`` over the ranks that share ``module``'s shards: they must run the same number of passes."""
    group = group_of(module)
    if group is None:
        return number
    shared = torch.tensor(number, device=next(module.parameters()).device)
    dist.all_reduce(shared, dist.ReduceOp.MAX, group)
    return int(shared)
