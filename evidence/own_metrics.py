"""The metrics of a user's own that a run was scored by, made once more from its config."""

from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from casehard.metrics.columns import Column
from casehard.metrics.errors import SettingError
from casehard.metrics.metric import Metric
from casehard.records.published import config_of, part


def metrics_of(folder: Path, columns: tuple[Column, ...]) -> list[Metric]:
    """The metrics that a run's ``columns`` are of; none where it had none of its own, and nothing is imported then.

    Raises:
        SettingError: a class is not there any more, or makes another column than it did.
    """
    if not columns:
        return []
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("metrics", type=list[Metric])
    named = ", ".join(column.class_path for column in columns)
    try:
        config = parser.parse_object({"metrics": part(config_of(folder), "data", "evaluation", "metrics") or []})
        made: list[Metric] = parser.instantiate_classes(config).metrics
    except (ArgumentError, ValueError) as error:
        raise SettingError(
            f"the metrics of {folder} must be there to score it again, and {named} cannot be made. Install their package, or add "
            "its folder to PYTHONPATH."
        ) from error
    if [metric.column().name for metric in made] != [column.name for column in columns]:
        raise SettingError(
            f"the metrics of {folder} must have the columns that they had to score it again, {named}, and they do not."
        )
    return made
