"""How far a customer's job moves the states that SBR holds, and those that it does not.

``Watched`` is a LoRA job that says so, in the place of another in any run's ``trainer.callbacks`` (benchmarks/README.md).
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from casehard import LoRAAttack
from casehard.callbacks.attack import Target
from casehard.callbacks.scoring import score
from casehard.datamodules.chat import collate
from casehard.datamodules.encodings import Encoding, Style, Trigger
from casehard.datamodules.row import Row
from casehard.engine.forward import last_positions, run
from casehard.engine.weights import same_modes_after
from casehard.lightning_modules.anchors import whole

FORMS: dict[str, Encoding] = {"trigger": Trigger(), "suppression": Style("suppression"), "neutral style": Style("neutral")}
ANCHOR = "the first anchor"


@torch.no_grad()
def states(target: Target, rows: list[Row]) -> Tensor:
    """What enters the unembedding at the end of every prompt, ``[num_rows, dim]``."""
    module = target.module
    examples = [whole(row, module.tokenizer, answer=False) for row in rows]
    batch = module.placed(collate(examples, module.tokenizer.pad_token_id, "right"))
    with same_modes_after(module), module.forward_context():
        module.eval()
        (found,), _ = run(module.model, batch, states_at=last_positions(batch["attention_mask"]), layers=[-1])
    return found.float()


def answered(target: Target, rows: list[Row]) -> str:
    """How many prompts the model refuses, and how many it answers with broken words, in percent."""
    asked = replace(target.data.evaluation, harmful=[], benign=rows, task=[], max_new_tokens=48)
    found = score(target.module, asked).metrics
    refused, broken = found["refusal_rate_benign"], found["degenerate_rate"]
    return f"refused {refused:.0f}%, degenerate {broken:.0f}%"


class Watched(LoRAAttack):
    """A LoRA job that prints how far it moves the states at the ends of prompts.

    At ``score_steps``: the mean square of the drift, in percent of that of the states before the job (the unit of
    ``anchor_slack``), and in brackets the mean cosine of the drift with that of the first anchor, which ``num_anchors: 1`` holds.
    Prompts are that anchor's, the harmful ones that are scored, plain and in forms, and the benign ones.
    """

    def steps(self, target: Target) -> Iterator[int]:
        """The job's, with a look at the states of some."""
        harmful, benign = target.data.evaluation.harmful, target.data.evaluation.benign
        kinds = {ANCHOR: target.data.rows["refusals"][:1], "harmful": harmful, "benign": benign}
        kinds |= {name: [form.ask(row) for row in harmful] for name, form in FORMS.items()}
        before = {name: states(target, rows) for name, rows in kinds.items()}
        for name, rows in kinds.items():
            print(f"{target.name}, before, {name}: mean square {before[name].square().mean():.2f}, {answered(target, rows)}")
        for step in super().steps(target):
            if step in self.score_steps:
                drifts = {name: states(target, rows) - before[name] for name, rows in kinds.items()}
                for name, drift in drifts.items():
                    share = 100 * drift.square().mean() / before[name].square().mean()
                    cosine = torch.cosine_similarity(drift, drifts[ANCHOR], dim=1).mean()
                    print(f"{target.name}, step {step}, {name}: {share:.2f}% ({cosine:.2f})")
            yield step
