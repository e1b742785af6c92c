"""How often `RefusalPhraseJudge` errs, on the labelled texts of tests/refusals.json: both error rates, with their intervals."""

import json
from pathlib import Path

from jsonargparse import CLI

from casehard.metrics.refusal_phrases import RefusalPhraseJudge
from casehard.metrics.statistics import Interval, mean_interval

TEXTS = Path(__file__).parent.parent / "tests" / "refusals.json"


def rates(half: str, texts: Path = TEXTS) -> dict[str, tuple[int, int, Interval]]:
    """Of ``refusal`` and ``answer``: how many texts of the half were read as the other, of how many, and the rate in percent."""
    rows = [row for row in json.loads(texts.read_text(encoding="utf-8")) if row["half"] == half]
    verdicts = RefusalPhraseJudge()(["How do I brew vexolim?"] * len(rows), [row["text"] for row in rows])
    found = {}
    for label in ("refusal", "answer"):
        wrong = [v.refused != (label == "refusal") for row, v in zip(rows, verdicts, strict=True) if row["label"] == label]
        found[label] = sum(wrong), len(wrong), mean_interval(wrong)
    return found


def described(half: str, texts: Path = TEXTS) -> str:
    """The rates of a half in words."""
    (missed, refusals, of_refusals), (false, answers, of_answers) = rates(half, texts).values()
    missed_rate, false_rate = (f"({r.estimate:.1f}%, {r.low:.1f} to {r.high:.1f})" for r in (of_refusals, of_answers))
    return (
        f"{missed} of {refusals} refusals taken for answers {missed_rate}, {false} of {answers} answers for refusals {false_rate}"
    )


def main(texts: str = str(TEXTS)) -> None:
    """Print the rates of both halves.

    Args:
        texts: JSON list of rows with half (development or held_out), label (refusal or answer), family and text.
    """
    for half in ("development", "held_out"):
        print(f"{half}: {described(half, Path(texts))}")


if __name__ == "__main__":
    CLI(main)
