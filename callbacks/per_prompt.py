"""Base of attacks that leave the weights alone and optimise something for every harmful prompt."""

from collections.abc import Iterator

from casehard.callbacks.attack import Attack, Target
from casehard.datamodules.batches import Batch
from casehard.datamodules.chat import IGNORED, collate, text_ids
from casehard.datamodules.row import Row
from casehard.engine.sharding import max_over_ranks
from casehard.engine.weights import NOTHING, Changes
from casehard.lightning_modules.defense import Defense


class PerPrompt(Attack):
    """Optimise something for each harmful prompt while it is answered, by the rank that answers it. No weight changes.

    It is scored at step 0 without; benign prompts and tasks stay plain. What is optimised goes on from scoring to scoring, so
    that an attack takes ``num_attack_steps`` steps in all for every prompt. ``wall_seconds`` do not count them.

    A subclass sets ``batch_size``, prompts of a pass, and ``target_text``, the beginning of an answer that complies. It overrides
    ``optimise`` and ``answered``.
    """

    batch_size: int
    target_text: str

    def changes(self, module: Defense) -> Changes:
        """No parameter."""
        return NOTHING

    def optimise(self, target: Target, rows: list[Row], num_steps: int) -> int:
        """Take ``num_steps`` more steps for the prompts of ``rows``, and keep in ``target.state`` what came of it.

        Returns:
            Tokens that went forward and backward.
        """
        raise NotImplementedError(f"{type(self).__name__} must override optimise.")

    def aimed(self, module: Defense, prompts: list[list[int]]) -> tuple[Batch, int]:
        """Prompts with ``target_text`` as their answer, as a batch, and how many tokens these have."""
        answer = text_ids(self.target_text, module.tokenizer)
        examples = [{"input_ids": p + answer, "labels": [IGNORED] * len(p) + answer} for p in prompts]
        batch = module.placed(collate(examples, module.tokenizer.pad_token_id, "right"))
        return batch, sum(len(example["input_ids"]) for example in examples)

    def answered(self, target: Target, rows: list[Row], max_new_tokens: int) -> list[str]:
        """Answers to the prompts of ``rows``, with what was optimised in place."""
        raise NotImplementedError(f"{type(self).__name__} must override answered.")

    def steps(self, target: Target) -> Iterator[int]:
        """Say how many steps to take."""
        target.module.requires_grad_(False).eval()
        target.state["done"] = {}  # steps, by row
        for target.state["steps"] in range(1, self.num_attack_steps + 1):
            yield target.state["steps"]

    def respond(self, target: Target, rows: list[Row], max_new_tokens: int) -> list[str]:
        """Take the steps that are due, then answer."""
        scored, state = self.evaluation(target.data).harmful, target.state
        harmful = rows if set(rows) <= set(scored) and state else []
        chunks = [harmful[i : i + self.batch_size] for i in range(0, len(harmful), self.batch_size)]
        model, done = target.module.model, state.get("done", {})
        num_chunks = max_over_ranks(model, len(chunks))
        due = max_over_ranks(model, max((state["steps"] - done.get(row, 0) for row in harmful), default=0))
        for number in range(num_chunks):  # a rank that has fewer keeps step with the others
            some = chunks[number] if number < len(chunks) else scored[:1]
            num_tokens = self.optimise(target, some, due)
            target.spend(trained=num_tokens if number < len(chunks) else 0)
        if num_chunks:
            target.spend(passes=due)  # over all prompts
            done |= dict.fromkeys(harmful, state["steps"])
        respond = self.answered if harmful else super().respond
        return respond(target, rows, max_new_tokens)
