"""An attack on the one direction by which a model refuses."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from casehard.callbacks.attack import Attack, Target, ThreatModel
from casehard.datamodules.mixing import mix, overlap
from casehard.datamodules.row import Row
from casehard.datamodules.sft import SFTDataModule
from casehard.datamodules.sources import read_rows
from casehard.engine.anatomy import decoder_layers, residual_parameters
from casehard.engine.directions import ablate, last_prompt_states
from casehard.engine.forward import Batch
from casehard.engine.gradients import mean_over_ranks
from casehard.engine.weights import Changes, restore
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError


class RefusalAblation(Attack):
    """Refusal ablation, "abliteration" (arXiv:2406.11717): take one direction out of all that writes to the residual stream.

    ``direction = normalize(mean(h of harmful prompts) - mean(h of harmless prompts))``, ``h`` being the state of a prompt's last
    token where it enters a decoder layer; then ``W <- W - direction direction^T W`` for embeddings, attention outputs and MLP
    outputs, biases and adapters included. The direction is of one layer of the first 80%: the one whose ablation leaves held-out
    rows of both kinds the lowest loss. This is the attack without a search of its settings.

    The direction stays in the stream where an architecture normalises what a layer adds (Gemma 2 and 3, OLMo 2). With tied
    embeddings the unembedding is edited, too. Cost: forward passes alone, over 4/5 of the rows once and over 1/5 for every layer.
    Memory: a copy of what is edited, and two whole matrices.

    Args:
        threat_model: open_weight, as only who holds the weights edits them; finetuning_service edits the aligned model.
        layer: whose direction is taken, from 1 to the number of layers - 1; null chooses one.
        num_samples: harmful rows, and as many harmless ones: four fifths are for the means, and the rest chooses the layer.
        harmless: sources of harmless rows of the attacker's own, best like harmful ones in form; null takes the data's benign.
        batch_size: rows of a pass, over all processes.
        settings: the rest of ``Attack``'s.
    """

    # Departures from the paper: 1. Of positions the last one of the prompt alone is tried. 2. The layer is chosen by the loss of
    # the rows' own answers, harmful and harmless, not by the log-odds of a list of refusal tokens, which differ between models:
    # it falls as refusals give way and rises as the model breaks, so it stands for the bounds on KL and steering, too. 3. Prompts
    # are not filtered by whether the model refuses them.

    def __init__(
        self,
        threat_model: ThreatModel = "open_weight",
        layer: int | None = None,
        num_samples: int = 160,
        harmless: list[str] | None = None,
        batch_size: int = 32,
        **settings: Any,
    ) -> None:
        if num_samples < 5:
            raise SettingError(f"num_samples must be >= 5, a fifth of which chooses the layer, got {num_samples}.")
        super().__init__(threat_model, **settings)
        self.layer, self.num_samples, self.harmless, self.batch_size = layer, num_samples, harmless, batch_size

    def settings(self) -> dict[str, Any]:
        """How the direction is found."""
        own = {} if self.harmless is None else {"harmless": self.harmless}
        return {"num_samples": self.num_samples, "layer": self.layer or "chosen"} | own

    def rows(self, data: SFTDataModule, seed: int) -> list[Row]:
        """Harmful rows, then as many harmless ones, none of which is scored."""
        own = [row for source in self.harmless or [] for row in read_rows(source)]
        harmless = data.rows["benign"] if self.harmless is None else data.instructed(own)
        if shared := overlap(own, data.rows["harmful_prompts"] + data.rows["benign_prompts"] + data.rows["task"]):
            raise SettingError(f"harmless must share no prompt with what is scored, and {len(shared)} do. Take other rows.")
        return mix([], data.rows["harmful"], self.num_samples, 1.0, seed) + mix(harmless, [], self.num_samples, 0.0, seed)

    def check_model(self, module: Defense) -> None:
        """Raise a ValueError where the model does not have the layer."""
        num_layers = len(decoder_layers(module.model))
        if not 1 <= (1 if self.layer is None else self.layer) < num_layers:
            raise SettingError(f"layer must lie in 1 to {num_layers - 1}, the model's layers - 1, got {self.layer}.")

    def changes(self, module: Defense) -> Changes:
        """All that writes to the residual stream."""
        written = {id(p) for p, _ in residual_parameters(module.model)}
        return {name for name, p in module.named_parameters() if id(p) in written}.__contains__

    @torch.no_grad()
    def steps(self, target: Target) -> Iterator[int]:
        """Find a direction for every layer, choose one, and take it out."""
        module, rows = target.module, self.rows(target.data, target.seed)
        module.eval()
        num_layers = len(decoder_layers(module.model))
        layers = list(range(1, num_layers * 4 // 5 + 1)) if self.layer is None else [self.layer]
        harmful, harmless, num = rows[: self.num_samples], rows[self.num_samples :], self.num_samples * 4 // 5
        states = partial(last_prompt_states, module.model, layers)
        sums = [self.total(target, states, part[:num], "means") for part in (harmful, harmless)]
        directions = F.normalize(sums[0] - sums[1], dim=-1)
        held_out = harmful[num:] + harmless[num:]
        losses = {}
        for layer, direction in zip(layers, directions, strict=True) if len(layers) > 1 else ():
            ablate(module.model, direction)
            losses[layer] = self.total(target, module.sft_loss, held_out, "validation").item()
            restore(module, target.start)
        layer = min(losses, key=losses.__getitem__, default=layers[0])
        target.state |= {"layer": layer, "direction": directions[layers.index(layer)], "losses": losses}
        ablate(module.model, target.state["direction"])
        yield 1

    def total(self, target: Target, value: Callable[[Batch], Tensor], rows: list[Row], stream: str) -> Tensor:
        """The mean over the ranks of a value, summed over batches of ``rows``."""
        batches, module = target.batches(rows, self.batch_size, stream), target.module
        with module.forward_context():
            values = [value(batches(step)) for step in range(-(-len(rows) // self.batch_size))]
        return mean_over_ranks(torch.stack(values).sum(dim=0), module.row_group)

    def notes(self, target: Target) -> list[str]:
        """Also whose direction it was."""
        return [*super().notes(target), f"the direction is that of layer {target.state['layer']}"]
