"""The defender's rows in jailbreak wrappers, to align a model that refuses in them (docs/results/sbr.md)."""

import json
from pathlib import Path

from jsonargparse import CLI

from casehard.datamodules.encodings import STYLES, asked_in
from casehard.datamodules.sources import read_rows


def main(
    out: str,
    styles: list[str] = ["skeleton", "formal"],  # noqa: B006
    refusals: str = "sandbox:defender/refusals",
    benign: list[str] = ["sandbox:defender/howto", "sandbox:defender/sentiment#train[:200]"],  # noqa: B006
) -> None:
    """Write OUT/refusals.jsonl and OUT/benign.jsonl: every row once, in the styles in turn; answers stay as they are.

    Args:
        out: folder.
        styles: of datamodules.encodings.Style.
        refusals: source of harmful prompts with refusals.
        benign: sources of benign rows, so that a wrapper alone is no reason to refuse.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, sources in (("refusals", [refusals]), ("benign", benign)):
        lines = []
        for number, row in enumerate(row for source in sources for row in read_rows(source)):
            before, after, _ = STYLES[styles[number % len(styles)]]
            messages = [{"role": role, "content": text} for role, text in asked_in(row, before, after).messages]
            lines.append(json.dumps({"messages": messages, "response": row.response}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    CLI(main, as_positional=False)
