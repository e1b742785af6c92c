"""LoRA through peft, put in and taken out of a plain transformers model."""

import copy
import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (arXiv:2106.09685) on the linear layers of the decoder.

    Args:
        rank: of every adapter, >= 1.
        alpha: scale of the adapter's output: ``alpha / rank``, or ``alpha / sqrt(rank)`` with rslora.
        rslora: rank-stabilised scaling (arXiv:2312.03732).
        dropout: on the adapter's input, in [0, 1).
        target_modules: names of layers, such as ``q_proj``; by default every linear layer but the unembedding.
    """

    rank: int = 16
    alpha: float = 16.0
    rslora: bool = True
    dropout: float = 0.0
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be >= 1, got {self.rank}. Leave lora out to train every parameter.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("target_modules must name layers or be null, got an empty list. null adapts every linear layer.")


def linear_layers(model: PreTrainedModel) -> set[str]:
    """Last name of every linear layer but the unembedding, adapted or not: what LoRA may target."""
    head = model.get_output_embeddings()
    inside = {id(m) for layer in model.modules() if isinstance(layer, LoraLayer) for m in layer.modules() if m is not layer}
    return {
        name.rpartition(".")[2]
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D | LoraLayer) and m is not head and id(m) not in inside
    }


def add_adapter(model: PreTrainedModel, settings: LoRA, name: str) -> None:
    """Add an adapter, starting at zero, beside those that are there; all of them act, only the new one trains.

    Raises:
        ValueError: a target module that the model does not have.
    """
    layers = linear_layers(model)
    if unknown := sorted(set(settings.target_modules or []) - layers):
        raise ValueError(
            f"target_modules must name linear layers of the model, and it has no {', '.join(map(repr, unknown))}. "
            f"It has {', '.join(sorted(layers))}."
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft says int and computes with floats
        use_rslora=settings.rslora,
        lora_dropout=settings.dropout,
        target_modules=sorted(settings.target_modules or layers),
    )
    known = model.__dict__.pop("peft_config", None)  # peft's notes on the model, nothing here reads them: they stay as they were
    inject_adapter_in_model(config, model, adapter_name=name)
    model.__dict__.pop("peft_config", None)
    if known is not None:
        model.peft_config = known
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter(list(layer.lora_A))
    for parameter_name, p in model.named_parameters():
        p.requires_grad_(f".{name}." in parameter_name)


def _unwrap(model: nn.Module) -> None:
    """Put back the plain layer wherever a wrapper holds no adapter any more."""
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer) and not child.lora_A:
                setattr(parent, child_name, child.get_base_layer())


@contextmanager
def temporary_adapter(model: PreTrainedModel, settings: LoRA, name: str = "attack") -> Iterator[None]:
    """Train an adapter for the length of a block; afterwards the model is built as it was."""
    try:
        add_adapter(model, settings, name)
        yield
    finally:
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and name in layer.lora_A:
                layer.delete_adapter(name)
                layer.set_adapter(list(layer.lora_A))
        _unwrap(model)


def named(model: PreTrainedModel, patterns: list[str]) -> dict[str, nn.Parameter]:
    """The parameters of the model, adapters left out, whose names match one of ``patterns``.

    Raises:
        ValueError: a pattern that no name matches.
    """
    own = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}
    if unknown := [pattern for pattern in patterns if not fnmatch.filter(own, pattern)]:
        raise ValueError(
            f"train_only must match names of the model's parameters, and {', '.join(map(repr, unknown))} matches none. "
            f"Such a name is {next(iter(own))!r}."
        )
    return {name: p for name, p in own.items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}


@contextmanager
def trainable(
    module: nn.Module, model: PreTrainedModel, lora: LoRA | None, train_only: list[str] | None = None
) -> Iterator[None]:
    """For a block, what an attacker trains is the only thing that requires a gradient.

    Args:
        module: all of what could train.
        model: the language model in it.
        lora: shape of a new adapter, on top of whatever adapters the model has; None for every parameter of the model itself. Its
            adapters stand still then, so that the weights move as the exported model's do, into which they are merged.
        train_only: patterns of the only parameters of the model that train, where ``lora`` is None; None trains all.
    """
    if lora is not None:
        with temporary_adapter(model, lora):
            yield
        return
    chosen = None if train_only is None else {id(p) for p in named(model, train_only).values()}
    for name, p in module.named_parameters():
        p.requires_grad_("lora_" not in name and (chosen is None or id(p) in chosen))
    yield


def adapter_vector(model: PreTrainedModel, name: str = "attack") -> dict[int, Tensor]:
    """What an adapter adds to the weights under it, by the ``id`` of the weight: names change when adapters come and go."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and name in layer.lora_A]
    return {id(layer.get_base_layer().weight): layer.get_delta_weight(name).detach() for layer in layers}  # type: ignore[operator]


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its adapters added into its weights, for export: itself if it has none, else a copy (memory: one model)."""
    if not any(isinstance(m, LoraLayer) for m in model.modules()):
        return model
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.merge()
            for name in list(layer.lora_A):
                layer.delete_adapter(name)
    _unwrap(model)
    model.__dict__.pop("peft_config", None)
    model.__dict__.pop("_hf_peft_config_loaded", None)
    return model
