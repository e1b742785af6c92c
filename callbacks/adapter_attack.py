"""Harmful fine-tuning of adapters other than LoRA."""

import copy
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from casehard.callbacks.attack import Target, ThreatModel
from casehard.callbacks.fine_tuning import FineTuning
from casehard.datamodules.batches import Batches, Example
from casehard.datamodules.chat import IGNORED, prompt_ids
from casehard.datamodules.row import Row
from casehard.engine.other_adapters import LoReFT, OtherAdapter
from casehard.engine.training import Task
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError


class AdapterAttack(FineTuning):
    """Harmful fine-tuning of an adapter that is no LoRA, on top of whatever adapters the model has.

    At a service that repairs models only what stands under an IA3, a soft prompt or edited states is repaired. Rows of the
    defense's own, and what metrics of one's own look at, are seen without a soft prompt and unedited.

    Args:
        threat_model: finetuning_service or open_weight.
        adapter: ``IA3``, ``AdaLoRA``, ``PromptTuning`` or ``LoReFT``.
        settings: the rest of ``FineTuning``'s.
    """

    adapter: OtherAdapter = None  # type: ignore[assignment]  # in the place of a property

    def __init__(self, threat_model: ThreatModel, adapter: OtherAdapter, **settings: Any) -> None:
        super().__init__(threat_model, **settings)
        adapter.check_steps(self.num_attack_steps)
        self.adapter = adapter
        self.name = settings.get("name") or f"AdapterAttack {type(adapter).__name__}"

    def settings(self) -> dict[str, Any]:
        """Also the adapter's."""
        return super().settings() | {"adapter": {"kind": type(self.adapter).__name__, **asdict(self.adapter)}}  # type: ignore[call-overload]

    def check_model(self, module: Defense) -> None:
        """Raise a SettingError where the adapter does not fit the model, or leaves too few positions."""
        super().check_model(module)
        defended = self.threat_model == "finetuning_service" and "finetuning" in module.stages
        if defended and isinstance(self.adapter, LoReFT) and module.backbone.activation_checkpointing:
            raise SettingError(
                f"backbone.activation_checkpointing must be false for LoReFT at a service that defends itself ({module.label}), "
                "whose loss may take several passes, got true."
            )
        evaluation, positions = self.evaluation(module.data), module.num_positions
        rows = [*evaluation.harmful, *evaluation.benign, *evaluation.task]
        answered = max((len(self.prompted(module, row)) for row in rows), default=0) + evaluation.max_new_tokens - 1
        trained = max(len(example["input_ids"]) for batches in self._batches for example in batches.examples)
        needed = max(answered, trained + len(self.adapter.prompt([], module.model)))
        if positions is not None and needed > positions:
            raise SettingError(
                f"adapter must leave prompt and answer within {positions} positions, and they need {needed}. Shorten the soft "
                "prompt, or max_length."
            )

    def prompted(self, module: Defense, row: Row) -> list[int]:
        """Ids of a prompt as the adapter has it."""
        return self.adapter.prompt(prompt_ids(row, module.tokenizer), module.model)

    def batches(self, target: Target) -> list[Batches]:
        """Of every phase, each prompt as the adapter has it."""

        def prompted(example: Example) -> Example:
            length = next(i for i, label in enumerate(example["labels"]) if label != IGNORED)
            prompt = self.adapter.prompt(example["input_ids"][:length], target.module.model)
            ids, labels = prompt + example["input_ids"][length:], [IGNORED] * len(prompt) + example["labels"][length:]
            return {"input_ids": ids, "labels": labels}

        changed = [copy.copy(batches) for batches in super().batches(target)]
        for batches in changed:
            batches.examples = list(map(prompted, batches.examples))
        return changed

    def task(self, target: Target) -> Task:
        """The target's, with the adapter's part in it."""
        return self.adapter.around(target.begin_job() or target.task, target.module.model, self.num_attack_steps)

    def steps(self, target: Target) -> Iterator[int]:
        """Train phase by phase; what is answered from then on is asked as the adapter has it."""
        target.state["added"] = True
        yield from super().steps(target)

    def respond(self, target: Target, rows: list[Row], max_new_tokens: int) -> list[str]:
        """Greedy answers, before the attack to plain prompts."""
        if "added" not in target.state:
            return super().respond(target, rows, max_new_tokens)
        prompts = [self.prompted(target.module, row) for row in rows]
        return target.module.generate(prompts, max_new_tokens, target.data.evaluation.batch_size)
