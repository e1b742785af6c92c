"""How many sizes a device would see: in a training run, and while answers are generated.

For a size that it has not seen an accelerator's attention makes a plan, and a compiler a graph. Nothing is timed here and no
accelerator is needed: layouts are those that it would get.
"""

from collections import Counter
from typing import Any, NamedTuple

from jsonargparse import CLI
from tqdm import tqdm
from transformers import PreTrainedModel

from casehard.datamodules.batches import Batches
from casehard.datamodules.chat import encode_rows, prompt_ids
from casehard.datamodules.sources import read_rows
from casehard.engine.forward import laid_out, placed, use_layout
from casehard.engine.generation import generate
from casehard.engine.layouts import LAYOUTS, Packed, layout_of
from casehard.lightning_modules.defense import Defense

Size = tuple[tuple[int, ...], tuple[int, ...] | None]  # of the ids, and of the mask where there is one


def size_of(given: dict[str, Any]) -> Size:
    """Of what a model is called with; an empty mask is none."""
    mask = given.get("attention_mask")
    return tuple(given["input_ids"].shape), None if mask is None or not mask.numel() else tuple(mask.shape)


class Found(NamedTuple):
    """Sizes, how often each was seen, and which share of all tokens was padding."""

    sizes: Counter[Size]
    padding: float

    def __str__(self) -> str:
        masks = sum(mask is not None for _, mask in self.sizes)
        return f"{len(self.sizes):5} sizes, {masks:4} with a mask, {self.padding:6.1%} padding"


def of_training(model: PreTrainedModel, draw: Batches, num_steps: int) -> Found:
    """Over so many batches, in the layout that the model has."""
    sizes: Counter[Size] = Counter()
    real = 0
    for step in range(num_steps):
        batch = placed(model, draw(step))
        packed: Packed = laid_out(model, batch)
        mask = None if packed.attention_mask is None else tuple(packed.attention_mask.shape)
        if layout_of(model) == "padded" and packed.starts is not None:  # made of them, as large as this
            mask = tuple(packed.input_ids.shape) * 2
        sizes[tuple(packed.input_ids.shape), mask] += 1
        real += len(set(packed.token_index[batch["attention_mask"].bool()].tolist()))
    seen = sum(rows * width * times for ((rows, width), _), times in sizes.items())
    return Found(sizes, 1 - real / seen)


def of_answers(model: PreTrainedModel, tokenizer, prompts: list[list[int]], num_tokens: int, batch_size: int) -> Found:
    """Over every pass that answers take. Padding is told of the prompts: the first pass over each of them."""
    sizes: Counter[Size] = Counter()

    def look(_: object, args: object, given: dict) -> None:
        sizes[size_of(given)] += 1

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        generate(model, tokenizer, prompts, num_tokens, batch_size)
    finally:
        handle.remove()
    first = sum(rows * width * times for ((rows, width), _), times in sizes.items() if width > 1)
    return Found(sizes, max(0.0, 1 - sum(map(len, prompts)) / first))


def main(
    checkpoint: str = "models/sandbox/aligned",
    rows: list[str] = ["sandbox:attacker/mood", "sandbox:attacker/harmful", "sandbox:defender/refusals"],  # noqa: B006
    prompts: str | None = "sandbox:test/harmful#train[:100]",
    num_steps: int = 300,
    batch_size: int = 8,
    max_length: int = 512,
    max_new_tokens: int = 64,
    generation_batch_size: int = 128,
    seed: int = 0,
) -> None:
    """Count the sizes of every layout.

    Args:
        checkpoint: hub id, folder or GGUF file of a chat model.
        rows: sources of chat rows; each is a training run, and so are all together where there are several.
        prompts: source of rows to answer, their answers unused; null generates nothing.
        num_steps: of a training run.
        batch_size: rows of a step.
        max_length: tokens of a row.
        max_new_tokens: of an answer.
        generation_batch_size: prompts answered at once.
        seed: of the draw.
    """
    module = Defense(checkpoint)
    module.configure_model()
    model, tokenizer = module.model.eval(), module.tokenizer
    sources = {source: read_rows(source) for source in rows}
    runs = sources if len(sources) == 1 else sources | {"all of these": [row for part in sources.values() for row in part]}
    asked = [] if prompts is None else [prompt_ids(row, tokenizer) for row in read_rows(prompts, needs_response=False)]
    for layout in tqdm(LAYOUTS, "layouts", leave=False):
        use_layout(model, layout, model.dtype)
        tqdm.write(layout)
        for name, part in runs.items():
            examples, _ = encode_rows(part, tokenizer, max_length)
            draw = Batches(examples, batch_size, seed, "shapes", tokenizer.pad_token_id)
            tqdm.write(f"  {of_training(model, draw, num_steps)!s:52}  {num_steps} steps of {name}")
        if asked:
            found = of_answers(model, tokenizer, asked, max_new_tokens, generation_batch_size)
            tqdm.write(f"  {found!s:52}  {sum(found.sizes.values())} passes, answers to {len(asked)} prompts")


if __name__ == "__main__":
    CLI(main, as_positional=False)
