"""The attacker that a defense trains against."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from casehard.datamodules.mixing import mix
from casehard.datamodules.order import uniform
from casehard.datamodules.row import Row
from casehard.datamodules.sources import read_rows
from casehard.engine.adapters import LoRA, adapter_vector, targets, trainable
from casehard.engine.forward import Batch
from casehard.engine.optimizer import Optimizer
from casehard.engine.sharding import shard_of
from casehard.engine.training import Plain, train_steps, with_progress_bar
from casehard.engine.weights import NOTHING, Weights, attack_vector, borrowed, reshard
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError


class InnerAttack(NamedTuple):
    """An attack that is going on.

    Attributes:
        steps: takes one step of the attacker's after another, and yields how many there were.
        vector: what they have added to the weights so far (the *attack vector*), by parameter name. Memory: one copy.
    """

    steps: Iterator[int]
    vector: Callable[[], Weights]


@dataclass(frozen=True)
class InnerAttacker:
    """The attacker that the defender trains against, on the data's ``alignment_harmful`` rows unless it has its own.

    Args:
        num_inner_steps: optimizer steps of an attack, >= 0; 0 leaves the attack vector zero.
        optimizer: the attacker's own, built anew for every attack.
        batch_size: rows a step, over all processes.
        lora: train an adapter of this shape; null trains every parameter.
        poison_ratio: harmful share of the attacker's rows, in (0, 1]; the others are the data's ``alignment_benign``.
        num_samples: rows of the attacker; null takes all harmful rows, and then poison_ratio must be 1.
        harmful: sources of this attacker's own harmful rows; null takes the data's ``alignment_harmful``.
        learning_rates: lowest and highest, both > 0, between which every attack draws its own, evenly by its logarithm; null
            takes the optimizer's.
    """

    num_inner_steps: int = 300
    optimizer: Optimizer = Optimizer(learning_rate=1e-5)  # noqa: RUF009  frozen
    batch_size: int = 8
    lora: LoRA | None = None
    poison_ratio: float = 1.0
    num_samples: int | None = None
    harmful: list[str] | None = None
    learning_rates: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.num_inner_steps < 0:
            raise SettingError(f"num_inner_steps must be >= 0, got {self.num_inner_steps}. 0 is no attack.")
        for name, value in (("batch_size", self.batch_size), ("num_samples", self.num_samples)):
            if value is not None and value < 1:
                raise SettingError(f"{name} of an inner attacker must be >= 1, got {value}.")
        if not 0 < self.poison_ratio <= 1:
            raise SettingError(f"poison_ratio of an inner attacker must lie in (0, 1], got {self.poison_ratio}. It is a share.")
        if self.poison_ratio != 1 and self.num_samples is None:
            raise SettingError(f"num_samples must be set where poison_ratio is not 1, got poison_ratio {self.poison_ratio}.")
        if self.learning_rates is not None and not 0 < self.learning_rates[0] <= self.learning_rates[1]:
            raise SettingError(
                f"learning_rates of an inner attacker must be two numbers, 0 < lowest <= highest, got {self.learning_rates}. "
                "null takes the optimizer's."
            )

    def own_rows(self) -> list[Row]:
        """Harmful rows of this attacker's own sources."""
        return [row for source in self.harmful or [] for row in read_rows(source)]

    def stream(self, module: Defense, name: str) -> Callable[[int], Batch]:
        """The attacker's batch by the number of its step; ``name`` tells its draws from those of other streams.

        Raises:
            SettingError: no harmful rows; an adapter that the model cannot have.
        """
        if self.lora is not None:
            targets(module.model, self.lora)
        data = module.data
        rows = data.rows["alignment_harmful"] if self.harmful is None else self.own_rows()
        if not rows:
            raise SettingError(
                f"data.sources.alignment_harmful must name harmful rows for {module.label}'s inner attacker, got none. "
                "Give rows that no attack is measured with, or choose the settings under which there is no inner attack."
            )
        if self.num_samples is not None:
            rows = mix(data.rows["alignment_benign"], rows, self.num_samples, self.poison_ratio, data.seed)
        return module.stream(rows, self.batch_size, name)

    @contextmanager
    def attack(
        self,
        module: Defense,
        batches: Callable[[int], Batch],
        seed: int,
        first_step: int = 0,
        name: str = "Inner attack",
        device: str | None = None,
    ) -> Iterator[InnerAttack]:
        """For a block, let the attacker have ``module``, which comes back bit for bit.

        Between its steps a defense may look at the attacked model, for instance take a gradient.

        Args:
            module: what is attacked.
            batches: by step, see ``stream``.
            seed: of its adapters and dropout, and of its learning rate where that is drawn.
            first_step: of ``batches``.
            name: on the progress bar, and in front of what goes wrong.
            device: where the copy of the weights waits, such as cpu; None keeps it beside them.
        """
        names = {id(p): key for key, p in module.named_parameters()}  # adapters change them
        changes = (lambda name: "lora_" not in name) if self.lora is None else NOTHING
        module.under_attack = True
        try:
            with borrowed(module, changes, device) as start:

                def vector() -> Weights:
                    if self.lora is None:
                        return attack_vector(module, start)
                    reshard(module)
                    added = adapter_vector(module.model)
                    whole = ((names[id(p)], added[id(p)], p) for p in module.parameters() if id(p) in added)
                    return {key: shard_of(delta, p) for key, delta, p in whole}

                torch.manual_seed(seed)
                with trainable(module, module.model, self.lora):
                    steps = self._steps(module, lambda step: batches(first_step + step), name, self.optimizer_of(seed))
                    yield InnerAttack(steps, vector)
        finally:
            module.under_attack = False

    def optimizer_of(self, seed: int) -> Optimizer:
        """The optimizer of the attack with this seed: its learning rate is drawn where there are ``learning_rates``."""
        if self.learning_rates is None:
            return self.optimizer
        low, high = self.learning_rates
        return replace(self.optimizer, learning_rate=low * (high / low) ** uniform(seed, "learning rate", 0))

    def _steps(
        self, module: Defense, batches: Callable[[int], dict[str, Tensor]], name: str, optimizer: Optimizer
    ) -> Iterator[int]:
        settings = (self.num_inner_steps, optimizer, module.forward_context, module.row_group)
        steps = train_steps(module, Plain(module.sft_loss), batches, *settings)
        for step, _ in with_progress_bar(steps, self.num_inner_steps, name, module.trainer, leave=False):
            yield step
