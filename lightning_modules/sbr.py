"""Safety Bottleneck Regularization."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from casehard.datamodules.chat import IGNORED, collate, prompt_ids, require_chat_template
from casehard.datamodules.columns import flaw
from casehard.datamodules.order import batch_indices
from casehard.datamodules.row import Row
from casehard.datamodules.sources import looks_like_source, read_rows
from casehard.engine.forward import Batch, label_positions, last_positions, placed, run
from casehard.engine.layouts import joined
from casehard.engine.weights import same_modes_after
from casehard.lightning_modules.defense import Defense
from casehard.lightning_modules.job import Job
from casehard.metrics.errors import SettingError


class SBRModule(Defense):
    """Safety Bottleneck Regularization (arXiv:2605.05995), a fine-tuning stage defense.

    Everything a model says passes through the unembedding, so the state that enters it at the end of a harmful prompt (an
    *anchor*) is held where the aligned model put it:
    ``loss = sft_loss + anchor_weight * mean((state - aligned_state) ** 2)``, the mean being over ``[num_anchors, dim]``.

    It protects while the provider trains (``finetuning_service``). Whoever holds the weights leaves the term out: no protection
    against ``open_weight`` attackers.

    Args:
        checkpoint: the aligned model, as for ``Defense``.
        anchors: harmful prompts, as a list of texts or as one source of rows (file, hub id, ``sandbox:...``), answers unused.
            null takes the prompts of the data's ``refusals``. They are rendered with the model's own chat template.
        num_anchors: take the first so many; null takes all.
        anchors_per_step: how many of them enter each step, in turn; null is all.
        anchor_weight: regularisation strength (``lambda`` in the paper), >= 0; 0 is plain SFT.
        anchor_layer: which state is held: -1 the one that enters the unembedding, after the final norm (the paper's); else an
            index into transformers' ``hidden_states``.
        freeze_unembedding: do not train the unembedding. Where it is tied to the embedding both stand still: otherwise the
            bottleneck itself moves, and holding the state before it holds nothing.
        settings: the rest of ``Defense``'s.
    """

    # Departures from the authors' setting: (1) the anchors share the forward pass of the batch, so they cost their tokens and no
    # more; (2) both terms are means, so gradient accumulation leaves the weight's meaning alone; (3) the unembedding is frozen.

    anchor_ids: Tensor  # on the host, as the mask
    anchor_mask: Tensor

    adaptive = "attack/adaptive/sbr"

    def __init__(
        self,
        checkpoint: str,
        anchors: str | list[str] | None = None,
        num_anchors: int | None = None,
        anchors_per_step: int | None = None,
        anchor_weight: float = 50.0,
        anchor_layer: int = -1,
        freeze_unembedding: bool = True,
        **settings: Any,
    ) -> None:
        if not anchor_weight >= 0:
            raise SettingError(f"anchor_weight must be >= 0, got {anchor_weight}. Use 0 for plain SFT.")
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
        super().__init__(checkpoint, **settings)
        self.anchors, self.num_anchors, self.anchors_per_step = anchors, num_anchors, anchors_per_step
        self.anchor_weight, self.anchor_layer, self.freeze_unembedding = anchor_weight, anchor_layer, freeze_unembedding
        require_chat_template(self.tokenizer)

    def own_rows(self) -> list[Row]:
        """The anchors, where they are the defense's own and not the data's."""
        if isinstance(self.anchors, str):
            return read_rows(self.anchors, needs_response=False)
        return [Row((("user", anchor),)) for anchor in self.anchors or []]

    def configure_model(self) -> None:
        """Load the weights and render the anchors."""
        rows = None if hasattr(self, "anchor_ids") else self._anchor_rows()  # refused before any weights load
        super().configure_model()
        if rows is None:
            return
        depth = self.model.config.get_text_config().num_hidden_layers
        if not -depth - 1 <= self.anchor_layer <= depth:
            raise SettingError(f"anchor_layer must lie in [{-depth - 1}, {depth}], got {self.anchor_layer}. -1 is the paper's.")
        ids = [prompt_ids(row, self.tokenizer) for row in rows]
        batch = collate([{"input_ids": i, "labels": [IGNORED] * len(i)} for i in ids], self.tokenizer.pad_token_id, "right")
        self.anchor_ids, self.anchor_mask = batch["input_ids"], batch["attention_mask"]
        self.every_anchor: Batch = {}  # where the model was when they were last asked for

    def _anchor_rows(self) -> list[Row]:
        rows = self.own_rows() if self.anchors is not None else self.trainer.datamodule.rows["refusals"]  # type: ignore[attr-defined]
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
        return rows[: self.num_anchors]

    def job(self) -> Job:
        """A fine-tuning that holds the anchors."""
        return SBRJob(self)

    def anchor_batch(self, turn: slice | list[int] = slice(None)) -> Batch:
        """The anchors of a turn, without labels, where the model is; laid out as one size whichever turn it is."""
        every = turn == slice(None)
        if every and self.every_anchor and self.every_anchor["input_ids"].device == self.model.device:
            return self.every_anchor
        ids, mask = self.anchor_ids[turn], self.anchor_mask[turn]
        most = int(self.anchor_mask.sum(dim=1).topk(len(ids)).values.sum())
        batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.full_like(ids, IGNORED)}
        batch = placed(self.model, batch, at_least=-(-most // 8) * 8)
        if every:
            self.every_anchor = batch
        return batch


class SBRJob(Job):
    """A service's fine-tuning under SBR. State: ``aligned_states`` ``[num_anchors, dim]``, the anchors' states at its start."""

    defense: SBRModule

    def freeze(self) -> None:
        """Keep the unembedding, and the embedding where the two are tied, from training."""
        if self.defense.freeze_unembedding:
            self.defense.model.get_output_embeddings().requires_grad_(False)

    @torch.no_grad()
    def begin(self) -> None:
        """Take the anchors' states from the model as it is."""
        defense, anchors = self.defense, self.defense.anchor_batch()
        with same_modes_after(defense), defense.forward_context():
            defense.eval()
            last = last_positions(anchors["attention_mask"])
            (states,), _ = run(defense.model, anchors, states_at=last, layers=[defense.anchor_layer])
        self.state["aligned_states"] = states.float()

    def loss(self, batch: Batch, step: int) -> Tensor:
        """Plain SFT on the batch, plus the weighted drift of the anchors whose turn it is."""
        defense = self.defense
        if defense.anchor_weight == 0:
            return defense.sft_loss(batch)
        turn = self._turn(step)
        fill = {"input_ids": defense.tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        both = joined(batch, defense.anchor_batch(turn), fill)
        last = last_positions(both["attention_mask"])[len(batch["input_ids"]) :]
        learnt = label_positions(both["labels"])
        (states,), logits = run(defense.model, both, logits_at=learnt, states_at=last, layers=[defense.anchor_layer])
        sft = defense.cross_entropy(logits, batch)
        aligned = self.state["aligned_states"]
        if not isinstance(turn, slice):  # a list would be sent to the device while the host waits for all that is queued there
            aligned = aligned[torch.tensor(turn, device="cpu").to(aligned.device, non_blocking=True)]
        drift = F.mse_loss(states.float(), aligned)
        self.terms = {"sft_loss": sft.detach(), "anchor_drift": drift.detach()}
        return sft + defense.anchor_weight * drift

    def _turn(self, step: int) -> slice | list[int]:
        """The anchors of this step."""
        number, per_step = len(self.defense.anchor_ids), self.defense.anchors_per_step
        if per_step is None or per_step >= number:
            return slice(None)
        return batch_indices(number, per_step, 0, "anchors", step)
