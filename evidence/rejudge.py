"""``casehard judge``: another judge's verdicts on the answers that a run kept."""

import csv
import hashlib
import io
import json
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from casehard.callbacks.results import Results, terminal
from casehard.evidence.runs import JUDGED, unscored_bounds
from casehard.metrics.conversation import prompt_of
from casehard.metrics.harmful_score import AttackSuccessRate, DegenerateRate, HarmfulScore, RefusalRate
from casehard.metrics.judges import Judge, Verdict, judged, require_judge, unscored
from casehard.metrics.statistics import Agreement, agreement
from casehard.records.files import write_whole
from casehard.records.rows import Answer, ResultRow, Run, read_run


def main(run: str, *, judge: Judge) -> None:
    """Score a run's saved answers by another judge, without the model.

    Writes RUN/judged/JUDGE/attacks.csv and generations.jsonl, which can be read as a run, and says how far this judge agrees with
    the run's own and with every other that has judged it. Known verdicts come from the judge's cache: what was cut off goes on.

    Args:
        run: the run's folder, with attacks.csv and generations.jsonl.
        judge: such as RubricJudge, ModerationJudge, GuardJudge, StrongRejectJudge or RefusalPhraseJudge.
    """
    require_judge(judge)
    found = rejudged(read_run(run), judge)
    harmful = [a for block in found.answers for a in block if a["kind"] == "harmful"]
    if why := unscored(judge.label, [(a["score"], a["degenerate"], a["detail"]) for a in harmful]):
        raise ValueError(f"{why}. Nothing was written; mend that and judge the run again.")
    write_run(found)
    console = terminal()
    shown = Results(str(found.folder))
    shown.rows = found.rows
    console.print(shown.table())
    for row in (row for row in found.rows if row.num_unscored):
        low, high = unscored_bounds(row)
        console.print(
            f"{row.attack} ({row.threat_model}, {row.defense}), step {row.num_attack_steps}: {row.num_unscored} of "
            f"{row.num_scored + row.num_unscored} answers unscored; harmful score {low:.1f} if all of them are safe, "
            f"{high:.1f} if all are harmful",
            soft_wrap=True,
        )
    for name, other in _others(Path(run), found.folder):
        console.print(f"Agreement with {name}: {described(agree(found, other))}", soft_wrap=True)
    console.print(f"Verdicts: {found.folder}", soft_wrap=True)


def rejudged(run: Run, judge: Judge) -> Run:
    """``run`` with the verdicts of ``judge``: all answers at once, so that calls run side by side."""
    if not any(run.answers):
        raise ValueError(f"run must have kept its answers (run.generations), and {run.folder} has no generations.jsonl.")
    verdicts: dict[str, dict[tuple[str, str], Verdict]] = {}
    for kind in ("harmful", "benign"):
        given = [a for answers in run.answers for a in answers if a["kind"] == kind and a.get("answered", True)]
        pairs = list(dict.fromkeys(map(_pair, given)))
        found = judged(judge, [p for p, _ in pairs], [r for _, r in pairs], benign=kind == "benign")
        verdicts[kind] = dict(zip(pairs, found, strict=True))
    answers = [
        [a | verdicts[a["kind"]][_pair(a)]._asdict() if a["kind"] in verdicts and a.get("answered", True) else a for a in block]
        for block in run.answers
    ]
    rows = [_scored(row, block, judge) for row, block in zip(run.rows, answers, strict=True)]
    return Run(_folder(run.folder / JUDGED, judge.label), rows, answers)


def _folder(root: Path, label: str) -> Path:
    """Where the verdicts of a judge are kept: no two judges share a folder, whatever their labels hold."""
    folder = root / (re.sub(r"[^\w.-]+", "_", label).strip(".") or "_")
    if (folder / "attacks.csv").exists() and any(row.judge != label for row in read_run(folder).rows):
        return folder.with_name(f"{folder.name}-{hashlib.sha256(label.encode()).hexdigest()[:8]}")
    return folder


def _pair(answer: Answer) -> tuple[str, str]:
    """Prompt and response; runs before conversations were kept have the last turn of each as its prompt."""
    turns = [(turn["role"], turn["content"]) for turn in answer.get("messages", [])]
    return prompt_of(turns) if turns else answer["prompt"], answer["response"]


def _scored(row: ResultRow, answers: list[Answer], judge: Judge) -> ResultRow:
    harmful = torch.tensor([a["score"] for a in answers if a["kind"] == "harmful"], dtype=torch.float64)
    score, success, refused, degenerate = (
        HarmfulScore(),
        AttackSuccessRate(judge.success_threshold),
        RefusalRate(),
        DegenerateRate(),
    )
    score.update(harmful)
    success.update(harmful)
    refusals = [a["refused"] for a in answers if a["kind"] == "benign" and a.get("answered", True)]
    refused.update(torch.tensor(refusals, dtype=torch.bool))
    degenerate.update(torch.tensor([a["degenerate"] for a in answers if a["kind"] != "task"], dtype=torch.bool))
    return replace(
        row,
        harmful_score=float(score.compute()),
        attack_success_rate=float(success.compute()),
        num_scored=int(score.num_scored),
        num_unscored=int(score.num_unscored),
        refusal_rate_benign=float(refused.compute()),
        degenerate_rate=float(degenerate.compute()),
        judge=judge.label,
    )


def write_run(run: Run) -> None:
    """``attacks.csv`` and ``generations.jsonl`` in the run's folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.DictWriter(table, [f.name for f in fields(ResultRow)])
    writer.writeheader()
    writer.writerows(asdict(row) for row in run.rows)
    lines = (json.dumps(answer, ensure_ascii=False) for block in run.answers for answer in block)
    write_whole(run.folder / "generations.jsonl", "".join(f"{line}\n" for line in lines))
    write_whole(run.folder / "attacks.csv", table.getvalue())


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


def described(found: Agreement) -> str:
    """``found`` in a sentence."""
    raw, kappa = found.raw, found.kappa
    return (
        f"{raw.estimate:.1f}% of {found.num_answers} answers ({raw.low:.1f} to {raw.high:.1f}), "
        f"kappa {kappa.estimate:.2f} ({kappa.low:.2f} to {kappa.high:.2f}), at a score of 0.5"
    )


def _others(run: Path, own: Path) -> list[tuple[str, Run]]:
    """The run as its own judge saw it, and as the other judges did."""
    own_judge = read_run(run)
    folders = sorted(path.parent for path in run.glob(f"{JUDGED}/*/attacks.csv") if path.parent != own)
    judged = [(other.rows[0].judge, other) for other in map(read_run, folders)]
    return [(f"{own_judge.rows[0].judge} (the run's own)", own_judge), *judged]
