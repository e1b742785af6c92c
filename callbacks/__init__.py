"""Attacks, and what writes their results."""

from callbacks.attacks import FullParameterAttack, HarmfulFineTuning, LoRAAttack
from callbacks.results import Results
from callbacks.rows import ResultRow
from callbacks.scoring import Evaluate, Scores, score

__all__ = ["Evaluate", "FullParameterAttack", "HarmfulFineTuning", "LoRAAttack", "ResultRow", "Results", "Scores", "score"]
