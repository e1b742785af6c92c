"""A training step under `Defense.sft_loss` beside one under the plain `model(**batch).loss`, on the same rows.

A step is forward, backward, clipping and the optimizer, full-parameter. The learning rate is so small that no weight moves, so
that both losses are of the same weights.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jsonargparse import CLI
from paired import paired, spread
from torch import Tensor

from casehard.datamodules.batches import Batches
from casehard.datamodules.chat import encode_rows
from casehard.datamodules.sources import read_rows
from casehard.engine.forward import Batch
from casehard.engine.optimizer import Optimizer
from casehard.engine.training import Plain, StepLoss, train_steps
from casehard.lightning_modules.defense import Defense

PRECISIONS = {"float32": False, "bfloat16": True}  # under autocast or not


def main(
    checkpoint: str,
    rows: str,
    batch_size: int = 8,
    num_pairs: int = 8,
    num_warmup: int = 1,
    precisions: list[Literal["float32", "bfloat16"]] = ["float32", "bfloat16"],  # noqa: B006
    max_length: int = 512,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Time a training step against the plain one.

    Args:
        checkpoint: hub id, folder or GGUF file of a chat model.
        rows: source of chat rows, as the data's ``benign``.
        batch_size: rows of a step.
        num_pairs: steps of each, every one on other rows.
        num_warmup: steps before those.
        precisions: float32, or bfloat16 by autocast.
        max_length: tokens of a row.
        seed: of the draw.
        device: where to run.
    """
    module = Defense(checkpoint)
    module.configure_model()
    module.to(device)
    examples, _ = encode_rows(read_rows(rows), module.tokenizer, max_length)
    draw = Batches(examples, batch_size, seed, "benchmark", module.tokenizer.pad_token_id)

    def batches(step: int) -> Batch:
        return {name: tensor.to(device) for name, tensor in draw(step).items()}

    def plain(batch: Batch) -> Tensor:
        return module.model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss

    drawn = [draw(step) for step in range(num_warmup, num_warmup + num_pairs)]
    tokens = {
        "padded": [b["input_ids"].numel() for b in drawn],
        "real": [int(b["attention_mask"].sum()) for b in drawn],
        "learnt": [int(b["num_labels"]) for b in drawn],
    }
    print(f"tokens of {batch_size} rows: " + ", ".join(f"{spread(n, '.0f')} {name}" for name, n in tokens.items()))
    print(f"{'precision':10}  {'plain, s':24}  {'casehard, s':24}  {'ratio':24}  largest difference of the losses")
    for precision in precisions:
        losses: dict[str, list[float]] = {"plain": [], "casehard": []}

        def step(name: str, loss: Callable[[Batch], Tensor], precision: str = precision, losses=losses) -> Callable[[], None]:
            def context() -> torch.autocast:
                return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=PRECISIONS[precision])

            steps: Iterator[tuple[int, StepLoss]] = train_steps(
                module, Plain(loss), batches, num_warmup + num_pairs, Optimizer(1e-12), context
            )
            return lambda: losses[name].append(float(next(steps)[1]))

        times = paired(step("plain", plain), step("casehard", module.sft_loss), num_pairs, num_warmup, precision)
        apart = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
        columns = [spread(a for a, _ in times), spread(b for _, b in times), spread(b / a for a, b in times)]
        print(f"{precision:10}  " + "  ".join(f"{column:24}" for column in columns) + f"  {apart:.1e}")


if __name__ == "__main__":
    CLI(main, as_positional=False)
