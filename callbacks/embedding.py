"""An attack by soft tokens in the prompt."""

from typing import Any

import torch
from torch import Tensor

from casehard.callbacks.attack import Attack, Target, ThreatModel
from casehard.callbacks.per_prompt import PerPrompt
from casehard.datamodules.chat import suffixed_ids, text_ids
from casehard.datamodules.row import Row
from casehard.engine.soft_tokens import sign_descent, soft_tokens, table_shape
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError

FIRST = " x"  # the text whose last token every soft token begins as


class EmbeddingAttack(PerPrompt):
    """Embedding attack (soft prompt; arXiv:2402.09063): optimise soft tokens behind every harmful prompt. No weight changes.

    Behind what the user says stand ``num_tokens`` embeddings ``e``, of a prompt's own. A step is
    ``e <- e - learning_rate * sign(d loss / d e)``, ``loss`` being the cross-entropy of ``target_text`` as the answer; then the
    model answers behind them, from the first token. It is scored at step 0 without them. Benign prompts and tasks stay plain.

    Cost: a forward and a backward pass over the harmful prompts a step, while they are answered, so that ``wall_seconds`` do not
    count it. Memory: no copy of the weights, and no gradients of theirs.

    Args:
        threat_model: open_weight: only who holds the weights feeds a model embeddings.
        num_attack_steps: optimisation steps, >= 1.
        num_tokens: soft tokens of a prompt, >= 0; 0 leaves prompts plain.
        learning_rate: of a step, in every entry of an embedding.
        target_text: the beginning of an answer that complies.
        batch_size: prompts of a pass, for each process.
        settings: the rest of ``Attack``'s.
    """

    def __init__(
        self,
        threat_model: ThreatModel = "open_weight",
        num_attack_steps: int = 100,
        num_tokens: int = 20,
        learning_rate: float = 1e-3,
        target_text: str = "Sure, here is",
        batch_size: int = 32,
        **settings: Any,
    ) -> None:
        if num_attack_steps < 1 or num_tokens < 0:
            raise SettingError(f"num_attack_steps must be >= 1 and num_tokens >= 0, got {num_attack_steps} and {num_tokens}.")
        self.num_attack_steps, self.num_tokens, self.learning_rate = num_attack_steps, num_tokens, learning_rate
        self.target_text, self.batch_size = target_text, batch_size
        super().__init__(threat_model, **settings)

    def settings(self) -> dict[str, Any]:
        """What is optimised, and how."""
        own = {"num_tokens": self.num_tokens, "target_text": self.target_text, "last_step": self.num_attack_steps}
        return {"learning_rate": self.learning_rate} | own

    def check_model(self, module: Defense) -> None:
        """Raise a ValueError where the model has no positions for the soft tokens."""
        evaluation, positions = self.evaluation(module.data), module.num_positions
        needed = max(map(len, self.prompts(module, evaluation.harmful)), default=0) + evaluation.max_new_tokens - 1
        if positions is not None and needed > positions:
            raise SettingError(f"num_tokens must leave prompt and answer within {positions} positions, and they need {needed}.")

    def prompts(self, module: Defense, rows: list[Row]) -> list[list[int]]:
        """Token ids of the prompts of ``rows``, each with its own soft tokens."""
        first, num = table_shape(module.model)[0], self.num_tokens
        soft = [list(range(first + i * num, first + (i + 1) * num)) for i in range(len(rows))]
        return [suffixed_ids(row, suffix, module.tokenizer) for row, suffix in zip(rows, soft, strict=True)]

    def start(self, module: Defense, number: int) -> Tensor:
        """The ids that so many soft tokens begin as."""
        return torch.full((number,), text_ids(FIRST, module.tokenizer)[-1], device=module.device)

    def respond(self, target: Target, rows: list[Row], max_new_tokens: int) -> list[str]:
        """Take the steps that are due, then answer; plainly where there are no soft tokens."""
        return (PerPrompt if self.num_tokens else Attack).respond(self, target, rows, max_new_tokens)

    def answered(self, target: Target, rows: list[Row], max_new_tokens: int) -> list[str]:
        """Answers behind the soft tokens."""
        module, added = target.module, torch.cat([target.state["added"][row] for row in rows])
        with soft_tokens(module.model, self.start(module, len(added)), added):
            return module.generate(self.prompts(module, rows), max_new_tokens, target.data.evaluation.batch_size)

    def optimise(self, target: Target, rows: list[Row], num_steps: int) -> int:
        """As many steps of descent; what is added to the soft tokens of a row, ``[num_tokens, dim]``, stays in the state."""
        module = target.module
        batch, num_tokens = self.aimed(module, self.prompts(module, rows))

        def loss(added: Tensor) -> Tensor:
            with module.forward_context(), soft_tokens(module.model, self.start(module, len(added)), added):
                return module.sft_loss(batch)

        zeros, kept = torch.zeros(self.num_tokens, table_shape(module.model)[1]), target.state.setdefault("added", {})
        known = torch.cat([kept.get(row, zeros.to(module.device)) for row in rows])
        kept |= zip(rows, sign_descent(loss, known, num_steps, self.learning_rate).split(self.num_tokens), strict=True)
        return num_steps * num_tokens
