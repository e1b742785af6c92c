"""Attacks, and what writes their results."""

from casehard.callbacks.attack import Attack, Target
from casehard.callbacks.fine_tuning import FineTuning, FullParameterAttack, LoRAAttack, Phase
from casehard.callbacks.results import Results
from casehard.callbacks.scoring import Evaluate, Scores, score
from casehard.records.rows import ResultRow

__all__ = [
    "Attack",
    "Evaluate",
    "FineTuning",
    "FullParameterAttack",
    "LoRAAttack",
    "Phase",
    "ResultRow",
    "Results",
    "Scores",
    "Target",
    "score",
]
