"""The base class of every defense; by itself it is plain SFT, the undefended baseline."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from casehard.datamodules.batches import share_of
from casehard.datamodules.order import counter_seed
from casehard.datamodules.row import Row
from casehard.engine.adapters import LoRA, merged
from casehard.engine.checkpoint import WEIGHT_FILES, load_model, num_positions, require_plain_weights
from casehard.engine.comparison import distance, logits_of, rounding, some_ids
from casehard.engine.export import merge_error
from casehard.engine.forward import Batch, label_positions, run, takes_prefix_trees
from casehard.engine.generation import generate
from casehard.engine.optimizer import Optimizer
from casehard.engine.sharding import distribute, gathered, sharded
from casehard.engine.weights import borrowed, group_of, local, restore
from casehard.lightning_modules.backbone import Backbone, mixed_precision, read_other, shard_mesh

Stage = Literal["none", "alignment", "finetuning", "post_finetuning"]


def _require_same_shapes(own: set[tuple[str, torch.Size]], other: set[tuple[str, torch.Size]], checkpoint: str) -> None:
    """Raise a ValueError where the parameters of ``checkpoint``, by name and shape, are not the defended model's."""
    if unlike := sorted(own ^ other):
        name, shape = unlike[0]
        which = "the defended model" if unlike[0] in own else repr(checkpoint)
        raise ValueError(
            f"undefended_checkpoint must be of the defended model's architecture, and {which} alone has {name} of "
            f"shape {list(shape)}. Name the model that the defense started from, or leave it out."
        )


class Defense(L.LightningModule):
    """Plain supervised fine-tuning: the undefended baseline, and the base class of every defense.

    A defense's stage is the method that it overrides: ``alignment_loss`` (before release), ``finetuning_loss`` (while a service
    fine-tunes on its customer's rows) or ``recover`` (after that). ``fit`` minimises the loss of the stage.

    Args:
        checkpoint: the model to start from: a hub id, a folder or a GGUF file. Of an adapter (peft), the model that it makes of
            its base; quantised weights are refused.
        optimizer: of ``fit``.
        lora: train adapters of this shape; null trains every parameter.
        backbone: how the model is loaded.
    """

    model: PreTrainedModel
    num_roles = 1  # parts that the ranks play, each of which has the model

    def __init__(
        self,
        checkpoint: str,
        optimizer: Optimizer = Optimizer(),  # noqa: B008  frozen
        lora: LoRA | None = None,
        backbone: Backbone = Backbone(),  # noqa: B008  frozen
    ) -> None:
        if not backbone.random_weights:
            require_plain_weights(checkpoint)
        super().__init__()
        self.checkpoint, self.optimizer, self.lora, self.backbone = checkpoint, optimizer, lora, backbone
        self.tokenizer = backbone.load_tokenizer(checkpoint)
        self.terms: dict[str, Tensor] = {}  # detached parts of the last loss, for the logs
        self.num_passes: float = 0  # forward and backward, over a batch each, that ``fit`` took; nan if a checkpoint knew none
        self.can_go_on = True  # with training: optimizer and gradients are as the last step left them
        self.progress: dict[str, int | str] = {}  # what the progress bar shows beside the losses

    # ---- the model

    def configure_model(self) -> None:
        """Load the weights, once; Lightning calls this when the strategy is ready for them."""
        if hasattr(self, "model"):
            return
        if self._trainer is not None and str(self.trainer.precision) in ("16-mixed", "16-true", "transformer-engine-float16"):
            raise ValueError(
                f"trainer.precision must be 32-true, bf16-mixed or bf16-true, got {self.trainer.precision}: attackers train "
                "without a scaler of gradients, and small ones would be lost in float16."
            )
        self.drawn_from = torch.get_rng_state()  # to draw random weights once more (``as_aligned``)
        if (mesh := self._mesh()) is None:
            self.register_module("model", self._whole())
        else:
            whole = self._whole() if mesh.get_local_rank() == 0 else None
            policy, prepare = mixed_precision(str(self.trainer.precision)), self.backbone.prepared(self.lora)
            model, self.empty_model = sharded(whole, mesh, self.trainer.strategy.root_device, policy, prepare)
            self.register_module("model", model)
        self.backbone.compile(self.model)
        takes_prefix_trees(self.model, 0)  # found out now: later passes may be watched by somebody's hooks
        if self.stage == "finetuning":
            self.freeze_parameters()

    def _whole(self) -> PreTrainedModel:
        return self.backbone.load_prepared(self.checkpoint, self.lora, self.tokenizer)

    def _mesh(self) -> DeviceMesh | None:
        return shard_mesh(self.device_mesh, self.num_roles)

    @property
    def num_positions(self) -> int | None:
        """How many tokens a prompt and its answer may have; None where the model does not say. No weights are loaded for it."""
        return num_positions(self.checkpoint, self.backbone.sizes)

    @property
    def row_group(self) -> dist.ProcessGroup | None:
        """The ranks that share out the rows of a batch; None for all."""
        return None if self.device_mesh is None else self.device_mesh["data_parallel"].get_group()

    def exported(self) -> PreTrainedModel | None:
        """The model to ship: adapters merged, on a copy if there are any.

        Where it is sharded every rank must call this; it is put together on the CPU of rank 0, and the others get None.

        Raises:
            ValueError: merged, it does not answer as it does with its adapters beside its weights.
        """
        model = self.model if group_of(self.model) is None else gathered(self.model, self.empty_model)
        whole = None if model is None else merged(model)
        if model is not None and whole is not None and whole is not model:
            off = merge_error(model, whole, self.tokenizer)
            if model.dtype != torch.float32:
                rank_zero_info(f"Adapters merged in {model.dtype}: logits are {100 * off:.2g}% off those of adapters beside it.")
        return whole

    @contextmanager
    def as_aligned(self) -> Iterator[None]:
        """For a block, undo what ``fit`` did to a fine-tuning stage defense: the aligned model, where a service's jobs start.

        The identity for other stages, and where nothing was fitted. Memory: one copy of what trains.
        """
        fitted = self._trainer is not None and (self.trainer.state.fn == TrainerFn.FITTING or self.trainer.ckpt_path is not None)
        if self.stage != "finetuning" or not fitted:
            yield
            return
        with borrowed(self):
            if self.lora is None:
                if self.backbone.random_weights:
                    torch.set_rng_state(self.drawn_from)
                aligned = read_other(lambda: self.backbone.load(self.checkpoint), self._mesh()).parameters
                distribute(self.model, {name: aligned[name] for name, p in self.model.named_parameters() if p.requires_grad})
                del aligned  # not held for the block
            else:  # an adapter whose second factor is zero adds nothing
                trained = {n: local(p) for n, p in self.named_parameters() if p.requires_grad}
                restore(self, {name: torch.zeros_like(p) for name, p in trained.items() if "lora_B" in name})
            yield

    @contextmanager
    def undefended_at(self, checkpoint: str) -> Iterator[None]:
        """For a block, hold the weights of another model of this architecture, adapters without effect.

        Memory: one copy of the model, and two while the other's weights are read.

        Raises:
            ValueError: ``checkpoint`` is of another architecture, in its weights' shapes or in what it computes with them.
        """
        with borrowed(self, self.thawed()):
            load = partial(load_model, checkpoint, self.backbone.dtype)
            theirs = read_other(load, self._mesh(), with_logits=True)
            own = dict(self.model.named_parameters())
            plain = {name: name.replace(".base_layer", "") for name in own if "lora_" not in name}
            ours = {key: own[name].shape for name, key in plain.items()}
            _require_same_shapes(set(ours.items()), {(key, w.shape) for key, w in theirs.parameters.items()}, checkpoint)
            distribute(self.model, {name: theirs.parameters[key] for name, key in plain.items()})
            for name, buffer in self.model.named_buffers():  # those of a checkpoint: the biases of some routers
                if (key := name.replace(".base_layer", "")) in theirs.buffers:
                    local(buffer).copy_(theirs.buffers[key])
            restore(self.model, {name: torch.zeros_like(local(p)) for name, p in own.items() if name not in plain})
            expected = theirs.logits
            del theirs  # not held for the block
            answered = logits_of(self.model, some_ids(self.model))
            if not (off := distance(answered, expected)) <= rounding(answered.dtype):
                raise ValueError(
                    f"undefended_checkpoint must be of the defended model's architecture, and the weights of {checkpoint!r} give "
                    f"other logits in it ({100 * off:.2g}% off), since its config.json has other settings. Name the model that "
                    "the defense started from, or leave it out."
                )
            yield

    def check_undefended(self, checkpoint: str) -> None:
        """Make sure, from sizes alone, that ``undefended_at`` will find a model of this architecture.

        Raises:
            ValueError: ``checkpoint`` is of another architecture.
            OSError: it is not there, or has no weights.
        """
        folder = Path(checkpoint)
        if (folder / "adapter_config.json").exists():
            return  # of the base's sizes, and looked at when it is read
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            ours = load_model(self.checkpoint, random_weights=True, sizes=self.backbone.sizes)
            theirs = load_model(checkpoint, random_weights=True)
        if folder.is_dir() and not any(path for pattern in WEIGHT_FILES for path in folder.glob(pattern)):
            raise FileNotFoundError(
                f"undefended_checkpoint must hold weights, and {checkpoint!r} has none. Name the model that the defense started "
                "from, or leave it out."
            )
        own, other = ({(name, p.shape) for name, p in model.named_parameters()} for model in (ours, theirs))
        _require_same_shapes(own, other, checkpoint)

    @contextmanager
    def thawed(self) -> Iterator[None]:
        """For ``borrowed``: everything may change, so everything is copied."""
        self.requires_grad_(True)
        yield

    # ---- what a defense overrides

    def alignment_loss(self, batch: Batch) -> Tensor:
        """Loss of the alignment stage, before release: plain SFT unless overridden."""
        return self.sft_loss(batch)

    def finetuning_loss(self, batch: Batch) -> Tensor:
        """Loss under which a fine-tuning service trains on its customer's rows: plain SFT unless overridden."""
        return self.sft_loss(batch)

    def freeze_parameters(self) -> None:
        """Freeze what must not move while a service fine-tunes, before the optimizer is built. Nothing unless overridden."""

    def begin_finetuning(self) -> None:
        """Take references before the first step of a service's fine-tuning. Nothing unless overridden."""

    def recover(self) -> None:
        """Repair the weights, in place, after a service has fine-tuned them. Nothing unless overridden.

        Called in front of every scoring of a service's job, on a loan (one more copy of the weights); gradients are enabled.
        """

    def own_rows(self) -> list[Row]:
        """Rows that the defense brings itself, to be told apart from those that it is scored on. None unless overridden."""
        return []

    def synchronize(self) -> None:
        """Make every rank hold the model as it is now, before somebody looks at it. Nothing unless ranks play different roles."""

    @property
    def stage(self) -> Stage:
        """Where the defense acts, by the method it overrides; ``none`` for the baseline."""
        stages: dict[str, Stage] = {"alignment_loss": "alignment", "finetuning_loss": "finetuning", "recover": "post_finetuning"}
        return next((stage for name, stage in stages.items() if getattr(type(self), name) is not getattr(Defense, name)), "none")

    @property
    def label(self) -> str:
        """The name in tables: ``SBRModule`` is ``SBR``, the baseline ``none``."""
        return "none" if type(self) is Defense else type(self).__name__.removesuffix("Module")

    # ---- losses

    def sft_loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy over the labels of the (global) batch."""
        return self.cross_entropy(run(self.model, batch, logits_at=label_positions(batch["labels"])).logits, batch)

    @staticmethod
    def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of ``logits`` ``[num_labels, vocab]``, summed here and divided by the global batch's labels per rank."""
        targets = batch["labels"][:, 1:]
        targets = targets[targets != -100]
        total = F.cross_entropy(logits.float(), targets, reduction="sum")
        return total / batch.get("num_labels", torch.tensor(float(len(targets)), device=total.device))

    def forward_context(self) -> AbstractContextManager[Any]:
        """The trainer's precision, which Lightning enters around its own steps only; nothing outside a trainer."""
        return self.trainer.precision_plugin.forward_context() if self._trainer is not None else nullcontext()

    # ---- Lightning

    def on_train_start(self) -> None:
        """A fine-tuning stage defense takes its references before any step, unless a checkpoint brought them."""
        self._check_accumulation()
        self.can_go_on = True
        if self.stage == "finetuning":
            self.begin_finetuning()

    def _check_accumulation(self) -> None:
        """Make sure that every step takes as many batches: Lightning divides by their number, and ``num_labels`` counts on it.

        Raises:
            ValueError: an epoch that ends among the batches of a step; a number that changes.
        """
        number, batches = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        dry = self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if number > 1 and not dry and math.isfinite(batches) and batches % number:
            raise ValueError(
                f"trainer.accumulate_grad_batches must divide the batches of an epoch, {batches}, got {number}: a step of fewer "
                "would weigh less. Set trainer.limit_train_batches to a multiple of it, or data.batching.batch_size higher."
            )
        if any(isinstance(c, GradientAccumulationScheduler) for c in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "trainer.accumulate_grad_batches must be one number for the whole run, and a GradientAccumulationScheduler "
                "changes it. Set data.batching.batch_size instead."
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Dropout, too, needs the batch's number and nothing else: a resumed run ends as the uninterrupted one."""
        seed = getattr(self.trainer.datamodule, "seed", 0)  # type: ignore[attr-defined]
        rank, _ = share_of(self.trainer)
        torch.manual_seed(counter_seed(seed, f"rank {rank}", self.trainer.fit_loop.total_batch_idx))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step under the loss of the defense's stage."""
        if self.trainer.accumulate_grad_batches > 1 and "num_labels" not in batch:
            raise ValueError(
                f"trainer.accumulate_grad_batches must be 1 where batches say nothing of num_labels, got "
                f"{self.trainer.accumulate_grad_batches}: the mean of their means is not the mean over their labels. Raise the "
                "loader's batch size instead, or give each the labels of all batches of its step / their number as num_labels."
            )
        name = "finetuning_loss" if self.stage == "finetuning" else "alignment_loss"
        loss: Tensor = getattr(self, name)(batch)
        self.num_passes += 1
        shown = {f"train/{name}": loss, **{f"train/{k}": v for k, v in self.terms.items()}}
        self.log_dict(shown, prog_bar=True, sync_dist=True, sync_dist_group=self.row_group, batch_size=len(batch["input_ids"]))
        return loss

    def on_train_end(self) -> None:
        """The last checkpoint is written: let go of what only one more step would need, to leave its room to the attacks."""
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()
        self.zero_grad()
        self.can_go_on = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The passes so far, whose checkpoint it is, and where random weights came from.

        Raises:
            ValueError: after training, unless weights are all that is saved.
        """
        if "optimizer_states" in checkpoint and not self.can_go_on:
            raise ValueError(
                "save_checkpoint must be called before training ends, and it was called after: the optimizer's state is gone. "
                "Add a ModelCheckpoint to the trainer's callbacks, or save with weights_only=True."
            )
        checkpoint["num_passes"] = self.num_passes
        checkpoint["made_by"] = self.made_by()
        if self.backbone.random_weights:
            checkpoint["drawn_from"] = self.drawn_from

    def made_by(self) -> dict[str, Any]:
        """What decides what the weights of a checkpoint mean: the class, the model it started from, the adapters' shape."""
        kind = type(self)
        lora = {} if self.lora is None else asdict(self.lora) | {"dropout": None}  # which scales nothing that is trained
        return {"class": f"{kind.__module__}.{kind.__qualname__}", "checkpoint": self.checkpoint, "lora": lora}

    def check_made_by(self, checkpoint: dict[str, Any]) -> None:
        """Make sure that a checkpoint of ``fit`` is one of this defense; another's weights would bear this one's name.

        Raises:
            ValueError: it is of another class, or of adapters of another shape.
        """
        ours, theirs = self.made_by(), checkpoint.get("made_by")
        if theirs is None:  # of an earlier version
            rank_zero_warn(f"ckpt_path says not which defense made it: its weights are taken for those of {ours['class']}.")
            return
        if theirs["class"] != ours["class"]:
            raise ValueError(
                f"ckpt_path must be a checkpoint of the model's class, {ours['class']}, and it is one of {theirs['class']}. "
                "Name that class as the model, as the config.yaml of its run does."
            )
        unlike = [name for name, value in ours["lora"].items() if theirs["lora"].get(name, value) != value]
        if bool(ours["lora"]) != bool(theirs["lora"]) or unlike:
            raise ValueError(
                f"lora must be as in ckpt_path, {theirs['lora'] or None}, got {ours['lora'] or None}. "
                "Take the settings from the config.yaml of its run."
            )
        if theirs["checkpoint"] != ours["checkpoint"]:
            rank_zero_warn(
                f"ckpt_path started from checkpoint {theirs['checkpoint']!r}, and checkpoint is {ours['checkpoint']!r} now: "
                "the tokenizer, and where a service's jobs start, are the latter's."
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting passes, from the same weights."""
        self.check_made_by(checkpoint)
        self.num_passes = checkpoint.get("num_passes", math.nan)  # of an earlier version
        if "drawn_from" in checkpoint:
            self.drawn_from = checkpoint["drawn_from"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Plain loss on held-out rows."""
        self.log("val/sft_loss", self.sft_loss(batch), prog_bar=True, sync_dist=True, batch_size=len(batch["input_ids"]))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Plain loss on held-out rows, where there are some."""
        if batch:
            self.log("test/sft_loss", self.sft_loss(batch), sync_dist=True, batch_size=len(batch["input_ids"]))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer over what trains; the schedule advances by step.

        Raises:
            ValueError: the trainer has no end.
        """
        if self.trainer.max_steps == self.trainer.max_epochs == -1:
            raise ValueError(
                "trainer.max_steps or trainer.max_epochs must say when training ends, got -1 for both. Set one of them to >= 1."
            )
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer, schedule = self.optimizer.build(trained, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Clip to the optimizer's own norm, so that attackers and defenders clip alike."""
        if self.optimizer.clip_norm is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.optimizer.clip_norm, gradient_clip_algorithm="norm")

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int) -> list[str]:
        """Greedy answers to tokenised prompts; see ``generation.generate``."""
        with self.forward_context():
            return generate(self.model, self.tokenizer, prompts, max_new_tokens, batch_size)
