"""What it costs to put the weights back after an attack, `weights.borrowed`, as a share of the attack."""

import statistics
from pathlib import Path

import torch
from jsonargparse import CLI
from paired import paired, spread

from casehard.datamodules.batches import Batches
from casehard.datamodules.chat import encode_rows
from casehard.datamodules.mixing import mix
from casehard.datamodules.sources import read_rows
from casehard.engine.optimizer import Optimizer
from casehard.engine.training import Plain, train_steps
from casehard.engine.weights import borrowed
from casehard.lightning_modules.defense import Defense

SANDBOX = Path(__file__).parent.parent / "models/sandbox/aligned"


def main(
    checkpoint: str = str(SANDBOX),
    benign: str = "sandbox:attacker/mood",
    harmful: str = "sandbox:attacker/harmful",
    num_attack_steps: int = 300,
    batch_size: int = 8,
    num_pairs: int = 20,
    num_warmup: int = 2,
    device: str = "cpu",
) -> None:
    """Time borrowing a model, copy and restore, against the steps of a full-parameter attack on it.

    Args:
        checkpoint: hub id, folder or GGUF file of a chat model.
        benign: source of benign rows.
        harmful: source of harmful rows, a tenth of the mixture.
        num_attack_steps: of the attack; its time is so many times that of a step.
        batch_size: rows of a step.
        num_pairs: how often each is timed.
        num_warmup: how often before.
        device: where to run.
    """
    module = Defense(checkpoint)
    with torch.device(device):
        module.configure_model()
    rows = mix(read_rows(benign), read_rows(harmful), 500, 0.1, seed=0)
    examples, _ = encode_rows(rows, module.tokenizer, 512)
    draw = Batches(examples, batch_size, 0, "benchmark", module.tokenizer.pad_token_id)
    steps = train_steps(
        module,
        Plain(module.sft_loss),
        lambda step: module.placed(draw(step)),
        num_warmup + num_pairs,
        Optimizer(),
    )

    def borrow() -> None:
        with borrowed(module):
            pass

    times = paired(lambda: next(steps), borrow, num_pairs, num_warmup, "pairs")
    step, back = (statistics.median(seconds) for seconds in zip(*times, strict=True))
    print(f"a step               {spread((1000 * s for s, _ in times), '.1f')} ms")
    print(f"copy and restore     {spread((1000 * s for _, s in times), '.1f')} ms")
    print(f"share of {num_attack_steps} steps   {100 * back / (num_attack_steps * step + back):.3f}%")


if __name__ == "__main__":
    CLI(main, as_positional=False)
