"""RepNoise: what the model holds of a harmful answer shall look like noise."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from casehard.datamodules.mixing import paired
from casehard.datamodules.row import Row
from casehard.datamodules.sources import read_rows
from casehard.engine.anatomy import blocks
from casehard.engine.forward import Batch, differing_positions, label_positions, run
from casehard.engine.gradients import mean_over_ranks, rows_of_all_ranks
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError


def mmd(first: Tensor, second: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two samples, ``[n, dim]`` and ``[m, dim]``; 0 where they are the same.

    The kernel is a sum of five ``exp(-distance**2 / width)``; widths are 1/4, 1/2, 1, 2 and 4 times the mean ``distance**2``.
    """
    both = torch.cat([first, second])
    squares = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist").square()
    width = squares.detach().sum() / (len(both) * (len(both) - 1))
    kernel = torch.stack([torch.exp(-squares / (width * 2.0**power)) for power in range(-2, 3)]).sum(dim=0)
    weights = torch.cat([torch.full_like(first[:, 0], 1 / len(first)), torch.full_like(second[:, 0], -1 / len(second))])
    return weights @ kernel @ weights


class RepNoiseModule(Defense):
    """RepNoise (arXiv:2405.14577), an alignment stage defense.

    Minimises ``sft_loss + noise_weight * noise - ascent_weight * log(ascent)``. ``noise`` is the mean over layers of the ``mmd``
    between what their MLPs put out on harmful answers and standard normal noise, a row being one sample; only tokens count that
    differ from those of a refusal to the same prompt. ``ascent`` is 1 plus the mean over layers of the cross-entropy on the
    harmful answers, earlier layers being read by the final norm and the unembedding.

    Two forward and backward passes a step. Memory beyond plain SFT: one copy of the gradient, and logits a layer.

    Args:
        checkpoint: the model to start from, as for ``Defense``. Every layer must have an MLP.
        refused: a source of refusals to prompts of the data's ``alignment_harmful``; null takes the data's ``refusals``. Rows
            without a partner are left out.
        noise_weight: of ``noise`` (``beta`` in the paper), >= 0.
        ascent_weight: of ``log(ascent)`` (``alpha`` in the paper), >= 0. Where both are 0 this is plain SFT.
        pair_batch_size: pairs a step, over all processes, >= 1.
        settings: the rest of ``Defense``'s.
    """

    # Departures from the authors' code: (1) the safe loss is that of the data's alignment rows, benign ones among them, not of
    # the pairs' refusals alone; (2) rows are samples from their first differing token on, without the prompt's zeros before it;
    # (3) the lens is on states 1 to L - 1: theirs norms the last one twice, whose loss is there already; (4) noise is by counter.

    adaptive = "attack/adaptive/repnoise"

    def __init__(
        self,
        checkpoint: str,
        refused: str | None = None,
        noise_weight: float = 0.001,
        ascent_weight: float = 1.0,
        pair_batch_size: int = 8,
        **settings: Any,
    ) -> None:
        super().__init__(checkpoint, **settings)
        self.refused, self.pair_batch_size = refused, pair_batch_size
        self.noise_weight, self.ascent_weight = noise_weight, ascent_weight
        for name, least in (("noise_weight", 0), ("ascent_weight", 0), ("pair_batch_size", 1)):
            if not getattr(self, name) >= least:
                raise SettingError(f"{name} of RepNoise must be >= {least}, got {getattr(self, name)}.")

    def own_rows(self) -> list[Row]:
        """The refusals, where they are the defense's own and not the data's."""
        return [] if self.refused is None else read_rows(self.refused)

    def on_fit_start(self) -> None:
        """Pair the rows, so that missing ones show before the first step."""
        refused = self.data.rows["refusals"] if self.refused is None else self.data.instructed(self.own_rows())
        pairs = paired(self.data.rows["alignment_harmful"], refused)
        if not pairs or any(harmful.response == refusal.response for harmful, refusal in pairs):
            raise SettingError(
                "refused must answer prompts of data.sources.alignment_harmful with refusals, and "
                f"{'some answers are the harmful ones' if pairs else 'no prompt stands in both'}. Name refusals to those prompts."
            )
        harmful, refusals = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        self.pair = self.pairs(harmful, refusals, self.pair_batch_size, "repnoise")
        blocks(self.model, "mlp")

    def alignment_loss(self, batch: Batch, step: int) -> Tensor:
        """``sft_loss``; the gradient of the terms on harmful answers is added to its own."""
        if self.noise_weight or self.ascent_weight:
            harmful, refusal = self.pair(step)
            loss = partial(self.harmful_loss, differs=differing_positions(harmful, refusal), step=step)
            self.add_gradient(self.gradient(harmful, loss))
        return self.sft_loss(batch)

    def harmful_loss(self, harmful: Batch, differs: Tensor, step: int) -> Tensor:
        """``noise_weight * noise - ascent_weight * log(ascent)``, up to a constant: its gradient is right, over ranks too."""
        mlps = [block.mlp for block in blocks(self.model, "mlp") if block.mlp is not None]
        learnt, early = label_positions(harmful["labels"]), range(len(mlps) - 1)
        states, logits = run(self.model, harmful, logits_at=learnt, states_at=differs, layers=mlps, lens=early)
        ascent = (
            1 + torch.stack([self.cross_entropy(read, harmful) for read in logits.view(len(mlps), -1, logits.shape[-1])]).mean()
        )
        total = mean_over_ranks(ascent.detach(), self.row_group)
        sizes: list[int] = differs.sum(dim=1).tolist()
        terms = []
        for layer, values in enumerate(states):
            drawn = self.noise(sizes, values.shape[1], f"repnoise layer {layer}", step)
            samples = [pad_sequence(rows, batch_first=True) for rows in (values.float().split(sizes), drawn)]
            terms.append(mmd(*(rows_of_all_ranks(rows, self.row_group).flatten(1) for rows in samples)))
        noise = torch.stack(terms).mean()
        self.terms = {"noise": noise.detach(), "ascent": total}
        return self.noise_weight * noise - self.ascent_weight * ascent / total
