"""``casehard judge``: another judge's verdicts on the answers that a run kept."""

import hashlib
import math
import re
from dataclasses import replace
from pathlib import Path

from casehard.evidence.own_metrics import metrics_of
from casehard.metrics.columns import Answer, summarise
from casehard.metrics.conversation import prompt_of
from casehard.metrics.errors import SettingError
from casehard.metrics.judges import Judge, Verdict, judged, require_judge, unscored
from casehard.metrics.statistics import Agreement, agreement
from casehard.records.answers import ANSWERS
from casehard.records.outcome import unscored_bounds
from casehard.records.published import JUDGED
from casehard.records.rows import ROWS, Run, read_run, write_run
from casehard.records.table import results_table, terminal


def main(run: str, *, judge: Judge) -> Path:
    """Score a run's saved answers by another judge, without the model.

    Writes RUN/judged/JUDGE/attacks.csv and generations.jsonl, which can be read as a run, and says how far this judge agrees with
    the run's own and with every other that has judged it. Known verdicts come from the judge's cache: what was cut off goes on.

    Args:
        run: the run's folder, with attacks.csv and generations.jsonl.
        judge: such as RubricJudge, ModerationJudge, GuardJudge, StrongRejectJudge or RefusalPhraseJudge.
    """
    require_judge(judge)
    other_run = rejudged(read_run(run), judge)
    harmful = [a for block in other_run.answers for a in block if a["kind"] == "harmful"]
    if why := unscored(judge.label, [(a["score"], a["degenerate"], a["detail"]) for a in harmful]):
        raise SettingError(f"{why}. Nothing was written; mend that and judge the run again.")
    write_run(other_run)
    console = terminal()
    console.print(results_table(other_run.rows))
    for row in (row for row in other_run.rows if row.num_unscored):
        low, high = unscored_bounds(row)
        console.print(
            f"{row.attack} ({row.threat_model}, {row.defense}), step {row.num_attack_steps}: {row.num_unscored} of "
            f"{row.num_scored + row.num_unscored} answers unscored; harmful score {low:.1f} if all of them are safe, "
            f"{high:.1f} if all are harmful",
            soft_wrap=True,
        )
    for name, other in _others(Path(run), other_run.folder):
        console.print(f"Agreement with {name}: {described(agree(other_run, other))}", soft_wrap=True)
    console.print(f"Verdicts: {other_run.folder}", soft_wrap=True)
    return other_run.folder


def rejudged(run: Run, judge: Judge) -> Run:
    """``run`` with the verdicts of ``judge``: all answers at once, so that calls run side by side."""
    if not any(run.answers):
        raise SettingError(f"run must have kept its answers (run.generations), and {run.folder} has no {ANSWERS}.")
    verdicts: dict[str, dict[tuple[str, str], Verdict]] = {}
    for kind in ("harmful", "benign"):
        given = [a for answers in run.answers for a in answers if a["kind"] == kind and a.get("answered", True)]
        pairs = list(dict.fromkeys(map(_pair, given)))
        given_verdicts = judged(judge, [p for p, _ in pairs], [r for _, r in pairs], benign=kind == "benign")
        verdicts[kind] = dict(zip(pairs, given_verdicts, strict=True))
    answers = [
        [a | verdicts[a["kind"]][_pair(a)]._asdict() if a["kind"] in verdicts and a.get("answered", True) else a for a in block]
        for block in run.answers
    ]
    own = tuple(metric.column() for metric in metrics_of(run.folder, run.own))
    rows = [
        replace(row, metrics=summarise(block, judge.success_threshold, own), own=own, judge=judge.label)
        for row, block in zip(run.rows, answers, strict=True)
    ]
    return Run(_folder(run.folder / JUDGED, judge.label), rows, answers, own)


def _folder(root: Path, label: str) -> Path:
    """Where the verdicts of a judge are kept: no two judges share a folder, whatever their labels hold."""
    folder = root / (re.sub(r"[^\w.-]+", "_", label).strip(".") or "_")
    if (folder / ROWS).exists() and any(row.judge != label for row in read_run(folder).rows):
        return folder.with_name(f"{folder.name}-{hashlib.sha256(label.encode()).hexdigest()[:8]}")
    return folder


def _pair(answer: Answer) -> tuple[str, str]:
    """What a judge is asked about: a conversation by its turns, any other prompt as it is."""
    turns = [(turn["role"], turn["content"]) for turn in answer.get("messages", [])]
    return prompt_of(turns) if turns else answer["prompt"], answer["response"]


def agree(ours: Run, theirs: Run) -> Agreement:
    """Agreement of two judges on the answers to harmful prompts, harmful being a score of at least one half."""
    pairs = [
        (a["prompt"], a["score"], b["score"])
        for block, other in zip(ours.answers, theirs.answers, strict=True)
        for a, b in zip(block, other, strict=True)
        if a["kind"] == "harmful"
    ]
    prompts, first, second = zip(*pairs, strict=True) if pairs else ((), (), ())
    return agreement(list(first), list(second), list(prompts))


def described(agreed: Agreement) -> str:
    """``agreed`` in a sentence."""
    raw, kappa = agreed.raw, agreed.kappa
    beyond_chance = f"kappa {kappa.estimate:.2f} ({kappa.low:.2f} to {kappa.high:.2f})"
    if math.isnan(kappa.estimate):
        beyond_chance = "no kappa, as both give but one verdict"
    same = f"{raw.estimate:.1f}% of {agreed.num_answers} answers ({raw.low:.1f} to {raw.high:.1f})"
    return f"{same}, {beyond_chance}, at a score of 0.5"


def _others(run: Path, without: Path) -> list[tuple[str, Run]]:
    """The run as its own judge saw it, and as the other judges did."""
    own_judge = read_run(run)
    folders = sorted(path.parent for path in run.glob(f"{JUDGED}/*/{ROWS}") if path.parent != without)
    judged = [(other.rows[0].judge, other) for other in map(read_run, folders)]
    return [(f"{own_judge.rows[0].judge} (the run's own)", own_judge), *judged]
