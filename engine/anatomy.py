"""The parts of a decoder by their role: its layers, their attention and MLP, and what writes to the residual stream."""

from typing import Literal, NamedTuple

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from casehard.engine.private import layer_classes
from casehard.engine.weights import reshard
from casehard.metrics.errors import SettingError


class Block(NamedTuple):
    """One decoder layer.

    ``attention`` and ``mlp`` are None where the layer has none, e.g. a recurrent one; of a mixture, ``mlp`` is the block of all
    experts. ``writers`` are the last matrices before the residual stream: linear layers of output size ``dim``, or the adapters
    around them, and modules that hold a stack of experts. Their outputs together are
    what the layer adds to its input, unless the architecture scales or normalises them first (Gemma 2 and 3, OLMo 2).
    """

    layer: nn.Module
    attention: nn.Module | None
    mlp: nn.Module | None
    writers: list[nn.Module]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers, sharded and adapted ones too.

    Raises:
        SettingError: the architecture does not declare its layers.
    """
    names = layer_classes(model)
    layers = _outermost(model, names)
    if not layers:
        raise SettingError(
            f"checkpoint must be of an architecture that declares its decoder layers, and {type(model).__name__} declares "
            f"{', '.join(sorted(names)) or 'none'}{' and has none of them' if names else ''}. Leave "
            "backbone.compile_backend out, set trainer.strategy to ddp, or take a method that does not look into layers."
        )
    return layers


def blocks(model: PreTrainedModel, *needed: Literal["attention", "mlp"]) -> list[Block]:
    """The decoder layers by their parts.

    Args:
        model: any causal language model of transformers; it may be sharded, compiled or have adapters.
        needed: parts that every layer must have.

    Raises:
        SettingError: the architecture does not declare its layers, or one lacks a part that is needed.
    """
    dim = model.config.get_text_config().hidden_size
    result = [Block(layer, *_parts(layer), _writers(layer, dim)) for layer in decoder_layers(model)]
    for number, block in enumerate(result):
        for part in needed:
            if getattr(block, part) is None:
                raise SettingError(
                    f"every decoder layer must have {'an attention' if part == 'attention' else 'an MLP'} for this method, and "
                    f"layer {number} of {type(model).__name__} has none. Take another checkpoint, or another method."
                )
    return result


def residual_parameters(model: PreTrainedModel) -> list[tuple[Tensor, int]]:
    """Every parameter that writes to the residual stream, once, and which of its dimensions is the stream's.

    Embeddings of tokens and of learned positions; the writers' matrices and biases, and the second factors of their adapters.
    Sharded parameters come as shards.

    Raises:
        ValueError: the architecture does not declare its layers.
    """
    reshard(model)
    dim = model.config.get_text_config().hidden_size
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.embedding_dim == dim]
    written: list[tuple[Tensor, int]] = [(weight, 1) for weight in embeddings]
    for block in blocks(model):
        written += [pair for writer in block.writers for pair in written_by(writer, dim)]
    return list({id(p): (p, axis) for p, axis in written}.values())


def written_by(writer: nn.Module, dim: int) -> list[tuple[Tensor, int]]:
    """The parameters of a writer that end in the residual stream, and the stream's dimension of each."""
    if isinstance(writer, LoraLayer):
        return [pair for part in (writer.base_layer, *writer.lora_B.values()) for pair in written_by(part, dim)]
    if isinstance(writer, nn.Linear | Conv1D):
        return [(p, 1 if p.ndim == 2 and isinstance(writer, Conv1D) else 0) for p in writer.parameters(recurse=False)]
    stacks = dict(writer.named_parameters(recurse=False))  # [experts, ...]
    others = [p for name, p in stacks.items() if "down" not in name and p.ndim == 3]
    square = 2 if any(p.shape[1] == dim for p in others) else 1  # what tells where the matrices that read are as wide inside
    written = [p for name, p in stacks.items() if "down" in name and dim in p.shape[1:]]
    return [(p, square if p.shape[1:] == (dim, dim) else 1 + p.shape[1:].index(dim)) for p in written]


def final_norm(model: PreTrainedModel) -> nn.Module:
    """What normalises the states between the last decoder layer and the unembedding.

    Raises:
        ValueError: no norm stands beside the layers.
    """
    last = decoder_layers(model)[-1]
    lists = [module for module in model.modules() if any(child is last for child in module.children())]
    beside = [child for module in model.modules() if lists[0] in module.children() for child in module.children()]
    norms = [child for child in beside if "Norm" in type(child).__name__]
    if not norms:
        raise ValueError(
            f"checkpoint must be of an architecture with a norm after its layers for a logit lens, and {type(model).__name__} "
            "has none. Take another checkpoint, or another method."
        )
    return norms[-1]


def is_linear(layer: nn.Module) -> bool:
    """Whether it does what a linear layer does: a router, which also chooses, may be a subclass of one."""
    return type(layer).forward in (nn.Linear.forward, Conv1D.forward)


_ATTENTION = ("Attention", "Attn")
_MLP = ("MLP", "Mlp", "FeedForward", "FFN", "MoE", "Moe", "MOE")


def _outermost(module: nn.Module, names: frozenset[str]) -> list[nn.Module]:
    """Modules of a class of these names, or made from one: FSDP2 puts a class of its own in front. None inside another."""
    if any(cls.__name__ in names for cls in type(module).__mro__):
        return [module]
    return [layer for child in module.children() for layer in _outermost(child, names)]


def _parts(layer: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The attention and the MLP: children with matrices whose classes are called so."""
    children = [child for child in layer.children() if any(p.ndim > 1 for p in child.parameters())]
    attention = [child for child in children if any(name in type(child).__name__ for name in _ATTENTION)]
    mlp = [child for child in children if child not in attention and any(name in type(child).__name__ for name in _MLP)]
    return next(iter(attention), None), next(iter(mlp), None)


def _writers(layer: nn.Module, dim: int) -> list[nn.Module]:
    """Of every group of matrices with one parent, the last that ends in the residual stream."""
    if isinstance(layer, LoraLayer):  # what is inside is the adapter's
        return []
    children = list(layer.children())
    inside = [writer for child in children for writer in _writers(child, dim)]
    return inside + [child for child in children if _writes(child, dim)][-1:]


def _writes(module: nn.Module, dim: int) -> bool:
    plain = module
    while isinstance(plain, LoraLayer):
        plain = plain.base_layer
    if isinstance(plain, nn.Linear | Conv1D):
        return (plain.nf if isinstance(plain, Conv1D) else plain.out_features) == dim
    return any(p.ndim == 3 and dim in p.shape[1:] for p in plain.parameters(recurse=False)) and "Experts" in type(plain).__name__
