"""Answers to held-out prompts by `generation.sample` beside one `model.generate` a prompt: how long, and whether the same.

Beside the tokens a second stands the bound that memory sets: a step, of one token for every row of a batch, reads all weights.
What a step takes is what longer answers take more: passes over prompts, and on a GPU the capture of a graph, come once.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import CLI
from paired import paired, seconds, spread
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig

from casehard import Backbone, Defense
from casehard.datamodules.chat import prompt_ids
from casehard.datamodules.sources import read_rows
from casehard.engine.generation import end_tokens, sample
from casehard.engine.layouts import Layout, choose, layout_of
from casehard.records.files import write_whole

SANDBOX = Path(__file__).parent.parent / "models/sandbox/aligned"


def bandwidth(device: str) -> float:
    """Bytes a second that a copy reads and writes, the best of five."""
    source = torch.zeros(2**28 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / min([seconds(lambda: target.copy_(source)) for _ in range(6)][1:])


def bytes_read(model: nn.Module, passes_in: torch.dtype) -> int:
    """Of the weights in a step: matrices in the dtype of passes, and of a table of embeddings nothing that counts."""
    table = model.get_input_embeddings().weight
    left_out = set() if table is model.get_output_embeddings().weight else {id(table)}
    weights = [p for p in model.parameters() if id(p) not in left_out]
    return sum(p.numel() * min(p.itemsize, passes_in.itemsize if p.dim() > 1 else p.itemsize) for p in weights)


def main(
    checkpoint: str = str(SANDBOX),
    prompts: str = "sandbox:test/harmful#train[:100]",
    max_new_tokens: int = 64,
    batch_size: int = 128,
    num_pairs: int = 5,
    num_warmup: int = 1,
    num_alone: int | None = None,
    device: str = "cpu",
    precision: Literal["float32", "bf16-mixed", "bf16"] = "float32",
    layout: Layout | None = None,
    graphs: bool = True,
    kernels: Literal["liger"] | None = None,
    random_weights: bool = False,
    figures: str | None = None,
) -> None:
    """Time the answers to all prompts at once against one by one.

    Args:
        checkpoint: hub id, folder or GGUF file of a chat model.
        prompts: source of rows; their answers are not used.
        max_new_tokens: of an answer.
        batch_size: prompts at once.
        num_pairs: rounds of each.
        num_warmup: rounds before those.
        num_alone: so many of the prompts are answered one by one, and their time stands for all; null takes all.
        device: where to run.
        precision: float32; bf16-mixed: float32 weights, bfloat16 passes; bf16: bfloat16 throughout.
        layout: of the passes; null takes the one for the device.
        graphs: on a CUDA device, replay steps as graphs.
        kernels: of the model, as ``backbone.kernels``.
        random_weights: take only the sizes from the checkpoint, and the sandbox's tokenizer.
        figures: file that gets what the last lines say, as JSON.
    """
    if device == "cuda" and not torch.cuda.is_available():
        print("Skipped: --device cuda needs a CUDA device, and none is here.")
        return
    backbone = Backbone(
        random_weights=random_weights,
        tokenizer=str(SANDBOX) if random_weights else None,
        kernels=kernels,
        weights_dtype="bfloat16" if precision == "bf16" else "float32",
    )
    module = Defense(checkpoint, backbone=backbone)
    with torch.device(device):
        module.configure_model()
    module.to(device).eval()
    model, tokenizer = module.model, module.tokenizer
    if layout is not None:
        choose(model, layout)
    asked = [prompt_ids(row, tokenizer) for row in read_rows(prompts, needs_response=False)]
    alone = asked[:num_alone]
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    answers: dict[str, list[list[int]]] = {}

    def one_by_one() -> None:
        answers["one by one"] = []
        for ids in tqdm(alone, "one by one", leave=False):
            row = torch.tensor([ids], device=device)
            out = model.generate(row, attention_mask=torch.ones_like(row), generation_config=settings)
            answers["one by one"].append(out[0, len(ids) :].tolist())

    def together() -> None:
        answers["together"] = sample(model, tokenizer, asked, max_new_tokens, batch_size=batch_size, graphs=graphs)

    def half_as_long() -> None:
        answers["half"] = sample(model, tokenizer, asked, max(1, max_new_tokens // 2), batch_size=batch_size, graphs=graphs)

    mixed = precision == "bf16-mixed"
    with torch.autocast(device, torch.bfloat16, enabled=mixed):
        times = paired(one_by_one, together, num_pairs, num_warmup, "rounds")
        lengths = paired(half_as_long, together, num_pairs, num_warmup, "lengths")
    times = [(a * len(asked) / len(alone), b) for a, b in times]
    tokens = sum(map(len, answers["together"]))
    weights, rate = bytes_read(model, torch.bfloat16 if mixed else model.dtype), bandwidth(device)
    bound = math.ceil(len(asked) / batch_size) * max(map(len, answers["together"])) * weights / rate
    same = sum(a == b for a, b in zip(answers["one by one"], answers["together"], strict=False))
    print(f"{len(asked)} prompts, {layout_of(model)}, {precision}; {same} of {len(alone)} answers the same")
    print(f"one by one  {spread(a for a, _ in times)} s")
    print(f"together    {spread(b for _, b in times)} s")
    print(f"faster by   {spread((a / b for a, b in times), '.1f')}")
    print(f"tokens/s    {spread((tokens / b for _, b in times), '.0f')}")
    print(f"at most     {tokens / bound:.0f}: a step reads {weights / 1e6:.3g} MB of weights, at {rate / 1e9:.3g} GB/s")
    print(f"over bound  {spread((b / bound for _, b in times), '.1f')}")
    chunks, most, half = math.ceil(len(asked) / batch_size), *(max(map(len, answers[name])) for name in ("together", "half"))
    took = statistics.median(b for _, b in times)
    found = {
        "seconds": took,
        "tokens": tokens,
        "tokens_per_second": tokens / took,
        "bound": tokens / bound,
        "over_bound": took / bound,
    }
    found |= {"same": same, "alone": len(alone), "bandwidth": rate}
    if most > half:
        steps = [(b - a) / (chunks * (most - half)) for a, b in lengths]
        found["step_over_bound"] = statistics.median(steps) * rate / weights
        print(f"a step      {spread((1e3 * each for each in steps), '.3g')} ms")
        print(f"over bound  {spread((each * rate / weights for each in steps), '.1f')}")
    if figures is not None:
        write_whole(Path(figures), json.dumps(found))


if __name__ == "__main__":
    CLI(main, as_positional=False)
