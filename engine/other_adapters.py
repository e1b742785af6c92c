"""Adapters other than LoRA: peft's AdaLoRA and IA3, a soft prompt, edited states."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, IA3Config
from peft.tuners.adalora.layer import RankAllocator, SVDLinear
from peft.tuners.ia3.layer import Linear as IA3Linear
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from casehard.engine.adapters import LoRA, Matrix, grouped, targets, wrapped
from casehard.engine.anatomy import decoder_layers, is_linear
from casehard.engine.forward import Batch
from casehard.engine.outputs import changed_outputs
from casehard.engine.soft_tokens import marks, soft_tokens, table_shape
from casehard.engine.training import Around, Task
from casehard.metrics.errors import SettingError

NAME = "attack"


class OtherAdapter:
    """Base of the adapters here, each an ``adapters.Adapter``. They start at doing nothing, but for the soft prompt."""

    def check(self, model: PreTrainedModel) -> None:
        """Raise a SettingError where it does not fit the model."""

    def check_steps(self, num_steps: int) -> None:
        """Raise a SettingError where it cannot be trained for so many steps."""

    def added(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """For a block, let it act in the model, and be all that trains."""
        raise NotImplementedError(f"{type(self).__name__} must override added.")

    def described(self, model: PreTrainedModel) -> str:
        """Its name, and how many parameters train."""
        return f"{type(self).__name__}: {grouped(sum(p.numel() for p in model.parameters() if p.requires_grad))} parameters"

    def prompt(self, ids: Sequence[int], model: PreTrainedModel) -> list[int]:
        """What becomes of a prompt, in training and before an answer; ids beyond the vocabulary are the adapter's own."""
        return list(ids)

    def around(self, task: Task, model: PreTrainedModel, num_steps: int) -> Task:
        """``task`` with the adapter's part in it, for ``num_steps`` steps."""
        return task


@contextmanager
def alone(model: PreTrainedModel, part: nn.Module) -> Iterator[None]:
    """For a block, ``part`` is one of the model, where it is, and no other trains."""
    model.requires_grad_(False)
    model.add_module(NAME, part.to(model.device))
    try:
        yield
    finally:
        delattr(model, NAME)


def _linear(model: PreTrainedModel, names: list[str] | None) -> list[Matrix]:
    """The linear layers of these names; by default all that LoRA adapts.

    Raises:
        SettingError: names that the model has not, or of experts that are one parameter.
    """
    chosen = targets(model, LoRA(target_modules=names))
    if stacks := sorted({m.short for m in chosen if not is_linear(m.layer)}):
        raise SettingError(
            f"target_modules must name linear layers for this adapter, got {', '.join(stacks)}, which are one parameter for all "
            "experts. Name others, or attack with LoRA."
        )
    return chosen


@contextmanager
def _around_layers(model: PreTrainedModel, chosen: list[Matrix], wrap, trains: tuple[str, ...]) -> Iterator[None]:  # type: ignore[no-untyped-def]
    """``adapters.wrapped``, where parameters of the names ``trains`` are all that trains."""
    with wrapped(model, chosen, wrap):
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith(tuple(f".{kind}.{NAME}" for kind in trains)))
        yield


@dataclass(frozen=True)
class IA3(OtherAdapter):
    """(IA)^3 (arXiv:2205.05638): a factor for every entry that chosen layers put out, or take in; all begin at 1.

    Args:
        target_modules: layers that are scaled; null takes peft's for the architecture, such as keys and values, and what leads
            back from the MLP.
        feedforward_modules: those of them that are scaled on their input; null takes peft's.
    """

    target_modules: list[str] | None = None
    feedforward_modules: list[str] | None = None

    def check(self, model: PreTrainedModel) -> None:
        """Raise a SettingError where the model lacks a layer, or peft does not know the architecture."""
        _linear(model, self._names(model)[0])

    def _names(self, model: PreTrainedModel) -> tuple[list[str], list[str]]:
        kind = model.config.get_text_config().model_type
        known = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING, TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
        given = self.target_modules, self.feedforward_modules
        if None in given and kind not in known[0]:
            raise SettingError(
                f"target_modules and feedforward_modules of IA3 must be set for {kind}, which peft does not know, got null."
            )
        return tuple(theirs[kind] if ours is None else ours for ours, theirs in zip(given, known, strict=True))  # type: ignore[return-value]

    def added(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """For a block, peft's layers around those of the model."""
        names, inputs = self._names(model)

        def wrap(layer: nn.Module, matrix: Matrix) -> nn.Module:
            config = IA3Config(fan_in_fan_out=matrix.transposed)
            on_input = any(matrix.named(name) for name in inputs)
            return IA3Linear(layer, NAME, config, on_input, is_target_conv_1d_layer=matrix.transposed)

        return _around_layers(model, _linear(model, names), wrap, ("ia3_l",))


@dataclass(frozen=True)
class AdaLoRA(OtherAdapter):
    """AdaLoRA (arXiv:2303.10512): ``B diag(E) A`` on every matrix, and a budget of ranks for the entries of ``E`` that matter.

    ``loss = task_loss + orthogonality_weight * mean(norm(A A^T - 1), norm(B^T B - 1))``, a mean over all factors. After
    every step the entries of ``E`` of least importance (gradient times weight, smoothed) are set to 0, all but a budget that
    falls from ``first_rank`` to ``rank`` a matrix. peft's layers and allocator.

    Args:
        rank: a matrix, on average, in the end; >= 1.
        first_rank: in the beginning; > rank.
        alpha: scale of the output; over ``first_rank``.
        orthogonality_weight: of the term that holds the factors orthogonal, >= 0.
        warm_up_ratio: share of the steps before the budget falls.
        final_ratio: share of the steps at its end; both together < 1.
        target_modules: as for ``LoRA``.
    """

    rank: int = 8
    first_rank: int = 12
    alpha: float = 16.0
    orthogonality_weight: float = 0.5
    warm_up_ratio: float = 0.1
    final_ratio: float = 0.3
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.rank < self.first_rank:
            raise SettingError(f"rank of AdaLoRA must be >= 1 and < first_rank, got {self.rank} and {self.first_rank}.")
        if self.orthogonality_weight < 0:
            raise SettingError(f"orthogonality_weight must be >= 0, got {self.orthogonality_weight}.")
        if min(self.warm_up_ratio, self.final_ratio) < 0 or self.warm_up_ratio + self.final_ratio >= 1:
            raise SettingError(
                f"warm_up_ratio and final_ratio must be >= 0 and together < 1, got {self.warm_up_ratio} and {self.final_ratio}."
            )

    def check(self, model: PreTrainedModel) -> None:
        """Raise a SettingError where the model lacks a layer."""
        _linear(model, self.target_modules)

    def check_steps(self, num_steps: int) -> None:
        """Raise a SettingError where the budget's last step is the first one: nothing is known yet of what matters."""
        if num_steps - int(self.final_ratio * num_steps) < 2:
            raise SettingError(
                "num_attack_steps must leave AdaLoRA two steps or more before its last ones, got "
                f"{num_steps} with final_ratio {self.final_ratio}. Take more steps, or lower final_ratio."
            )

    def config(self, num_steps: int) -> AdaLoraConfig:
        """As peft has it."""
        first, last = (int(ratio * num_steps) for ratio in (self.warm_up_ratio, self.final_ratio))
        return AdaLoraConfig(init_r=self.first_rank, target_r=self.rank, tinit=first, tfinal=last, total_step=num_steps)

    def added(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """For a block, peft's layers around those of the model."""
        config = self.config(1)

        def wrap(layer: nn.Module, matrix: Matrix) -> nn.Module:
            new = SVDLinear(layer, NAME, config, self.first_rank, self.alpha)  # type: ignore[arg-type]  # peft says int
            new.fan_in_fan_out = matrix.transposed
            return new

        return _around_layers(model, _linear(model, self.target_modules), wrap, ("lora_A", "lora_B", "lora_E"))

    def around(self, task: Task, model: PreTrainedModel, num_steps: int) -> Task:
        """With the term of orthogonality, and the budget."""
        return _Budgeted(task, model, self.config(num_steps), self.orthogonality_weight)


class _Budgeted(Around):
    """A task with AdaLoRA's two parts, as peft's ``AdaLoraModel`` has them."""

    def __init__(self, task: Task, model: PreTrainedModel, config: AdaLoraConfig, weight: float) -> None:
        super().__init__(task)
        self.model, self.config, self.weight = model, config, weight
        self.allocator = RankAllocator(model, config, NAME)
        self.kept: dict[str, list[bool]] | None = None

    def loss(self, batch: Batch, step: int) -> Tensor:
        """The task's, and how far the factors are from orthogonal."""
        return super().loss(batch, step) + self.weight * orthogonality(self.model)

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Set the entries to 0 that are beyond the budget."""
        super().after_step(step, optimizer)
        for p in self.model.parameters():
            if p.requires_grad and p.grad is None:  # such as of an expert without a token, which does not matter
                p.grad = torch.zeros_like(p)
        num_done, last = step + 1, self.config.total_step - self.config.tfinal  # type: ignore[operator]
        if num_done > last:
            self.allocator.mask_using_rank_pattern(self.model, self.kept)
        else:
            _, self.kept = self.allocator.update_and_allocate(self.model, num_done, force_mask=num_done == last)


def orthogonality(model: PreTrainedModel) -> Tensor:
    """Mean of ``norm(F^T F - 1)`` over AdaLoRA's factors, whose columns ``F`` holds."""
    layers = [layer for layer in model.modules() if isinstance(layer, SVDLinear)]
    factors: Iterator[Tensor] = chain(*((layer.lora_A[NAME].T, layer.lora_B[NAME]) for layer in layers))  # type: ignore[arg-type, operator]
    with torch.autocast(model.device.type, enabled=False):
        return torch.stack([(f.T @ f - torch.eye(f.shape[1], dtype=f.dtype, device=f.device)).norm() for f in factors]).mean()


@dataclass(frozen=True)
class PromptTuning(OtherAdapter):
    """Prompt tuning (arXiv:2104.08691): one soft prompt in front of every prompt, in training and before every answer.

    It begins as tokens drawn from the vocabulary.

    Args:
        num_tokens: of the soft prompt, >= 1.
    """

    num_tokens: int = 20

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise SettingError(f"num_tokens must be >= 1, got {self.num_tokens}.")

    @contextmanager
    def added(self, model: PreTrainedModel) -> Iterator[None]:
        """For a block, ids from the end of the vocabulary on are the soft prompt."""
        size, dim = table_shape(model)
        part = nn.Module()
        part.register_buffer("tokens", torch.randint(size, (self.num_tokens,)))
        part.soft = nn.Parameter(torch.zeros(self.num_tokens, dim))
        with alone(model, part), soft_tokens(model, part.tokens, part.soft):  # type: ignore[arg-type]
            yield

    def prompt(self, ids: Sequence[int], model: PreTrainedModel) -> list[int]:
        """``ids`` behind the soft prompt."""
        size = table_shape(model)[0]
        return [*range(size, size + self.num_tokens), *ids]


@dataclass(frozen=True)
class LoReFT(OtherAdapter):
    """LoReFT (arXiv:2404.03592): edit states ``h`` of chosen layers at the ends of a prompt, ``h + R^T (W h + b - R h)``.

    The rows of ``R`` stay orthonormal. An edit is of a layer's own, and one for both ends. Tokens of answers are not edited.

    Args:
        rank: of every edit, >= 1.
        layers: whose output is edited, by number; null takes every fourth, from the third on (of fewer than 3 the last).
        first: so many tokens at a prompt's beginning, >= 0.
        last: so many at its end, >= 0, where the template has opened the answer.
    """

    # Departure: W begins as R, and b as 0, so that the model begins as it was; the authors draw W.

    rank: int = 4
    layers: list[int] | None = None
    first: int = 4
    last: int = 4

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SettingError(f"rank of LoReFT must be >= 1, got {self.rank}.")
        if min(self.first, self.last) < 0 or self.first + self.last == 0:
            raise SettingError(f"first and last must be >= 0, and not both 0, got {self.first} and {self.last}.")
        if self.layers is not None and not self.layers:
            raise SettingError("layers must name layers or be null, got an empty list. null takes every fourth.")

    def check(self, model: PreTrainedModel) -> None:
        """Raise a SettingError where the model lacks a layer, or has states of fewer entries than the rank."""
        number, dim = len(decoder_layers(model)), table_shape(model)[1]
        if self.layers is not None and not all(0 <= layer < number for layer in self.layers):
            raise SettingError(f"layers must lie between 0 and {number - 1}, got {self.layers}.")
        if self.rank > dim:
            raise SettingError(f"rank of LoReFT must be at most the width of the states, {dim}, got {self.rank}.")

    @contextmanager
    def added(self, model: PreTrainedModel) -> Iterator[None]:
        """For a block, marked tokens are edited."""
        every = decoder_layers(model)
        chosen = self.layers or list(range(2, len(every), 4)) or [len(every) - 1]
        edits = nn.ModuleList(_Edit(table_shape(model)[1], self.rank) for _ in chosen)

        def edited(number: int, states: Tensor) -> Tensor:
            return torch.where(seen.now[..., None], edits[number](states), states)

        with alone(model, edits), marks(model) as seen, changed_outputs(model, [every[layer] for layer in chosen], edited):
            yield

    def prompt(self, ids: Sequence[int], model: PreTrainedModel) -> list[int]:
        """``ids``, its first and last ones marked."""
        size, end = table_shape(model)[0], len(ids) - self.last
        return [token + size if place < self.first or place >= end else token for place, token in enumerate(ids)]


class _Edit(nn.Module):
    """``h + R^T (W h + b - R h)``, computed in float32."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.randn(dim, rank))
        self.source = nn.Linear(dim, rank)
        with torch.no_grad():
            self.source.weight.copy_(self.rotation)
            self.source.bias.zero_()

    @property
    def rotation(self) -> Tensor:
        """``R``, ``[rank, dim]``: an orthonormal base of what the columns of ``free`` span."""
        return torch.linalg.qr(self.free).Q.T

    def forward(self, states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            h, rotation = states.float(), self.rotation
            return (h + (F.linear(h, self.source.weight) - F.linear(h, rotation) + self.source.bias) @ rotation).to(states.dtype)
