"""A full-parameter training step with compiled decoder layers beside one without, on the same rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import CLI
from paired import paired, seconds, spread

from casehard.datamodules.batches import Batches
from casehard.datamodules.chat import encode_rows
from casehard.datamodules.sources import read_rows
from casehard.engine.forward import Batch
from casehard.engine.optimizer import Optimizer
from casehard.engine.training import Plain, StepLoss, train_steps
from casehard.lightning_modules.backbone import Backbone
from casehard.lightning_modules.defense import Defense

SANDBOX = str(Path(__file__).parent.parent / "models/sandbox/aligned")


def main(
    checkpoint: str = SANDBOX,
    rows: str = "sandbox:attacker/harmful",
    backend: str = "inductor",
    batch_size: int = 16,
    num_pairs: int = 20,
    num_warmup: int = 3,
    precision: Literal["float32", "bfloat16"] = "float32",
    max_length: int = 512,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Time a step of a compiled model against one of a model as it is.

    Args:
        checkpoint: hub id, folder or GGUF file of a chat model.
        rows: source of chat rows, as the data's ``harmful``.
        backend: of torch.compile.
        batch_size: rows of a step.
        num_pairs: steps of each, every one on other rows.
        num_warmup: steps before those; the first ones compile.
        precision: float32, or bfloat16 by autocast.
        max_length: tokens of a row.
        seed: of the draw.
        device: where to run.
    """

    def steps_of(compile_backend: str | None) -> Iterator[tuple[int, StepLoss]]:
        module = Defense(checkpoint, backbone=Backbone(compile_backend=compile_backend))
        module.configure_model()
        module.to(device)
        examples, _ = encode_rows(read_rows(rows), module.tokenizer, max_length)
        draw = Batches(examples, batch_size, seed, "benchmark", module.tokenizer.pad_token_id)

        def batches(step: int) -> Batch:
            return {name: tensor.to(device) for name, tensor in draw(step).items()}

        def context() -> torch.autocast:
            return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")

        return train_steps(module, Plain(module.sft_loss), batches, 1 + num_warmup + num_pairs, Optimizer(1e-12), context)

    plain, compiled = steps_of(None), steps_of(backend)
    next(plain)
    first = seconds(lambda: next(compiled))
    times = paired(lambda: next(plain), lambda: next(compiled), num_pairs, num_warmup, precision)
    print(f"first step, which compiles  {first:.0f} s")
    print(f"a step                      {spread((1000 * a for a, _ in times), '.0f')} ms")
    print(f"compiled                    {spread((1000 * b for _, b in times), '.0f')} ms")
    print(f"ratio                       {spread(b / a for a, b in times)}")


if __name__ == "__main__":
    CLI(main, as_positional=False)
