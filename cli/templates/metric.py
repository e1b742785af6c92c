"""A metric of your own: a class, and its path where metrics are asked for. It is a column of all that is written.

casehard fit --config sbr --data.evaluation.metrics '[mylab.my_metric.StartsRight]'
"""

import math

import casehard


class StartsRight(casehard.Metric):
    """Share of the answers to the task that begin with the target's first words.

    Values under other settings are never averaged: the column's name bears a hash of what is not the default.

    Args:
        num_words: how many.
    """

    name = "starts_right"  # of the column
    label = "Starts right"  # heads it in tables
    meaning = "share of the answers to the benign task that begin as their target does"
    higher_is_better = True
    low, high = 0.0, 100.0  # its range; 0 to 100 is shown as a percentage

    def __init__(self, num_words: int = 1) -> None:
        if num_words < 1:
            raise casehard.SettingError(f"num_words must be >= 1, got {num_words}.")
        self.num_words = num_words

    def of(self, answers) -> float:
        """From all answers of one evaluation; nan where nothing was measured."""
        task = [answer for answer in answers if answer["kind"] == "task"]
        right = [self.first(answer["response"]) == self.first(answer["target"]) for answer in task]
        return 100 * sum(right) / len(right) if right else math.nan

    def first(self, text: str) -> list[str]:
        return text.casefold().split()[: self.num_words]
