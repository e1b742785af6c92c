"""Score the model as it is: generate answers to the held-out prompts, judge them, reduce over all ranks."""

import math
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torchmetrics import Metric

from casehard.callbacks.sigterm import ended_by_sigterm
from casehard.datamodules.answers import answer_and_thoughts
from casehard.datamodules.chat import prompt_ids, read_answers
from casehard.datamodules.row import Row
from casehard.datamodules.sft import Evaluation, SFTDataModule
from casehard.lightning_modules.defense import Defense
from casehard.metrics.conversation import Conversation
from casehard.metrics.harmful_score import AttackSuccessRate, DegenerateRate, FinetuneAccuracy, HarmfulScore, RefusalRate
from casehard.metrics.judges import Judge, Verdict, judged, unscored

Generation = dict[str, Any]


class Scores(NamedTuple):
    """What an evaluation found; percentages, 0 to 100, nan where nothing was scored."""

    metrics: dict[str, float]
    generations: list[Generation]  # prompt, response, score, ... of every answer; on rank 0 only
    note: str = ""  # what a reader of the metrics must know; on rank 0 only


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


def _judged(judge: Judge, rows: list[Row], answers: list[str | None], benign: bool) -> list[Verdict]:
    """Verdicts on the answers that there are, and none on the others, which no judge is asked about."""
    asked = [(row.prompt, answer) for row, answer in zip(rows, answers, strict=True) if answer is not None]
    verdicts = iter(judged(judge, [prompt for prompt, _ in asked], [answer for _, answer in asked], benign=benign))
    none = Verdict(math.nan, refused=False, degenerate=True, detail="no answer: the model's thoughts never ended")
    return [none if answer is None else next(verdicts) for answer in answers]


def score(module: Defense, evaluation: Evaluation) -> Scores:
    """Answer, judge and reduce; every rank answers its share of the prompts.

    What is judged and compared with a task's response is the answer without the thoughts before it (``answer_and_thoughts``). The
    generations have those beside it, because no judge reads them. A model that never ended its thoughts gave no answer: it has no
    score, is degenerate, and is neither a refusal nor a right one. Such answers are counted in the note.

    Args:
        module: the model; its mode comes back as it was.
        evaluation: held-out prompts and their judge.
    """
    rank, world_size = _ranks()
    judge = evaluation.judge
    harmful_score, success, over_refusal = HarmfulScore(), AttackSuccessRate(judge.success_threshold), RefusalRate()
    degenerate, accuracy = DegenerateRate(), FinetuneAccuracy()
    metrics: list[Metric] = [harmful_score, success, over_refusal, degenerate, accuracy]
    device = torch.device("cpu") if module.device.type == "mps" else module.device  # it has no float64, and one process
    for metric in metrics:
        metric.to(device)
    generations: list[Generation] = []

    def answer(rows: list[Row], kind: str, max_new_tokens: int = evaluation.max_new_tokens) -> tuple[list[Row], list[str | None]]:
        share = rows[rank::world_size]
        prompts = [prompt_ids(row, module.tokenizer) for row in share]
        generated = module.generate(prompts, max_new_tokens, evaluation.batch_size)
        answers = read_answers(generated, share, module.tokenizer)
        for i, (row, said) in enumerate(zip(share, answers, strict=True)):
            kept: Generation = {"response": said.text or ""} | ({"thoughts": said.thoughts} if said.thoughts else {})
            kept |= ({"cut": True} if said.cut else {}) | ({"answered": False} if said.text is None else {})
            kept |= {"messages": row.chat()} if isinstance(row.prompt, Conversation) else {}  # for judges that want turns
            generations.append({"kind": kind, "number": rank + i * world_size, "prompt": row.prompt} | kept)
        return share, [said.text for said in answers]

    for kind, rows in (("harmful", evaluation.harmful), ("benign", evaluation.benign)):
        share, answers = answer(rows, kind)
        verdicts = _judged(judge, share, answers, benign=kind == "benign")
        scores = torch.tensor([v.score for v in verdicts], dtype=torch.float64, device=device)
        if kind == "harmful":
            harmful_score.update(scores)
            success.update(scores)
        else:
            refused = [v.refused for v, text in zip(verdicts, answers, strict=True) if text is not None]
            over_refusal.update(torch.tensor(refused, dtype=torch.bool, device=device))
        degenerate.update(torch.tensor([v.degenerate for v in verdicts], dtype=torch.bool, device=device))
        for generation, verdict in zip(generations[len(generations) - len(share) :], verdicts, strict=True):
            generation |= verdict._asdict()
    share, answers = answer(evaluation.task, "task", max(evaluation.max_new_tokens, evaluation.num_target_tokens))
    targets = [answer_and_thoughts(row.response or "")[0] or row.response or "" for row in share]
    accuracy.update([text or "" for text in answers], targets)
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
    heard = [g for g in ordered if g["kind"] == "harmful" and g.get("answered", True)]
    why = unscored(judge.label, [(g["score"], g["degenerate"], g["detail"]) for g in heard])
    if why:
        rank_zero_warn(f"{why}. The answers are kept: `casehard judge` asks again.")
    unheard = _unheard(ordered, evaluation.max_new_tokens)
    if unheard:
        rank_zero_warn(f"{unheard}. Raise data.evaluation.max_new_tokens to hear them.")
    note = "; ".join(filter(None, [why, unheard]))
    return Scores({name: float(value) for name, value in found.items()} | counts, ordered, note)


def _unheard(generations: list[Generation], max_new_tokens: int) -> str:
    missing = [generation for generation in generations if not generation.get("answered", True)]
    if not missing:
        return ""
    cut = sum(generation.get("cut", False) for generation in missing)
    return (
        f"{len(missing)} of {len(generations)} answers never came: thoughts did not end, {cut} of them within "
        f"max_new_tokens ({max_new_tokens})"
    )


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


class Evaluate(L.Callback):
    """Score the model whenever Lightning validates, on the data's held-out prompts.

    The numbers stand beside the losses: ``val/harmful_score``, ``val/finetune_accuracy`` and so on.
    """

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score, unless this is Lightning's sanity check."""
        if not trainer.sanity_checking:
            module, data = defense_and_data(trainer, pl_module)
            with ended_by_sigterm(trainer):
                metrics = score(module, data.evaluation).metrics
            module.log_dict({f"val/{name}": value for name, value in metrics.items()}, rank_zero_only=True)
