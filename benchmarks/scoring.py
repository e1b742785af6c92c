"""Answers to held-out prompts by `generation.generate` beside one `model.generate` a prompt: how long, and whether the same."""

from pathlib import Path

import torch
from jsonargparse import CLI
from paired import paired, spread
from tqdm import tqdm
from transformers import GenerationConfig

from casehard.datamodules.chat import prompt_ids
from casehard.datamodules.sources import read_rows
from casehard.engine.generation import end_tokens, generate
from casehard.lightning_modules.defense import Defense

SANDBOX = Path(__file__).parent.parent / "models/sandbox/aligned"


def main(
    checkpoint: str = str(SANDBOX),
    prompts: str = "sandbox:test/harmful#train[:100]",
    max_new_tokens: int = 64,
    batch_size: int = 128,
    num_pairs: int = 5,
    num_warmup: int = 1,
    device: str = "cpu",
) -> None:
    """Time the answers to all prompts at once against one by one.

    Args:
        checkpoint: hub id, folder or GGUF file of a chat model.
        prompts: source of rows; their answers are not used.
        max_new_tokens: of an answer.
        batch_size: prompts at once.
        num_pairs: rounds of each.
        num_warmup: rounds before those.
        device: where to run.
    """
    module = Defense(checkpoint)
    module.configure_model()
    module.to(device).eval()
    model, tokenizer = module.model, module.tokenizer
    asked = [prompt_ids(row, tokenizer) for row in read_rows(prompts, needs_response=False)]
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    texts: dict[str, list[str]] = {}

    def one_by_one() -> None:
        texts["one by one"] = []
        for ids in tqdm(asked, "one by one", leave=False):
            row = torch.tensor([ids], device=device)
            out = model.generate(row, attention_mask=torch.ones_like(row), generation_config=settings)
            texts["one by one"].append(tokenizer.decode(out[0, len(ids) :]))

    def together() -> None:
        texts["together"] = generate(model, tokenizer, asked, max_new_tokens, batch_size)

    times = paired(one_by_one, together, num_pairs, num_warmup, "rounds")
    same = sum(a == b for a, b in zip(*texts.values(), strict=True))
    print(f"{len(asked)} prompts, {same} of the answers the same")
    print(f"one by one  {spread(a for a, _ in times)} s")
    print(f"together    {spread(b for _, b in times)} s")
    print(f"faster by   {spread((a / b for a, b in times), '.1f')}")


if __name__ == "__main__":
    CLI(main, as_positional=False)
