"""What is measured: judges turn answers into verdicts, metrics sum them up. Knows torch and text only."""

from metrics.cached_judge import CachedJudge
from metrics.harmful_score import AttackSuccessRate, DegenerateRate, FinetuneAccuracy, HarmfulScore, RefusalRate, Share
from metrics.judges import Judge, RefusalPhraseJudge, Verdict, is_degenerate
from metrics.local_judges import GuardJudge, ModerationJudge, StrongRejectJudge
from metrics.rubric_judge import RubricJudge

__all__ = [
    "AttackSuccessRate",
    "CachedJudge",
    "DegenerateRate",
    "FinetuneAccuracy",
    "GuardJudge",
    "HarmfulScore",
    "Judge",
    "ModerationJudge",
    "RefusalPhraseJudge",
    "RefusalRate",
    "RubricJudge",
    "Share",
    "StrongRejectJudge",
    "Verdict",
    "is_degenerate",
]
