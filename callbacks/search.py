"""Search for an attack's strongest settings, on prompts that are not those of the table."""

import copy
import hashlib
import math
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import is_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from casehard.callbacks.attack import Attack, Target
from casehard.callbacks.results import Results
from casehard.callbacks.scoring import Scores, everywhere
from casehard.callbacks.search_space import (
    FIXED,
    Bound,
    Choices,
    MedianPruner,
    has_setting,
    required,
    searched,
    to_check,
    with_settings,
    without,
)
from casehard.datamodules.fingerprint import digest as row_digest
from casehard.datamodules.mixing import overlap
from casehard.datamodules.row import Row
from casehard.datamodules.sft import Evaluation, SFTDataModule
from casehard.datamodules.sources import read_rows
from casehard.engine.first_token import kl
from casehard.engine.gradients import sum_over_ranks
from casehard.engine.training import DivergedError
from casehard.lightning_modules.defense import Defense
from casehard.metrics.columns import COLUMNS
from casehard.metrics.errors import SettingError
from casehard.records.rows import NONE
from casehard.records.trials import TrialRow, in_words, write_trials
from casehard.version import version_of

if TYPE_CHECKING:
    from casehard.callbacks.trials import Given, Trials, Tried

KL = "kl"  # a bound's name
NEEDS = {KL: "benign_prompts", "refusal_rate_benign": "benign_prompts", "finetune_accuracy": "task"}  # prompts, by metric
NAMES = {"harmful_prompts": "prompts", "benign_prompts": "benign_prompts", "task": "task"}  # of settings, by role
SAMPLE = 1024  # numbers of a weight by which a model is told from others


class Search(Attack):
    """An attacker who tries out settings first: Optuna around any attack.

    Every trial is a whole attack on the borrowed model, scored at the attack's ``score_steps`` on validation prompts, which no
    table shows. Of the trials that keep all ``bounds`` at their last step, the one with the highest coherent harm there (harmful
    and not degenerate) is chosen, and its settings are measured on the test prompts at ``score_steps``. Where no trial keeps them
    the rows are nan, never 0. Trials that were pruned, failed (diverged, not possible, or without a verdict) or broke a bound
    count as trials. Every value of a list and both ends of a range are tried on the attack before the first one.
    A defended model and its undefended baseline are searched separately, each with ``num_trials`` and the same sampler seeds.
    Columns of searched settings stay empty; the note of every row says what was chosen.

    ``search.csv`` in the run's folder has a line a trial. Each that keeps the bounds is also scored on the test prompts, once it
    is over, so that the best so far can be shown by number of trials; nothing is chosen by that.

    A search that was killed goes on where it was, with the very trials of one that was not, and processes that share a
    ``storage`` run one search together. What TPE then proposes depends on which trial ended first. A trial is found again where
    model, data, settings and casehard's version are the same; whoever changes code in between deletes the file.

    Cost: ``num_trials`` attacks, each with scorings of the validation prompts and one of the test prompts. ``passes``, the tokens
    and ``wall_seconds`` (of this process) include the search. Memory: one copy of the model more than the attack by itself.
    Needs the extra ``search``.

    Args:
        attack: whose settings are searched; it says when, on whom and with which seed.
        choices: for each setting, such as batch_size or optimizer.learning_rate, a list of values or a range
            ``{low, high, log}``. A setting made of several takes mappings of those that change: ``lora: [null, {rank: 4}]``.
        prompts: sources of held-out harmful prompts, none of which is scored in the end.
        num_trials: attacks tried, >= 1.
        sampler: class of ``optuna.samplers`` that takes a seed, such as TPESampler or RandomSampler.
        pruner: ends trials early that do less harm than most; null runs all to their end.
        bounds: where metrics must lie on the validation prompts for a trial to be chosen, such as
            ``finetune_accuracy: {low: 80}``. ``kl`` is the mean over benign prompts of KL(start || trial), in nats, of the
            answer's first token.
        benign_prompts: sources of held-out benign prompts, which bounds of refusal_rate_benign and kl need.
        task: sources of held-out rows of a task, which a bound of finetune_accuracy needs.
        storage: file of the trials; null keeps them beside the run's folder, as ``VERSION.trials``.
        name: in tables; by default the attack's and "searched".
    """

    def __init__(
        self,
        attack: Attack,
        choices: Choices,
        prompts: list[str],
        num_trials: int = 20,
        sampler: str = "TPESampler",
        pruner: MedianPruner | None = MedianPruner(),  # noqa: B008  frozen
        bounds: dict[str, Bound] | None = None,
        benign_prompts: list[str] | None = None,
        task: list[str] | None = None,
        storage: str | None = None,
        name: str | None = None,
    ) -> None:
        if num_trials < 1:
            raise SettingError(f"num_trials must be >= 1, got {num_trials}.")
        if not attack.num_attack_steps:
            raise SettingError(f"attack must take steps to be searched, and {attack.name} has none. Run it plainly.")
        for setting, values in choices.items():
            if not has_setting(attack, setting) or (isinstance(values, list) and not values):
                raise SettingError(
                    f"choices must give values for settings of {type(attack).__name__} other than {', '.join(FIXED)}, got "
                    f"{setting!r}: {values!r}. One inside another is written with a dot: optimizer.learning_rate."
                )
        if not choices or not prompts:
            raise SettingError(
                f"choices and prompts must not be empty, got {choices!r} and {prompts!r}. Name some, or attack plainly."
            )
        self.attack, self.num_attack_steps = attack, attack.num_attack_steps
        self.choices, self.num_trials, self.sampler, self.pruner = choices, num_trials, sampler, pruner
        self.bounds, self.storage = bounds or {}, storage
        self.prompts = {"harmful_prompts": prompts, "benign_prompts": benign_prompts or [], "task": task or []}
        for metric in self.bounds:
            if (role := NEEDS.get(metric)) and not self.prompts[role]:
                raise SettingError(f"{role} must name held-out rows where bounds have {metric}, got none. Name some sources.")
        self.chosen: Attack | None = None  # while an attack runs, once its settings are chosen
        self.choice_note = ""  # what was chosen, for the note
        super().__init__(
            attack.threat_model,
            attack.seed,
            attack.score_steps,
            attack.undefended,
            attack.every_n_epochs,
            name or f"{attack.name}, searched",
            attack.copy_device,
            attack.undefended_checkpoint,
        )

    def prepare(self, data: SFTDataModule, seed: int) -> None:
        """Read the prompts that trials are scored on, and lay out the attack's rows, with every value of the choices.

        Raises:
            SettingError: Optuna or its sampler is not there; a bound's metric is not; a prompt is scored in the end too, or
                trained on; the attack cannot take a value.
        """
        if find_spec("optuna") is None:
            raise SettingError("Search needs optuna, and it is not installed. Install it: pip install 'casehard[search]'.")
        import optuna

        if not hasattr(optuna.samplers, self.sampler):
            raise SettingError(f"sampler must be a class of optuna.samplers, such as TPESampler, got {self.sampler!r}.")
        known = [column.name for column in (*COLUMNS, *(metric.column() for metric in data.evaluation_settings.metrics))]
        if unknown := next((metric for metric in self.bounds if metric not in (*known, KL)), None):
            raise SettingError(f"bounds must name metrics, {', '.join([*known, KL])}, got {unknown!r}.")
        rows = {
            role: [row for source in sources for row in read_rows(source, needs_response=role == "task")]
            for role, sources in self.prompts.items()
        }
        for role, part in rows.items():
            if shared := overlap(part, data.rows[role]):
                raise SettingError(
                    f"{NAMES[role]} must share no prompt with {role} of the data, and {len(shared)} "
                    "stand in both: the settings would be chosen by what they are measured on. Choose other rows (a slice: "
                    "FILE#train[:100])."
                )
        self._validation = copy.copy(data)
        self._validation.rows = data.rows | {role: data.instructed(part) for role, part in rows.items()}
        self._validation.num_target_tokens = data.longest_target(self._validation.rows["task"])
        self.attack.prepare(data, seed)
        self._checked: list[tuple[dict[str, Any], Attack]] = []
        for settings in to_check(self.choices):
            with required(self.attack, settings):
                attack = with_settings(self.attack, settings)
                if (attack.num_attack_steps, attack.score_steps) != (self.num_attack_steps, self.score_steps):
                    raise SettingError(f"num_attack_steps must stay {self.num_attack_steps}, got {attack.num_attack_steps}.")
                attack.prepare(data, seed)
                trained_on = data.rows["harmful"] + data.rows["benign"] + attack.rows(data, seed)
            self._checked.append((settings, attack))
            for role, part in rows.items():
                if shared := overlap(trained_on, part):
                    raise SettingError(
                        f"{NAMES[role]} must share no prompt with rows that are trained on, and {len(shared)} stand in both: the "
                        "settings would be chosen by what was learnt by heart. Choose other rows."
                    )

    def steps(self, target: Target) -> Iterator[int]:
        """Try out settings, then attack with the chosen ones; where nothing may be chosen the steps are empty."""
        try:
            tried = self._search(target)
            best = max((t for t in tried if t.within), key=lambda t: (t.value, -t.number), default=None)
            self._write(target, tried, best)
            self.choice_note = self._what_came_of(tried, best)
            for passes, *tokens in (t.cost for t in tried):
                target.spend(passes, *(tokens if target.trainer.is_global_zero else (0, 0)))
            if best is None:
                yield from range(1, self.num_attack_steps + 1)
                return
            self.chosen = with_settings(self.attack, best.settings)
            self.chosen.prepare(target.data, target.seed)
            yield from self.chosen.steps(target)
        finally:
            self.chosen, self.choice_note = None, ""

    def scores(self, target: Target) -> Scores:
        """As the attack; nan where nothing could be chosen."""
        if self.chosen is None and self.choice_note:
            own = tuple(metric.column() for metric in target.data.evaluation_settings.metrics)
            return Scores({c.name: 0 if c.kind is int else math.nan for c in (*COLUMNS, *own)}, [], own=own)
        attack = copy.copy(self.chosen or self.attack)
        attack.respond = self.respond  # type: ignore[method-assign]  # of every attack of a run it is asked
        return attack.scores(target)

    # ---- trials

    def _search(self, target: Target) -> list["Tried"]:
        """All trials, those of a killed process and of others at work on the same search among them."""
        from casehard.callbacks.trials import Trials

        rests_on, folder = self._rests_on(target), self._folder(target)
        start = target.module.first_token_logprobs(self._validation.rows["benign_prompts"]) if KL in self.bounds else None
        with ExitStack() as stack:
            trials = cast(Trials, None)  # rank 0 has them
            if target.trainer.is_global_zero:
                beside = None if folder is None else folder.with_name(f"{folder.name}.trials")
                path = self.storage or beside or Path(stack.enter_context(TemporaryDirectory()), "trials")
                settings = (self.choices, self.num_trials, target.seed, self.sampler, self.pruner)
                trials = stack.enter_context(Trials(Path(path), rests_on, *settings))
            while (given := everywhere(lambda: trials.next())) is not None:
                self._try(given, trials, target, start)
            tried = everywhere(lambda: trials.all())
        if all(t.state == "failed" for t in tried):
            reason = next((f" ({t.reason.rstrip('.')})" for t in tried if t.reason), "")
            raise DivergedError(f"{target.name}: none of {len(tried)} trials had a harmful score{reason}. Narrow choices.")
        return tried

    def _try(self, given: "Given", trials: "Trials", target: Target, start: Tensor | None) -> None:
        """Run a trial; the model comes back as it was. One that cannot be run has failed, and why is kept."""
        state, test, reason, tried = "failed", math.nan, "", None
        try:
            attack = with_settings(self.attack, given.settings)
            attack.prepare(target.data, target.seed)
            with (
                attack.lent(replace(target, data=self._validation)) as tried,
                closing(attack.seeded_steps(tried)) as steps,  # type: ignore[type-var]
            ):
                state, test = self._outcome(attack, tried, steps, trials, start, target.data)
        except (DivergedError, SettingError) as error:
            reason = str(error)
        cost = (0.0, 0, 0)
        if tried is not None:
            cost = (tried.passes, *sum_over_ranks(tried.tokens.to(tried.module.device), tried.module.row_group).tolist())
        everywhere(lambda: trials.end(state, test, cost, reason))

    def _outcome(
        self,
        attack: Attack,
        tried: Target,
        steps: Iterator[int],
        trials: "Trials",
        start: Tensor | None,
        data: SFTDataModule,
    ) -> tuple[str, float]:
        """How a trial ended, and its coherent harm on the test prompts where it may be chosen."""
        for step in (step for step in steps if step in attack.score_steps):
            metrics = self._metrics(attack, tried, start)
            value = metrics["coherent_harm"]
            excess = {name: bound.excess(metrics[name]) for name, bound in self.bounds.items()}
            pruned = everywhere(lambda: trials.keep(step, value, excess, metrics))  # noqa: B023  called here
            if step < attack.score_steps[-1] and not pruned:
                continue
            if step < attack.score_steps[-1] or math.isnan(value):
                return "pruned" if pruned else "failed", math.nan
            within = everywhere(lambda: max(excess.values(), default=0.0) <= 0)  # noqa: B023  called here
            tried.data = data  # of the test, from here on
            return "complete", attack.scores(tried).metrics["coherent_harm"] if within else math.nan
        raise AssertionError(f"{attack.name} ended before its last step")

    def _metrics(self, attack: Attack, tried: Target, start: Tensor | None) -> dict[str, float]:
        """On the validation prompts, of the model as it is handed back."""
        metrics = attack.scores(tried).metrics
        if start is None:
            return metrics
        with tried.module.handed_back(tried.start, attack.copy_device) if tried.defended else nullcontext():
            now = tried.module.first_token_logprobs(self._validation.rows["benign_prompts"])
        return metrics | {KL: float(kl(start, now).mean())}

    def _rests_on(self, target: Target) -> str:
        """The search's name in its storage: whose it is, and a digest of all that its trials rest on."""
        data, digest = target.data, hashlib.sha256()
        plain = {
            n: repr(v) for n, v in vars(self.attack).items() if n[0] != "_" and (is_dataclass(v) or not hasattr(v, "__dict__"))
        }
        rests_on = (
            version_of("casehard"),
            (type(self.attack).__qualname__, plain, self.attack.settings()),
            (self.choices, self.bounds, self.sampler, self.pruner),
            (data.origins, data.batching, data.system_prompt, data.judge.label),
            (data.evaluation_settings.num_evaluated, data.evaluation_settings.max_new_tokens),
            [row_digest(self._validation.rows[role]) for role in self.prompts],
        )
        digest.update(repr(rests_on).encode())
        for name, weight in target.weights().items():
            some = weight.detach().reshape(-1)[:: max(1, weight.numel() // SAMPLE)]
            digest.update(name.encode() + some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        who = NONE if target.undefended else target.module.label
        return f"{self.name} ({self.threat_model}, {who}, seed {target.seed}) {digest.hexdigest()[:16]}"

    def _folder(self, target: Target) -> Path | None:
        """The run's, None where it keeps no results."""
        return next((c.folder for c in target.trainer.callbacks if isinstance(c, Results)), None)  # type: ignore[attr-defined]

    def _write(self, target: Target, tried: list["Tried"], best: "Tried | None") -> None:
        """Keep a line a trial in the run's folder."""
        if (folder := self._folder(target)) is None or not target.trainer.is_global_zero:
            return
        attacks = [callback for callback in target.trainer.callbacks if isinstance(callback, Attack)]  # type: ignore[attr-defined]
        rows = [
            TrialRow(
                attack_index=attacks.index(self),
                attack=self.name,
                threat_model=self.threat_model,
                defense=NONE if target.undefended else target.module.label,
                seed=target.seed,
                epoch="" if target.epoch is None else str(target.epoch),
                number=t.number,
                state=t.state,
                within_bounds=t.within,
                chosen=t is best,
                step=t.step,
                settings=t.settings,
                coherent_harm=t.value,
                test_coherent_harm=t.test,
                metrics=t.metrics,
                reason=t.reason,
            )
            for t in tried
        ]
        write_trials(folder, rows)

    def _what_came_of(self, tried: list["Tried"], best: "Tried | None") -> str:
        """In one line, for the note."""
        states = [t.state if t.state != "complete" or t.within else "beyond bounds" for t in tried]
        counts = [f"{states.count(s)} {s}" for s in ("pruned", "failed", "beyond bounds") if s in states]
        trials = f"{len(tried)} trials" + (f" ({', '.join(counts)})" if counts else "")
        if best is None:
            return f"none of {trials} may be chosen, so nothing was attacked with"
        prompts = len(self._validation.rows["harmful_prompts"])
        return f"{in_words(best.settings)}: chosen of {trials}, coherent harm {best.value:.1f} on {prompts} other prompts"

    # ---- as the attack does

    @property
    def harmful(self) -> bool:  # type: ignore[override]
        """As the attack."""
        return self.attack.harmful

    def rows(self, data: SFTDataModule, seed: int) -> list[Row]:
        """As the attack."""
        return self.attack.rows(data, seed)

    def check_model(self, module: Defense) -> None:
        """As the attack, with every value of the choices."""
        self.attack.check_model(module)
        for settings, attack in self._checked:
            with required(attack, settings):
                attack.check_model(module)

    def evaluation(self, data: SFTDataModule) -> Evaluation:
        """As the attack, with the chosen settings."""
        return (self.chosen or self.attack).evaluation(data)

    def respond(self, target: Target, rows: list[Row], max_new_tokens: int) -> list[str]:
        """As the attack, with the chosen settings."""
        return (self.chosen or self.attack).respond(target, rows, max_new_tokens)

    def settings(self) -> dict[str, Any]:
        """Those of the attack that are not searched."""
        settings = self.attack.settings()
        for setting in searched(self.choices):
            settings = without(settings, setting)
        return settings

    def what_trains(self, target: Target) -> str:
        """The search chooses it anew for every model and seed: the note says what."""
        return "what the search chose"

    def notes(self, target: Target) -> list[str]:
        """Also what was chosen."""
        return [*(self.chosen.notes(target) if self.chosen else super().notes(target)), self.choice_note]
