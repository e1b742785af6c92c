"""Plain SFT, SBR and rounds of Patcher, full-parameter, on any architecture from its sizes: speed, share of the peak, memory.

Each of the three is a `Trainer.fit` of one step that does not count and `num_steps` that do, on the same weights and rows of one
length. They take turns, so that a ratio is one of neighbours in time. Weights and tokens are random: what a step costs does not
depend on what they say.
"""

import gc
import json
import logging
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
import yaml
from clock import Clock
from jsonargparse import CLI
from paired import seconds, spread
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from tqdm import tqdm
from transformers import PreTrainedModel

from casehard import Backbone, Defense, InnerAttacker, Optimizer, PatcherModule, SandboxJudge, SBRModule, SFTDataModule
from casehard.datamodules.batches import Example
from casehard.datamodules.chat import IGNORED
from casehard.datamodules.row import Row
from casehard.datamodules.settings import Batching, Sources
from casehard.records.files import write_whole

SANDBOX = str(Path(__file__).parent.parent / "models/sandbox/aligned")
STILL = Optimizer(1e-12)  # no weight moves: every fit starts from the same ones
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
}
PEAKS = {  # dense bfloat16 in TFLOP/s, from NVIDIA's data sheets; the first pattern that is found in the name counts
    r"B200": 2250,
    r"H200|H100.*HBM3": 989,
    r"H100 NVL": 835,
    r"H100": 756,
    r"A100": 312,
    r"L40S": 362,
    r"L4$": 121,
    r"A10G?$": 125,
    r"RTX 4090": 165,
    r"RTX 3090": 71,
}


class RandomTokens(SFTDataModule):
    """Every row is ``max_length`` random tokens, of which the second half is learnt."""

    def encode(self, rows: list[Row], what: str) -> list[Example]:
        assert isinstance(self.model, Defense)
        vocabulary = self.model.model.config.get_text_config().vocab_size
        draw = torch.Generator().manual_seed(self.seed)
        length = self.batching.max_length
        asked = length // 2
        ids = torch.randint(vocabulary, (len(rows), length), generator=draw).tolist()
        return [{"input_ids": row, "labels": [IGNORED] * asked + row[asked:]} for row in ids]


class Block(NamedTuple):
    seconds: float
    peak: float  # bytes


class Meter(Clock):
    """Seconds and peak memory of the steps after the first, in which the optimizer makes its moments."""

    peak = float("nan")

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        super().on_train_batch_end(trainer, *args)
        device = trainer.strategy.root_device
        if trainer.global_step == self.start:
            forget_peak(device)
        elif trainer.global_step == trainer.max_steps:
            self.peak = peak_bytes(device)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the weights where they are, and no moments: of a large model Lightning would copy both to the CPU for seconds."""
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
        pl_module.cpu = lambda: pl_module  # type: ignore[method-assign]


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> float:
    """Most that was held since ``forget_peak``: by tensors on a CUDA device, else by this process; nan where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return float("nan")
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else float("nan")


def model_flops(model: PreTrainedModel, tokens: float, labels: float, length: int) -> float:
    """What passes forward and backward must compute: six operations a weight and token, and attention to the tokens before.

    Args:
        model: a causal one, whose unembedding is needed at labels only.
        tokens: how many pass through it.
        labels: how many of them are learnt.
        length: tokens of a row.
    """
    config = model.config.get_text_config()
    ends = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    inside = sum(p.numel() for p in model.parameters() if id(p) not in ends)
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    attention = config.num_hidden_layers * heads * length  # two products over half of a row, in the mean
    return 6.0 * (tokens * (inside + attention) + labels * model.get_output_embeddings().weight.numel())


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that matrix products reach at best, and how that is known."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if known := next((peak for pattern, peak in PEAKS.items() if re.search(pattern, name)), None):
            return known * 1e12, "data sheet"
    size = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = min([seconds(lambda: a @ b) for _ in range(6)][1:])
    return 2 * size**3 / best, f"best of 5 products of {size} x {size}"


def strategy_of(file: str) -> dict[str, Any]:
    """The trainer's settings in a file of ``experiments/cluster/``, its strategy built anew."""
    settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))["trainer"]
    module, _, name = settings["strategy"]["class_path"].rpartition(".")
    strategy = getattr(import_module(module), name)(**settings["strategy"].get("init_args", {}))
    return {**settings, "strategy": strategy}


def top_kernels(action: Callable[[], object], device: str, most: int = 10) -> tuple[float, list[dict[str, Any]]]:
    """Seconds that the device worked during ``action``, and what took most of it: kernels of a GPU, operators of a CPU.

    Operators of the host are not recorded beside a GPU: that would take longer than what is measured.
    """
    on_gpu = device == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        action()
    times = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event)
        for event in profiler.key_averages()
        if not on_gpu or event.device_type != DeviceType.CPU
    ]
    total = sum(time for time, _ in times)
    longest = sorted(times, key=lambda pair: pair[0], reverse=True)[:most]
    return total / 1e6, [
        {"name": event.key, "ms": time / 1e3, "share": time / total, "calls": event.count} for time, event in longest
    ]


def main(
    checkpoint: str = SANDBOX,
    layers: int | None = None,
    device: Literal["cuda", "cpu"] | None = None,
    precision: Literal["float32", "bf16-mixed", "bf16"] = "bf16-mixed",
    strategy: str | None = None,
    batch_size: int = 4,
    length: int = 256,
    num_steps: int = 10,
    num_inner_steps: int = 3,
    num_anchors: int = 1,
    num_blocks: int = 5,
    num_warmup: int = 1,
    beside: list[Literal["SBR", "Patcher"]] = ["SBR", "Patcher"],  # noqa: B006
    activation_checkpointing: bool = False,
    copy_device: str | None = None,
    compile_backend: str | None = None,
    compile_mode: str | None = None,
    kernels: str | None = None,
    layout: str | None = None,
    profile: bool = False,
    figures: str | None = None,
) -> None:
    """Time SFT, SBR and Patcher side by side.

    Args:
        checkpoint: folder with a config.json, such as models/sizes/qwen2_5_1_5b, or a hub id; only the sizes are read.
        layers: so many instead of the architecture's.
        device: where to run; null takes what is there.
        precision: float32; bf16-mixed: float32 weights, bfloat16 passes; bf16: bfloat16 throughout.
        strategy: file with the trainer's strategy, such as experiments/cluster/one_gpu.yaml; null is one device by itself.
        batch_size: rows of a step.
        length: tokens of a row.
        num_steps: steps of a block; Patcher's is a round of so many defender steps.
        num_inner_steps: of a round's attack; the paper has 300 to 1000 defender steps.
        num_anchors: of SBR.
        num_blocks: how many of each.
        num_warmup: how many of each before those.
        beside: what is timed beside SFT.
        activation_checkpointing: compute activations again in the backward pass.
        copy_device: where Patcher keeps what is idle, such as cpu.
        compile_backend: of torch.compile for the decoder layers, such as inductor; the warm-up compiles.
        compile_mode: of torch.compile, as ``backbone.compile_mode``; null leaves it out.
        kernels: as ``backbone.kernels``, such as liger; null leaves it out.
        layout: of the rows, as ``backbone.layout``; null takes the device's.
        profile: then print where the time of one more block of SFT goes.
        figures: file that gets all figures as JSON, as they come.
    """
    if device == "cuda" and not torch.cuda.is_available():
        print("Skipped: --device cuda needs a CUDA device, and none is here.")
        return
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = {"compile_backend": compile_backend, "compile_mode": compile_mode, "kernels": kernels, "layout": layout}
    shape: dict[str, Any] = {
        "checkpoint": checkpoint,
        "optimizer": STILL,
        "backbone": Backbone(
            random_weights=True,
            sizes={} if layers is None else {"num_hidden_layers": layers},
            tokenizer=SANDBOX,
            weights_dtype="bfloat16" if precision == "bf16" else "float32",
            activation_checkpointing=activation_checkpointing,
            **{name: value for name, value in chosen.items() if value is not None},
        ),
    }
    attacker = InnerAttacker(num_inner_steps, STILL, batch_size)
    round_of = {"attacker": attacker, "num_outer_steps": num_steps, "num_sft_steps": 1, "copy_device": copy_device}
    made: dict[str, tuple[type[Defense], dict[str, Any]]] = {
        "SFT": (Defense, {}),
        "SBR": (SBRModule, {"num_anchors": num_anchors, "freeze_unembedding": False}),  # all three train the same parameters
        "Patcher": (PatcherModule, round_of),
    }
    accelerator = torch.device(device)
    forget_peak(accelerator)
    empty = peak_bytes(accelerator)  # what the process holds without a model; nothing on a CUDA device
    peak, source = peak_flops(accelerator, torch.float32 if precision == "float32" else torch.bfloat16)
    handed_on: dict[str, Any] = {}  # from block to block, which train the same weights
    anchors = 0

    def block(kind: str) -> Block:
        nonlocal anchors
        gc.collect()  # the last block's moments hang in cycles
        sources = Sources([], refusals=["sandbox:defender/refusals"], alignment_harmful=["sandbox:defender/harmful"])
        data = RandomTokens(sources, SandboxJudge(), batching=Batching(batch_size, length), train_on="alignment")
        make, settings = made[kind]
        module = make(**shape, **settings)
        for name, value in handed_on.items():
            setattr(module, name, value)
        meter = Meter(every=num_steps, start=1)
        cluster = {"devices": 1} if strategy is None else strategy_of(strategy)
        half = "bf16-mixed" if precision == "bf16-mixed" else "32-true"
        where = cluster | {"precision": half, "accelerator": device}
        trainer = L.Trainer(max_steps=1 + num_steps, callbacks=[meter], **QUIET, **where)
        trainer.fit(module, datamodule=data)
        module.model.zero_grad()
        handed_on.update({name: getattr(module, name) for name in ("model", "empty_model") if hasattr(module, name)})
        if isinstance(module, SBRModule):
            anchors = int(module.plain_anchors.mask.sum())
        return Block(meter.seconds[0], meter.peak)  # not the meter, on which Lightning hangs the module, and that its moments

    kinds = ["SFT", *beside]
    blocks: dict[str, list[Block]] = {kind: [] for kind in kinds}
    found: dict[str, Any] = {"kinds": {}}

    def note(kind: str, one: Block) -> None:
        blocks[kind].append(one)
        model, rows = handed_on["model"], batch_size * length
        passes = {"SFT": 1.0, "SBR": 1.0, "Patcher": 2 + num_inner_steps / num_steps}[kind]
        tokens, labels = rows * passes + (anchors if kind == "SBR" else 0), passes * batch_size * (length - length // 2)
        step = statistics.median(block.seconds for block in blocks[kind]) / num_steps
        most, weights = max(block.peak for block in blocks[kind]) - empty, sum(p.numel() for p in model.parameters())
        found.update(
            model=f"{Path(checkpoint).name}: {model.config.get_text_config().num_hidden_layers} layers, "
            f"{weights / 1e6:.0f} million parameters; {precision}",
            device=torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads",
            at_best=f"{peak / 1e12:.3g} TFLOP/s ({source})",
            rows=f"{batch_size} rows of {length} tokens, anchors of {anchors} tokens",
        )
        found["kinds"].setdefault(kind, {}).update(
            seconds=[block.seconds / num_steps for block in blocks[kind]],
            over_sft=[one.seconds / plain.seconds for one, plain in zip(blocks[kind], blocks["SFT"], strict=False)],
            limit=tokens / rows,
            tokens_per_second=tokens / step,
            share_of_peak=model_flops(model, tokens, labels, length) / step / peak,
            gib=most / 2**30,
            copies=most / weights / model.dtype.itemsize,
        )
        keep()

    def keep() -> None:
        if figures is not None:
            write_whole(Path(figures), json.dumps(found))

    turns = [(number, kind) for number in range(num_warmup + num_blocks) for kind in kinds]
    for number, kind in tqdm(turns, "blocks", leave=False):
        begun = time.perf_counter()
        one = block(kind)
        found.setdefault("first_block", time.perf_counter() - begun)
        if number >= num_warmup:
            note(kind, one)
    show(found)
    for kind in ["SFT"] if profile else []:
        worked, longest = top_kernels(partial(block, kind), device)
        took = statistics.median(block.seconds for block in blocks[kind]) + found["kinds"]["SFT"]["seconds"][0]
        found["kinds"][kind] |= {"busy": worked / took, "kernels": longest}
        keep()
        print(f"{kind}: the device worked {worked / took:.0%} of the time")
        for kernel in longest:
            print(f"{kernel['share']:6.1%} {kernel['ms']:9.2f} ms {kernel['calls']:7} x  {kernel['name'][:80]}")


def show(found: dict[str, Any]) -> None:
    """Print what was measured, a line a kind."""
    print(f"{found['model']} on {found['device']}")
    print(f"at best {found['at_best']}; {found['rows']}; the first block took {found['first_block']:.1f} s")
    print(f"{'':8}  {'s a step':22}  {'over SFT':20}  {'limit':>5}  {'tokens/s':>8}  {'of peak':>7}  peak memory, GiB (copies)")
    for kind, says in found["kinds"].items():
        ratios = f"{spread(says['seconds'], '.3f'):22}  {spread(says['over_sft']):20}  {says['limit']:5.2f}"
        speed = f"{says['tokens_per_second']:8.0f}  {says['share_of_peak']:8.3%}"
        print(f"{kind:8}  {ratios}  {speed}  {says['gib']:.2f} ({says['copies']:.1f})")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    CLI(main, as_positional=False)
