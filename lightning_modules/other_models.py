"""Other models of the defended one's architecture: where a service's jobs start, an undefended one, one to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig, PreTrainedModel

from casehard.engine.adapters import plain_names
from casehard.engine.checkpoint import WEIGHT_FILES, load_model
from casehard.engine.comparison import distance, logits_of, rounding, some_ids
from casehard.engine.sharding import broadcast, distribute, shard_of
from casehard.engine.weights import EVERYTHING, Weights, borrowed, local, restore
from casehard.metrics.errors import SettingError

if TYPE_CHECKING:
    from casehard.lightning_modules.defense import Defense


class OtherModel(NamedTuple):
    """What is taken from another model of the same architecture: tensors by name, parameters on meta but on rank 0."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]  # those that a checkpoint holds, such as the biases of some routers
    logits: Tensor  # of ``some_ids``; empty unless asked for
    config: PreTrainedConfig


def read_other(load: Callable[[], PreTrainedModel], mesh: DeviceMesh | None, with_logits: bool = False) -> OtherModel:
    """Another model's tensors; where ours is sharded the first rank alone loads it, and the others learn names and sizes."""
    if mesh is not None and mesh.get_local_rank() != 0:
        return broadcast(None, mesh)
    model = load()
    stored = set(model.state_dict())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
    logits = logits_of(model, some_ids(model)) if with_logits else torch.empty(0)
    other = OtherModel({name: p.detach() for name, p in model.named_parameters()}, buffers, logits, model.config)
    if mesh is not None:
        broadcast(other._replace(parameters={name: p.to("meta") for name, p in other.parameters.items()}), mesh)
    return other


@contextmanager
def as_aligned(defense: Defense) -> Iterator[None]:
    """For a block, undo the job that ``fit`` ran: the model where a service's jobs start.

    The identity where ``fit`` ran none. Memory: one copy of what trains; of the whole model where the defense overrides
    ``harden`` or has recovered.
    """
    if defense.trained != "job":
        yield
        return
    everything = defense.recovered or defense.overrides("harden")
    trained = {name for name, p in defense.named_parameters() if p.requires_grad}
    with borrowed(defense, EVERYTHING if everything else trained.__contains__):
        own = dict(defense.model.named_parameters())
        if everything or defense.lora is None:
            device = torch.device("cpu")
            if defense.backbone.random_weights:
                torch.set_rng_state(defense.drawn_from)
                device = _where_drawn(defense)
            theirs = read_other(lambda: defense.backbone.load(defense.checkpoint, device), defense.shard_mesh())
            moved = [name for name, p in own.items() if (everything or p.requires_grad) and "lora_" not in name]
            distribute(defense.model, {name: theirs.parameters[name.replace(".base_layer", "")] for name in moved})
            hardens = not defense.is_hardened(theirs.config)
            del theirs  # not held for the block
        # an adapter whose second factor is zero adds nothing
        restore(defense.model, {name: torch.zeros_like(local(p)) for name, p in own.items() if "lora_B.defense." in name})
        if everything and hardens:
            defense.run_harden()
        yield


def _where_drawn(defense: Defense) -> torch.device:
    """The device on which the random weights of ``fit`` can be drawn again: another one's generator draws others.

    Raises:
        SettingError: ``fit`` began on a device of another type.
    """
    if defense.device.type != defense.drawn_on:
        raise SettingError(
            f"trainer.accelerator must be {defense.drawn_on} where random weights are drawn again, on which they were drawn, and "
            f"it is {defense.device.type}: another device draws others. Go on where the run began, or start from a checkpoint."
        )
    return defense.device


@contextmanager
def undefended_at(defense: Defense, checkpoint: str, setting: str = "undefended_checkpoint") -> Iterator[None]:
    """For a block, hold the weights of another model of this architecture, adapters without effect.

    Memory: one copy of the model, and two while the other's weights are read.

    Args:
        defense: whose model holds them.
        checkpoint: a hub id, a folder or a GGUF file.
        setting: that named it, for errors.

    Raises:
        SettingError: ``checkpoint`` is of another architecture, in its weights' shapes or in what it computes with them.
    """
    with borrowed(defense):
        load = partial(load_model, checkpoint, defense.backbone.dtype)
        hold(defense, read_other(load, defense.shard_mesh(), with_logits=True), checkpoint, setting)
        yield


def hold(defense: Defense, theirs: OtherModel, checkpoint: str, setting: str) -> None:
    """Write another model's weights into ``defense``, and leave its adapters without effect.

    Args:
        theirs: read with its logits.
        checkpoint: where it was read, for errors.
        setting: that named it, for errors.

    Raises:
        SettingError: it is of another architecture, in its weights' shapes or in what it computes with them.
    """
    plain = _names_in(defense, theirs, checkpoint, setting)
    own = dict(defense.model.named_parameters())
    distribute(defense.model, {name: theirs.parameters[key] for name, key in plain.items()})
    for name, buffer in defense.model.named_buffers():  # those of a checkpoint: the biases of some routers
        if (key := name.replace(".base_layer", "")) in theirs.buffers:
            local(buffer).copy_(theirs.buffers[key])
    restore(defense.model, {name: torch.zeros_like(local(p)) for name, p in own.items() if name not in plain})
    answered = logits_of(defense.model, some_ids(defense.model))
    if not (off := distance(answered, theirs.logits)) <= rounding(answered.dtype):
        raise SettingError(
            f"{setting} must be of the defended model's architecture, and the weights of {checkpoint!r} give "
            f"other logits in it ({100 * off:.2g}% off), since its config.json has other settings. Name the model that "
            "the defense started from, or leave it out."
        )


def weights_of(defense: Defense, checkpoint: str, setting: str) -> Weights:
    """The weights of another model of this architecture, under the names of ``named_parameters``, by shard; no adapters'.

    Memory: one copy of the model, and one more on the first rank while it is read.

    Args:
        checkpoint: a hub id, a folder or a GGUF file.
        setting: that named it, for errors.

    Raises:
        ValueError: ``checkpoint`` is of another architecture.
    """
    theirs = read_other(partial(load_model, checkpoint, defense.backbone.dtype), defense.shard_mesh())
    plain, own = _names_in(defense, theirs, checkpoint, setting), dict(defense.model.named_parameters())
    return {
        f"model.{name}": shard_of(theirs.parameters[key], own[name], source=0).to(own[name].device) for name, key in plain.items()
    }


def _names_in(defense: Defense, theirs: OtherModel, checkpoint: str, setting: str) -> dict[str, str]:
    """By the name of every parameter here but an adapter's: its name in another model, which must be of this architecture."""
    plain, own = plain_names(defense.model), {name: p.shape for name, p in defense.model.named_parameters()}
    shapes = {(name, w.shape) for name, w in theirs.parameters.items()}
    _require_same_shapes({(key, own[name]) for name, key in plain.items()}, shapes, checkpoint, setting)
    return plain


def check_other(defense: Defense, checkpoint: str, setting: str) -> None:
    """Make sure, from sizes alone, that ``undefended_at`` or ``weights_of`` will find a model of this architecture.

    Args:
        checkpoint: a hub id, a folder or a GGUF file.
        setting: that names it, for errors.

    Raises:
        SettingError: ``checkpoint`` is of another architecture.
        OSError: it is not there, or has no weights.
    """
    folder = Path(checkpoint)
    if (folder / "adapter_config.json").exists():
        return  # of the base's sizes, and looked at when it is read
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        ours = load_model(defense.checkpoint, random_weights=True, sizes=defense.backbone.sizes)
        theirs = load_model(checkpoint, random_weights=True)
    if folder.is_dir() and not any(path for pattern in WEIGHT_FILES for path in folder.glob(pattern)):
        raise FileNotFoundError(
            f"{setting} must hold weights, and {checkpoint!r} has none. Name the model that the defended one was made from."
        )
    own, other = ({(name, p.shape) for name, p in model.named_parameters()} for model in (ours, theirs))
    _require_same_shapes(own, other, checkpoint, setting)


def _require_same_shapes(
    own: set[tuple[str, torch.Size]], other: set[tuple[str, torch.Size]], checkpoint: str, setting: str
) -> None:
    """Raise a SettingError where the parameters of ``checkpoint``, by name and shape, are not the defended model's."""
    if unlike := sorted(own ^ other):
        name, shape = unlike[0]
        which = "the defended model" if unlike[0] in own else repr(checkpoint)
        raise SettingError(
            f"{setting} must be of the defended model's architecture, and {which} alone has {name} of shape {list(shape)}. "
            "Name the model that the defended one was made from."
        )
