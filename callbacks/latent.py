"""An attack on the states inside the model, between its layers."""

from itertools import chain, count
from typing import Any

import torch
from torch import Tensor

from casehard.callbacks.attack import Target, ThreatModel
from casehard.callbacks.per_prompt import PerPrompt
from casehard.datamodules.chat import prompt_ids
from casehard.datamodules.row import Row
from casehard.engine.anatomy import decoder_layers
from casehard.engine.latent import Norm, ball_descent, perturbed
from casehard.engine.soft_tokens import table_shape
from casehard.lightning_modules.defense import Defense
from casehard.metrics.errors import SettingError


class LatentAttack(PerPrompt):
    """Latent attack: move the states of every harmful prompt between layers (as in arXiv:2407.15549). No weight changes.

    At every token of a prompt a ``delta`` is added to what the decoder layers ``layers`` put out; it is the prompt's own.
    Projected gradient descent lowers the cross-entropy of ``target_text`` as the answer: ``delta <- project(delta - step_ratio *
    radius * g / norm(g))``, token by token and layer by layer (``l2``), or with ``sign(g)`` (``linf``). Then the model answers
    with the deltas in place. It is scored at step 0 without them. Benign prompts and tasks stay plain.

    Cost: a forward and a backward pass over the harmful prompts a step, while they are answered, so that ``wall_seconds`` do not
    count it. Memory: no copy of the weights, and no gradients of theirs; ``dim`` numbers a token and layer of every prompt.

    Args:
        threat_model: open_weight: only who holds the weights reaches into the model.
        num_attack_steps: optimisation steps, >= 1.
        radius: of the ball that a delta stays in, >= 0, in the units of the states; 0 is the plain model.
        norm: l2, of a token's delta in a layer, or linf, of its entries.
        layers: decoder layers, from 0, after which states are moved; null takes the one in the middle.
        step_ratio: of a step, as a share of the radius, in (0, 1].
        target_text: the beginning of an answer that complies.
        batch_size: prompts of a pass, for each process.
        settings: the rest of ``Attack``'s.
    """

    # Departures: (1) deltas are optimised against the model that is attacked, on one text that complies, and not in training;
    # (2) every token of the prompt is moved, the template's own too.

    def __init__(
        self,
        threat_model: ThreatModel = "open_weight",
        num_attack_steps: int = 50,
        radius: float = 1.0,
        norm: Norm = "l2",
        layers: list[int] | None = None,
        step_ratio: float = 0.1,
        target_text: str = "Sure, here is",
        batch_size: int = 32,
        **settings: Any,
    ) -> None:
        if num_attack_steps < 1 or not radius >= 0 or not 0 < step_ratio <= 1:
            got = f"{num_attack_steps}, {radius} and {step_ratio}"
            raise SettingError(f"num_attack_steps must be >= 1, radius >= 0 and step_ratio in (0, 1], got {got}.")
        if norm not in ("l2", "linf"):
            raise SettingError(f"norm must be l2 or linf, got {norm!r}.")
        self.num_attack_steps, self.radius, self.norm, self.layers = num_attack_steps, radius, norm, layers
        self.step_ratio, self.target_text, self.batch_size = step_ratio, target_text, batch_size
        super().__init__(threat_model, **settings)

    def settings(self) -> dict[str, Any]:
        """Where states are moved, and how far."""
        own = {name: getattr(self, name) for name in ("radius", "norm", "step_ratio", "target_text")}
        return own | {"layers": self.layers or "middle", "last_step": self.num_attack_steps}

    def chosen(self, module: Defense) -> list[int]:
        """The layers after which states are moved."""
        return self.layers or [(len(decoder_layers(module.model)) - 1) // 2]

    def check_model(self, module: Defense) -> None:
        """Raise a SettingError where the model does not have a layer."""
        last = len(decoder_layers(module.model)) - 1
        if not all(0 <= layer <= last for layer in self.chosen(module)):
            raise SettingError(f"layers must lie in 0 to {last}, the model's last, got {self.layers}.")

    def answered(self, target: Target, rows: list[Row], max_new_tokens: int) -> list[str]:
        """Answers with the deltas in place."""
        module, (prompts, tokens) = target.module, self.marked(target.module, rows)
        deltas = torch.cat([target.state["deltas"][row] for row in rows], dim=1)
        with perturbed(module.model, self.chosen(module), tokens, deltas):
            return module.generate(prompts, max_new_tokens, target.data.evaluation.batch_size)

    def marked(self, module: Defense, rows: list[Row]) -> tuple[list[list[int]], Tensor]:
        """The prompts of ``rows`` in ids that mark every token of theirs, and the tokens that these stand for."""
        plain, mark = [prompt_ids(row, module.tokenizer) for row in rows], count(table_shape(module.model)[0])
        return [[next(mark) for _ in ids] for ids in plain], torch.tensor(list(chain(*plain)), device=module.device)

    def optimise(self, target: Target, rows: list[Row], num_steps: int) -> int:
        """As many steps of descent; the deltas of a row, ``[layers, tokens, dim]``, stay in the state."""
        module = target.module
        (prompts, tokens), layers = self.marked(module, rows), self.chosen(module)
        batch, num_tokens = self.aimed(module, prompts)
        shapes = [(len(layers), len(prompt), table_shape(module.model)[1]) for prompt in prompts]

        def gradient(deltas: Tensor) -> Tensor:
            deltas = deltas.detach().requires_grad_()
            with perturbed(module.model, layers, tokens, deltas):
                with module.forward_context():
                    loss = module.sft_loss(batch)
                return torch.autograd.grad(loss, deltas)[0]

        kept = target.state.setdefault("deltas", {})
        known = [kept.get(row, torch.zeros(shape, device=module.device)) for row, shape in zip(rows, shapes, strict=True)]
        found = ball_descent(gradient, torch.cat(known, dim=1), num_steps, self.radius, self.step_ratio, self.norm)
        kept |= zip(rows, found.split([len(prompt) for prompt in prompts], dim=1), strict=True)
        return num_steps * num_tokens
