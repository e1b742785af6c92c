"""Patcher: adversarial training against malicious fine-tuning."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from casehard.datamodules.mixing import mix
from casehard.datamodules.order import counter_seed, uniform
from casehard.datamodules.row import Row
from casehard.datamodules.sources import read_rows
from casehard.engine.adapters import LoRA, adapter_vector, targets, trainable
from casehard.engine.forward import Batch
from casehard.engine.optimizer import Optimizer, parked
from casehard.engine.sharding import as_saved, saved_in, shard_of
from casehard.engine.training import train_steps, watched
from casehard.engine.weights import Weights, attack_vector, borrowed, check_device, local, reshard, shifted, vector_norm
from casehard.lightning_modules.defense import Defense
from casehard.lightning_modules.roles import ATTACKERS, DEFENDERS, RolesStrategy


@dataclass(frozen=True)
class InnerAttacker:
    """The attacker that the defender trains against, on the data's ``alignment_harmful`` rows unless it has its own.

    Args:
        num_inner_steps: optimizer steps of an attack, >= 0; 0 leaves the attack vector zero.
        optimizer: the attacker's own, built anew for every attack.
        batch_size: rows a step, over all processes.
        lora: train an adapter of this shape; null trains every parameter.
        poison_ratio: harmful share of the attacker's rows, in (0, 1]; the others are the data's ``alignment_benign``.
        num_samples: rows of the attacker; null takes all harmful rows, and then poison_ratio must be 1.
        harmful: sources of this attacker's own harmful rows; null takes the data's ``alignment_harmful``.
    """

    num_inner_steps: int = 300
    optimizer: Optimizer = Optimizer(learning_rate=1e-5)  # noqa: RUF009  frozen
    batch_size: int = 8
    lora: LoRA | None = None
    poison_ratio: float = 1.0
    num_samples: int | None = None
    harmful: list[str] | None = None

    def __post_init__(self) -> None:
        if self.num_inner_steps < 0:
            raise ValueError(f"num_inner_steps must be >= 0, got {self.num_inner_steps}. 0 is no attack.")
        for name, value in (("batch_size", self.batch_size), ("num_samples", self.num_samples)):
            if value is not None and value < 1:
                raise ValueError(f"{name} of an inner attacker must be >= 1, got {value}.")
        if not 0 < self.poison_ratio <= 1:
            raise ValueError(f"poison_ratio of an inner attacker must lie in (0, 1], got {self.poison_ratio}. It is a share.")
        if self.poison_ratio != 1 and self.num_samples is None:
            raise ValueError(f"num_samples must be set where poison_ratio is not 1, got poison_ratio {self.poison_ratio}.")

    def own_rows(self) -> list[Row]:
        """Harmful rows of this attacker's own sources."""
        return [row for source in self.harmful or [] for row in read_rows(source)]


class PatcherModule(Defense):
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

    def __init__(
        self,
        checkpoint: str,
        attacker: InnerAttacker = InnerAttacker(),
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
            raise ValueError(f"attack_weight must lie in [0, 1], got {attack_weight}. 0 is plain SFT, the paper's is 0.5.")
        attackers = [attacker, *(more_attackers or [])]
        for name, value, least in (
            ("num_outer_steps", num_outer_steps, len(attackers)),
            ("num_sft_steps", num_sft_steps, 0),
            ("attack_every", attack_every, 1),
            ("vector_age", vector_age, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}.")
        if parallel and vector_age != 1:
            raise ValueError(f"vector_age must be 1 in the parallel form, got {vector_age}: attackers need an interval.")
        super().__init__(checkpoint, **settings)
        self.attackers, self.num_outer_steps, self.attack_weight = attackers, num_outer_steps, attack_weight
        self.num_sft_steps = num_outer_steps if num_sft_steps is None else num_sft_steps
        self.attack_every = attack_every or num_outer_steps // len(attackers)
        self.fresh_optimizer, self.random_scale, self.one_pass_per_row = fresh_optimizer, random_scale, one_pass_per_row
        self.vector_age, self.parallel, self.copy_device = vector_age, parallel, copy_device
        self.vector: Weights = {}  # in use
        self.pending: list[Weights] = []  # not yet old enough
        self.num_attacks = 0

    def own_rows(self) -> list[Row]:
        """Harmful rows of the attackers' own."""
        return [row for attacker in self.attackers for row in attacker.own_rows()]

    # ---- the inner attacker

    def on_fit_start(self) -> None:
        """Lay out the attackers' rows and find what their adapters go on, so that bad settings show before the first step."""
        check_device(self.copy_device)
        for attacker in self.attackers:
            if attacker.lora is not None and self.attack_weight:
                targets(self.model, attacker.lora)
        self.draws = [self._draw(which, attacker) for which, attacker in enumerate(self.attackers)] if self.attack_weight else []
        if self.parallel and self.draws:
            self._ask_for_sigterm_at_exchanges()
            self._warn_of_checkpoints_between_exchanges()

    def _ask_for_sigterm_at_exchanges(self) -> None:
        """Have Lightning ask for SIGTERM where all ranks meet anyway, not before every batch.

        It broadcasts what rank 0 knows, for which defenders would wait until the attack is over, so that the halves took turns.
        Lightning 2.6 has no setting for it (Lightning-AI/pytorch-lightning#21487).

        Raises:
            ValueError: a Lightning that asks in another way.
        """
        loop = self.trainer.fit_loop.epoch_loop
        ask = getattr(loop, "_broadcast_sigterm_tensor", None)
        if ask is None:
            raise ValueError(
                f"parallel must be false under lightning {L.__version__}, whose training loop has no _broadcast_sigterm_tensor: "
                "unless that is replaced, defenders wait for attackers. Leave vector_age at 1 for the same weights, or install "
                "lightning 2.6."
            )

        def ask_if_due() -> None:
            if self._attack_is_due():
                self.trainer.strategy.barrier()
                ask()

        loop._broadcast_sigterm_tensor = ask_if_due  # type: ignore[method-assign]

    def _warn_of_checkpoints_between_exchanges(self) -> None:
        """Defenders wait there until the attack is over, and then attackers are idle for the rest of the interval."""
        for callback in self.trainer.checkpoint_callbacks:
            steps = getattr(callback, "_every_n_train_steps", None)  # 0 is one an epoch
            if steps == 0 or (steps and (steps % self.attack_every or self.num_sft_steps % self.attack_every)):
                rank_zero_warn(
                    f"run.checkpoint_steps and num_sft_steps should be multiples of attack_every, {self.attack_every}, in the "
                    f"parallel form, and they are {steps or 'one epoch'} and {self.num_sft_steps}: at a checkpoint between two "
                    "exchanges the defenders wait until the attack is over."
                )

    def _draw(self, which: int, attacker: InnerAttacker) -> Callable[[int], Batch]:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        rows = data.rows["alignment_harmful"] if attacker.harmful is None else attacker.own_rows()
        if not rows:
            raise ValueError(
                "data.sources.alignment_harmful must name harmful rows for Patcher's inner attacker, got none. "
                "Give rows that no attack is measured with, or set attack_weight to 0 for plain SFT."
            )
        if attacker.num_samples is not None:
            rows = mix(data.rows["alignment_benign"], rows, attacker.num_samples, attacker.poison_ratio, data.seed)
        draw: Callable[[int], Batch] = data.batches(rows, attacker.batch_size, data.seed, f"inner attacker {which}")
        return draw

    def _due(self, step: int) -> int:
        """How many attacks are to be over before defender step ``step`` (from 0)."""
        return max(0, (step - self.num_sft_steps) // self.attack_every + 1)

    def _attack_is_due(self) -> bool:
        return bool(self.attack_weight) and self._due(self.trainer.global_step) > self.num_attacks

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Attack where one is due, before the first batch of a step."""
        super().on_train_batch_start(batch, batch_idx)
        step = self.trainer.global_step
        number = max(0, (step - self.num_sft_steps) // self.num_outer_steps + 1)
        self.progress = {"round": number, "phase": "harden" if number else "SFT"}
        if self._attack_is_due():
            if self.parallel:
                names = ("train/defenders_waited", "train/attackers_waited")
                waited = dict(zip(names, self.trainer.strategy.seconds_waited(), strict=True))  # type: ignore[attr-defined]
                self.log_dict(waited, batch_size=len(batch["input_ids"]))
            self._next_vector()
            self.num_attacks += 1
            if self.vector:
                norm = vector_norm(self, self.vector)
                self.log("train/attack_vector_norm", norm, batch_size=len(batch["input_ids"]))

    def _next_vector(self) -> None:
        optimizer = self.optimizers().optimizer  # type: ignore[union-attr]
        self.vector = {}  # the last round's is not held beside the new one
        if self.fresh_optimizer:
            optimizer.state.clear()
        if self.parallel:
            self.synchronize()
            self.vector, self.pending = self._handed_over(), []
        if self.plays(ATTACKERS):
            with parked(optimizer, self.copy_device):
                self.pending.append(self.attack(self.num_attacks))
        self.num_passes += self.attackers[self.num_attacks % len(self.attackers)].num_inner_steps
        if not self.parallel and len(self.pending) > self.vector_age:
            self.vector = self.pending.pop(0)

    def attack(self, number: int) -> Weights:
        """What attack ``number`` (from 0) adds to the weights, by name; they themselves come back bit for bit."""
        turn, which = divmod(number, len(self.attackers))
        attacker, draw = self.attackers[which], self.draws[which]

        def batches(step: int) -> Batch:  # the attacker's rows go on where its last attack left them
            batch = draw(turn * attacker.num_inner_steps + step)
            return {name: tensor.to(self.device) for name, tensor in batch.items()}

        shown = f"Round {self.progress['round']}, inner attack"
        with borrowed(self, self._prepared(number, attacker), self.copy_device) as start:
            how = (attacker.optimizer, self.forward_context, self.row_group)
            steps = train_steps(self, self.sft_loss, batches, attacker.num_inner_steps, *how)
            for _ in watched(steps, attacker.num_inner_steps, shown, self.trainer, leave=False):
                pass
            if attacker.lora is None:
                return {name: tensor.to(self.copy_device) for name, tensor in attack_vector(self, start).items()}
            reshard(self)
            added = adapter_vector(self.model)
        own = {name: p for name, p in self.named_parameters() if id(p) in added}
        return {name: shard_of(added[id(p)], p).to(self.copy_device) for name, p in own.items()}

    @contextmanager
    def _prepared(self, number: int, attacker: InnerAttacker) -> Iterator[None]:
        seed = self.trainer.datamodule.seed  # type: ignore[attr-defined]
        torch.manual_seed(counter_seed(seed, "inner attack", number))  # of adapters and dropout: the same on resume
        with trainable(self, self.model, attacker.lora):
            yield

    # ---- roles

    @property
    def num_roles(self) -> int:  # type: ignore[override]
        """Two in the parallel form."""
        return 2 if self.parallel else 1

    def plays(self, role: int) -> bool:
        """Whether this process has a part: every process has both in the sequential form."""
        return not self.parallel or self._roles().get_local_rank() == role

    def _roles(self) -> DeviceMesh:
        assert self.device_mesh is not None
        return self.device_mesh["tensor_parallel"]  # a defender and the attacker that holds the same shard

    def configure_model(self) -> None:
        """As for every defense; the parallel form needs its strategy."""
        if self.parallel and not isinstance(self.trainer.strategy, RolesStrategy):
            raise ValueError(
                f"parallel must run under RolesStrategy, and the strategy is "
                f"{type(self.trainer.strategy).__name__}. Add --config experiments/cluster/patcher_parallel.yaml."
            )
        super().configure_model()

    @torch.no_grad()
    def synchronize(self) -> None:
        """In the parallel form, attackers get the defenders' weights, shard by shard."""
        if self.parallel:
            reshard(self)
            for p in self.parameters():
                if p.requires_grad:
                    dist.broadcast(local(p), group=self._roles().get_group(), group_src=DEFENDERS)

    def _handed_over(self) -> Weights:
        """The last attack's vector, from the attackers to the defenders, shard by shard."""
        pair, found = self._roles().get_group(), next(iter(self.pending), {})
        names = [list(found)]
        dist.broadcast_object_list(names, group=pair, group_src=ATTACKERS)
        own, vector = dict(self.named_parameters()), {}
        for name in names[0]:
            shard = found[name].to(self.device).contiguous() if found else torch.empty_like(local(own[name]))
            dist.broadcast(shard, group=pair, group_src=ATTACKERS)
            if self.plays(DEFENDERS):
                vector[name] = shard.to(self.copy_device)
        return vector

    def on_validation_start(self) -> None:
        """Validate one model."""
        self.synchronize()

    def on_train_end(self) -> None:
        """What comes now, such as attacks, is for all processes, and needs no vector."""
        super().on_train_end()
        self.vector, self.pending = {}, []
        self.synchronize()

    # ---- the defender

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The defender's step. Attackers have attacked before the first one of the interval, and only count the others."""
        if self.plays(DEFENDERS):
            return super().training_step(batch, batch_idx)
        return torch.zeros((), device=self.device, requires_grad=True)

    def alignment_loss(self, batch: Batch) -> Tensor:
        """Value of the objective; its gradient comes in two parts.

        The attacked pass is over when this returns, forward and backward, because its weights are gone by then: its gradient is
        on the parameters. The other pass's hangs on the returned loss, as everywhere. Before the first attack it is plain SFT.
        """
        if not self.vector:
            return self.sft_loss(batch)
        attacked_rows, clean_rows = shared_out(batch, self.attack_weight) if self.one_pass_per_row else (batch, batch)
        with shifted(self, self.vector, self._scale(), one_backward=True):
            attacked = self.sft_loss(attacked_rows)
            self._backward(self.attack_weight * attacked)
        self.num_passes += not self.one_pass_per_row  # beside the one that every step counts
        clean, attacked = self.sft_loss(clean_rows), attacked.detach()
        self.terms = {"clean_loss": clean.detach(), "attacked_loss": attacked, "loss_gap": attacked - clean.detach()}
        return (1 - self.attack_weight) * clean + self.attack_weight * attacked

    def _scale(self) -> float:
        if not self.random_scale:
            return 1.0
        return uniform(self.trainer.datamodule.seed, "attack vector", self.trainer.global_step)  # type: ignore[attr-defined]

    def _backward(self, loss: Tensor) -> None:
        """As Lightning would do it, out of autocast, for gradients that wait for those of the pass that Lightning sees."""
        with torch.autocast(self.device.type, enabled=False):
            if self._trainer is None:
                loss.backward()
            else:
                self.trainer.strategy.backward(loss / self.trainer.accumulate_grad_batches, None)

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Not before Lightning's backward, where the attacked pass's gradients already wait: after the step, below."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then drop the gradients."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    # ---- what a resume needs

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The number of attacks, and the attack vector unless the next step begins with another attack.

        The vector goes the way of the weights: shard by shard into a sharded checkpoint, whole into a single file.
        """
        super().on_save_checkpoint(checkpoint)
        kept = {"vector": {} if self._attack_is_due() else self.vector}
        kept |= {f"pending_{i}": vector for i, vector in enumerate(self.pending)}
        saved = {key: as_saved(self, vector) for key, vector in kept.items()}
        if not self.parallel and not any(isinstance(w, DTensor) for w in checkpoint["state_dict"].values()):
            whole = {key: {name: _whole(v) for name, v in vector.items()} for key, vector in saved.items()}
            checkpoint["patcher"] = {"num_attacks": self.num_attacks, **whole}
            return
        checkpoint["state_dict"] |= {f"patcher.{key}.{name}": v for key, vector in saved.items() for name, v in vector.items()}
        checkpoint["patcher"] = {"num_attacks": self.num_attacks}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the vectors of the interrupted round."""
        super().on_load_checkpoint(checkpoint)
        state, path = checkpoint["patcher"], Path(str(self.trainer.ckpt_path))
        own = dict(self.named_parameters())

        def read(key: str) -> Weights:
            if path.is_dir():
                vector = saved_in(self, path, f"patcher.{key}.")
            else:
                vector = {name: shard_of(whole, own[name]) for name, whole in state.get(key, {}).items()}
            return {name: v.to(self.copy_device) for name, v in vector.items()}

        self.num_attacks, vector = state["num_attacks"], read("vector")
        pending = [read(f"pending_{i}") for i in range(self.vector_age)]
        self.vector = vector if self.plays(DEFENDERS) else {}
        self.pending = [vector for vector in pending if vector and self.plays(ATTACKERS)]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_out(batch: Batch, attack_weight: float) -> tuple[Batch, Batch]:
    """The rows of a batch in two parts, a share ``attack_weight`` of them first; each part's mean loss estimates the batch's.

    Raises:
        ValueError: a part without rows.
    """
    num_rows = len(batch["input_ids"])
    cut = round(attack_weight * num_rows)
    if not 0 < cut < num_rows:
        raise ValueError(
            f"one_pass_per_row must find rows for both passes, and attack_weight {attack_weight} sends {cut} of the batch's "
            f"{num_rows} through the attacked one. Raise batch_size, or choose an attack_weight between 0 and 1."
        )
    num_labels = batch.get("num_labels", (batch["labels"][:, 1:] != -100).sum())
    return tuple(  # type: ignore[return-value]
        {key: batch[key][part] for key in ("input_ids", "attention_mask", "labels")} | {"num_labels": num_labels * share}
        for part, share in ((slice(None, cut), cut / num_rows), (slice(cut, None), 1 - cut / num_rows))
    )
