"""What a run leaves behind: tidy result rows, generations, the trained model with its scores, and closing tables."""

import math
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from casehard.callbacks.scoring import Scores, score
from casehard.callbacks.sigterm import ended_by_sigterm
from casehard.datamodules.sft import SFTDataModule
from casehard.engine.export import save_model
from casehard.engine.weights import NOTHING, borrowed
from casehard.lightning_modules.defense import Defense
from casehard.metrics.columns import Answer, Column
from casehard.metrics.errors import SettingError
from casehard.metrics.judges import NO_VERDICT
from casehard.records.answers import ANSWERS, KINDS
from casehard.records.delivered import STATES, Delivered, keep_answers
from casehard.records.frames import as_html, frame
from casehard.records.outcome import job, logged_metrics, outcome
from casehard.records.rows import ROWS, ResultRow, Run, append_row, read_run, write_run
from casehard.records.table import delivered_table, results_table, terminal, to_read

if TYPE_CHECKING:
    from pandas import DataFrame


class Results(L.Callback):
    """Keep every result row, write it the moment it is known, score the model that ``fit`` delivers, and close with tables.

    ``attacks.csv`` has a row an evaluation, ``generations.jsonl`` an answer a line, ``model/`` the trained weights in Hugging
    Face format. Both files of results grow by one evaluation at a time, its answers first; what a kill cuts off is left out by
    ``read_run``. A run that goes on from a checkpoint in its folder keeps what earlier epochs of ``fit`` found. Loggers get the
    numbers; W&B's summary also what each attack came to. ``delivered.json`` has the scores of the model before the first step and
    of the one that training left, before any attack, and ``delivered.jsonl`` the answers behind them.

    Args:
        folder: the run's folder.
        export: write the model when training ends.
        generations: write the generated answers, local only.
        wandb_generations: also send them to W&B, a table an evaluation. With real data they are harmful texts.
        score: score the model that is delivered, and before training the one that it is made from.
    """

    def __init__(
        self,
        folder: str,
        export: bool = True,
        generations: bool = True,
        wandb_generations: bool = False,
        score: bool = True,
    ) -> None:
        self.folder, self.export, self.generations = Path(folder), export, generations
        self.wandb_generations, self.score = wandb_generations, score
        self.before: dict[str, float] | None = None  # scores before the first step; a checkpoint keeps them
        self.delivered: Delivered | None = None
        self.rows: list[ResultRow] = []
        self.began = False  # training or attacking
        self.training_seconds = 0.0  # up to the last checkpoint where a run goes on from it
        self._started: float | None = None  # while it trains
        self._goes_on = self._exported = self._nothing_to_score = False
        self._notes: list[str] = []  # on the scores
        self._adaptive = ""  # of the defense: what names the attacker who knows it
        self._evaluation: int | None = None  # the last one's number; None before anything is written

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Whom the closing lines may miss."""
        self._adaptive = pl_module.adaptive if isinstance(pl_module, Defense) else ""

    @rank_zero_only
    def record(self, trainer: L.Trainer, row: ResultRow, answers: list[Answer]) -> None:
        """Keep a row and its answers, on disk and in every logger (``attack/<job>/<metric>`` against ``attack_step``).

        The evaluation gets its number here.
        """
        self.began = True
        if self._evaluation is None:
            self._evaluation = self._begin(row.epoch, row.own)
        self._evaluation += 1
        row = replace(row, evaluation=self._evaluation)
        append_row(self.folder, row, answers if self.generations else None)
        self.rows.append(row)
        name, rows = self._job()
        metrics = {f"attack/{name}/{n}": float(row.metrics[n]) for n in logged_metrics(row.own) if not math.isnan(row.metrics[n])}
        for logger in trainer.loggers:
            logger.log_metrics(metrics | {"attack_step": float(row.num_attack_steps)}, step=trainer.global_step)
            if isinstance(logger, WandbLogger):
                logger.experiment.summary.update({f"attack/{name}/{n}": value for n, value in outcome(rows).items()})
                if self.wandb_generations:
                    columns, data = _wandb_table(row, answers)
                    logger.log_table(f"generations/{name}", columns, data, step=trainer.global_step)

    def _begin(self, epoch: str, own: tuple[Column, ...]) -> int:
        """Write the files of results with what they keep; returns the last number of an evaluation.

        A run that goes on keeps what was found in earlier epochs of ``fit``; from ``epoch`` on it is found anew.
        """
        kept = Run(self.folder, [], [], own)
        if self._goes_on and (self.folder / ROWS).exists():
            before = read_run(self.folder, may_be_empty=True)
            earlier = [bool(row.epoch) and (not epoch or int(row.epoch) < int(epoch)) for row in before.rows]
            rows = [row.measured_by(own) for row in compress(before.rows, earlier)]
            kept = Run(self.folder, rows, list(compress(before.answers, earlier)), own)
        write_run(kept, answers=self.generations or (self.folder / ANSWERS).exists())
        self.rows = list(kept.rows)
        return max((row.evaluation for row in kept.rows), default=0)

    def _job(self) -> tuple[str, list[ResultRow]]:
        """The attack under way as loggers name it, and its rows so far. The second of one name in a run is ``NAME_2``."""
        row = self.rows[-1]
        alike = [r for r in self.rows if (r.attack, r.threat_model) == (row.attack, row.threat_model)]
        number = list(dict.fromkeys(r.attack_index for r in alike)).index(row.attack_index) + 1
        name = row.attack if number == 1 else f"{row.attack}_{number}"
        return f"{name}-{row.threat_model}-{row.defense}", [r for r in self.rows if job(r) == job(row)]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From a checkpoint a run goes on."""
        self._goes_on = trainer.ckpt_path is not None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training begins, or goes on."""
        if not self._goes_on:
            scores = self._scored(trainer, pl_module, STATES[0])
            self.before = None if scores is None else scores.metrics
        self.began = True
        self._started = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export before any attack runs, so that no attack can cost the model."""
        self.training_seconds, self._started = self._seconds(), None
        self._deliver(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that goes on from its last step trains no more, and may not have got to the export."""
        if not self._exported:
            with pl_module.on_its_device() if isinstance(pl_module, Defense) else nullcontext():
                self._deliver(trainer, pl_module)

    def _deliver(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._export(trainer, module)
        if trainer.interrupted or not (scores := self._scored(trainer, module, STATES[1])):
            return
        data: SFTDataModule = trainer.datamodule  # type: ignore[attr-defined]
        prompts = {kind: len(getattr(data.evaluation, kind)) for kind in KINDS}
        before, after = self.before or {}, scores.metrics
        self.delivered = Delivered(before, after, prompts, data.judge.label, list(dict.fromkeys(self._notes)), scores.own)
        if trainer.is_global_zero:
            self.delivered.write(self.folder)
        names = logged_metrics(scores.own)
        logged = {f"delivered/{n}": after[n] for n in names} | {f"delivered/{n}_before": before.get(n, math.nan) for n in names}
        for logger in trainer.loggers:
            logger.log_metrics({n: float(v) for n, v in logged.items() if not math.isnan(v)}, step=trainer.global_step)

    def _scored(self, trainer: L.Trainer, module: L.LightningModule, when: str) -> Scores | None:
        """Scores of the model as it is, without a trace; None where none are asked for, or nothing is held out."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not self.score or not isinstance(module, Defense) or not isinstance(data, SFTDataModule):
            return None
        evaluation = data.evaluation
        self._nothing_to_score = not any(getattr(evaluation, kind) for kind in KINDS)
        if self._nothing_to_score:
            return None
        if when == STATES[1]:
            module.finish()
        module.synchronize()
        with ended_by_sigterm(trainer), torch.inference_mode(False), borrowed(module, NOTHING):
            scores = score(module, evaluation)
        self._notes += filter(None, [scores.note])
        if trainer.is_global_zero and self.generations:
            self.folder.mkdir(parents=True, exist_ok=True)
            keep_answers(self.folder, when, scores.generations)
        return scores

    def _export(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.export and not trainer.interrupted and isinstance(module, Defense):
            module.finish()  # hardened or recovered
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
        """Seconds of training so far, and what the model scored before."""
        return {"seconds": self._seconds(), "before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on."""
        self.training_seconds, self.before = state_dict["seconds"], state_dict.get("before")

    def frame(self) -> "DataFrame":
        """The rows, as a data frame of pandas."""
        return frame(self.rows)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return as_html(self.rows, f"Run folder: {self.folder}", self.delivered)

    @rank_zero_only
    def close(self, stopped: bool = False) -> None:
        """Print the tables and where everything is; of a run that was stopped, not what it would have lacked."""
        console = terminal()
        if self.delivered is not None:
            console.print(delivered_table(self.delivered))
        elif self._nothing_to_score and not stopped:
            console.print("Not scored: data.sources names no harmful_prompts, benign_prompts or task.")
        if self.rows:
            console.print(results_table(self.rows))
            if self._adaptive and not any(row.attack.startswith(f"{row.defense}: ") for row in self.rows):
                console.print(f"Not run: the attacker who knows this defense. Add --config {self._adaptive}")
        elif self.delivered is None and not self._nothing_to_score and not stopped:
            console.print("Nothing was attacked or scored: trainer.callbacks has no attack.")
        if (self.rows or self.delivered) and (command := to_read(self.folder)):
            console.print(command, soft_wrap=True)
        console.print(f"Run folder: {self.folder}", soft_wrap=True)

    @rank_zero_only
    def require_verdicts(self) -> None:
        """Refuse to call a run finished whose judge failed on every answer.

        Raises:
            SettingError: nothing was scored; the answers are kept.
        """
        failed = [row.note for row in self.rows if row.num_unscored and not row.num_scored and NO_VERDICT in row.note]
        if failed and not any(row.num_scored for row in self.rows):
            raise SettingError(f"{failed[-1]}. The answers are kept: mend that, and `casehard judge {self.folder}` scores them.")
        found = self.delivered
        if found is None or self.rows or found.delivered["num_scored"]:
            return
        if failed := [note for note in found.notes if NO_VERDICT in note]:
            raise SettingError(
                f"{failed[-1]}. The model is exported: mend that, and start again with --ckpt_path last, which scores it without "
                "training."
            )


def _wandb_table(row: ResultRow, answers: list[Answer]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a table of answers; kinds of answers differ in what they have."""
    lines = [{"attack_step": row.num_attack_steps} | answer for answer in answers]
    columns = list(dict.fromkeys(name for line in lines for name in line if name != "messages"))  # their text is the prompt
    return columns, [[line.get(name) for name in columns] for line in lines]
