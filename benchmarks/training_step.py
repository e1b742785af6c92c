"""A training step under `Defense.sft_loss` beside one under the plain `model(**batch).loss`, on the same rows.

A step is forward, backward, clipping and the optimizer, full-parameter. The learning rate is so small that no weight moves, so
that both losses are of the same weights. A GPU makes plans for every new size of a pass, which an average hides: the worst step
stands beside the median, and how many sizes there were.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import CLI
from paired import paired, spread
from shapes import size_of
from torch import Tensor, nn
from transformers import PreTrainedModel

from casehard.datamodules.batches import Batches
from casehard.datamodules.chat import encode_rows
from casehard.datamodules.sources import read_rows
from casehard.engine.forward import Batch, use_layout
from casehard.engine.layouts import layout_of
from casehard.engine.optimizer import Optimizer
from casehard.engine.training import Plain, train_steps
from casehard.lightning_modules.backbone import Backbone
from casehard.lightning_modules.defense import Defense
from casehard.records.files import write_whole

PRECISIONS = {"float32": False, "bfloat16": True}  # under autocast or not


class Sizes:
    """The distinct sizes of the tokens that a model is called with, and of the mask beside them.

    Args:
        model: of transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.seen: set[Any] = set()
        self.new = False  # whether there was one since this was last set
        model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, _: nn.Module, __: object, given: dict[str, Any]) -> None:
        size = size_of(given)
        self.new |= size not in self.seen
        self.seen.add(size)


class Way:
    """A way to take training steps, one at a time.

    Args:
        module: what trains.
        loss_of: of a batch.
        batches: the batch of a step.
        num_steps: how many there will be.
        precision: of ``PRECISIONS``.
    """

    def __init__(
        self,
        module: Defense | PreTrainedModel,
        loss_of: Callable[[Batch], Tensor],
        batches: Callable[[int], Batch],
        num_steps: int,
        precision: str,
    ) -> None:
        self.losses: list[float] = []
        self.new: list[bool] = []  # whether the step had a size that was not there before
        self.sizes = Sizes(module.model if isinstance(module, Defense) else module)
        device = next(module.parameters()).device.type

        def context() -> torch.autocast:
            return torch.autocast(device, torch.bfloat16, enabled=PRECISIONS[precision])

        self._steps = train_steps(module, Plain(loss_of), batches, num_steps, Optimizer(1e-12), context)

    def step(self) -> None:
        """The next one, its loss read."""
        self.sizes.new = False
        self.losses.append(float(next(self._steps)[1]))
        self.new.append(self.sizes.new)


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
    layout: Literal["auto", "prefix_tree", "varlen", "padded"] = "auto",
    compile_backend: str | None = None,
    compile_mode: str | None = None,
    kernels: str | None = None,
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
        layout: of casehard's rows, as ``backbone.layout``.
        compile_backend: for casehard's decoder layers, as ``backbone.compile_backend``; the warm-up compiles.
        compile_mode: as ``backbone.compile_mode``; null leaves it out.
        kernels: of casehard's model, as ``backbone.kernels``; null leaves it out.
        figures: file that gets all figures as JSON, as they come.
    """
    chosen = {"compile_backend": compile_backend, "compile_mode": compile_mode, "kernels": kernels}
    backbone = Backbone(**{name: value for name, value in chosen.items() if value is not None})
    module = Defense(checkpoint, backbone=backbone)
    plain = Backbone().load(checkpoint).to(device)
    with torch.device(device):
        module.configure_model()
    examples, _ = encode_rows(read_rows(rows), module.tokenizer, max_length)
    draw = Batches(examples, batch_size, seed, "benchmark", module.tokenizer.pad_token_id)

    def sent(step: int) -> Batch:
        return {name: tensor.to(device) for name, tensor in draw(step).items()}

    def loss_of(batch: Batch) -> Tensor:
        return plain(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss

    drawn = [draw(step) for step in range(num_warmup, num_warmup + num_pairs)]
    tokens = {
        "padded": [b["input_ids"].numel() for b in drawn],
        "real": [int(b["attention_mask"].sum()) for b in drawn],
        "learnt": [int(b["num_labels"]) for b in drawn],
    }
    print(f"tokens of {batch_size} rows: " + ", ".join(f"{spread(n, '.0f')} {name}" for name, n in tokens.items()))
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else device, "precisions": {}}
    for precision in precisions:
        use_layout(module.model, layout, torch.bfloat16 if PRECISIONS[precision] else torch.float32)
        ways = {
            "plain": Way(plain, loss_of, sent, num_warmup + num_pairs, precision),
            "casehard": Way(module, module.sft_loss, lambda step: module.placed(draw(step)), num_warmup + num_pairs, precision),
        }
        times = paired(ways["plain"].step, ways["casehard"].step, num_pairs, num_warmup, precision)
        found["precisions"][precision] = {
            "plain": [a for a, _ in times],
            "casehard": [b for _, b in times],
            "ratios": [b / a for a, b in times],
            "layout": layout_of(module.model),
            "sizes": {name: len(way.sizes.seen) for name, way in ways.items()},
            "new_size": {name: way.new[num_warmup:] for name, way in ways.items()},
            "losses_apart": max(abs(a - b) for a, b in zip(*(way.losses for way in ways.values()), strict=True)),
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
        print(f"{'':10}  {says['layout']}; largest difference of the losses {says['losses_apart']:.1e}")


if __name__ == "__main__":
    CLI(main, as_positional=False)
