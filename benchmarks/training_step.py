"""A training step under `Defense.sft_loss` beside one under the plain `model(**batch).loss`, on the same rows.

A step is forward, backward, clipping and the optimizer, full-parameter. The learning rate is so small that no weight moves, so
that both losses are of the same weights. A GPU makes plans for every new size of a pass, which an average hides: the worst step
stands beside the median, and how many sizes there were.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import CLI
from paired import paired, spread
from torch import Tensor, nn

from casehard.datamodules.batches import Batches
from casehard.datamodules.chat import encode_rows
from casehard.datamodules.sources import read_rows
from casehard.engine.anatomy import decoder_layers
from casehard.engine.forward import Batch
from casehard.engine.optimizer import Optimizer
from casehard.engine.training import Plain, train_steps
from casehard.lightning_modules.defense import Defense
from casehard.records.files import write_whole

PRECISIONS = {"float32": False, "bfloat16": True}  # under autocast or not


class Sizes:
    """The distinct sizes in which a decoder layer gets its tokens, and of the mask beside them.

    Args:
        layer: the first one.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.seen: dict[str, set[Any]] = {}
        self.whose, self.new = "", False
        layer.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        size = (tuple(args[0].shape), tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__)
        self.new |= size not in self.seen[self.whose]
        self.seen[self.whose].add(size)

    def watch(self, whose: str) -> None:
        """From now on, sizes are those of ``whose``."""
        self.whose, self.new = whose, False
        self.seen.setdefault(whose, set())


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
    figures: str | None = None,
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
        figures: file that gets all figures as JSON, as they come.
    """
    module = Defense(checkpoint)
    module.configure_model()
    module.to(device)
    examples, _ = encode_rows(read_rows(rows), module.tokenizer, max_length)
    draw = Batches(examples, batch_size, seed, "benchmark", module.tokenizer.pad_token_id)
    sizes = Sizes(decoder_layers(module.model)[0])

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
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else device, "precisions": {}}
    for precision in precisions:
        losses: dict[str, list[float]] = {"plain": [], "casehard": []}
        news: dict[str, list[bool]] = {"plain": [], "casehard": []}
        sizes.seen.clear()

        def steps_of(
            name: str, loss: Callable[[Batch], Tensor], precision: str = precision, losses=losses, news=news
        ) -> Callable[[], None]:
            def context() -> torch.autocast:
                return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=PRECISIONS[precision])

            steps: Iterator[tuple[int, Any]] = train_steps(
                module, Plain(loss), batches, num_warmup + num_pairs, Optimizer(1e-12), context
            )

            def step() -> None:
                sizes.watch(name)
                losses[name].append(float(next(steps)[1]))
                news[name].append(sizes.new)

            return step

        times = paired(steps_of("plain", plain), steps_of("casehard", module.sft_loss), num_pairs, num_warmup, precision)
        found["precisions"][precision] = {
            "plain": [a for a, _ in times],
            "casehard": [b for _, b in times],
            "ratios": [b / a for a, b in times],
            "sizes": {name: len(seen) for name, seen in sizes.seen.items()},
            "new_size": {name: new[num_warmup:] for name, new in news.items()},
            "losses_apart": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)),
        }
        if figures is not None:
            write_whole(Path(figures), json.dumps(found))
    show(found)


def show(found: dict[str, Any]) -> None:
    """Print what was measured, two lines a precision."""
    print(f"{'precision':10}  {'':8}  {'s a step':26}  {'over plain':22}  {'sizes':>5}  {'steps of a new size':>19}")
    for precision, says in found["precisions"].items():
        for name in ("plain", "casehard"):
            ratio = spread(says["ratios"]) if name == "casehard" else ""
            columns = f"{spread(says[name], '.4f'):26}  {ratio:22}  {says['sizes'][name]:5}  {sum(says['new_size'][name]):19}"
            print(f"{precision if name == 'plain' else '':10}  {name:8}  {columns}")
        print(f"{'':10}  largest difference of the losses {says['losses_apart']:.1e}")


if __name__ == "__main__":
    CLI(main, as_positional=False)
