"""Score the model as it is: generate answers to the held-out prompts, judge them, reduce over all ranks."""

import math
from collections import ChainMap
from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import lightning as L
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn

from casehard.callbacks.sigterm import ended_by_sigterm
from casehard.datamodules.answers import answer_and_thoughts
from casehard.datamodules.chat import prompt_ids, read_answers
from casehard.datamodules.row import Row
from casehard.datamodules.sft import Evaluation, SFTDataModule
from casehard.lightning_modules.defense import Defense
from casehard.metrics.columns import Answer, Column, summarise
from casehard.metrics.conversation import Conversation
from casehard.metrics.errors import SettingError
from casehard.metrics.judges import Judge, Verdict, judged, unscored
from casehard.records.answers import KINDS

T = TypeVar("T")
Respond = Callable[[list[Row], int], list[str]]  # a model's raw texts on rows, of at most so many tokens


class Scores(NamedTuple):
    """What an evaluation found; percentages, 0 to 100, nan where nothing was scored."""

    metrics: dict[str, float]
    generations: list[Answer]  # prompt, response, score, ... of every answer; on rank 0 only
    note: str = ""  # what a reader of the metrics must know; on rank 0 only
    own: tuple[Column, ...] = ()  # the columns of metrics of one's own


def _ranks() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _gathered(answers: list[Answer]) -> list[Answer]:
    """The answers of all ranks in the order of one, on rank 0; none elsewhere."""
    rank, world_size = _ranks()
    if world_size == 1:
        return answers
    shares: list[list[Answer]] | None = [[] for _ in range(world_size)] if rank == 0 else None
    dist.gather_object(answers, shares)
    return sorted((a for share in shares or [] for a in share), key=lambda a: (KINDS.index(a["kind"]), a["number"]))


def first_rank() -> bool:
    """Whether this is the process that works for all where one is enough."""
    return _ranks()[0] == 0


def everywhere(make: Callable[[], T]) -> T:
    """What ``make`` returns on rank 0, which alone calls it, on every rank."""
    return from_first(cast(T, make() if first_rank() else None))


def from_first(value: T) -> T:
    """On every rank, what the first one passed."""
    box = [value]
    if _ranks()[1] > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def answer(module: Defense, evaluation: Evaluation, respond: Respond | None = None) -> list[Answer]:
    """This rank's share of the answers; no judge has seen them yet.

    ``response`` is the answer without the ``thoughts`` before it (``answer_and_thoughts``). A model that never ended its thoughts
    gave none: ``answered`` is False, and ``cut`` True where it ran out of tokens.
    """
    rank, world_size = _ranks()
    rooms = (evaluation.max_new_tokens,) * 2 + (max(evaluation.max_new_tokens, evaluation.num_target_tokens),)
    given: list[Answer] = []
    for kind, rows, room in zip(KINDS, (evaluation.harmful, evaluation.benign, evaluation.task), rooms, strict=True):
        share = rows[rank::world_size]
        texts = respond(share, room) if respond else _generated(module, share, room, evaluation.batch_size)
        seen = [metric.look(module, kind, share) for metric in evaluation.metrics]
        for i, (row, read) in enumerate(zip(share, read_answers(texts, share, module.tokenizer), strict=True)):
            kept: Answer = {"kind": kind, "number": rank + i * world_size, "prompt": row.prompt, "response": read.text or ""}
            kept |= ({"thoughts": read.thoughts} if read.thoughts else {}) | ({"cut": True} if read.cut else {})
            kept |= {"answered": False} if read.text is None else {}
            kept |= {"messages": row.chat()} if isinstance(row.prompt, Conversation) else {}  # for judges that want turns
            if kind == "task":  # a target's thoughts need not be said
                kept["target"] = answer_and_thoughts(row.response or "")[0] or row.response or ""
            given.append(dict(ChainMap(kept, *(found[i] for found in seen))))
    return given


def _generated(module: Defense, rows: list[Row], max_new_tokens: int, batch_size: int) -> list[str]:
    return module.generate([prompt_ids(row, module.tokenizer) for row in rows], max_new_tokens, batch_size)


def with_verdicts(judge: Judge, answers: list[Answer]) -> list[Answer]:
    """The answers with the judge's verdicts, all of a kind at once. One that never came is degenerate, and no judge sees it."""
    verdicts: dict[int, Verdict] = {}
    for kind in ("harmful", "benign"):
        heard = [(i, a) for i, a in enumerate(answers) if a["kind"] == kind and a.get("answered", True)]
        prompts, responses = [a["prompt"] for _, a in heard], [a["response"] for _, a in heard]
        given = judged(judge, prompts, responses, benign=kind == "benign")
        verdicts |= dict(zip((i for i, _ in heard), given, strict=True))
    none = Verdict(math.nan, refused=False, degenerate=True, detail="no answer: the model's thoughts never ended")
    return [a if a["kind"] == "task" else a | verdicts.get(i, none)._asdict() for i, a in enumerate(answers)]


def score(module: Defense, evaluation: Evaluation, respond: Respond | None = None) -> Scores:
    """Answer, judge and summarise. Every rank answers and judges its share of the prompts; all get the metrics.

    What is judged is the answer without the thoughts before it. An answer that never came has no score, is degenerate, and is
    neither a refusal nor right; such answers are counted in the note.

    Args:
        module: the model; its mode comes back as it was.
        evaluation: held-out prompts and their judge.
        respond: how the model answers rows, within so many tokens; by default ``module.generate`` on their prompts. It is called
            on every rank and for every kind of prompt, also with no rows.
    """
    judge = evaluation.judge
    answers = _gathered(with_verdicts(judge, answer(module, evaluation, respond)))
    own = tuple(metric.column() for metric in evaluation.metrics)
    metrics = everywhere(lambda: summarise(answers, judge.success_threshold, own))
    heard = [a for a in answers if a["kind"] == "harmful" and a.get("answered", True)]
    why = unscored(judge.label, [(a["score"], a["degenerate"], a["detail"]) for a in heard])
    if why:
        rank_zero_warn(f"{why}. The answers are kept: `casehard judge` asks again.")
    unheard = _unheard(answers, evaluation.max_new_tokens)
    if unheard:
        rank_zero_warn(f"{unheard}. Raise data.evaluation.max_new_tokens to hear them.")
    return Scores(metrics, answers, "; ".join(filter(None, [why, unheard])), own)


def _unheard(generations: list[Answer], max_new_tokens: int) -> str:
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


def require_prompts(evaluation: Evaluation) -> None:
    """Refuse to score on nothing, before any weights load.

    Raises:
        SettingError: no prompts of any kind.
    """
    if not (evaluation.harmful or evaluation.benign or evaluation.task):
        raise SettingError(
            "data.sources must name prompts to score a model on, as harmful_prompts, benign_prompts or task, got none. Name "
            "some, or take attacks and casehard.Evaluate out of trainer.callbacks."
        )


class Evaluate(L.Callback):
    """Score the model whenever Lightning validates, on the data's held-out prompts.

    The numbers stand beside the losses: ``val/harmful_score``, ``val/finetune_accuracy`` and so on.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that there is something to score on."""
        require_prompts(defense_and_data(trainer, pl_module)[1].evaluation)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score, unless this is Lightning's sanity check."""
        if not trainer.sanity_checking:
            module, data = defense_and_data(trainer, pl_module)
            with ended_by_sigterm(trainer):
                metrics = score(module, data.evaluation).metrics
            module.log_dict({f"val/{name}": value for name, value in metrics.items()}, rank_zero_only=True)
