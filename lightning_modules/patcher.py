"""Patcher: adversarial training against malicious fine-tuning."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from casehard.datamodules.order import counter_seed, uniform
from casehard.datamodules.row import Row
from casehard.datamodules.sources import read_rows
from casehard.engine.forward import Batch
from casehard.engine.gradients import mean_over_ranks, norm
from casehard.engine.optimizer import offloaded
from casehard.engine.weights import Weights, check_device, parked
from casehard.lightning_modules.attacker import InnerAttacker
from casehard.lightning_modules.patcher_parallel import TwoRoles
from casehard.lightning_modules.roles import ATTACKERS, DEFENDERS
from casehard.metrics.errors import SettingError

Choose = Literal["turn", "draw", "strongest"]


class PatcherModule(TwoRoles):
    """Patcher (arXiv:2606.07970), an alignment stage defense against full-parameter harmful fine-tuning.

    Every round an inner attacker fine-tunes the weights of the moment on harmful rows; what it adds to them is the *attack
    vector* ``v``, a constant for the round. The defender then minimises, for ``num_outer_steps`` steps,
    ``attack_weight * sft_loss(weights + v) + (1 - attack_weight) * sft_loss(weights)`` on its refusals (and benign rows, where
    the data has some).

    In the parallel form half of the processes defend while the others attack, each half with the weights sharded over its
    processes (FSDP2). Where the next attack is due, attackers hand over their vector and get the weights of the moment, so that
    a vector is one interval old when it comes into use. The sequential form with ``vector_age`` 1 is the same algorithm. The
    seconds that each half waited for the other are logged: both are small where it pays.

    Memory beyond plain SFT: the attack vector (one copy of what the attacker trains), one more copy during a shifted pass, which
    goes as the gradients come, and during an attack the attacker's gradients and moments; ``copy_device: cpu`` keeps what is idle
    off the accelerator.

    Args:
        checkpoint: the model to start from, as for ``Defense``.
        attacker: the inner attacker.
        more_attackers: others beside it: the steps of a round are shared out among all of them.
        choose: who of them attacks next: turn, one after the other; draw, one at random; strongest, all of them one by one, and
            the vector of the one with the lowest loss on ``held_out_harmful`` is used (a round then has one such attack).
        held_out_harmful: sources of harmful rows that no attacker trains on, for strongest alone. Each attacker is looked at on
            one batch of them, of ``attacker.batch_size`` rows, which counts as a pass.
        num_outer_steps: defender steps of a round (``GA_STEPS`` in the authors' scripts), >= 1.
        num_sft_steps: defender steps of plain SFT before the first attack, >= 0; null is one round, as in the paper.
        attack_weight: share of the loss taken at the attacked weights (``alpha`` in the paper), in [0, 1]; 0 is plain SFT.
        attack_every: defender steps between attacks, >= 1; null shares a round out evenly among the attackers.
        fresh_optimizer: begin a new optimizer with every attack, as the authors do: its moments are then not held meanwhile.
        vector_scale: lowest and highest factor of the attack vector, both >= 0, drawn evenly at every step: [0, 1] hardens the
            attacker's whole path and not its end alone, [0.5, 4] also what a longer attack may reach.
        one_pass_per_row: send every row of a batch through one of the two passes instead of both, a share ``attack_weight`` of
            them through the attacked one: the same expected gradient at half the cost.
        vector_age: how many attacks ago the vector in use was found, >= 0; before that many there is none, and training is SFT.
        parallel: attack and defend at the same time; ``vector_age`` must then be 1, and the strategy as in
            ``experiments/cluster/patcher_parallel.yaml``.
        copy_device: where the attack vector and the attacker's copy of the weights wait, such as cpu; null keeps them beside
            the model.
        settings: the rest of ``Defense``'s.
    """

    # Departures from the authors' setting: (1) one optimizer for the whole of ``fit``, unless ``fresh_optimizer`` says otherwise;
    # (2) the defender's batch may hold benign rows; (3) the attacker's rows go on from attack to attack where they start over;
    # (4) in their parallel form the vector is what the attack ends at minus the weights of the moment, and comes when it comes.

    adaptive = "attack/adaptive/patcher"

    def __init__(
        self,
        checkpoint: str,
        attacker: InnerAttacker = InnerAttacker(),  # noqa: B008  frozen
        more_attackers: list[InnerAttacker] | None = None,
        num_outer_steps: int = 1000,
        num_sft_steps: int | None = None,
        attack_weight: float = 0.5,
        attack_every: int | None = None,
        fresh_optimizer: bool = False,
        vector_scale: tuple[float, float] = (1.0, 1.0),
        one_pass_per_row: bool = False,
        vector_age: int = 0,
        parallel: bool = False,
        copy_device: str | None = None,
        choose: Choose = "turn",
        held_out_harmful: list[str] | None = None,
        **settings: Any,
    ) -> None:
        if not 0 <= attack_weight <= 1:
            raise SettingError(f"attack_weight must lie in [0, 1], got {attack_weight}. 0 is plain SFT, the paper's is 0.5.")
        if choose not in get_args(Choose):
            raise SettingError(f"choose must be one of {', '.join(get_args(Choose))}, got {choose!r}.")
        if (choose == "strongest") != bool(held_out_harmful):
            raise SettingError(
                f"held_out_harmful must name rows where choose is strongest and nowhere else, got {held_out_harmful}. "
                "Name harmful rows that no attacker trains on, or leave it out."
            )
        if not 0 <= vector_scale[0] <= vector_scale[1]:
            raise SettingError(
                f"vector_scale must be two numbers, 0 <= lowest <= highest, got {vector_scale}. [1, 1] is the paper's."
            )
        attackers = [attacker, *(more_attackers or [])]
        in_turn = 1 if choose == "strongest" else len(attackers)
        for name, value, least in (
            ("num_outer_steps", num_outer_steps, in_turn),
            ("num_sft_steps", num_sft_steps, 0),
            ("attack_every", attack_every, 1),
            ("vector_age", vector_age, 0),
        ):
            if value is not None and value < least:
                raise SettingError(f"{name} must be >= {least}, got {value}.")
        if parallel and vector_age != 1:
            raise SettingError(f"vector_age must be 1 in the parallel form, got {vector_age}: attackers need an interval.")
        if parallel and choose == "strongest":
            raise SettingError("choose must be turn or draw in the parallel form, got strongest: defenders would wait for all.")
        super().__init__(checkpoint, **settings)
        self.attackers, self.num_outer_steps, self.attack_weight = attackers, num_outer_steps, attack_weight
        self.num_sft_steps = num_outer_steps if num_sft_steps is None else num_sft_steps
        self.attack_every = attack_every or num_outer_steps // in_turn
        self.fresh_optimizer, self.vector_scale, self.one_pass_per_row = fresh_optimizer, vector_scale, one_pass_per_row
        self.choose, self.held_out_harmful = choose, held_out_harmful or []
        self.vector_age, self.parallel, self.copy_device = vector_age, parallel, copy_device
        self.num_attacks = 0  # so far; vector n of them is kept as "vector_n" until it has been used

    def own_rows(self) -> list[Row]:
        """Harmful rows of the attackers' own, and those on which they are compared."""
        return [row for attacker in self.attackers for row in attacker.own_rows()] + self._held_out()

    def _held_out(self) -> list[Row]:
        return [row for source in self.held_out_harmful for row in read_rows(source)]

    # ---- the attack vector

    def on_fit_start(self) -> None:
        """Lay out the attackers' rows and what their adapters go on, so that bad settings show before the first step."""
        check_device(self.copy_device)
        self.streams: list[Callable[[int], Batch]] = []
        if self.attack_weight:
            self.streams = [a.stream(self, f"inner attacker {which}") for which, a in enumerate(self.attackers)]
            if self.held_out_harmful:
                self.held_out = self.stream(self._held_out(), self.attackers[0].batch_size, "held-out harmful rows")
            super().on_fit_start()

    def exchange_is_due(self) -> bool:
        """Whether the next step begins with an attack."""
        due = max(0, (self.trainer.global_step - self.num_sft_steps) // self.attack_every + 1)
        return bool(self.attack_weight) and due > self.num_attacks

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Attack where one is due, before the first batch of a step."""
        super().on_train_batch_start(batch, batch_idx)
        number = max(0, (self.trainer.global_step - self.num_sft_steps) // self.num_outer_steps + 1)
        self.progress = {"round": number, "phase": "harden" if number else "SFT"}
        if self.exchange_is_due():
            terms: dict[str, float | Tensor] = {**self.seconds_waited()}
            self.next_vector()
            if self.vector:
                terms["train/attack_vector_norm"] = norm(self, self.vector)
            self.log_dict(terms, batch_size=len(batch["input_ids"]))

    def next_vector(self) -> None:
        """Drop the attack vector in use, run the next attack, and take the vector that is old enough into use."""
        optimizer = self.optimizers().optimizer  # type: ignore[union-attr]
        self._drop_vector()  # it is not held beside the new one
        if self.fresh_optimizer:
            optimizer.state.clear()
        self.synchronize()
        last = self.num_attacks - 1  # in the parallel form attackers have kept it until now
        self._keep(last, self.hand_over(self.kept.pop(f"vector_{last}", {}), self.copy_device))
        if self.plays(ATTACKERS):
            with offloaded(optimizer, self.copy_device):
                self._keep(self.num_attacks, self.attack(self.num_attacks))
        looks = 1 if self.choose == "strongest" else 0
        self.num_passes += sum(self.attackers[which].num_inner_steps + looks for which in self.who_attacks(self.num_attacks))
        self.num_attacks += 1

    def who_attacks(self, number: int) -> list[int]:
        """Which of the attackers run for attack ``number`` (from 0)."""
        if self.choose == "strongest":
            return list(range(len(self.attackers)))
        if self.choose == "draw":
            return [int(uniform(self.data.seed, "inner attacker", number) * len(self.attackers))]
        return [number % len(self.attackers)]

    def attack(self, number: int) -> Weights:
        """What attack ``number`` (from 0) adds to the weights, by name; they themselves come back bit for bit."""
        turn = number // len(self.attackers) if self.choose == "turn" else number
        seed, best, vector = counter_seed(self.data.seed, "inner attack", number), 0.0, Weights()
        name = f"Round {self.progress['round']}, inner attack"
        for which in self.who_attacks(number):
            attacker = self.attackers[which]
            first_step = turn * attacker.num_inner_steps  # its rows go on where its last attack left them
            with attacker.attack(self, self.streams[which], seed, first_step, name, self.copy_device) as attack:
                for _ in attack.steps:
                    pass
                loss = self._held_out_loss(number) if self.choose == "strongest" else 0.0
                if not vector or loss < best:
                    best, vector = loss, parked(attack.vector(), self.copy_device)
        return vector

    @torch.no_grad()
    def _held_out_loss(self, number: int) -> float:
        """Loss of one batch of ``held_out_harmful`` on the model as it is, the same on every rank."""
        self.eval()
        with self.forward_context():
            loss = self.sft_loss(self.held_out(number))
        return mean_over_ranks(loss, self.row_group).item()

    @property
    def vector(self) -> Weights:
        """The attack vector in use; {} before there is one, and on processes that only attack."""
        return self.kept.get(self._in_use, {})

    @property
    def _in_use(self) -> str:
        return f"vector_{self.num_attacks - 1 - self.vector_age}"

    def _keep(self, number: int, vector: Weights) -> None:
        if vector:
            self.kept[f"vector_{number}"] = vector

    def _drop_vector(self) -> None:
        self.kept.pop(self._in_use, None)

    # ---- the defender's step

    def alignment_loss(self, batch: Batch, step: int) -> Tensor:
        """``attack_weight * sft_loss(weights + vector) + (1 - attack_weight) * sft_loss(weights)``; plain SFT before any attack.

        The attacked pass is over when this returns, because its weights are gone by then: its gradient is added to the step's.
        """
        if not self.vector:
            return self.sft_loss(batch)
        attacked_rows, clean_rows = shared_out(batch, self.attack_weight) if self.one_pass_per_row else (batch, batch)
        attacked, gradient = self.loss_and_gradient(attacked_rows, at=self.vector, scale=self._scale(step))
        self.add_gradient(gradient, self.attack_weight)
        clean = self.sft_loss(clean_rows)
        if self.one_pass_per_row and self.num_accumulated:
            self.num_passes -= 1  # the two passes are one over the batch
        self.terms = {"clean_loss": clean.detach(), "attacked_loss": attacked, "loss_gap": attacked - clean.detach()}
        return (1 - self.attack_weight) * clean + self.attack_weight * attacked

    def _scale(self, step: int) -> float:
        low, high = self.vector_scale
        return low if low == high else low + (high - low) * uniform(self.data.seed, "attack vector", step)

    # ---- what a resume needs

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The number of attacks, and the attack vectors but for one that the next attack replaces."""
        if self.exchange_is_due():
            self._drop_vector()
        super().on_save_checkpoint(checkpoint)
        checkpoint["num_attacks"] = self.num_attacks

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the vectors of the interrupted round."""
        super().on_load_checkpoint(checkpoint)
        if "num_attacks" not in checkpoint:
            raise SettingError(
                "ckpt_path must hold num_attacks, and it does not: an earlier version of casehard wrote it, which kept attack "
                "vectors in another way. Train with that version, or from the start."
            )
        self.num_attacks = checkpoint["num_attacks"]
        self.kept = {
            key: parked(vector, self.copy_device)
            for key, vector in self.kept.items()
            if self.plays(DEFENDERS if key == self._in_use else ATTACKERS)
        }


def shared_out(batch: Batch, attack_weight: float) -> tuple[Batch, Batch]:
    """The rows of a batch in two parts, a share ``attack_weight`` of them first; each part's mean loss estimates the batch's.

    Raises:
        SettingError: a part without rows.
    """
    num_rows = len(batch["input_ids"])
    cut = round(attack_weight * num_rows)
    if not 0 < cut < num_rows:
        raise SettingError(
            f"one_pass_per_row must find rows for both passes, and attack_weight {attack_weight} sends {cut} of the batch's "
            f"{num_rows} through the attacked one. Raise batch_size, or choose an attack_weight between 0 and 1."
        )
    num_labels = batch.get("num_labels", (batch["labels"][:, 1:] != -100).sum())
    return tuple(  # type: ignore[return-value]
        {key: batch[key][part] for key in ("input_ids", "attention_mask", "labels")} | {"num_labels": num_labels * share}
        for part, share in ((slice(None, cut), cut / num_rows), (slice(cut, None), 1 - cut / num_rows))
    )
