"""Plain SFT, SBR and rounds of Patcher, full-parameter, on any architecture from its sizes: speed, share of the peak, memory.

Each of the three is a `Trainer.fit` of one step that does not count and `num_steps` that do, on the same weights and rows of one
length. They take turns, so that a ratio is one of neighbours in time. Weights and tokens are random: what a step costs does not
depend on what they say.
"""

import gc
import logging
import re
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from clock import Clock
from jsonargparse import CLI
from paired import seconds, spread
from tqdm import tqdm
from transformers import PreTrainedModel

from casehard import Backbone, Defense, InnerAttacker, Optimizer, PatcherModule, SandboxJudge, SBRModule, SFTDataModule
from casehard.datamodules.batches import Example
from casehard.datamodules.chat import IGNORED
from casehard.datamodules.row import Row
from casehard.datamodules.settings import Batching, Sources

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

    vocabulary: int

    def encode(self, rows: list[Row], what: str) -> list[Example]:
        draw = torch.Generator().manual_seed(self.seed)
        length = self.batching.max_length
        asked = length // 2
        ids = torch.randint(self.vocabulary, (len(rows), length), generator=draw).tolist()
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


def fitted(module: Defense, model: PreTrainedModel, data: SFTDataModule, steps: int, device: str, precision: str) -> Block:
    """Train ``model`` under ``module`` for a block of ``steps``; it is handed on from block to block."""
    gc.collect()  # the last block's moments hang in cycles
    model.zero_grad()
    module.model = model
    meter = Meter(every=steps, start=1)
    trainer = L.Trainer(accelerator=device, devices=1, precision=precision, max_steps=1 + steps, callbacks=[meter], **QUIET)  # type: ignore[arg-type]
    trainer.fit(module, datamodule=data)
    return Block(meter.seconds[0], meter.peak)  # not the meter, on which Lightning hangs the module, and that its moments


def main(
    checkpoint: str = SANDBOX,
    layers: int | None = None,
    device: Literal["cuda", "cpu"] | None = None,
    precision: Literal["float32", "bf16-mixed", "bf16"] = "bf16-mixed",
    batch_size: int = 4,
    length: int = 256,
    num_steps: int = 10,
    num_inner_steps: int = 3,
    num_anchors: int = 1,
    num_blocks: int = 5,
    num_warmup: int = 1,
    activation_checkpointing: bool = False,
    copy_device: str | None = None,
    compile_backend: str | None = None,
    profile: bool = False,
) -> None:
    """Time SFT, SBR and Patcher side by side.

    Args:
        checkpoint: folder with a config.json, such as models/sizes/qwen2_5_1_5b, or a hub id; only the sizes are read.
        layers: so many instead of the architecture's.
        device: where to run; null takes what is there.
        precision: float32; bf16-mixed: float32 weights, bfloat16 passes; bf16: bfloat16 throughout.
        batch_size: rows of a step.
        length: tokens of a row.
        num_steps: steps of a block; Patcher's is a round of so many defender steps.
        num_inner_steps: of a round's attack; the paper has 300 to 1000 defender steps.
        num_anchors: of SBR.
        num_blocks: how many of each.
        num_warmup: how many of each before those.
        activation_checkpointing: compute activations again in the backward pass.
        copy_device: where Patcher keeps what is idle, such as cpu.
        compile_backend: of torch.compile for the decoder layers, such as inductor; set num_warmup to 2 or more then.
        profile: then print where the time of one more block of each goes.
    """
    if device == "cuda" and not torch.cuda.is_available():
        print("Skipped: --device cuda needs a CUDA device, and none is here.")
        return
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shape: dict[str, Any] = {
        "checkpoint": checkpoint,
        "optimizer": STILL,
        "backbone": Backbone(
            random_weights=True,
            sizes={} if layers is None else {"num_hidden_layers": layers},
            tokenizer=SANDBOX,
            weights_dtype="bfloat16" if precision == "bf16" else "float32",
            activation_checkpointing=activation_checkpointing,
            compile_backend=compile_backend,
        ),
    }
    attacker = InnerAttacker(num_inner_steps, STILL, batch_size)
    round_of = {"attacker": attacker, "num_outer_steps": num_steps, "num_sft_steps": 1, "copy_device": copy_device}
    kinds: dict[str, tuple[type[Defense], dict[str, Any]]] = {
        "SFT": (Defense, {}),
        "SBR": (SBRModule, {"num_anchors": num_anchors, "freeze_unembedding": False}),  # all three train the same parameters
        "Patcher": (PatcherModule, round_of),
    }
    accelerator = torch.device(device)
    forget_peak(accelerator)
    empty = peak_bytes(accelerator)  # what the process holds without a model; nothing on a CUDA device
    start = Defense(**shape)
    start.configure_model()
    model, anchors = start.model, 0

    def block(kind: str) -> Block:
        nonlocal anchors
        sources = Sources([], refusals=["sandbox:defender/refusals"], alignment_harmful=["sandbox:defender/harmful"])
        data = RandomTokens(sources, SandboxJudge(), batching=Batching(batch_size, length), train_on="alignment")
        data.vocabulary = model.config.get_text_config().vocab_size
        make, settings = kinds[kind]
        module = make(**shape, **settings)
        found = fitted(module, model, data, num_steps, device, "bf16-mixed" if precision == "bf16-mixed" else "32-true")
        if isinstance(module, SBRModule):
            anchors = int(module.anchor_mask.sum())
        return found

    turns = [(number, kind) for number in range(num_warmup + num_blocks) for kind in kinds]
    blocks = {turn: block(turn[1]) for turn in tqdm(turns, "blocks", leave=False)}
    measured = {kind: [blocks[number, kind] for number in range(num_warmup, num_warmup + num_blocks)] for kind in kinds}

    peak, source = peak_flops(accelerator, torch.float32 if precision == "float32" else torch.bfloat16)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    weights, layers = sum(p.numel() for p in model.parameters()), model.config.get_text_config().num_hidden_layers
    print(f"{Path(checkpoint).name}: {layers} layers, {weights / 1e6:.0f} million parameters; {precision} on {name}")
    print(f"at best {peak / 1e12:.3g} TFLOP/s ({source}); {batch_size} rows of {length} tokens, anchors of {anchors} tokens")
    print(f"{'':8}  {'s a step':22}  {'over SFT':20}  {'limit':>5}  {'tokens/s':>8}  {'of peak':>7}  peak memory, GiB (copies)")
    rows, passes = batch_size * length, {"SFT": 1.0, "SBR": 1.0, "Patcher": 2 + num_inner_steps / num_steps}
    for kind, found in measured.items():
        tokens = rows * passes[kind] + (anchors if kind == "SBR" else 0)
        labels = passes[kind] * batch_size * (length - length // 2)
        times = [each.seconds / num_steps for each in found]
        ratios = [each.seconds / plain.seconds for each, plain in zip(found, measured["SFT"], strict=True)]
        step, most = statistics.median(times), max(each.peak for each in found) - empty
        share = model_flops(model, tokens, labels, length) / step / peak
        columns = f"{spread(times, '.3f'):22}  {spread(ratios):20}  {tokens / rows:5.2f}  {tokens / step:8.0f}  {share:8.3%}"
        print(f"{kind:8}  {columns}  {most / 2**30:.2f} ({most / weights / model.dtype.itemsize:.1f})")
    for kind in kinds if profile else {}:
        with torch.profiler.profile() as profiler:
            block(kind)
        by = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
        print(f"{kind}\n{profiler.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=40)}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    CLI(main, as_positional=False)
