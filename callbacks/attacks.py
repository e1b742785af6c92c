"""Harmful fine-tuning attacks: poisoned SFT rounds that borrow the model and give it back bit for bit."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from casehard.callbacks.results import Results
from casehard.callbacks.scoring import Scores, defense_and_data, score
from casehard.callbacks.sigterm import ended_by_sigterm
from casehard.datamodules.sft import SFTDataModule
from casehard.engine.adapters import LoRA, coverage, named, targets, trainable, what_trains
from casehard.engine.forward import Batch
from casehard.engine.optimizer import Optimizer
from casehard.engine.training import Plain, train_steps, with_progress_bar
from casehard.engine.weights import borrowed, check_device
from casehard.lightning_modules.defense import Defense
from casehard.records.rows import ResultRow

ThreatModel = Literal["open_weight", "finetuning_service"]
BEYOND = "expected to break: the defense acts only while a service fine-tunes"
MOST = 90.0  # percent of the decoder's weights: a LoRA attack that reaches less by default is noted as weaker than its name says


class HarmfulFineTuning(L.Callback):
    """Base of the attacks: fine-tune on a poisoned mixture, score at ``score_steps``, put the model back.

    Runs when ``fit`` ends, in ``test`` on any checkpoint, and every ``every_n_epochs`` if set. The rows come from the run's data.
    A ``finetuning_service`` job is fine-tuning itself: it starts from the model that the service aligned, so for a fine-tuning
    stage defense from ``checkpoint``, whatever ``fit`` made of it since. An ``open_weight`` attacker starts from the release.

    Args:
        threat_model: finetuning_service: the provider trains, under the defense's ``finetuning_loss``; open_weight: the attacker
            holds the weights and trains by plain SFT, so that only alignment stage defenses can act.
        poison_ratio: harmful share of the rows, in [0, 1].
        num_samples: rows of the mixture.
        num_attack_steps: optimizer steps, >= 1.
        batch_size: rows a step, over all processes.
        optimizer: the attacker's own.
        seed: of the mixture, the order and the adapters; null takes the data's.
        score_steps: steps after which to score; 0 (before the attack) is always scored; null scores the last step.
        undefended: under finetuning_service, first run the same job by plain SFT: the same rows, order, optimizer and seed.
        every_n_epochs: also attack after every so many epochs of ``fit``; null only when it ends.
        name: in tables and dashboards; by default the class's. Attacks of one run that differ only in settings that no table
            shows, such as the shape of an adapter, need one each.
        copy_device: where the copy of the weights waits, such as cpu; null keeps it beside the model.
        undefended_checkpoint: an undefended model of the same architecture: first run the same job on it. The weights of both
            are held, so one copy more.
    """

    lora: LoRA | None = None  # every parameter trains, or
    train_only: list[str] | None = None  # those that match

    def __init__(
        self,
        threat_model: ThreatModel,
        poison_ratio: float = 0.1,
        num_samples: int = 500,
        num_attack_steps: int = 100,
        batch_size: int = 8,
        optimizer: Optimizer = Optimizer(),  # noqa: B008  frozen
        seed: int | None = None,
        score_steps: list[int] | None = None,
        undefended: bool = True,
        every_n_epochs: int | None = None,
        name: str | None = None,
        copy_device: str | None = None,
        undefended_checkpoint: str | None = None,
    ) -> None:
        if threat_model not in ("open_weight", "finetuning_service"):
            raise ValueError(f"threat_model must be open_weight or finetuning_service, got {threat_model!r}.")
        if not 0 <= poison_ratio <= 1:
            raise ValueError(f"poison_ratio must lie in [0, 1], got {poison_ratio}. It is a share: write 0.1 for 10%.")
        for setting, value in (("num_samples", num_samples), ("num_attack_steps", num_attack_steps), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{setting} must be >= 1, got {value}.")
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be >= 1 or null, got {every_n_epochs}. null attacks when fit ends.")
        steps = sorted({0, *([num_attack_steps] if score_steps is None else score_steps)})
        if steps[0] < 0 or steps[-1] > num_attack_steps:
            raise ValueError(f"score_steps must lie between 0 and num_attack_steps ({num_attack_steps}), got {score_steps}.")
        self.threat_model, self.poison_ratio, self.num_samples = threat_model, poison_ratio, num_samples
        self.num_attack_steps, self.batch_size, self.optimizer, self.seed = num_attack_steps, batch_size, optimizer, seed
        self.score_steps, self.undefended, self.every_n_epochs = steps, undefended, every_n_epochs
        self.name, self.copy_device = name or type(self).__name__, copy_device
        self.undefended_checkpoint = undefended_checkpoint

    @property
    def state_key(self) -> str:
        """Several attacks of one class may stand in one run."""
        return self._generate_state_key(name=self.name, threat_model=self.threat_model, seed=self.seed, poison=self.poison_ratio)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check all that an attack wants before any weights load: it must not fail after hours of training.

        Raises:
            ValueError: two attacks whose rows could not be told apart; a ``test`` of no batches, which ends before it begins;
                rows, a device or an undefended model that are not there; a judge that cannot judge.
            OSError: files that are not there, or cannot be written.
        """
        if stage == "test" and not trainer.limit_test_batches:
            raise ValueError("trainer.limit_test_batches must be left out or > 0, got 0: attacks run when testing ends.")
        module, data = defense_and_data(trainer, pl_module)
        check_device(self.copy_device)
        self._draw = self._batches(data)
        if self.undefended_checkpoint is not None:
            module.check_undefended(self.undefended_checkpoint)
        own = self._known_by(data.seed)
        attacks = [c for c in trainer.callbacks if isinstance(c, HarmfulFineTuning)]  # type: ignore[attr-defined]
        if sum(attack._known_by(data.seed) == own for attack in attacks) > 1:
            raise ValueError(
                "attacks must differ in name, threat model, optimizer, learning rate, poison ratio or seed, by which results are "
                f"told apart, and two are {', '.join(map(str, own))}. Set name for one of them."
            )

    def _batches(self, data: SFTDataModule) -> Callable[[int], Batch]:
        """The attacker's batch of every step, on rows that are there."""
        seed = data.seed if self.seed is None else self.seed
        rows = data.mixture(self.num_samples, self.poison_ratio, seed)
        return data.batches(rows, self.batch_size, seed, "attack")

    def _known_by(self, seed: int) -> tuple[Any, ...]:
        """What tables and reports tell attacks of one run apart by (``Results.jobs``); ``seed`` is the data's."""
        own = seed if self.seed is None else self.seed
        return self.name, self.threat_model, self.optimizer.name, self.optimizer.learning_rate, self.poison_ratio, own

    # ---- when it runs

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check what needs the model, before it is trained."""
        self._check(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same, before anything is scored."""
        self._check(trainer, pl_module)

    def _check(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Raise a ValueError where the settings of what trains do not fit the model."""
        model = defense_and_data(trainer, module)[0].model
        if self.lora is not None:
            targets(model, self.lora)
        if self.train_only is not None:
            named(model, self.train_only)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The trained model is exported and its checkpoint saved: attack it."""
        if not trainer.interrupted:
            self.run(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Attack the checkpoint as it is."""
        self.run(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Attack in the middle of training, which goes on as if nothing had happened."""
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs is not None and epoch % self.every_n_epochs == 0:
            self.run(trainer, pl_module, epoch)

    # ---- what it does

    def run(self, trainer: L.Trainer, module: L.LightningModule, epoch: int | None = None) -> None:
        """The attack, undefended and defended where both have a meaning, recorded in ``Results``."""
        module, data = defense_and_data(trainer, module)
        module.synchronize()
        seed = data.seed if self.seed is None else self.seed
        service = self.threat_model == "finetuning_service"
        acts = service and module.stage in ("finetuning", "post_finetuning")  # else a service does as everybody does: plain SFT
        with ended_by_sigterm(trainer), torch.inference_mode(False), torch.enable_grad():
            job = _Job(trainer, module, data, self._draw, seed, epoch)
            if self.undefended_checkpoint is not None:
                with module.undefended_at(self.undefended_checkpoint):
                    self._attack(replace(job, twin=True), score(module, data.evaluation))
            with module.as_aligned() if acts else nullcontext():
                before = score(module, data.evaluation)
                if acts and self.undefended and self.undefended_checkpoint is None:
                    self._attack(replace(job, twin=True), before)
                self._attack(replace(job, defended=acts), before)

    def _attack(self, job: "_Job", before: Scores) -> None:
        module = job.module

        def batches(step: int) -> dict[str, Tensor]:
            return {name: tensor.to(module.device) for name, tensor in job.draw(step).items()}

        shown = f"{self.name} ({self.threat_model}, {'undefended' if job.twin else module.label})"
        with borrowed(module, device=self.copy_device), self._prepared(job):
            job = replace(job, trained=what_trains(module, module.model, self.lora), note=self._note(job))
            self._record(job, 0, before, 0.0)
            loss = Plain(module.finetuning_loss if job.defended else module.sft_loss)
            how = (self.optimizer, module.forward_context, module.row_group)
            steps = train_steps(module, loss, batches, self.num_attack_steps, *how)
            trained, start = 0.0, time.perf_counter()
            for step, value, bar in with_progress_bar(steps, self.num_attack_steps, shown, job.trainer):
                trained += time.perf_counter() - start
                if step in self.score_steps:
                    with self._handed_back(job):
                        scores = score(module, job.data.evaluation)
                    bar.set_postfix(loss=f"{value:.3f}", harmful_score=f"{scores.metrics['harmful_score']:.1f}")
                    self._record(job, step, scores, trained)
                start = time.perf_counter()

    @contextmanager
    def _prepared(self, job: "_Job") -> Iterator[None]:
        torch.manual_seed(job.seed)  # adapters start alike in every run; ``borrowed`` brings the generators back
        with trainable(job.module, job.module.model, self.lora, self.train_only):
            if job.defended:
                job.module.freeze_parameters()
                job.module.begin_finetuning()
            yield

    @contextmanager
    def _handed_back(self, job: "_Job") -> Iterator[None]:
        """The model as its customer gets it: repaired where the service does that, on a loan, for the job goes on unrepaired."""
        module = job.module
        if not job.defended or type(module).recover is Defense.recover:
            yield
            return
        with borrowed(module, device=self.copy_device):
            module.recover()
            yield

    def _note(self, job: "_Job") -> str:
        """What a reader of the rows must know, "" if nothing."""
        notes, module = [], job.module
        if self.threat_model == "open_weight" and module.stage in ("finetuning", "post_finetuning") and not job.twin:
            notes.append(BEYOND)
        if job.twin and self.undefended_checkpoint is not None:
            notes.append(f"the undefended model is {Path(self.undefended_checkpoint).name}")
        if self.lora is not None and self.lora.target_modules is None:
            share, still = coverage(module.model)
            if share < MOST:
                notes.append(f"LoRA reaches {share:g}% of the decoder's weights: no adapter can act on {', '.join(still)}")
        return "; ".join(notes)

    def _record(self, job: "_Job", step: int, scores: Scores, seconds: float) -> None:
        module, m = job.module, scores.metrics
        row = ResultRow(
            defense="none" if job.twin else module.label,
            stage="none" if job.twin else module.stage,
            attack=self.name,
            threat_model=self.threat_model,
            poison_ratio=self.poison_ratio,
            optimizer=self.optimizer.name,
            learning_rate=self.optimizer.learning_rate,
            seed=job.seed,
            num_attack_steps=step,
            harmful_score=m["harmful_score"],
            attack_success_rate=m["attack_success_rate"],
            num_scored=int(m["num_scored"]),
            num_unscored=int(m["num_unscored"]),
            finetune_accuracy=m["finetune_accuracy"],
            refusal_rate_benign=m["refusal_rate_benign"],
            degenerate_rate=m["degenerate_rate"],
            wall_seconds=round(seconds, 3),
            num_samples=self.num_samples,
            batch_size=self.batch_size,
            judge=job.data.judge.label,
            epoch="" if job.epoch is None else str(job.epoch),
            note="; ".join(filter(None, [job.note, scores.note])),
            trained=job.trained,
        )
        for callback in job.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Results):
                callback.record(job.trainer, row, scores.generations)


@dataclass(frozen=True)
class _Job:
    """One run of an attack. ``defended``: under the defense's own loss; ``twin``: the undefended model beside it; ``trained`` and
    ``note``: as its rows have them.
    """

    trainer: L.Trainer
    module: Defense
    data: SFTDataModule
    draw: Callable[[int], Batch]
    seed: int
    epoch: int | None
    defended: bool = False
    twin: bool = False
    trained: str = ""
    note: str = ""


class FullParameterAttack(HarmfulFineTuning):
    """Harmful fine-tuning of every parameter (Qi et al., arXiv:2310.03693; the attack of Patcher, arXiv:2606.07970).

    Under a defense that freezes some of them (SBR: the unembedding), the provider leaves those out. For the settings see
    ``HarmfulFineTuning``.

    Args:
        threat_model: finetuning_service or open_weight.
        train_only: patterns of the only parameters that train, such as ``*.layers.5.*`` or ``*.mlp.*``; null trains all.
    """

    def __init__(self, threat_model: ThreatModel, train_only: list[str] | None = None, **settings: object) -> None:
        if train_only is not None and not train_only:
            raise ValueError("train_only must hold patterns of parameters or be null, got an empty list. null trains all.")
        super().__init__(threat_model, **settings)  # type: ignore[arg-type]
        self.train_only = train_only


class LoRAAttack(HarmfulFineTuning):
    """Harmful fine-tuning of a new LoRA adapter, on top of whatever adapters the model has. For the settings see
    ``HarmfulFineTuning``.

    Args:
        threat_model: finetuning_service or open_weight.
        lora: shape of the adapter.
    """

    def __init__(self, threat_model: ThreatModel, lora: LoRA = LoRA(), **settings: object) -> None:  # noqa: B008  frozen
        super().__init__(threat_model, **settings)  # type: ignore[arg-type]
        self.lora = lora
