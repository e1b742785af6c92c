"""What runs came to, for Python: the rows of a run's folder or of all cells of a study's, as data frames and tables."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casehard.evidence.study_plan import INDEX
from casehard.evidence.summary import reported
from casehard.metrics.errors import SettingError
from casehard.records.delivered import Delivered, read_delivered
from casehard.records.files import DONE
from casehard.records.frames import answers_frame, as_html, frame
from casehard.records.published import run_name
from casehard.records.rows import ROWS, ResultRow, Run, read_run
from casehard.records.table import delivered_table, results_table, terminal

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Found:
    """Results, read from a folder. A notebook shows them as a table, and so does ``print``.

    Args:
        folder: of the run or the study.
        runs: the run, or those of the study that came to their end.
        named: what a study calls the defense and the attack of each run; empty for a run by itself.
    """

    folder: Path
    runs: list[Run]
    named: list[dict[str, str]]

    @property
    def rows(self) -> list[ResultRow]:
        """A row an evaluation; metrics are attributes, ``row.harmful_score``."""
        return [row for run in self.runs for row in run.rows]

    def frame(self) -> "DataFrame":
        """The rows as a data frame of pandas: the columns of ``attacks.csv``, behind the run and a study's names."""
        return frame(self.rows, [beside for run, beside in self._beside() for _ in run.rows])

    def answers(self) -> "DataFrame":
        """Every answer that was kept, with its verdict, as a data frame: `generations.jsonl`. They may be harmful texts."""
        return answers_frame(beside | a for run, beside in self._beside() for block in run.answers for a in block)

    def _beside(self) -> list[tuple[Run, dict[str, Any]]]:
        return [(run, {"run": run_name(run.folder)} | name) for run, name in zip(self.runs, self.named, strict=True)]

    @property
    def delivered(self) -> Delivered | None:
        """Scores of the model before ``fit`` and of the one that it delivered; None for what scored none, as a study."""
        return read_delivered(self.folder)

    def _repr_html_(self) -> str:
        return as_html(self.rows, str(self), self.delivered)

    def __repr__(self) -> str:
        return f"{len(self.rows)} evaluations of {len(self.runs)} run{'s' * (len(self.runs) != 1)}: {self.folder}"

    def show(self) -> None:
        """Print the closing tables of the command line."""
        if self.delivered is not None:
            terminal().print(delivered_table(self.delivered))
        if self.rows:
            terminal().print(results_table(self.rows))


def read(folder: str | Path) -> Found:
    """The results in a folder: of a run, of a study, or of ``RUN/judged/JUDGE``.

    Raises:
        SettingError: it is none of these.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        done = [(cell, path) for cell, path, why in reported(folder) if cell.attack and not why]
        names = [{"defense_name": cell.defense, "attack_name": cell.attack} for cell, _ in done]
        return Found(folder, [read_run(path) for _, path in done], names)
    if (folder / ROWS).exists():
        return Found(folder, [read_run(folder, may_be_empty=True)], [{}])
    if not (folder / DONE).exists() and not (folder / "config.yaml").exists():
        raise SettingError(
            f"folder must be a run's or a study's, and {folder} is none. Name runs/EXPERIMENT/VERSION or runs/STUDY."
        )
    return Found(folder, [Run(folder, [], [])], [{}])
