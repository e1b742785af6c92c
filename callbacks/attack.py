"""Base of every attack: when it runs, on whom, borrowed, scored and recorded. An attack itself is a generator of steps."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from casehard.callbacks.results import Results
from casehard.callbacks.scoring import Scores, defense_and_data, require_prompts, score
from casehard.callbacks.sigterm import ended_by_sigterm
from casehard.datamodules.batches import share_of
from casehard.datamodules.chat import prompt_ids
from casehard.datamodules.order import batch_indices, require_seed
from casehard.datamodules.row import Row
from casehard.datamodules.sft import Evaluation, SFTDataModule
from casehard.engine.forward import Batch
from casehard.engine.gradients import sum_over_ranks
from casehard.engine.optimizer import Optimizer
from casehard.engine.training import Plain, StepLoss, Task, named, train_steps, with_progress_bar
from casehard.engine.weights import EVERYTHING, Changes, Weights, borrowed, check_device, local, reshard
from casehard.lightning_modules.defense import Defense
from casehard.lightning_modules.job import Job
from casehard.lightning_modules.other_models import as_aligned, undefended_at
from casehard.metrics.errors import SettingError
from casehard.metrics.names import plain, require_name
from casehard.records.rows import NONE, ResultRow, as_columns, header

ThreatModel = Literal["open_weight", "finetuning_service"]
EXPECTED = "expected to break: the defense acts only while a service fine-tunes"
IDENTITY = ("optimizer", "learning_rate", "poison_ratio")  # settings by which tables tell attacks apart


@dataclass
class Target:
    """A model under one run of an attack, borrowed: whatever ``Attack.changes`` names comes back afterwards.

    An attack that trains yields from ``train``, on ``batches`` of its rows, inside ``engine.adapters.trainable``, which says what
    trains and takes a new adapter away again. One that looks at the model between those steps calls ``settle`` first. One that
    edits weights writes into ``weights()``.

    Args:
        module: the model, at the weights where the attack starts.
        data: rows to train on and prompts to be scored on.
        task: what ``train`` minimises: plain SFT, or at a service with a fine-tuning stage defense that defense's job.
        seed: of rows, order and adapters.
        trainer: shows progress bars. An attack needs nothing of it.
        name: on progress bars and in front of what goes wrong.
        start: copy of what the attack may change, made before it began.
        undefended: this is the baseline beside a defended model, under the same attack.
        defended: a service with a defense of its own trains.
        epoch: of ``fit`` after which the attack runs; None at its end.
        state: free for the attack: what its steps keep for each other and for its answers.
    """

    module: Defense
    data: SFTDataModule
    task: Task
    seed: int
    trainer: L.Trainer
    name: str
    start: Weights = field(default_factory=dict)
    undefended: bool = False
    defended: bool = False
    epoch: int | None = None
    state: dict[str, Any] = field(default_factory=dict)
    bar: dict[str, str] = field(default_factory=dict)  # what the progress bar shows beside the loss
    num_done: int = 0  # optimizer steps that ``task`` took
    passes: float = 0.0  # what the attack has cost so far: see ``spend``
    tokens: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))  # trained, and forward alone
    last_loss: StepLoss | None = None  # of ``train``

    def batches(self, rows: list[Row], batch_size: int, stream: str = "attack") -> Callable[[int], Batch]:
        """The batch of every step of training on ``rows``: this process's share of ``batch_size`` rows, on the model's device.

        Args:
            rows: to train on.
            batch_size: rows a step, over all processes.
            stream: names the order in which rows are drawn; draws under different names are independent.
        """
        drawn = self.data.batches(rows, batch_size, self.seed, stream)
        return lambda step: self.module.placed(drawn(step))

    def share(self, rows: list[Row], batch_size: int, stream: str = "attack") -> Callable[[int], list[tuple[int, Row]]]:
        """This process's share of the rows of every step, by the rule of ``batches``: for steps that make their batch themselves.

        Returns:
            By step: each row and its number, which no other draw of the stream has. It numbers what is random about the row.

        Raises:
            SettingError: fewer rows a step than processes.
        """
        rank, world_size = share_of(self.trainer)
        if batch_size < world_size:
            raise SettingError(f"batch_size must be at least the number of processes, {world_size}, got {batch_size}.")

        def drawn(step: int) -> list[tuple[int, Row]]:
            indices = batch_indices(len(rows), batch_size, self.seed, stream, step)
            return [(step * batch_size + i, rows[indices[i]]) for i in range(rank, batch_size, world_size)]

        return drawn

    def weights(self) -> Weights:
        """This process's part of every parameter, by name, to edit in place: whole rows, where it is sharded."""
        reshard(self.module)
        return {name: local(p) for name, p in self.module.named_parameters()}

    def spend(self, passes: float = 0.0, trained: Tensor | int = 0, forward: Tensor | int = 0, by_all: bool = False) -> None:
        """Count what the attack costs. ``train`` counts its own steps; whoever makes other passes says so here.

        Args:
            passes: forward and backward passes over a (global) batch; a forward pass alone is a third of one.
            trained: tokens of this process's share that went forward and backward, without padding.
            forward: those that went forward alone: read, or generated.
            by_all: every process made these passes, and they count once.
        """
        self.passes += passes
        if by_all and share_of(self.trainer)[0]:
            return
        parts = [torch.as_tensor(part, dtype=torch.int64, device=self.module.device) for part in (trained, forward)]
        self.tokens = self.tokens.to(self.module.device) + torch.stack(parts)

    def begin_job(self) -> Job | None:
        """Begin the job of the service's defense, for a task of one's own that lets it act; None where no defense does."""
        if not isinstance(self.task, Job):
            return None
        reshard(self.module)  # a job freezes shards, not the parameters that a pass has gathered
        self.task.freeze()
        self.task.begin()
        return self.task

    def train(
        self, batches: Callable[[int], Batch], num_steps: int, optimizer: Optimizer, task: Task | None = None
    ) -> Iterator[int]:
        """Train what requires a gradient, with a progress bar; yields 1, 2, ... after each step.

        A second call has an optimizer and a schedule of its own, and its task counts on from the first one's steps.

        Args:
            batches: of every step from 0, on any device.
            num_steps: optimizer steps.
            optimizer: built anew.
            task: trained instead of the target's, such as another loss: ``Plain(loss)``. A service's defense then does not act,
                unless that task lets the job of ``begin_job``.
        """
        begun = self.num_done
        if task is None:
            if not begun:
                self.begin_job()
            task = self.task
        seen: list[Tensor] = []

        def counted(step: int) -> Batch:
            batch = self.module.placed(batches(step))
            seen.append(batch["attention_mask"].sum())
            return batch

        ways = (self.module.forward_context, self.module.row_group)
        steps = train_steps(self.module, task, counted, num_steps, optimizer, *ways, begun)
        for step, loss in with_progress_bar(steps, num_steps, self.name, self.trainer, self.bar):
            self.num_done, self.last_loss = begun + step, loss
            self.spend(passes=1, trained=seen.pop())
            if isinstance(self.task, Job):
                self.spend(*self.task.spent())
            yield step

    def settle(self) -> None:
        """Wait for the last step of ``train``, before somebody looks at the model.

        Raises:
            DivergedError: its loss was not finite.
        """
        if self.last_loss is not None:
            with named(self.name):
                float(self.last_loss)


class Attack(L.Callback):
    """Base of the attacks: change a borrowed model, score it at ``score_steps``, put it back bit for bit.

    Runs when ``fit`` ends, in ``test`` on any checkpoint, and every ``every_n_epochs`` if set. A ``finetuning_service`` job
    starts from the model that the service aligned, so for a fine-tuning stage defense from ``checkpoint``, whatever ``fit`` made
    of it since. An ``open_weight`` attacker starts from the release.

    A subclass overrides ``steps``, sets ``num_attack_steps``, its last, before ``super().__init__``, and overrides what else
    differs. They are called so:

    - before weights load: ``prepare``, which calls ``rows``, so that what is missing shows; once they are there ``check_model``;
    - for every model that is attacked, defended or not: ``changes``, then ``steps``;
    - for every scoring, before the first step and at ``score_steps``: ``evaluation``, then ``respond`` on its prompts;
    - for the rows of the tables: ``settings``, ``what_trains``, ``notes``.

    One object attacks several models: what a run has to remember belongs into ``target.state``. A variant of fine-tuning starts
    from ``FullParameterAttack`` or ``LoRAAttack``.

    Args:
        threat_model: finetuning_service: the provider trains, and a fine-tuning stage defense acts; open_weight: the attacker
            holds the weights and trains by plain SFT, so that only alignment stage defenses can act.
        seed: of rows, order and adapters; null takes the data's.
        score_steps: steps after which to score; 0 (before the attack) is always scored; null scores the last step.
        undefended: under finetuning_service, first run the same job by plain SFT: the same rows, order, optimizer and seed.
        every_n_epochs: also attack after every so many epochs of ``fit``; null only when it ends.
        name: in tables and dashboards; by default the class's. Attacks of one run that differ only in settings that no table
            shows, such as the shape of an adapter, need one each.
        copy_device: where the copy of the weights waits, such as cpu; null keeps it beside the model.
        undefended_checkpoint: an undefended model of the same architecture: first run the same job on it. The weights of both
            are held, so one copy more.
    """

    harmful: bool = True  # whether there is anything to break: benign fine-tuning breaks nothing
    num_attack_steps: int = 1  # the last number that ``steps`` yields; 0: nothing is tampered with, and ``steps`` not called

    def __init__(
        self,
        threat_model: ThreatModel,
        seed: int | None = None,
        score_steps: list[int] | None = None,
        undefended: bool = True,
        every_n_epochs: int | None = None,
        name: str | None = None,
        copy_device: str | None = None,
        undefended_checkpoint: str | None = None,
    ) -> None:
        if threat_model not in ("open_weight", "finetuning_service"):
            raise SettingError(f"threat_model must be open_weight or finetuning_service, got {threat_model!r}.")
        if every_n_epochs is not None and every_n_epochs < 1:
            raise SettingError(f"every_n_epochs must be >= 1 or null, got {every_n_epochs}. null attacks when fit ends.")
        if seed is not None:
            require_seed(seed)
        last = self.num_attack_steps
        steps = sorted({0, *([last] if score_steps is None else score_steps)})
        if steps[0] < 0 or steps[-1] > last:
            raise SettingError(f"score_steps must lie between 0 and num_attack_steps ({last}), got {score_steps}.")
        if steps == [0] and last:
            raise SettingError(f"score_steps must name a step of the attack or be null, got {score_steps}. null scores the last.")
        self.threat_model, self.seed, self.score_steps, self.undefended = threat_model, seed, steps, undefended
        self.every_n_epochs, self.name, self.copy_device = every_n_epochs, name or type(self).__name__, copy_device
        self.undefended_checkpoint = undefended_checkpoint
        require_name("name of an attack", self.name)

    # ---- what an attack overrides

    def steps(self, target: Target) -> Iterator[int]:
        """Change the model of ``target``; yield 1, 2, ... to ``num_attack_steps``, after each step.

        What costs passes beside those of ``target.train`` is counted by ``target.spend``.

        The model is scored while the generator waits at a step of ``score_steps``, as it is there. Step 0 is scored before.
        Gradients are enabled, and torch's generator has just been seeded with the target's seed.
        """
        raise NotImplementedError(f"{type(self).__name__} must override steps.")

    def changes(self, module: Defense) -> Changes:
        """Which parameters ``steps`` may change, by name. They are copied before anything happens; adapters need no copy."""
        return EVERYTHING

    def rows(self, data: SFTDataModule, seed: int) -> list[Row]:
        """What the attacker trains on. None unless overridden."""
        return []

    def handed_in(self, data: SFTDataModule, seed: int) -> list[Row]:
        """What a service sees of the rows: ``rows`` unless overridden."""
        return self.rows(data, seed)

    def evaluation(self, data: SFTDataModule) -> Evaluation:
        """What the attacked model is scored on; ``dataclasses.replace(data.evaluation, harmful=...)`` changes the prompts."""
        return data.evaluation

    def respond(self, target: Target, rows: list[Row], max_new_tokens: int) -> list[str]:
        """What the attacked model answers to the prompts of ``rows``, in their order. Greedy answers unless overridden."""
        prompts = [prompt_ids(row, target.module.tokenizer) for row in rows]
        return target.module.generate(prompts, max_new_tokens, target.data.evaluation.batch_size)

    def settings(self) -> dict[str, Any]:
        """Fields that identify this attack in result tables. Names of ``records.rows.FINE_TUNING`` fill columns of their own."""
        return {}

    def what_trains(self, target: Target) -> str:
        """What the attacker trains, in one line, "" if nothing. Asked once the first step is done."""
        return ""

    def notes(self, target: Target) -> list[str]:
        """What a reader of the rows must know. Asked once the first step is done."""
        notes = []
        stages = target.module.stages
        if self.threat_model == "open_weight" and stages and "alignment" not in stages and not target.undefended:
            notes.append(EXPECTED)
        if target.undefended and self.undefended_checkpoint is not None:
            notes.append(f"the undefended model is {Path(self.undefended_checkpoint).name}")
        return notes

    def prepare(self, data: SFTDataModule, seed: int) -> None:
        """Lay out the rows, before any weights load: an attack must not fail after hours of training.

        Raises:
            SettingError: rows that are not there, or that cannot be trained on.
        """
        if rows := self.rows(data, seed):
            data.batches(rows, len(rows), seed, self.name)

    def check_model(self, module: Defense) -> None:
        """Raise a SettingError where settings do not fit the model, before it is trained or scored."""

    # ---- when it runs

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check all that an attack needs before any weights load.

        Raises:
            SettingError: two attacks whose rows, or metrics whose columns, could not be told apart; a ``test`` of no batches;
                rows, a device or an undefended model that are not there; a judge that cannot judge.
            OSError: files that are not there, or cannot be written.
        """
        if stage == "test" and not trainer.limit_test_batches:
            raise SettingError("trainer.limit_test_batches must be left out or > 0, got 0: attacks run when testing ends.")
        module, data = defense_and_data(trainer, pl_module)
        require_name(f"the label of {type(module).__name__}", module.label)
        header([metric.column() for metric in data.evaluation_settings.metrics])
        check_device(self.copy_device)
        require_prompts(self.evaluation(data))
        try:
            self.prepare(data, self._seed(data))
        except SettingError as error:  # which may be of a setting that the data has, too
            raise SettingError(f"{self.name} ({self.threat_model}): {error}") from error
        if self.undefended_checkpoint is not None:
            module.check_other(self.undefended_checkpoint, "undefended_checkpoint")
        attacks = [c for c in trainer.callbacks if isinstance(c, Attack)]  # type: ignore[attr-defined]
        if sum(attack.identity(data) == self.identity(data) for attack in attacks) > 1:
            raise SettingError(
                "attacks must differ in name, threat model, optimizer, learning rate, poison ratio or seed, by which results are "
                f"told apart, and two are {', '.join(map(str, self.identity(data)))}. Set name for one of them."
            )

    def _seed(self, data: SFTDataModule) -> int:
        return data.seed if self.seed is None else self.seed

    def identity(self, data: SFTDataModule) -> tuple[Any, ...]:
        """Fields that identify this attack among those of its run in result tables (``Results.jobs``)."""
        settings = self.settings()
        return self.name, self.threat_model, *(settings[name] for name in IDENTITY if name in settings), self._seed(data)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.check_model(defense_and_data(trainer, pl_module)[0])

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.check_model(defense_and_data(trainer, pl_module)[0])

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The trained model is exported and its checkpoint saved: attack it."""
        if not trainer.interrupted:
            module, _ = defense_and_data(trainer, pl_module)
            with module.on_its_device():
                module.finish()
                module.forget_training()
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

    def run(self, trainer: L.Trainer, module: L.LightningModule, epoch: int | None = None) -> list[ResultRow]:
        """The attack, undefended and defended where both have a meaning, recorded in ``Results``.

        Returns:
            What it came to: a row for every step that was scored, the undefended model's first.
        """
        module, data = defense_and_data(trainer, module)
        module.synchronize()
        service = self.threat_model == "finetuning_service"
        defended = service and bool(module.stages & {"finetuning", "post_finetuning"})  # else a service does plain SFT
        outcome: list[ResultRow] = []
        with ended_by_sigterm(trainer), torch.inference_mode(False), torch.enable_grad():
            plain = Target(module, data, Plain(module.sft_loss), self._seed(data), trainer, self.name, epoch=epoch)
            if self.undefended_checkpoint is not None:
                with undefended_at(module, self.undefended_checkpoint):
                    self._attack(replace(plain, undefended=True), outcome)
            with as_aligned(module) if defended else nullcontext():
                before = None
                if defended and self.undefended and self.undefended_checkpoint is None:
                    before = self._attack(replace(plain, undefended=True), outcome)
                self._attack(replace(plain, defended=defended), outcome, before)
        return outcome

    @contextmanager
    def lent(self, target: Target) -> Iterator[Target]:
        """For a block, ``target`` as a model that this attack may change: borrowed, with a task that has taken no step."""
        module = target.module
        who = "undefended" if target.undefended else module.label
        changes = EVERYTHING if self._recovers(target) else self.changes(module)  # a repair compares with all of the start
        with borrowed(module, changes, self.copy_device) as start:
            job = module.job() if target.defended else None
            if job is not None:
                job.rows = partial(self.handed_in, target.data, target.seed)
            yield replace(
                target,
                task=job or Plain(module.sft_loss),
                name=f"{self.name} ({self.threat_model}, {who})",
                start=start,
                state={},
                bar={},
                num_done=0,
                passes=0.0,
                tokens=torch.zeros(2, dtype=torch.int64),
                last_loss=None,
            )

    def seeded_steps(self, target: Target) -> Iterator[int]:
        """``steps``, with the generators seeded first; close it to end the attack early."""
        torch.manual_seed(target.seed)  # adapters start alike in every run; ``borrowed`` brings the generators back
        if self.num_attack_steps:
            yield from self.steps(target)

    def scores(self, target: Target) -> Scores:
        """Scores of the model as it is now; at a service whose defense repairs models, as its customer gets it."""
        target.settle()
        with target.module.handed_back(target.start, self.copy_device) if target.defended else nullcontext():
            return score(target.module, self.evaluation(target.data), partial(self.respond, target))

    def _recovers(self, target: Target) -> bool:
        return target.defended and "post_finetuning" in target.module.stages

    def _attack(self, lender: Target, outcome: list[ResultRow], before: Scores | None = None) -> Scores:
        """One run of the attack; returns the scores of step 0, which ``before`` may bring."""
        with self.lent(lender) as target, closing(self.seeded_steps(target)) as steps:  # type: ignore[type-var]
            if before is None or self._recovers(target):
                before = self.scores(target)
            step, seconds, since = 0, 0.0, time.perf_counter()
            for step in steps:
                if step in self.score_steps:
                    target.settle()  # its time counts
                seconds += time.perf_counter() - since
                if step == 1:  # now it is known what trains
                    self._record(target, 0, before, 0.0, outcome)
                if step in self.score_steps:
                    scores = self.scores(target)
                    target.bar["harmful"] = f"{scores.metrics['harmful_score']:.1f}"
                    self._record(target, step, scores, seconds, outcome)
                since = time.perf_counter()
            if not self.num_attack_steps:
                self._record(target, 0, before, 0.0, outcome)
            assert step == self.num_attack_steps, f"{self.name} took {step} steps, and its num_attack_steps is not that"
        return before

    def _record(self, target: Target, step: int, scores: Scores, seconds: float, outcome: list[ResultRow]) -> None:
        module = target.module
        trained, forward = sum_over_ranks(target.tokens.to(module.device), module.row_group).tolist()
        began = step > 0 or not self.num_attack_steps  # the row of step 0 is written once the first step is done
        attacks = [callback for callback in target.trainer.callbacks if isinstance(callback, Attack)]  # type: ignore[attr-defined]
        row = ResultRow(
            attack_index=attacks.index(self),
            defense=NONE if target.undefended else module.label,
            stage=NONE if target.undefended else module.stage,
            attack=self.name,
            threat_model=self.threat_model,
            harmful=self.harmful,
            seed=target.seed,
            num_attack_steps=step,
            metrics=scores.metrics,
            own=scores.own,
            wall_seconds=round(seconds, 3),
            passes=round(target.passes, 3) if began else 0.0,
            tokens_trained=trained if began else 0,
            tokens_forward=forward if began else 0,
            judge=target.data.judge.label,
            epoch="" if target.epoch is None else str(target.epoch),
            note=plain("; ".join(filter(None, [*self.notes(target), scores.note]))),
            trained=plain(self.what_trains(target)),
            **as_columns(self.settings()),
        )
        outcome.append(row)
        for callback in target.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Results):
                callback.record(target.trainer, row, scores.generations)
