"""What a run leaves behind: tidy result rows, generations, the trained model, and a closing table."""

import csv
import io
import json
import math
import time
from dataclasses import asdict, fields
from itertools import chain, compress, zip_longest
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from rich.console import Console
from rich.table import Table
from rich.text import Text

from casehard.engine.export import save_model
from casehard.lightning_modules.defense import Defense
from casehard.metrics.judges import NO_VERDICT
from casehard.metrics.refusal_phrases import error_rates
from casehard.records.files import write_whole
from casehard.records.outcome import METRICS, outcome, steps_to_break
from casehard.records.rows import KEYS, ResultRow, read_run


class Results(L.Callback):
    """Keep every result row, write it the moment it is known, and close with a table.

    ``attacks.csv`` has a row an evaluation, ``generations.jsonl`` an answer a line, ``model/`` the trained weights in Hugging
    Face format. Each appears whole or not at all; a run that goes on from a checkpoint in its folder keeps what earlier epochs
    of ``fit`` found. Loggers get the numbers; W&B's summary also what each attack came to.

    Args:
        folder: the run's folder.
        export: write the model when training ends.
        generations: write the generated answers, local only.
        wandb_generations: also send them to W&B, a table an evaluation. With real data they are harmful texts.
    """

    def __init__(self, folder: str, export: bool = True, generations: bool = True, wandb_generations: bool = False) -> None:
        self.folder, self.export, self.generations = Path(folder), export, generations
        self.wandb_generations = wandb_generations
        self.rows: list[ResultRow] = []
        self.training_seconds = 0.0  # up to the last checkpoint where a run goes on from it
        self._started: float | None = None  # while it trains
        self._goes_on = self._exported = False
        self._answers: list[dict[str, Any]] = []

    @rank_zero_only
    def record(self, trainer: L.Trainer, row: ResultRow, answers: list[dict[str, Any]]) -> None:
        """Keep a row and its answers, on disk and in every logger (``attack/<job>/<metric>`` against ``attack_step``)."""
        if not self.rows and self._goes_on:
            self._go_on(row.epoch)
        self.rows.append(row)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.generations:
            key = {name: getattr(row, name) for name in KEYS}
            self._answers += [key | answer for answer in answers]
            lines = (json.dumps(a, ensure_ascii=False, default=str) for a in self._answers)
            write_whole(self.folder / "generations.jsonl", "".join(f"{line}\n" for line in lines))
        table = io.StringIO()
        writer = csv.DictWriter(table, [f.name for f in fields(ResultRow)])
        writer.writeheader()
        writer.writerows(asdict(r) for r in self.rows)
        write_whole(self.folder / "attacks.csv", table.getvalue())
        job, rows = self._job()
        metrics = {f"attack/{job}/{n}": float(getattr(row, n)) for n in METRICS if not math.isnan(getattr(row, n))}
        for logger in trainer.loggers:
            logger.log_metrics(metrics | {"attack_step": float(row.num_attack_steps)}, step=trainer.global_step)
            if isinstance(logger, WandbLogger):
                logger.experiment.summary.update({f"attack/{job}/{n}": value for n, value in outcome(rows).items()})
                if self.wandb_generations:
                    columns, data = _table(row, answers)
                    logger.log_table(f"generations/{job}", columns, data, step=trainer.global_step)

    def _job(self) -> tuple[str, list[ResultRow]]:
        """The attack under way as loggers name it, and its rows so far. The second of one name in a run is ``NAME_2``."""
        row = self.rows[-1]
        starts = [
            number
            for number, r in enumerate(self.rows)
            if (r.attack, r.threat_model, r.defense, r.epoch, r.num_attack_steps)
            == (row.attack, row.threat_model, row.defense, row.epoch, 0)
        ]
        name = row.attack if len(starts) < 2 else f"{row.attack}_{len(starts)}"
        return f"{name}-{row.threat_model}-{row.defense}", self.rows[starts[-1] if starts else 0 :]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From a checkpoint a run goes on."""
        self._goes_on = trainer.ckpt_path is not None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training begins, or goes on."""
        self._started = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export before any attack runs, so that no attack can cost the model."""
        self.training_seconds, self._started = self._seconds(), None
        self._export(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that goes on from its last step trains no more, and may not have got to the export."""
        if not self._exported:
            self._export(trainer, pl_module)

    def _export(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.export and not trainer.interrupted and isinstance(module, Defense):
            model = module.exported()
            if model is not None and trainer.is_global_zero:
                off = save_model(model, module.tokenizer, self.folder / "model", module.backbone.exported_dtype)
                if off:
                    rank_zero_info(
                        f"Exported in {module.backbone.exported_dtype}: logits are {100 * off:.2g}% off those of {model.dtype}."
                    )
        self._exported = True

    def _seconds(self) -> float:
        return self.training_seconds + (0.0 if self._started is None else time.perf_counter() - self._started)

    def state_dict(self) -> dict[str, Any]:
        """Seconds of training so far."""
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on."""
        self.training_seconds = state_dict["seconds"]

    def _go_on(self, epoch: str) -> None:
        """Keep what the interrupted run found in earlier epochs of ``fit``; from ``epoch`` on it is found anew."""
        if (self.folder / "attacks.csv").exists():
            before = read_run(self.folder)
            kept = [bool(row.epoch) and (not epoch or int(row.epoch) < int(epoch)) for row in before.rows]
            self.rows = list(compress(before.rows, kept))
            self._answers = list(chain(*compress(before.answers, kept)))

    def jobs(self) -> dict[tuple[str, ...], list[ResultRow]]:
        """The rows of every attack on every model, in the order in which they came."""
        jobs: dict[tuple[str, ...], list[ResultRow]] = {}
        for r in self.rows:
            settings = (f"{r.optimizer} {r.learning_rate:g}", f"{r.poison_ratio:g}", str(r.seed), r.epoch)
            key = (r.attack, r.threat_model, *settings, "undefended" if r.defense == "none" else r.defense)
            jobs.setdefault(key, []).append(r)
        return jobs

    def table(self) -> Table:
        """The rows as a table for people, each attack headed by the step at which it broke the model."""
        table = Table(title="Results (percent; harmful score: lower is safer)")
        for column in ("attack", "defense"):
            table.add_column(column)
        for column in ("step", "harmful score", "finetune accuracy", "benign refused", "degenerate"):
            table.add_column(column, justify="right")
        notes = sorted({r.note for r in self.rows if r.note})
        for (attack, threat_model, optimizer, poison, seed, epoch, defense), rows in self.jobs().items():
            heads = [
                attack,
                threat_model,
                f"{optimizer}, poison {poison}",
                f"seed {seed}" + (f", epoch {epoch}" if epoch else ""),
            ]
            sides = [defense, *_broken(rows)] if float(poison) else [defense]
            for r, head, side in zip_longest(rows, heads, sides):
                table.add_row(*(Text(cell) for cell in (head or "", side or "", *(_cells(r, notes) if r else ()))))
            table.add_section()
        rates = filter(None, map(error_rates, sorted({r.judge for r in self.rows})))
        said = [*(f"{'*' * i} {note}" for i, note in enumerate(notes, start=1)), *rates]
        table.caption = Text("\n".join(said)) if said else None
        return table

    @rank_zero_only
    def close(self) -> None:
        """Print the table and where everything is."""
        console = terminal()
        if self.rows:
            console.print(self.table())
        console.print(f"Run folder: {self.folder}", soft_wrap=True)

    @rank_zero_only
    def require_verdicts(self) -> None:
        """Refuse to call a run finished whose judge failed on every answer.

        Raises:
            ValueError: nothing was scored; the answers are kept.
        """
        failed = [row.note for row in self.rows if row.num_unscored and not row.num_scored and NO_VERDICT in row.note]
        if failed and not any(row.num_scored for row in self.rows):
            raise ValueError(f"{failed[-1]}. The answers are kept: mend that, and `casehard judge {self.folder}` scores them.")


def _broken(rows: list[ResultRow]) -> list[str]:
    """Steps to break, and the rows that these steps take."""
    steps = steps_to_break(rows)
    number = steps.removeprefix("> ")
    return [f"to break: {steps}"] + ([f"({int(number) * rows[0].batch_size:,} rows)"] if number.isdigit() else [])


def terminal() -> Console:
    """Where tables and paths are printed, letter by letter: a name with ``[bold]`` or ``:smile:`` in it is no markup."""
    return Console(width=None if Console().is_terminal else 130, markup=False, emoji=False)


def _table(row: ResultRow, answers: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a table of answers; kinds of answers differ in what they have."""
    lines = [{"attack_step": row.num_attack_steps} | answer for answer in answers]
    columns = list(dict.fromkeys(name for line in lines for name in line if name != "messages"))  # their text is the prompt
    return columns, [[line.get(name) for name in columns] for line in lines]


def _cells(row: ResultRow, notes: list[str]) -> list[str]:
    numbers = (row.harmful_score, row.finetune_accuracy, row.refusal_rate_benign, row.degenerate_rate)
    cells = [str(row.num_attack_steps), *(f"{n:.1f}" for n in numbers)]
    if row.note:
        cells[1] += "*" * (notes.index(row.note) + 1)
    return cells
