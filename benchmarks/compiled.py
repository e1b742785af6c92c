"""A full-parameter training step with compiled decoder layers or fused kernels beside one without, on the same rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import CLI
from paired import paired, seconds, spread

from casehard.datamodules.batches import Batches
from casehard.datamodules.chat import encode_rows
from casehard.datamodules.sources import read_rows
from casehard.engine.forward import use_layout
from casehard.engine.kernels import require_device
from casehard.engine.optimizer import Optimizer
from casehard.engine.training import Plain, StepLoss, train_steps
from casehard.lightning_modules.backbone import Backbone
from casehard.lightning_modules.defense import Defense

SANDBOX = str(Path(__file__).parent.parent / "models/sandbox/aligned")


def main(
    checkpoint: str = SANDBOX,
    rows: str = "sandbox:attacker/harmful",
    backend: str | None = "inductor",
    compile_mode: Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs"] = "default",
    kernels: Literal["liger"] | None = None,
    batch_size: int = 16,
    num_pairs: int = 20,
    num_warmup: int = 3,
    precision: Literal["float32", "bfloat16"] = "float32",
    max_length: int = 512,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Time a step of a compiled or fused model against one of a model as it is.

    Args:
        checkpoint: hub id, folder or GGUF file of a chat model.
        rows: source of chat rows, as the data's ``harmful``.
        backend: of torch.compile; null with kernels.
        compile_mode: of inductor.
        kernels: liger for fused kernels, on a CUDA device; backend must then be null.
        batch_size: rows of a step.
        num_pairs: steps of each, every one on other rows.
        num_warmup: steps before those; the first ones compile, once a size with reduce-overhead.
        precision: float32, or bfloat16 by autocast.
        max_length: tokens of a row.
        seed: of the draw.
        device: where to run.
    """

    if kernels is not None:
        require_device(torch.device(device))

    def steps_of(backbone: Backbone) -> Iterator[tuple[int, StepLoss]]:
        module = Defense(checkpoint, backbone=backbone)
        with torch.device(device):
            module.configure_model()
        use_layout(module.model, "auto", torch.bfloat16 if precision == "bfloat16" else torch.float32)
        examples, _ = encode_rows(read_rows(rows), module.tokenizer, max_length)
        draw = Batches(examples, batch_size, seed, "benchmark", module.tokenizer.pad_token_id)

        def context() -> torch.autocast:
            return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")

        num_steps, batches = 1 + num_warmup + num_pairs, lambda step: module.placed(draw(step))
        return train_steps(module, Plain(module.sft_loss), batches, num_steps, Optimizer(1e-12), context)

    plain = steps_of(Backbone())
    fast = steps_of(Backbone(compile_backend=backend, compile_mode=compile_mode, kernels=kernels))
    next(plain)
    first = seconds(lambda: next(fast))
    times = paired(lambda: next(plain), lambda: next(fast), num_pairs, num_warmup, precision)
    name = kernels or f"{backend}, {compile_mode}"
    print(f"{precision} on {torch.cuda.get_device_name() if device.startswith('cuda') else device}")
    print(f"{'first step':28}  {first:.0f} s, {name}")
    print(f"{'a step':28}  {spread((1000 * a for a, _ in times), '.0f')} ms")
    print(f"{name:28}  {spread((1000 * b for _, b in times), '.0f')} ms")
    print(f"{'ratio':28}  {spread(b / a for a, b in times)}")


if __name__ == "__main__":
    CLI(main, as_positional=False)
