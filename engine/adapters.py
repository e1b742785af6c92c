"""What an attacker may add to a model and train in the place of its parameters; and LoRA, through peft."""

import copy
import fnmatch
import inspect
import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer, ParamWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from casehard.engine.anatomy import is_linear
from casehard.engine.private import forget_adapters, parameters_of
from casehard.engine.sharding import shard_of
from casehard.engine.weights import local, reshard
from casehard.metrics.errors import SettingError


class Adapter(Protocol):
    """What trains in the place of a model's own parameters; these stand still."""

    def check(self, model: PreTrainedModel) -> None:
        """Raise a SettingError where it does not fit the model."""

    def added(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """For a block, let it act in the model, and be all that requires a gradient; afterwards the model is built as it was.

        The model may be sharded or have adapters of its own. Every rank must draw the same from torch's generator.
        """
        ...

    def described(self, model: PreTrainedModel) -> str:
        """What trains, in one line, inside the block."""
        ...


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (arXiv:2106.09685) on the weight matrices of the decoder.

    Args:
        rank: of every adapter, of every expert's too, >= 1.
        alpha: scale of the adapter's output: ``alpha / rank``, or ``alpha / sqrt(rank)`` with rslora.
        rslora: rank-stabilised scaling (arXiv:2312.03732).
        dropout: on the adapter's input, in [0, 1); 0 where experts are adapted.
        target_modules: names of layers, or ends of names, such as ``q_proj``, ``experts.down_proj`` or
            ``model.layers.0.mlp.down_proj``; by default every linear layer but the unembedding, and all experts.
        frozen_a: draw the first factor from N(0, 1 / its inputs) and leave it there, so that every matrix moves within ``rank``
            random directions of its input. ``alpha: RANK`` with ``rslora: false`` gives the scale 1.
    """

    rank: int = 16
    alpha: float = 16.0
    rslora: bool = True
    dropout: float = 0.0
    target_modules: list[str] | None = None
    frozen_a: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SettingError(f"rank must be >= 1, got {self.rank}. Leave lora out to train every parameter.")
        if not 0 <= self.dropout < 1:
            raise SettingError(f"dropout must lie in [0, 1), got {self.dropout}.")
        if self.target_modules is not None and not self.target_modules:
            raise SettingError("target_modules must name layers or be null, got an empty list. null adapts every linear layer.")

    def check(self, model: PreTrainedModel) -> None:
        """Raise a SettingError where it does not fit the model."""
        targets(model, self)

    def added(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """For a block, a new adapter on top of whatever adapters the model has."""
        return temporary_adapter(model, self)

    def described(self, model: PreTrainedModel) -> str:
        """As ``adapted``."""
        return adapted(model)


# ---- what can be adapted


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of the decoder, or an experts' stack of them.

    ``name`` is the layer's, in the plain model; that of the parameter where the layer is no linear one. ``still`` says why no
    adapter can act on it, "" where one can.
    """

    name: str
    layer: nn.Module
    parameter: str
    still: str

    @property
    def weight(self) -> nn.Parameter:
        """The parameter itself."""
        return getattr(self.layer, self.parameter)  # type: ignore[no-any-return]

    @property
    def transposed(self) -> bool:
        """Whether the weight is ``[in, out]``, as GPT-2 has it, and not ``[out, in]``."""
        return isinstance(self.layer, Conv1D)

    @property
    def short(self) -> str:
        """The end of the name by which all layers of the decoder have it; a number alone says nothing."""
        last = self.name.split(".")
        return ".".join(last[-2:] if last[-1].isdigit() or not is_linear(self.layer) else last[-1:])

    def named(self, name: str) -> bool:
        """Whether ``name`` is its name or the end of it."""
        return f".{self.name}".endswith(f".{name}")


def matrices(model: PreTrainedModel) -> list[Matrix]:
    """Every weight matrix of the decoder, adapted or not: all parameters of two dimensions and more but the (un)embeddings'."""
    head, above, result = model.get_output_embeddings(), _above(model), []
    for full_name, layer in model.named_modules():
        if layer is head or isinstance(layer, nn.Embedding) or "lora_" in full_name:
            continue
        name = full_name.replace(".base_layer", "")
        for parameter, weight in layer.named_parameters(recurse=False):
            if weight.ndim >= 2 and "bias" not in parameter:
                matrix = name if is_linear(layer) else f"{name}.{parameter}"
                result.append(Matrix(matrix, layer, parameter, _why_still(layer, weight, *_outside(layer, above))))
    return result


def _above(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """By the ``id`` of a module: its parent, and its name there."""
    return {id(child): (parent, name) for parent in model.modules() for name, child in parent.named_children()}


def _outside(layer: nn.Module, above: dict[int, tuple[nn.Module, str]]) -> tuple[nn.Module, str]:
    """The parent of a layer, and its name there, around all wrappers of its adapters."""
    parent, name = above.get(id(layer), (layer, ""))  # the model itself may hold a parameter
    while isinstance(parent, LoraLayer):
        parent, name = above[id(parent)]
    return parent, name


def _why_still(layer: nn.Module, weight: Tensor, parent: nn.Module, name: str) -> str:
    if name in _read_past_forward(type(parent)):  # type: ignore[arg-type]  # mypy finds a class without a hash
        return f"{type(parent).__name__} reads its weight past its forward pass"
    stack = "Experts" in type(layer).__name__ and weight.ndim == 3 and len(weight) > 1
    return "" if stack or is_linear(layer) else f"{type(layer).__name__} is no linear layer"


@cache
def _read_past_forward(kind: type[nn.Module]) -> frozenset[str]:
    """Names of a module's layers whose weight its code reads by itself, e.g. for a fused kernel: an adapter there does nothing.

    Reading a slice is left to ``pretraining_tp`` above 1, which nothing here sets.
    """
    names: set[str] = set()
    for cls in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        try:
            code = inspect.getsource(cls)
        except (OSError, TypeError):  # made while running, such as FSDP2's; what it is made from follows
            continue
        code = re.sub(r"init\.\w+\(.*|isinstance\(.*?\)", "", code)
        names |= set(re.findall(r"self\.(\w+)\.weight\b(?!\[|\.(?:data|device|dtype|ndim|requires_grad|shape|size)\b)", code))
    return frozenset(names)


def targets(model: PreTrainedModel, settings: LoRA) -> list[Matrix]:
    """What LoRA of these settings adapts.

    Raises:
        SettingError: a target module that the model does not have or that cannot be adapted; dropout on experts.
    """
    every = matrices(model)
    able = [m for m in every if not m.still]
    names = settings.target_modules
    for name in names or []:
        if any(m.named(name) for m in able):
            continue
        if why := next((m.still for m in every if m.named(name)), ""):
            raise SettingError(
                f"target_modules must name layers that an adapter can act on, got {name!r}: {why}. "
                f"Leave it out, or attack with every parameter. {_has(able)}"
            )
    if unknown := [name for name in sorted(set(names or [])) if not any(m.named(name) for m in able)]:
        raise SettingError(
            f"target_modules must name linear layers of the model, and it has no {', '.join(map(repr, unknown))}. {_has(able)}"
        )
    chosen = able if names is None else [m for m in able if any(m.named(name) for name in names)]
    if not chosen:
        raise SettingError("lora must be null for a model without linear layers, got a rank. null trains every parameter.")
    if settings.dropout and (stacks := sorted({m.short for m in chosen if not is_linear(m.layer)})):
        raise SettingError(
            f"dropout of lora must be 0 where experts are adapted, got {settings.dropout}: {', '.join(stacks)} are one parameter "
            "a layer, whose input an adapter does not see. Set it to 0, or name other layers in target_modules."
        )
    return chosen


def _has(able: list[Matrix]) -> str:
    return f"It has {', '.join(sorted({m.short for m in able}))}."


# ---- in and out


class StackWrapper(ParamWrapper):
    """peft's adapter of experts that are one parameter. It takes that out of their layer for every pass, and puts it back last.

    Here it keeps its place, and ``torch.compile`` stays out: it would compile the taking out and putting back anew every time.
    """

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As peft's."""
        parameters = parameters_of(self.get_base_layer())
        names = list(parameters)
        try:
            return super().forward(*args, **kwargs)
        finally:
            for name in names:
                parameters[name] = parameters.pop(name)


def add_adapter(model: PreTrainedModel, settings: LoRA, name: str) -> None:
    """Add an adapter, starting at zero, beside those that are there; all of them act, only the new one trains.

    Raises:
        SettingError: as ``targets`` does.
    """
    chosen, above = targets(model, settings), _above(model)
    for matrix in chosen:  # by hand: peft's own injection renames targets as transformers 4 had them, and doubles some ranks
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft says int and computes with floats
            use_rslora=settings.rslora,
            lora_dropout=settings.dropout,
            fan_in_fan_out=matrix.transposed,
        )
        inner, (parent, place) = matrix.layer, above[id(matrix.layer)]
        while isinstance(parent, LoraLayer) and getattr(parent, "parameter_name", "weight") != matrix.parameter:
            inner, (parent, place) = parent, above[id(parent)]  # around the wrappers of other parameters of one layer
        rank, alpha = config.r, config.lora_alpha
        if isinstance(parent, LoraLayer):
            parent.update_layer(name, rank, lora_alpha=alpha, config=config)  # type: ignore[operator]
            continue
        wrapper = (
            Linear(inner, name, config, rank, alpha, is_target_conv_1d_layer=matrix.transposed)
            if is_linear(matrix.layer)
            else StackWrapper(inner, name, matrix.parameter, config, rank, alpha)
        )
        setattr(parent, place, wrapper)
        above |= {id(wrapper): (parent, place), id(inner): (wrapper, "base_layer")}
    for layer in _lora_layers(model):
        layer.set_adapter(_names(layer))
    for parameter_name, p in model.named_parameters():
        frozen = settings.frozen_a and f".lora_A.{name}." in parameter_name
        if frozen:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
        p.requires_grad_(f".{name}." in parameter_name and not frozen)
    _say(f"Adapter {name!r}: {adapted(model, name)}.")


def _lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


def _names(layer: LoraLayer) -> list[str]:
    """Of the adapters on a layer."""
    return [*layer.lora_A, *layer.lora_embedding_A]


@cache
def _say(text: str) -> None:
    """Once a run."""
    rank_zero_info(text)


def _unwrap(model: nn.Module) -> None:
    """Put back the plain layer wherever a wrapper holds no adapter any more."""
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            plain = child
            while isinstance(plain, LoraLayer) and not _names(plain):
                plain = plain.base_layer
            if plain is not child:
                setattr(parent, child_name, plain)


@contextmanager
def wrapped(model: PreTrainedModel, chosen: list[Matrix], wrap: Callable[[nn.Module, Matrix], nn.Module]) -> Iterator[None]:
    """For a block, put ``wrap(layer, matrix)`` around every layer of ``chosen``, outside the adapters that are there."""
    above = _above(model)
    places = [(*_outside(matrix.layer, above), matrix) for matrix in chosen]
    layers = [getattr(parent, place) for parent, place, _ in places]
    try:
        for (parent, place, matrix), layer in zip(places, layers, strict=True):
            setattr(parent, place, wrap(layer, matrix))
        yield
    finally:
        for (parent, place, _), layer in zip(places, layers, strict=True):
            setattr(parent, place, layer)


@contextmanager
def temporary_adapter(model: PreTrainedModel, settings: LoRA, name: str = "attack") -> Iterator[None]:
    """Train an adapter for the length of a block; afterwards the model is built as it was."""
    try:
        add_adapter(model, settings, name)
        yield
    finally:
        for layer in _lora_layers(model):
            if name in _names(layer):
                layer.delete_adapter(name)
                layer.set_adapter(_names(layer))
        _unwrap(model)


def plain_names(model: nn.Module) -> dict[str, str]:
    """By the name of every parameter but an adapter's: its name in a model without adapters."""
    return {name: name.replace(".base_layer", "") for name, _ in model.named_parameters() if "lora_" not in name}


def named(model: PreTrainedModel, patterns: list[str]) -> dict[str, nn.Parameter]:
    """The parameters of the model, adapters left out, whose names match one of ``patterns``.

    Raises:
        SettingError: a pattern that no name matches.
    """
    plain = plain_names(model)
    parameters = {plain[name]: p for name, p in model.named_parameters() if name in plain}
    if unknown := [pattern for pattern in patterns if not fnmatch.filter(parameters, pattern)]:
        raise SettingError(
            f"train_only must match names of the model's parameters, and {', '.join(map(repr, unknown))} matches none. "
            f"Such a name is {next(iter(parameters))!r}."
        )
    return {name: p for name, p in parameters.items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Let the adapters that are there act as if they were merged: the model that is released drops nothing of them."""
    held = [(layer.lora_dropout, name, drop) for layer in _lora_layers(model) for name, drop in layer.lora_dropout.items()]
    try:
        for dropouts, name, _ in held:
            dropouts[name] = nn.Identity()
        yield
    finally:
        for dropouts, name, drop in held:
            dropouts[name] = drop


@contextmanager
def trainable(
    module: nn.Module, model: PreTrainedModel, adapter: Adapter | None, train_only: list[str] | None = None
) -> Iterator[None]:
    """For a block, what an attacker trains is the only thing that requires a gradient.

    The adapters that the model has stand still then, and drop nothing of their input, so that the weights move as the exported
    model's do, into which they are merged.

    Args:
        module: all of what could train.
        model: the language model in it.
        adapter: what is added and trains, such as a new ``LoRA``; None for every parameter of the model itself.
        train_only: patterns of the only parameters of the model that train, where ``adapter`` is None; None trains all.
    """
    reshard(module)  # flags and adapters belong to shards, not to what a pass has put together
    with _without_dropout(model):
        if adapter is not None:
            with adapter.added(model):
                yield
            return
        chosen = None if train_only is None else {id(p) for p in named(model, train_only).values()}
        for name, p in module.named_parameters():
            p.requires_grad_("lora_" not in name and (chosen is None or id(p) in chosen))
        yield


# ---- what it comes to


def adapted(model: PreTrainedModel, name: str = "attack") -> str:
    """What an adapter is on, in one line: matrices, their share of the decoder's weights, parameters, and what stands still."""
    share, still = coverage(model, name)
    layers = [layer for layer in _lora_layers(model) if name in layer.lora_A]
    ranks = sorted({layer.r[name] for layer in layers})
    trained = sum(p.numel() for n, p in model.named_parameters() if f".{name}." in n and p.requires_grad)
    return (
        f"LoRA r{'/'.join(map(str, ranks))} on {len(layers)} of {len(matrices(model))} weight matrices "
        f"({share:g}% of the decoder); {grouped(trained)} parameters" + (f"; not on {', '.join(still)}" if still else "")
    )


def coverage(model: PreTrainedModel, name: str = "attack") -> tuple[float, list[str]]:
    """Share of the decoder's weights that an adapter is on, in percent, rounded down; and the names of what it is not on."""
    on = {id(_weight(layer)) for layer in _lora_layers(model) if name in layer.lora_A}
    every = matrices(model)
    covered, total = (sum(m.weight.numel() for m in some) for some in ([m for m in every if id(m.weight) in on], every))
    return math.floor(1000 * covered / total) / 10, sorted({m.short for m in every if id(m.weight) not in on})


def what_trains(module: nn.Module, model: PreTrainedModel, adapter: Adapter | None) -> str:
    """What an attacker trains, in one line, inside ``trainable``: for the rows of results."""
    if adapter is not None:
        return adapter.described(model)
    base = [p for name, p in module.named_parameters() if "lora_" not in name]
    trained, total = (sum(p.numel() for p in some) for some in ([p for p in base if p.requires_grad], base))
    return f"all {grouped(total)} parameters" if trained == total else f"{grouped(trained)} of {grouped(total)} parameters"


def grouped(number: int) -> str:
    """With a space at every thousand: a comma is the table's own."""
    return f"{number:,}".replace(",", " ")


def _weight(layer: LoraLayer) -> nn.Parameter:
    """The parameter under a wrapper."""
    return layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight  # type: ignore[return-value]


def adapter_vector(model: PreTrainedModel, name: str = "attack") -> dict[int, Tensor]:
    """What an adapter adds to the weights under it, by the ``id`` of the weight: names change when adapters come and go."""
    layers = [layer for layer in _lora_layers(model) if name in layer.lora_A]
    return {id(_weight(layer)): layer.get_delta_weight(name).detach() for layer in layers}  # type: ignore[attr-defined]


def added_to(model: nn.Module, weight: Tensor) -> Tensor | float:
    """What all adapters together add to a weight, the whole of it; 0 where there is none."""
    layers = [layer for layer in _lora_layers(model) if _weight(layer) is weight]
    parts = [layer.get_delta_weight(name).detach() for layer in layers for name in _names(layer)]  # type: ignore[attr-defined]
    return sum(part.full_tensor() if isinstance(part, DTensor) else part for part in parts)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its adapters added into its weights, for export: itself if it has none, else a copy (memory: one model)."""
    if not _lora_layers(model):
        return model
    model = copy.deepcopy(model)
    for layer in _lora_layers(model):
        layer.merge()
        for name in _names(layer):
            layer.delete_adapter(name)
    _unwrap(model)
    forget_adapters(model)
    return model


# ---- out of the way, for a while


def second_factor(layer: LoraLayer, name: str) -> Tensor:
    """The factor without which an adapter adds nothing, of LoRA and AdaLoRA."""
    factor = layer.lora_B[name]
    return factor if isinstance(factor, Tensor) else factor.weight  # type: ignore[return-value]


@torch.no_grad()
def fold_adapters(model: PreTrainedModel) -> None:
    """Add what every adapter does to the weights under it, in place and shard by shard, and set the adapter to do nothing."""
    reshard(model)
    for layer in _lora_layers(model):
        weight = _weight(layer)
        for name in _names(layer):
            local(weight).add_(shard_of(layer.get_delta_weight(name).detach(), weight))  # type: ignore[attr-defined]
            local(second_factor(layer, name)).zero_()


@contextmanager
def plain_layers(model: PreTrainedModel) -> Iterator[None]:
    """For a block, take adapters out: plain layers under the names of a model without any. They do nothing in the block."""
    taken = []
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer) and not isinstance(parent, LoraLayer):
                taken.append((parent, child_name, child))
                plain: nn.Module = child
                while isinstance(plain, LoraLayer):
                    plain = plain.base_layer
                setattr(parent, child_name, plain)
    try:
        yield
    finally:
        for parent, child_name, child in taken:
            setattr(parent, child_name, child)


@contextmanager
def training_adapters_off(model: PreTrainedModel) -> Iterator[None]:
    """For a block, switch off the adapters that train; others act on."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    layers = _lora_layers(model)
    try:
        for layer in layers:
            layer.set_adapter([name for name in _names(layer) if not second_factor(layer, name).requires_grad])
        yield
    finally:
        for layer in layers:
            layer.set_adapter(_names(layer))
        for p, flag in flags:
            p.requires_grad_(flag)
