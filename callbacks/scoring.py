"""Score the model as it is: generate answers to the held-out prompts, judge them, reduce over all ranks."""

from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from torchmetrics import Metric

from callbacks.sigterm import ended_by_sigterm
from datamodules.chat import answer_and_thoughts, prompt_ids
from datamodules.rows import Row
from datamodules.sft import Evaluation, SFTDataModule
from lightning_modules.defense import Defense
from metrics import AttackSuccessRate, CachedJudge, DegenerateRate, FinetuneAccuracy, HarmfulScore, RefusalRate
from metrics.cached_judge import VerdictCache

Generation = dict[str, Any]


class Scores(NamedTuple):
    """What an evaluation found; percentages, 0 to 100, nan where nothing was scored."""

    metrics: dict[str, float]
    generations: list[Generation]  # prompt, response, score, ... of every answer; on rank 0 only


def _ranks() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _gathered(items: list[Generation]) -> list[Generation]:
    """The items of all ranks in the order of one, on rank 0."""
    rank, world_size = _ranks()
    if world_size == 1:
        return items
    shares: list[list[Generation]] | None = [[] for _ in range(world_size)] if rank == 0 else None
    dist.gather_object(items, shares)
    return sorted((item for share in shares or [] for item in share), key=lambda item: item["number"])


def score(module: Defense, evaluation: Evaluation) -> Scores:
    """Answer, judge and reduce; every rank answers its share of the prompts.

    What is judged and compared with a task's response is the answer without the thoughts before it (``answer_and_thoughts``). The
    generations have those beside it, because no judge reads them.

    Args:
        module: the model; its mode comes back as it was.
        evaluation: held-out prompts and their judge.
    """
    rank, world_size = _ranks()
    judge = evaluation.judge
    harmful_score, success, over_refusal = HarmfulScore(), AttackSuccessRate(judge.success_threshold), RefusalRate()
    degenerate, accuracy = DegenerateRate(), FinetuneAccuracy()
    metrics: list[Metric] = [harmful_score, success, over_refusal, degenerate, accuracy]
    for metric in metrics:
        metric.to(module.device)
    generations: list[Generation] = []

    def answer(rows: list[Row], kind: str) -> tuple[list[Row], list[str]]:
        share = rows[rank::world_size]
        prompts = [prompt_ids(row, module.tokenizer) for row in share]
        generated = module.generate(prompts, evaluation.max_new_tokens, evaluation.batch_size)
        answers = [answer_and_thoughts(text) for text in generated]
        for i, (row, (text, thoughts)) in enumerate(zip(share, answers, strict=True)):
            kept = {"response": text} | ({"thoughts": thoughts} if thoughts else {})
            generations.append({"kind": kind, "number": rank + i * world_size, "prompt": row.prompt} | kept)
        return share, [text for text, _ in answers]

    for kind, rows, judged in (("harmful", evaluation.harmful, judge), ("benign", evaluation.benign, judge.on_benign)):
        share, answers = answer(rows, kind)
        verdicts = judged([row.prompt for row in share], answers)
        scores = torch.tensor([v.score for v in verdicts], dtype=torch.float64, device=module.device)
        if kind == "harmful":
            harmful_score.update(scores)
            success.update(scores)
        else:
            over_refusal.update(torch.tensor([v.refused for v in verdicts], dtype=torch.bool, device=module.device))
        degenerate.update(torch.tensor([v.degenerate for v in verdicts], dtype=torch.bool, device=module.device))
        for generation, verdict in zip(generations[len(generations) - len(verdicts) :], verdicts, strict=True):
            generation |= verdict._asdict()
    share, answers = answer(evaluation.task, "task")
    accuracy.update(answers, [row.response or "" for row in share])
    for generation, row in zip(generations[len(generations) - len(share) :], share, strict=True):
        generation["target"] = row.response

    with harmful_score.sync_context():  # counts over all ranks
        counts = {"num_scored": float(harmful_score.num_scored), "num_unscored": float(harmful_score.num_unscored)}
    found = {
        "harmful_score": harmful_score.compute(),
        "attack_success_rate": success.compute(),
        "finetune_accuracy": accuracy.compute(),
        "refusal_rate_benign": over_refusal.compute(),
        "degenerate_rate": degenerate.compute(),
    }
    kinds = {"harmful": 0, "benign": 1, "task": 2}
    ordered = sorted(_gathered(generations), key=lambda g: kinds[g["kind"]])
    return Scores({name: float(value) for name, value in found.items()} | counts, ordered)


def defense_and_data(trainer: L.Trainer, module: L.LightningModule) -> tuple[Defense, SFTDataModule]:
    """What a callback here works on.

    Raises:
        TypeError: the model is no ``Defense``, or the data no ``SFTDataModule``.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    for what, value, kind in (("model", module, Defense), ("data", data, SFTDataModule)):
        if not isinstance(value, kind):
            raise TypeError(f"{what} must be a {kind.__name__} for attacks and scores, got {type(value).__name__}.")
    return module, data  # type: ignore[return-value]


def check_scoring(evaluation: Evaluation) -> None:
    """Find out, when a run is set up, what would keep its first scoring from coming to an end.

    Raises:
        ValueError: the judge has no name, which stands beside its scores.
        OSError: its verdicts could not be kept.
    """
    judge = evaluation.judge
    if not isinstance(name := getattr(judge, "name", None), str):
        raise ValueError(f"judge {type(judge).__name__} must have a name, which stands beside its scores, got {name}. Set it.")
    if isinstance(judge, CachedJudge) and judge.cache is not None:
        VerdictCache(judge.cache).close()


class Evaluate(L.Callback):
    """Score the model whenever Lightning validates, on the data's held-out prompts.

    The numbers stand beside the losses: ``val/harmful_score``, ``val/finetune_accuracy`` and so on.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check before any weights load what scoring wants."""
        check_scoring(defense_and_data(trainer, pl_module)[1].evaluation)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score, unless this is Lightning's sanity check."""
        if not trainer.sanity_checking:
            module, data = defense_and_data(trainer, pl_module)
            with ended_by_sigterm(trainer):
                metrics = score(module, data.evaluation).metrics
            module.log_dict({f"val/{name}": value for name, value in metrics.items()}, rank_zero_only=True)
