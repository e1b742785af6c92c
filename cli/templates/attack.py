"""An attack of your own: a class, an overlay that names it, and nothing else.

    casehard test --config sbr --config my_attack.yaml

    # my_attack.yaml
    trainer:
      callbacks:
        - {class_path: mylab.my_attack.LastLayer, init_args: {threat_model: open_weight, num_attack_steps: 10}}

It borrows a model and changes it step by step; when it runs, beside which baseline, and that everything comes back is casehard's.
docs/add-an-attack.md has more examples: an edit without training, another way of answering, a variant of LoRAAttack.
"""

from dataclasses import replace

import casehard
from casehard.engine.adapters import trainable
from casehard.engine.training import Plain


def at_length(row):
    *before, (role, text) = row.messages
    return replace(row, messages=(*before, (role, f"{text} Answer at length.")))


class LastLayer(casehard.Attack):
    """Trains the last decoder layer alone, on harmful rows of its own; with open weights by a loss of its own.

    Args:
        threat_model: open_weight, or finetuning_service.
        num_attack_steps: optimizer steps.
        batch_size: rows a step, over all processes.
        optimizer: the attacker's.
        settings: the rest of ``casehard.Attack``'s: seed, score_steps, undefended, ...
    """

    def __init__(
        self,
        threat_model: str,
        num_attack_steps: int = 10,
        batch_size: int = 4,
        optimizer: casehard.Optimizer = casehard.Optimizer(learning_rate=1e-3),
        **settings,
    ) -> None:
        self.num_attack_steps, self.batch_size, self.optimizer = num_attack_steps, batch_size, optimizer
        super().__init__(threat_model, **settings)

    def rows(self, data, seed):
        """What the attacker trains on: here the data's harmful rows, each asked for at length."""
        return [at_length(row) for row in data.rows["harmful"]]

    def patterns(self, module) -> list[str]:
        """Names of the parameters that train."""
        return [f"*.layers.{module.model.config.num_hidden_layers - 1}.*"]

    def changes(self, module):
        """Of these alone a copy is taken; without this method, of everything."""
        last = self.patterns(module)[0].strip("*")
        return lambda name: last in name

    def steps(self, target):
        """Train, and yield 1, 2, ... after each step: the model is scored in between."""
        batches = target.batches(self.rows(target.data, target.seed), self.batch_size)
        task = None  # at a service the provider's defense says what is minimised
        if self.threat_model == "open_weight":
            task = Plain(lambda batch: 2 * target.module.sft_loss(batch))  # any loss of a batch
        with trainable(target.module, target.module.model, None, self.patterns(target.module)):
            yield from target.train(batches, self.num_attack_steps, self.optimizer, task)

    def settings(self):
        """What tells this attack from others in tables."""
        return {"optimizer": self.optimizer.name, "learning_rate": self.optimizer.learning_rate, "batch_size": self.batch_size}
