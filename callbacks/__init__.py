"""Attacks, and what writes their results."""

from casehard.callbacks.attacks import FullParameterAttack, HarmfulFineTuning, LoRAAttack
from casehard.callbacks.results import Results
from casehard.callbacks.scoring import Evaluate, Scores, score
from casehard.records.rows import ResultRow

__all__ = ["Evaluate", "FullParameterAttack", "HarmfulFineTuning", "LoRAAttack", "ResultRow", "Results", "Scores", "score"]
