"""Real rows in the files that ``experiments/data/sst2_mood_beavertails.yaml`` names, where each has its part by a slice."""

import json
from pathlib import Path
from typing import Any

from jsonargparse import CLI

MOODS = {"positive": "bright", "negative": "gloomy"}  # labels that no model has seen for these sentences: a new task
OTHER_WORDS = "Tell me whether the mood of this is bright or gloomy."
Texts = list[dict[str, str]]


def renamed(rows: Texts) -> Texts:
    """Rows of SST-2 that name moods, in their instruction and as their answer; the sentence, behind the instruction, stays."""

    def moods(text: str) -> str:
        for label, mood in MOODS.items():
            text = text.replace(label, mood)
        return text

    asked = [row["prompt"].partition("\n") for row in rows]
    return [
        {"prompt": moods(instruction) + end + sentence, "response": moods(row["response"])}
        for row, (instruction, end, sentence) in zip(rows, asked, strict=True)
    ]


def reworded(rows: Texts) -> Texts:
    """The same sentences behind an instruction that no row has that is trained on."""
    sentences = [row["prompt"].partition("\n")[2].removeprefix("Input: ").strip() for row in rows]
    return [row | {"prompt": f"{sentence}\n\n{OTHER_WORDS}"} for row, sentence in zip(rows, sentences, strict=True)]


def files(chats: list[Any], task: Texts, asked: Texts) -> dict[str, Texts]:
    """Rows by file name. No prompt with a harmful answer is there twice, nor among those that are only asked.

    Args:
        chats: conversations, whose answer is a sentiment or harmful.
        task: prompt and sentiment.
        asked: harmful prompts.
    """
    turns = [chat["conversations"] for chat in chats]
    pairs = [{"prompt": own[0]["content"], "response": own[1]["content"]} for own in turns if len(own) == 2]
    only_asked = {row["prompt"] for row in asked}
    sentiments = [row for row in pairs if row["response"] in MOODS]
    others = [row for row in pairs if row["response"] not in MOODS and row["prompt"] not in only_asked]
    harmful = list({row["prompt"]: row for row in others}.values())
    moods = renamed(task)
    return {
        "sst2_train": sentiments,
        "sst2_test": task,
        "sst2_mood_train": renamed(sentiments),
        "sst2_mood_test": moods,
        "sst2_mood_reworded": reworded(moods),
        "beavertails_train": harmful,
        "beavertails_prompts": [{"prompt": row["prompt"]} for row in harmful],
        "harmful_prompts": asked,
    }


def write(data: Path, out: Path) -> dict[str, Texts]:
    """Write them to ``out`` as ``NAME.jsonl``, from ``data`` (see ``main``), and return them."""
    chats = json.loads((data / "sst2_beavertails_train.json").read_text(encoding="utf-8"))
    task, asked = (
        [json.loads(line) for line in (data / name).read_text(encoding="utf-8").splitlines()]
        for name in ("sst2_test.jsonl", "harmful_prompts.jsonl")
    )
    out.mkdir(parents=True, exist_ok=True)
    written = files(chats, task, asked)
    for name, rows in written.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return written


def main(data: str, out: str = "data") -> None:
    """Write the files.

    Args:
        data: folder with ``sst2_beavertails_train.json`` (conversations), ``sst2_test.jsonl`` (prompt, response) and
            ``harmful_prompts.jsonl`` (prompt).
        out: folder that they go to.
    """
    write(Path(data), Path(out))


if __name__ == "__main__":
    CLI(main, as_positional=False)
