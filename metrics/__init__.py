"""What is measured: judges turn answers into verdicts, metrics sum them up. Knows torch and text only."""

from metrics.harmful_score import AttackSuccessRate, DegenerateRate, FinetuneAccuracy, HarmfulScore, RefusalRate, Share
from metrics.judges import Judge, RefusalPhraseJudge, Verdict, is_degenerate

__all__ = [
    "AttackSuccessRate",
    "DegenerateRate",
    "FinetuneAccuracy",
    "HarmfulScore",
    "Judge",
    "RefusalPhraseJudge",
    "RefusalRate",
    "Share",
    "Verdict",
    "is_degenerate",
]
