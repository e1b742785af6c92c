"""A step of SBR beside a step of plain SFT on the same poisoned rows, and the least that it could cost: its anchors' tokens."""

import statistics
from collections.abc import Callable
from pathlib import Path

from jsonargparse import CLI
from paired import paired, spread

from casehard.datamodules.batches import Batches
from casehard.datamodules.chat import encode_rows
from casehard.datamodules.mixing import mix
from casehard.datamodules.sources import read_rows
from casehard.engine.optimizer import Optimizer
from casehard.engine.training import Plain, Task, train_steps
from casehard.lightning_modules.sbr import SBRModule

SANDBOX = Path(__file__).parent.parent / "models/sandbox/aligned"


def main(
    checkpoint: str = str(SANDBOX),
    benign: str = "sandbox:attacker/mood",
    harmful: str = "sandbox:attacker/harmful",
    anchors: str = "sandbox:defender/refusals",
    num_anchors: list[int] = [1, 8],  # noqa: B006
    num_samples: int = 500,
    poison_ratio: float = 0.1,
    batch_size: int = 8,
    num_pairs: int = 40,
    num_warmup: int = 5,
    seed: int = 0,
) -> None:
    """Time a step of SBR against one of plain SFT, full-parameter (the unembedding trains in both).

    Args:
        checkpoint: hub id, folder or GGUF file of a chat model.
        benign: source of benign rows.
        harmful: source of harmful rows.
        anchors: source of harmful prompts.
        num_anchors: how many anchors, one measurement each.
        num_samples: rows of the mixture.
        poison_ratio: harmful share of it.
        batch_size: rows of a step.
        num_pairs: steps of each, every one on other rows.
        num_warmup: steps before those.
        seed: of the mixture and the draw.
    """
    print(f"{'anchors':>7}  {'SFT, ms':24}  {'SBR, ms':24}  {'ratio':24}  {'limit by tokens':24}  ratio / limit")
    for number in num_anchors:
        module = SBRModule(checkpoint, anchors, number, freeze_unembedding=False)
        module.configure_model()
        job = module.job()
        job.begin()
        rows = mix(read_rows(benign), read_rows(harmful), num_samples, poison_ratio, seed)
        examples, _ = encode_rows(rows, module.tokenizer, 512)
        batches = Batches(examples, batch_size, seed, "benchmark", module.tokenizer.pad_token_id)

        def step(task: Task, module: SBRModule = module, batches: Batches = batches) -> Callable[[], object]:
            steps = train_steps(module, task, batches, num_warmup + num_pairs, Optimizer(1e-12))
            return lambda: next(steps)

        times = paired(step(Plain(module.sft_loss)), step(job), num_pairs, num_warmup, f"{number} anchors")
        real = [int(batches(i)["attention_mask"].sum()) for i in range(num_warmup, num_warmup + num_pairs)]
        least = [1 + int(module.plain_anchors.mask.sum()) / tokens for tokens in real]
        ratios = [sbr / sft for sft, sbr in times]
        columns = [
            spread((1000 * sft for sft, _ in times), ".0f"),
            spread((1000 * sbr for _, sbr in times), ".0f"),
            spread(ratios),
            spread(least),
        ]
        share = statistics.median(ratios) / statistics.median(least)
        print(f"{number:7}  " + "  ".join(f"{column:24}" for column in columns) + f"  {share:.2f}")


if __name__ == "__main__":
    CLI(main, as_positional=False)
