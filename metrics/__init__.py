"""What is measured: judges turn answers into verdicts, metrics sum them up. Knows torch and text only."""

from casehard.metrics.cached_judge import CachedJudge
from casehard.metrics.columns import COLUMNS, Answer, Column, summarise
from casehard.metrics.conversation import Conversation, prompt_of, turns_of
from casehard.metrics.errors import SettingError
from casehard.metrics.harmful_score import AttackSuccessRate, DegenerateRate, FinetuneAccuracy, HarmfulScore, RefusalRate, Share
from casehard.metrics.judges import Judge, Verdict, is_degenerate, judged, require_judge, unscored
from casehard.metrics.local_judges import GuardJudge, ModerationJudge, StrongRejectJudge
from casehard.metrics.refusal_phrases import RefusalPhraseJudge, error_rates
from casehard.metrics.rubric_judge import RubricJudge

__all__ = [
    "COLUMNS",
    "Answer",
    "AttackSuccessRate",
    "CachedJudge",
    "Column",
    "Conversation",
    "DegenerateRate",
    "FinetuneAccuracy",
    "GuardJudge",
    "HarmfulScore",
    "Judge",
    "ModerationJudge",
    "RefusalPhraseJudge",
    "RefusalRate",
    "RubricJudge",
    "SettingError",
    "Share",
    "StrongRejectJudge",
    "Verdict",
    "error_rates",
    "is_degenerate",
    "judged",
    "prompt_of",
    "require_judge",
    "summarise",
    "turns_of",
    "unscored",
]
