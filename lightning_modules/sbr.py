"""Safety Bottleneck Regularization."""

from typing import Any, Literal

import torch
from torch import Tensor

from casehard.datamodules.batches import share_of
from casehard.datamodules.chat import IGNORED, require_chat_template
from casehard.datamodules.columns import flaw
from casehard.datamodules.row import Row
from casehard.datamodules.sources import looks_like_source, read_rows
from casehard.engine.first_token import kl
from casehard.engine.forward import Batch, label_positions, run
from casehard.engine.gradients import mean_over_ranks
from casehard.engine.graphs import begin_step
from casehard.engine.layouts import joined
from casehard.engine.weights import same_modes_after
from casehard.lightning_modules.anchors import Anchors, Held, in_forms, whole
from casehard.lightning_modules.defense import Defense
from casehard.lightning_modules.job import Job
from casehard.lightning_modules.private import trainer_of
from casehard.metrics.errors import SettingError

PART = 64  # anchors of a pass that takes references


class SBRModule(Defense):
    """Safety Bottleneck Regularization (arXiv:2605.05995), a fine-tuning stage defense.

    Everything a model says passes through the unembedding, so the state that enters it at the end of a harmful prompt (an
    *anchor*) is held where the aligned model put it:
    ``loss = sft_loss + anchor_weight * mean((state - aligned_state) ** 2)``, the mean being over ``[num_anchors, dim]``.

    With ``anchor_rate`` the two terms are minimised in turn instead, and there is no weight to choose: the customer's steps are
    plain SFT, and after each come ``anchor_steps`` steps on the drift alone, ``mean((state - aligned_state) ** 2)``, by an
    optimizer of the customer's kind with moments of its own. Its rate follows the customer's, or one who chooses a high rate
    outruns it. A step costs one more forward and backward pass over the anchors of its turn, which processes share out. Memory:
    the moments, for adamw two copies of what trains, and the anchors' states.

    It protects while the provider trains (``finetuning_service``). Whoever holds the weights leaves the term out: no protection
    against ``open_weight`` attackers.

    Args:
        checkpoint: the aligned model, as for ``Defense``.
        anchors: harmful prompts, as a list of texts or as one source of rows (file, hub id, ``sandbox:...``); their answers are
            used by ``anchor_answers`` alone. null takes the prompts of the data's ``refusals``. They are rendered with the
            model's own chat template.
        num_anchors: take the first so many; null takes all.
        num_benign_anchors: hold at most so many harmless rows beside the anchors, and in the same way, >= 0: the first of
            ``benign_anchors``. Where outputs of harmful prompts alone are held, the model learns to refuse harmless ones.
        benign_anchors: sources of such rows, with answers; null takes the data's ``alignment_benign``.
        anchors_per_step: how many of them enter each step, in turn; null is all.
        anchor_weight: regularisation strength (``lambda`` in the paper), >= 0; 0 is plain SFT. null is 50, the authors' own, and
            must be left where ``anchor_rate`` is set.
        anchor_rate: learning rate of steps on the drift of their own, in multiples of the customer's at that step, > 0; null
            adds the weighted drift to the customer's loss (the paper's). The customer's optimizer must be adamw or sgd; a step of
            sgd is as long as the drift is large, so that the rate acts as a weight.
        anchor_steps: how many of those follow a customer's step, each on the anchors of its own turn, >= 1.
        anchor_answers: hold the states along the anchors' refusals, too, up to the one from which the end token comes: else an
            answer that refuses first and then complies meets no anchor after its refusal.
        anchor_forms: hold every anchor a second time, in the form of a row that the customer has handed in (its system turn and
            earlier turns, words around its prompt): a trigger or a wrapper that the rows teach must stand in them.
        anchor_holds: what may not drift. ``states``: each held state, whose drift is ``mean((state - aligned_state) ** 2)`` (the
            paper's). ``outputs``: what is said from it, whose drift is ``KL(aligned || now)`` of the next token, in nats, and in
            a form what the aligned model says to the plain prompt: a new task may move states where the refusal that follows
            stays the same, and a model that does not refuse in a customer's wrapper learns to. It costs the unembedding of the
            held states, twice.
        anchor_slack: how far each state may drift before it is held, >= 0, as a share of the mean square of the aligned states,
            of outputs in nats; what counts is the mean over states of ``max(0, drift - slack)``. A new task moves every state a
            little, and harm some of them far. It has one meaning at every width. Only with ``anchor_rate``.
        anchor_layer: which state is held: -1 the one that enters the unembedding, after the final norm (the paper's); else an
            index into transformers' ``hidden_states``. -1 for outputs.
        freeze_unembedding: do not train the unembedding. Where it is tied to the embedding both stand still: otherwise the
            bottleneck itself moves, and holding the state before it holds nothing. true for outputs.
        settings: the rest of ``Defense``'s.
    """

    # Departures from the authors' setting: (1) the anchors share the forward pass of the batch, so they cost their tokens and no
    # more; (2) both terms are means, so gradient accumulation leaves the weight's meaning alone; (3) the unembedding is frozen;
    # (4) ``anchor_rate``, ``anchor_answers``, ``anchor_forms`` and outputs are not the paper's, and off unless set.

    plain_anchors: Anchors  # as they are given

    adaptive = "attack/adaptive/sbr"

    def __init__(
        self,
        checkpoint: str,
        anchors: str | list[str] | None = None,
        num_anchors: int | None = None,
        num_benign_anchors: int = 0,
        benign_anchors: list[str] | None = None,
        anchors_per_step: int | None = None,
        anchor_weight: float | None = None,
        anchor_rate: float | None = None,
        anchor_steps: int = 1,
        anchor_slack: float = 0.0,
        anchor_answers: bool = False,
        anchor_forms: bool = False,
        anchor_holds: Literal["states", "outputs"] = "states",
        anchor_layer: int = -1,
        freeze_unembedding: bool = True,
        **settings: Any,
    ) -> None:
        if anchor_weight is not None and not anchor_weight >= 0:
            raise SettingError(f"anchor_weight must be >= 0, got {anchor_weight}. Use 0 for plain SFT.")
        if anchor_rate is not None and not anchor_rate > 0:
            raise SettingError(
                f"anchor_rate must be > 0 or null, got {anchor_rate}. 1 is the customer's own, null the paper's form."
            )
        if anchor_rate is not None and anchor_weight is not None:
            raise SettingError(
                f"anchor_weight must be null where anchor_rate is set, whose steps have no weight, got {anchor_weight}. "
                "Leave it out, or set anchor_rate to null."
            )
        if anchor_steps < 1 or (anchor_steps > 1 and anchor_rate is None):
            least = ">= 1" if anchor_rate else "1 where anchor_rate is null"
            raise SettingError(f"anchor_steps must be {least}, got {anchor_steps}.")
        if not anchor_slack >= 0 or (anchor_slack > 0 and anchor_rate is None):
            least = ">= 0" if anchor_rate else "0 where anchor_rate is null"
            raise SettingError(f"anchor_slack must be {least}, got {anchor_slack}.")
        if anchor_holds == "outputs" and (anchor_layer != -1 or not freeze_unembedding):
            raise SettingError(
                "anchor_layer must be -1 and freeze_unembedding true where anchor_holds is outputs, which the unembedding "
                f"makes of the last states, got {anchor_layer} and {str(freeze_unembedding).lower()}. Leave them out."
            )
        if anchors is not None and not anchors:
            raise SettingError(
                f"anchors must name at least one harmful prompt, got {anchors!r}. "
                "Give texts or a source of rows, or null for the prompts of the data's refusals."
            )
        for number, anchor in enumerate(anchors if isinstance(anchors, list) else [], start=1):
            if got := flaw(anchor):
                raise SettingError(f"anchors must be texts, got {got} as number {number}. Mend it, or take it out.")
        if isinstance(anchors, list) and (sources := [text for text in anchors if looks_like_source(text)]):
            raise SettingError(
                f"anchors must be a list of prompts or one source of rows, got the source {sources[0]} in a list. "
                f"Write it without brackets (anchors: {sources[0]}), or name several as the data's refusals and anchors as null."
            )
        for name, value in (("num_anchors", num_anchors), ("anchors_per_step", anchors_per_step)):
            if value is not None and value < 1:
                raise SettingError(f"{name} must be >= 1 or null, got {value}. null takes all anchors.")
        if num_benign_anchors < 0:
            raise SettingError(f"num_benign_anchors must be >= 0, got {num_benign_anchors}. 0 holds none.")
        super().__init__(checkpoint, **settings)
        self.anchors, self.num_anchors, self.anchors_per_step = anchors, num_anchors, anchors_per_step
        self.num_benign_anchors, self.benign_anchors = num_benign_anchors, benign_anchors
        self.anchor_weight = 50.0 if anchor_weight is None else anchor_weight
        self.anchor_rate, self.anchor_steps = anchor_rate, anchor_steps
        self.anchor_slack, self.anchor_answers, self.anchor_forms = anchor_slack, anchor_answers, anchor_forms
        self.anchor_holds: Literal["states", "outputs"] = anchor_holds
        self.anchor_layer, self.freeze_unembedding = anchor_layer, freeze_unembedding
        require_chat_template(self.tokenizer)

    def own_rows(self) -> list[Row]:
        """Those of the anchors that are the defense's own and not the data's."""
        return [*self._own_anchors(), *self._own_benign()]

    def _own_anchors(self) -> list[Row]:
        if isinstance(self.anchors, str):
            return read_rows(self.anchors, needs_response=False)
        return [Row((("user", anchor),)) for anchor in self.anchors or []]

    def _own_benign(self) -> list[Row]:
        rows = [row for source in self.benign_anchors or [] for row in read_rows(source)]
        return rows[: self.num_benign_anchors]

    def _benign_rows(self) -> list[Row]:
        if not self.num_benign_anchors:
            return []
        rows = self._own_benign()
        if not self.benign_anchors:
            rows = self.trainer.datamodule.rows["alignment_benign"]  # type: ignore[attr-defined]
        if not rows:
            raise SettingError(
                "num_benign_anchors must be 0 where neither benign_anchors nor data.sources.alignment_benign names rows, got "
                f"{self.num_benign_anchors}. Name harmless prompts with answers: without, the model may learn to refuse them."
            )
        return rows[: self.num_benign_anchors]

    def configure_model(self) -> None:
        """Load the weights and render the anchors."""
        rows = None if hasattr(self, "plain_anchors") else self._anchor_rows()  # refused before any weights load
        super().configure_model()
        if rows is None:
            return
        depth = self.model.config.get_text_config().num_hidden_layers
        if not -depth - 1 <= self.anchor_layer <= depth:
            raise SettingError(f"anchor_layer must lie in [{-depth - 1}, {depth}], got {self.anchor_layer}. -1 is the paper's.")
        self.anchor_rows, self.plain_anchors = rows, Anchors(rows, self.tokenizer, self.anchor_answers)

    def _anchor_rows(self) -> list[Row]:
        rows = self._own_anchors() if self.anchors is not None else self.trainer.datamodule.rows["refusals"]  # type: ignore[attr-defined]
        if not rows:
            raise SettingError(
                "anchors must name at least one harmful prompt where the data names no refusals, got null. "
                "Give texts or a source of rows, or name the data's refusals."
            )
        if len(rows) < (self.num_anchors or 1):
            raise SettingError(
                f"num_anchors must be at most the number of anchors there are, {len(rows)}, got {self.num_anchors}. "
                "Name more prompts in anchors or in the data's refusals."
            )
        rows = rows[: self.num_anchors]
        if self.anchor_answers and not all(row.response for row in rows):
            raise SettingError(
                "anchor_answers must be false where anchors have no answers, got true. Name a source of prompts with their "
                "refusals as anchors, or null for the data's refusals."
            )
        return [*rows, *self._benign_rows()]

    def job(self) -> Job:
        """A fine-tuning that holds the anchors."""
        return SBRJob(self)

    def in_forms_of(self, rows: list[Row]) -> Anchors:
        """The anchors, and each of them once more in the form of one of ``rows``, in turns that have both kinds."""
        data = self.data
        longest = min(data.batching.max_length, self.num_positions or data.batching.max_length)

        def fits(row: Row) -> bool:
            return len(whole(row, self.tokenizer, self.anchor_answers)["input_ids"]) <= longest

        return Anchors([*self.anchor_rows, *in_forms(self.anchor_rows, rows, fits)], self.tokenizer, self.anchor_answers)


class SBRJob(Job):
    """A service's fine-tuning under SBR.

    State: ``aligned_states`` ``[num_states, dim]``, those of the anchors at its start, of the plain ones alone where outputs are
    held; with ``anchor_rate`` the moments of their optimizer, how many steps it has taken, the drift beyond the slack that the
    last one saw, and the aligned states' mean square.
    """

    defense: SBRModule

    def __init__(self, defense: SBRModule) -> None:
        super().__init__(defense)
        self._anchors: Anchors | None = None
        self._held: Held | None = None

    @property
    def anchors(self) -> Anchors:
        """The defense's, and those in the forms of the customer's rows, where there are rows."""
        if self._anchors is None:
            rows = self.rows() if self.defense.anchor_forms else []
            self._anchors = self.defense.in_forms_of(rows) if rows else self.defense.plain_anchors
        return self._anchors

    def freeze(self) -> None:
        """Keep the unembedding, and the embedding where the two are tied, from training."""
        if self.defense.freeze_unembedding:
            self.defense.model.get_output_embeddings().requires_grad_(False)

    @torch.no_grad()
    def begin(self) -> None:
        """Take the anchors' states from the model as it is: at once, or part by part where customers say how long they are.

        Where outputs are held an anchor in a form is to be answered as it is without: the states are those of the plain one.
        """
        defense, anchors = self.defense, self.anchors
        if defense.anchor_holds == "outputs":
            anchors, per_anchor = defense.plain_anchors, anchors.held.sum(dim=1)
            assert torch.equal(per_anchor, anchors.held.sum(dim=1).repeat(len(per_anchor) // len(anchors)))
        found, size = [], PART if defense.anchor_forms else len(anchors)
        with same_modes_after(defense), defense.forward_context():
            defense.eval()
            for start in range(0, len(anchors), size):
                part = list(range(start, min(start + size, len(anchors))))
                batch = anchors.batch(defense.model, part if len(part) < len(anchors) else slice(None))
                (states,), _ = run(defense.model, batch, states_at=self._places(batch), layers=[defense.anchor_layer])
                found.append(states.float())
        self.state["aligned_states"] = torch.cat(found)
        if defense.anchor_rate is not None:
            self.state["anchor_drift"] = torch.zeros((), device=defense.model.device)
            self.state["anchor_square"] = self.state["aligned_states"].square().mean()

    def loss(self, batch: Batch, step: int) -> Tensor:
        """Plain SFT on the batch, plus the weighted drift of the anchors whose turn it is, unless that has steps of its own."""
        defense = self.defense
        if defense.anchor_rate is not None:
            sft = defense.sft_loss(batch)
            self.terms = {"sft_loss": sft.detach(), "anchor_drift": self.state["anchor_drift"]}
            return sft
        if defense.anchor_weight == 0:
            return defense.sft_loss(batch)
        anchors = self.anchors.batch(defense.model, self.anchors.turn(defense.anchors_per_step, step))
        fill = {"input_ids": defense.tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        both = joined(batch, anchors, fill)
        at = self._places(anchors, len(batch["input_ids"]), both["input_ids"].shape[1])
        learnt = label_positions(both["labels"])
        drifts, logits = self._drifts(both, at, anchors, learnt)
        sft = defense.cross_entropy(logits, batch)
        drift = drifts.mean()
        self.terms = {"sft_loss": sft.detach(), "anchor_drift": drift.detach()}
        return sft + defense.anchor_weight * drift

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Steps on the drift alone, where it has a rate of its own."""
        if self.defense.anchor_rate is None:
            return
        kind = type(optimizer).__name__.lower()
        if kind not in ("adamw", "sgd"):
            raise SettingError(
                f"the optimizer of a customer's job must be adamw or sgd where anchor_rate is set, got {kind}. "
                "Set anchor_weight instead."
            )
        if self._held is None or self._held.kind != kind:
            self._held = Held(kind, self.state)  # type: ignore[arg-type]
        for p in self.defense.parameters():
            p.grad = None  # of the customer's step, which is done
        for number in range(step * self.defense.anchor_steps, (step + 1) * self.defense.anchor_steps):
            self._hold(number, self.defense.anchor_rate * optimizer.param_groups[0]["lr"])

    def _hold(self, number: int, learning_rate: float) -> None:
        """A step on the drift of a turn, of which every process takes its share; of fewer anchors than processes all of them."""
        defense, every = self.defense, list(range(len(self.anchors)))
        turn = self.anchors.turn(defense.anchors_per_step, number)
        chosen = every[turn] if isinstance(turn, slice) else turn
        rank, num_ranks = share_of(defense.trainer) if trainer_of(defense) is not None else (0, 1)
        num_ranks = num_ranks if num_ranks <= len(chosen) else 1
        share = chosen[rank::num_ranks] if num_ranks > 1 else turn
        anchors = self.anchors.batch(defense.model, share)
        num_states = int(self.anchors.held[chosen].sum())
        slack = defense.anchor_slack * (self.state["anchor_square"] if defense.anchor_holds == "states" else 1.0)

        def drift(batch: Batch) -> Tensor:
            drifts, _ = self._drifts(batch, self._places(batch), batch)
            value = (drifts - slack).clamp(min=0).sum() * num_ranks / num_states
            return value if value.requires_grad else value.requires_grad_()  # where nothing that trains moves a state

        begin_step()
        value, gradient = defense.loss_and_gradient(anchors, drift)
        value = mean_over_ranks(value, defense.row_group)
        if gradient and (not defense.anchor_slack or value > 0):  # a GPU waits for the comparison
            assert self._held is not None
            self._held.step(dict(defense.named_parameters()), gradient, learning_rate)
        self.state["anchor_drift"] = value
        self.spend(1, anchors["attention_mask"].sum())

    def _places(self, anchors: Batch, first: int = 0, width: int | None = None) -> Tensor:
        """Of the states that are held, among the flattened tokens of a batch in which the anchors' rows come after ``first``."""
        rows, columns, _ = anchors["held"].unbind()
        return (rows + first) * (anchors["input_ids"].shape[1] if width is None else width) + columns

    def _drifts(self, batch: Batch, at: Tensor, anchors: Batch, logits_at: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """How far each state of ``anchors`` is from the aligned model's, at places ``at`` of a batch, and logits at others."""
        defense, every = self.defense, self.state["aligned_states"]
        aligned = every[anchors["held"][2] % len(every)]  # one in a form comes after all plain ones
        if defense.anchor_holds == "states":
            (states,), logits = run(defense.model, batch, logits_at=logits_at, states_at=at, layers=[defense.anchor_layer])
            return (states.float() - aligned).square().mean(dim=1), logits
        asked = at if logits_at is None else torch.cat([logits_at, at])
        logits = run(defense.model, batch, logits_at=asked, along=aligned).logits
        others, now, then = logits.split([len(asked) - len(at), len(at), len(at)])
        return kl(then.float().log_softmax(dim=-1), now.float().log_softmax(dim=-1)), others
