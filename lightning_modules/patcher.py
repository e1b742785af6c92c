"""Patcher: adversarial training against malicious fine-tuning."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from casehard.datamodules.order import counter_seed, uniform
from casehard.datamodules.row import Row
from casehard.engine.forward import Batch
from casehard.engine.gradients import norm
from casehard.engine.optimizer import offloaded
from casehard.engine.weights import Weights, check_device, parked
from casehard.lightning_modules.attacker import InnerAttacker
from casehard.lightning_modules.patcher_parallel import TwoRoles
from casehard.lightning_modules.roles import ATTACKERS, DEFENDERS
from casehard.metrics.errors import SettingError


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
        more_attackers: others, which take turns with it: the steps of a round are shared out among all of them.
        num_outer_steps: defender steps of a round (``GA_STEPS`` in the authors' scripts), >= 1.
        num_sft_steps: defender steps of plain SFT before the first attack, >= 0; null is one round, as in the paper.
        attack_weight: share of the loss taken at the attacked weights (``alpha`` in the paper), in [0, 1]; 0 is plain SFT.
        attack_every: defender steps between attacks, >= 1; null shares a round out evenly among the attackers.
        fresh_optimizer: begin a new optimizer with every attack, as the authors do: its moments are then not held meanwhile.
        random_scale: scale the attack vector by a factor drawn from [0, 1] at every step, so that the attacker's whole path is
            hardened and not its end alone.
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
        random_scale: bool = False,
        one_pass_per_row: bool = False,
        vector_age: int = 0,
        parallel: bool = False,
        copy_device: str | None = None,
        **settings: Any,
    ) -> None:
        if not 0 <= attack_weight <= 1:
            raise SettingError(f"attack_weight must lie in [0, 1], got {attack_weight}. 0 is plain SFT, the paper's is 0.5.")
        attackers = [attacker, *(more_attackers or [])]
        for name, value, least in (
            ("num_outer_steps", num_outer_steps, len(attackers)),
            ("num_sft_steps", num_sft_steps, 0),
            ("attack_every", attack_every, 1),
            ("vector_age", vector_age, 0),
        ):
            if value is not None and value < least:
                raise SettingError(f"{name} must be >= {least}, got {value}.")
        if parallel and vector_age != 1:
            raise SettingError(f"vector_age must be 1 in the parallel form, got {vector_age}: attackers need an interval.")
        super().__init__(checkpoint, **settings)
        self.attackers, self.num_outer_steps, self.attack_weight = attackers, num_outer_steps, attack_weight
        self.num_sft_steps = num_outer_steps if num_sft_steps is None else num_sft_steps
        self.attack_every = attack_every or num_outer_steps // len(attackers)
        self.fresh_optimizer, self.random_scale, self.one_pass_per_row = fresh_optimizer, random_scale, one_pass_per_row
        self.vector_age, self.parallel, self.copy_device = vector_age, parallel, copy_device
        self.num_attacks = 0  # so far; vector n of them is kept as "vector_n" until it has been used

    def own_rows(self) -> list[Row]:
        """Harmful rows of the attackers' own."""
        return [row for attacker in self.attackers for row in attacker.own_rows()]

    # ---- the attack vector

    def on_fit_start(self) -> None:
        """Lay out the attackers' rows and what their adapters go on, so that bad settings show before the first step."""
        check_device(self.copy_device)
        self.streams: list[Callable[[int], Batch]] = []
        if self.attack_weight:
            self.streams = [a.stream(self, f"inner attacker {which}") for which, a in enumerate(self.attackers)]
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
        self.num_passes += self.attackers[self.num_attacks % len(self.attackers)].num_inner_steps
        self.num_attacks += 1

    def attack(self, number: int) -> Weights:
        """What attack ``number`` (from 0) adds to the weights, by name; they themselves come back bit for bit."""
        turn, which = divmod(number, len(self.attackers))
        attacker = self.attackers[which]
        seed = counter_seed(self.data.seed, "inner attack", number)
        first_step = turn * attacker.num_inner_steps  # its rows go on where its last attack left them
        name = f"Round {self.progress['round']}, inner attack"
        with attacker.attack(self, self.streams[which], seed, first_step, name, self.copy_device) as attack:
            for _ in attack.steps:
                pass
            return parked(attack.vector(), self.copy_device)

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
        scale = self._scale(step) if self.random_scale else 1.0
        attacked, gradient = self.loss_and_gradient(attacked_rows, at=self.vector, scale=scale)
        self.add_gradient(gradient, self.attack_weight)
        clean = self.sft_loss(clean_rows)
        if self.one_pass_per_row and self.num_accumulated:
            self.num_passes -= 1  # the two passes are one over the batch
        self.terms = {"clean_loss": clean.detach(), "attacked_loss": attacked, "loss_gap": attacked - clean.detach()}
        return (1 - self.attack_weight) * clean + self.attack_weight * attacked

    def _scale(self, step: int) -> float:
        return uniform(self.data.seed, "attack vector", step)

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
