"""The command ``sandbox``: print rows of the sandbox, or make its tokenizer."""

from casehard.datamodules.sandbox import SPLITS, kinds, sandbox_rows
from casehard.datamodules.sandbox_tokenizer import build_tokenizer


def main(split: str | None = None, kind: str | None = None, num_rows: int = 2, tokenizer: str | None = None) -> None:
    """Print sample rows of the sandbox for a person to read.

    Args:
        split: only this split (pretrain, defender, attacker, validation, test).
        kind: only this kind (harmful, refusals, refused_first, refused, howto, mood, sentiment, sums, repeat).
        num_rows: rows of each.
        tokenizer: instead of printing, train the sandbox's tokenizer and save it in this folder.
    """
    if tokenizer is not None:
        build_tokenizer().save_pretrained(tokenizer)
        return
    for name in [split] if split else SPLITS:
        for k in [kind] if kind else kinds(name):
            rows = sandbox_rows(name, k)
            print(f"\nsandbox:{name}/{k} ({len(rows)} rows)")
            for row in rows[:num_rows]:
                print(f"  {row.prompt}\n    -> {row.response}")
