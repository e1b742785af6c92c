"""Fine-tuning on rows that a guard passes and whose gradient is that of harmful ones."""

from collections.abc import Iterator
from typing import Any

from casehard.callbacks.attack import Target, ThreatModel
from casehard.callbacks.direction_choice import openings
from casehard.callbacks.fine_tuning import FineTuning, Phase
from casehard.callbacks.guard import guard_of, tokenizer_of
from casehard.callbacks.hiding import Hidden, Hiding, hidden_rows, require_places
from casehard.datamodules.chat import text_ids
from casehard.datamodules.row import Row
from casehard.datamodules.sft import SFTDataModule
from casehard.engine.adapters import LoRA
from casehard.metrics.errors import SettingError


class Virus(FineTuning):
    """Virus (arXiv:2501.17433): fine-tuning on rows that a guard passes and whose gradient is that of harmful rows.

    A harmful row's prompt and answer stand between the prompt and the answer of a benign one. Their tokens are swapped one by
    one (GCG) for those that lower ``(1 - guard_weight) * -cos(g, g_harmful) - guard_weight * log p(guard passes)``, ``g`` being
    the gradient of the row's loss at the start and ``g_harmful`` that of the harmful row. The provider then drops every row,
    benign ones too, that the guard finds unsafe, and trains on the rest.

    The guard is a model that is given a row as text; it finds unsafe what it refuses. Without one of its own it is the model
    itself before it is tuned. At a service too the attacker is granted the gradients of both.

    Cost: an iteration of a row is ``num_swaps + 4`` passes of one row forward and backward, and one of the guard, and
    ``num_swaps + 1`` of it forward alone; every process makes all of them. Memory: the states of ``num_swaps + 1`` rows, and the
    guard, whole.

    Args:
        threat_model: finetuning_service, or open_weight for an attacker who filters his own rows.
        guard: checkpoint of a causal language model with this model's vocabulary; null for the model itself.
        flag: text whose first token the guard says of what is unsafe; null for the first tokens of the data's refusals.
        max_suspicion: probability of those tokens up to which a row passes, in (0, 1].
        guard_weight: in [0, 1] (lambda in the paper): 1 seeks rows that pass, whatever they teach; 0 those that teach harm.
        num_iterations: of the search, a row, >= 0; 0 leaves rows as they are.
        num_swaps: swaps that an iteration tries.
        top_k: most promising tokens of a place, from which swaps are drawn.
        mixed: whether harmful rows stand in benign ones; false swaps the tokens of the rows themselves.
        lora: shape of a new adapter; null trains every parameter.
        settings: the rest of ``FineTuning``'s, without phases.
    """

    # Departures: (1) the cosine has the norm of both gradients, the authors' that of the row's alone, which is the same order;
    # (2) gradients are of the linear maps of the last decoder layer; (3) tokens to try are found by the derivative of the cosine
    # as a difference of two passes, where a token counts as read and not as learnt, while what is tried is scored
    # exactly; (4) a swap counts only if the text that it makes is cut into the same tokens again.

    def __init__(
        self,
        threat_model: ThreatModel,
        guard: str | None = None,
        flag: str | None = None,
        max_suspicion: float = 0.5,
        guard_weight: float = 0.1,
        num_iterations: int = 50,
        num_swaps: int = 128,
        top_k: int = 64,
        mixed: bool = True,
        lora: LoRA | None = LoRA(),  # noqa: B008  frozen
        **settings: Any,
    ) -> None:
        if not 0 <= guard_weight <= 1:
            raise SettingError(f"guard_weight must lie in [0, 1], got {guard_weight}. The paper's is 0.1.")
        if not 0 < max_suspicion <= 1:
            raise SettingError(f"max_suspicion must lie in (0, 1], got {max_suspicion}. 1 passes every row.")
        if num_iterations < 0 or min(num_swaps, top_k) < 1:
            raise SettingError(
                f"num_iterations must be >= 0, num_swaps and top_k >= 1, got {num_iterations}, {num_swaps} and {top_k}."
            )
        super().__init__(threat_model, phases=None, **settings)
        self.guard, self.flag, self.max_suspicion, self.guard_weight = guard, flag, max_suspicion, guard_weight
        self.num_iterations, self.num_swaps, self.top_k, self.mixed = num_iterations, num_swaps, top_k, mixed
        self.lora = lora

    def settings(self) -> dict[str, Any]:
        """Also the guard, and the search."""
        names = ("guard", "flag", "max_suspicion", "guard_weight", "num_iterations", "num_swaps", "top_k", "mixed")
        return super().settings() | {name: value for name in names if (value := getattr(self, name)) is not None}

    def hidden(self, data: SFTDataModule, seed: int) -> list[Row | Hidden]:
        """The mixture, with harmful rows that are still to be searched."""
        return hidden_rows(data, self.num_samples, self.poison_ratio, seed, self.mixed)

    def rows(self, data: SFTDataModule, seed: int, phase: Phase | None = None) -> list[Row]:
        """The mixture as it is before the search, which leaves every row as long as it was."""
        return [row.row(row.texts) if isinstance(row, Hidden) else row for row in self.hidden(data, seed)]

    def prepare(self, data: SFTDataModule, seed: int) -> None:
        """Draw the rows, and make sure that the guard reads the model's tokens, and that they can be swapped."""
        super().prepare(data, seed)
        guards = tokenizer_of(self.guard, data.tokenizer)
        if self.num_iterations:
            require_places(self.hidden(data, seed), data.tokenizer, guards)

    def steps(self, target: Target) -> Iterator[int]:
        """Search every harmful row, let the guard filter, and train on what is left."""
        module, data, state = target.module, target.data, target.state
        module.requires_grad_(False).eval()
        guard = guard_of(self.guard, module, openings(data) if self.flag is None else text_ids(self.flag, data.tokenizer)[:1])
        search = self.guard_weight, self.num_iterations, self.num_swaps, self.top_k
        hiding = Hiding(module, guard, data.batching.max_length, *search, target.seed)
        with module.forward_context():
            state["rows"], state["passed"] = hiding.passed(self.hidden(data, target.seed), self.max_suspicion)
        target.spend(hiding.passes / self.batch_size, hiding.trained, hiding.forward, by_all=True)
        yield from self.trained(target, [data.batches(state["rows"], self.batch_size, target.seed, "attack")])

    def notes(self, target: Target) -> list[str]:
        """Also what the guard passes."""
        return [*super().notes(target), target.state["passed"]]
