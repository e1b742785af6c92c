"""The base class of every defense; by itself it is plain SFT, the undefended baseline."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Literal, get_args

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from casehard.datamodules.batches import share_of
from casehard.datamodules.chat import IGNORED
from casehard.datamodules.order import counter_seed
from casehard.datamodules.row import Row
from casehard.datamodules.sft import SFTDataModule
from casehard.engine.adapters import LoRA, fold_adapters, merged, plain_layers, training_adapters_off
from casehard.engine.checkpoint import num_positions, require_plain_weights
from casehard.engine.cross_entropy import summed_cross_entropy
from casehard.engine.export import merge_error
from casehard.engine.first_token import first_token_logprobs
from casehard.engine.forward import Batch, label_positions, label_targets, placed, run, takes_prefix_trees, use_layout
from casehard.engine.generation import generate
from casehard.engine.gradients import add_to_grad, loss_and_gradient, mean_over_ranks
from casehard.engine.graphs import begin_step, keep_gradients
from casehard.engine.kernels import require_device
from casehard.engine.losses import losses
from casehard.engine.optimizer import Optimizer
from casehard.engine.sharding import gathered, sharded
from casehard.engine.weights import (
    EVERYTHING,
    Weights,
    borrowed,
    copies,
    group_of,
    local,
    reshard,
    restore,
    same_modes_after,
    shifted,
)
from casehard.lightning_modules.backbone import Backbone, mixed_precision, shard_mesh
from casehard.lightning_modules.job import Job
from casehard.lightning_modules.other_models import as_aligned, check_other, weights_of
from casehard.lightning_modules.private import trainer_of
from casehard.lightning_modules.saved import load_state, made_by, save_state
from casehard.metrics.errors import SettingError

Stage = Literal["alignment", "finetuning", "post_finetuning"]  # in order of time
STAGE_OF: dict[str, Stage] = {  # by the method that is overridden
    "alignment_loss": "alignment",
    "rows": "alignment",
    "harden": "alignment",
    "job": "finetuning",
    "recover": "post_finetuning",
}


class Defense(L.LightningModule):
    """Plain supervised fine-tuning: the undefended baseline, and the base class of every defense.

    What a defense overrides says in which stages it acts: alignment (``rows``, ``alignment_loss``, ``harden``), before release;
    fine-tuning (``job``), while a service trains on a customer's rows; post-fine-tuning (``recover``), after that. A class that
    acts by one of Lightning's hooks, as TAR does once an optimizer step, declares ``stages``. The methods are called so:

    - ``fit`` of an alignment: ``rows``; ``on_fit_start``, the place to open a ``stream``; ``alignment_loss`` once a batch, and so
      several times a step where batches are accumulated; ``harden`` at the end.
    - ``fit`` of a job: ``harden``, unless the checkpoint is hardened; ``job``; the hooks of that ``Job``; ``recover`` at the end.
      This is what ``fit`` runs where the defense acts after release only, or also then and ``data.train_on`` is ``mixture``.
    - An attack at a service, which starts from the model as it was aligned: a new ``job``, its hooks, and before every scoring
      ``recover``, on a loan.
    - An open-weight attack, which starts from the release: none of them.
    - A resumed ``fit``: as above, from ``kept`` and the job's ``state`` as the checkpoint brings them, and without the job's
      ``begin``. All else that a step needs must follow from the settings and the step's number, as a ``stream`` does.

    Processes share out the rows of a batch, and weights may be sharded. Change weights by ``local(p)``, in place, and take the
    gradients of other losses by ``gradient``: both are right on any number of processes.

    Args:
        checkpoint: the model to start from: a hub id, a folder or a GGUF file. Of an adapter (peft), the model that it makes of
            its base; quantised weights are refused.
        optimizer: of ``fit``.
        lora: train adapters of this shape; null trains every parameter.
        backbone: how the model is loaded.
    """

    model: PreTrainedModel
    stages: frozenset[Stage] = frozenset()
    adaptive: ClassVar[str] = ""  # the attacker who knows this defense, as --config names it; its attacks are called "LABEL: ..."
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
        self.training_state_intact = True  # False once ``forget_training`` has dropped the optimizer's state
        self.running: Job | None = None  # the job of ``fit``, where it runs one
        self.trained: Literal["", "alignment", "job"] = ""  # what ``fit`` trains, or trained in the checkpoint that was loaded
        self.recovered = False  # whether ``recover`` has repaired what ``fit`` trained
        self.saved_job: dict[str, Any] | None = None  # the state of a job that goes on
        self.progress: dict[str, int | str] = {}  # what the progress bar shows beside the losses
        self.kept: dict[str, Weights] = {}  # by a name without dots: what a method remembers in the shape of its weights
        self.num_accumulated = 0  # batches of a step of ``fit``; 0 outside of its training steps
        self.under_attack = False  # an inner attacker has the weights

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "stages" not in vars(cls):
            cls.stages |= {stage for method, stage in STAGE_OF.items() if cls.overrides(method)}

    @classmethod
    def overrides(cls, method: str) -> bool:
        return getattr(cls, method) is not getattr(Defense, method)

    # ---- the model

    def configure_model(self) -> None:
        """Load the weights, once, and prepare ``fit``; Lightning calls this when the strategy is ready for them."""
        self._check_trainer()
        if not hasattr(self, "model"):
            self._load()
        if (trainer := trainer_of(self)) is not None and trainer.state.fn == TrainerFn.FITTING:
            self._prepare_fit()

    def _check_trainer(self) -> None:
        if trainer_of(self) is not None and str(self.trainer.precision) in ("16-mixed", "16-true", "transformer-engine-float16"):
            raise SettingError(
                f"trainer.precision must be 32-true, bf16-mixed or bf16-true, got {self.trainer.precision}: attackers train "
                "without a scaler of gradients, and small ones would be lost in float16."
            )
        if trainer_of(self) is not None and self.backbone.kernels is not None:
            require_device(self.trainer.strategy.root_device)

    def _load(self) -> None:
        self.drawn_from, self.drawn_on = torch.get_rng_state(), self._home().type  # to draw random weights once more
        if (mesh := self.shard_mesh()) is None:
            self.register_module("model", self._whole())
            self.to(self._home())  # they are there, and now it is known
        else:
            whole = self._whole() if mesh.get_local_rank() == 0 else None
            policy, prepare = mixed_precision(str(self.trainer.precision)), self.backbone.prepared(self.lora)
            model, self.empty_model = sharded(whole, mesh, self.trainer.strategy.root_device, policy, prepare)
            self.register_module("model", model)
        self.backbone.compile(self.model)
        takes_prefix_trees(self.model, 0)  # found out now: later passes may run under somebody's hooks
        half = trainer_of(self) is not None and str(self.trainer.precision) in ("bf16-mixed", "bf16-true")
        use_layout(self.model, self.backbone.layout, torch.bfloat16 if half else self.model.dtype)

    def _home(self) -> torch.device:
        """Where weights are drawn, and stay unless they are sharded: the trainer's device, or torch's default without one."""
        return torch.get_default_device() if trainer_of(self) is None else self.trainer.strategy.root_device

    def _whole(self) -> PreTrainedModel:
        to_shard = self.shard_mesh() is not None
        device = torch.device("cpu") if to_shard and not self.backbone.random_weights else self._home()
        return self.backbone.load_prepared(self.checkpoint, self.lora, self.tokenizer, device, to_shard)

    def shard_mesh(self) -> DeviceMesh | None:
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
            SettingError: merged, it does not answer as it does with its adapters beside its weights.
        """
        model = self.model if group_of(self.model) is None else gathered(self.model, self.empty_model)
        if model is not None:
            model.config = self.model.config  # which says what hardened it
        whole = None if model is None else merged(model)
        if model is not None and whole is not None and whole is not model:
            off = merge_error(model, whole, self.tokenizer)
            if model.dtype != torch.float32:
                rank_zero_info(f"Adapters merged in {model.dtype}: logits are {100 * off:.2g}% off those of adapters beside it.")
        return whole

    def check_other(self, checkpoint: str, setting: str) -> None:
        """Before weights load, make sure that ``checkpoint`` is of this architecture; see ``other_models.check_other``."""
        check_other(self, checkpoint, setting)

    def weights_of(self, checkpoint: str, setting: str) -> Weights:
        """The weights of another model of this architecture, by shard; see ``other_models.weights_of``."""
        return weights_of(self, checkpoint, setting)

    # ---- what a defense overrides

    def rows(self, data: SFTDataModule) -> list[Row]:
        """Rows that alignment trains on (``data.train_on: alignment``): refusals and benign rows unless overridden."""
        return data.rows["refusals"] + data.rows["alignment_benign"]

    def alignment_loss(self, batch: Batch, step: int) -> Tensor:
        """Loss of the alignment stage, before release, in optimizer step ``step`` (from 0): plain SFT unless overridden.

        Pure: a gradient that is no part of the loss goes through ``add_gradient``.
        """
        return self.sft_loss(batch)

    def harden(self) -> None:
        """Change the weights in place before release, without training. Nothing unless overridden.

        Acts once on a model: when an alignment ``fit`` ends, before the export; else when a run starts from ``checkpoint``,
        unless that is a model that ``fit`` exported hardened. Adapters are folded into the weights and out of the way.
        """

    def job(self) -> Job:
        """A new fine-tuning at a service, called while the model is where that starts: plain SFT unless overridden."""
        return Job(self)

    def recover(self, start: Weights) -> None:
        """Repair the weights, in place, after a service has fine-tuned them. Nothing unless overridden.

        Acts when a job of ``fit`` ends, before the export, and before every scoring of an attack on a service, on a loan.
        Gradients are enabled; adapters are folded into the weights and out of the way.

        Args:
            start: the weights where the job started, under the names that ``named_parameters`` gives now, by shard.
        """

    def own_rows(self) -> list[Row]:
        """Rows the defense brings along (e.g. anchors); checked for overlap with the evaluation prompts. Override to add some."""
        return []

    def synchronize(self) -> None:
        """Make every rank hold the model as it is now, before somebody looks at it. Nothing unless ranks play different roles."""

    @property
    def stage(self) -> str:
        """Where the defense acts, for tables: ``none``, or its stages in order of time, joined by ``+``."""
        return "+".join(stage for stage in get_args(Stage) if stage in self.stages) or "none"

    @property
    def label(self) -> str:
        """The name in tables: ``SBRModule`` is ``SBR``, the baseline ``none``."""
        return "none" if type(self) is Defense else type(self).__name__.removesuffix("Module")

    # ---- what a defense uses

    @property
    def data(self) -> SFTDataModule:
        """The data of the run.

        Raises:
            SettingError: a trainer without an SFTDataModule.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, SFTDataModule):
            raise SettingError(
                f"datamodule must be an SFTDataModule for {self.label}, which draws rows of its own, got {type(data).__name__}. "
                "Pass one to the trainer."
            )
        return data

    def stream(self, rows: list[Row], batch_size: int, name: str) -> Callable[[int], Batch]:
        """The batch of every step, on the device, from the step's number alone; this process's share of it.

        Args:
            rows: to draw from.
            batch_size: rows of a batch, over all processes.
            name: of the stream; streams of other names are independent.
        """
        batches = self.data.batches(rows, batch_size, self.data.seed, name)
        return lambda step: self.placed(batches(step))

    def pairs(self, first: list[Row], second: list[Row], batch_size: int, name: str) -> Callable[[int], tuple[Batch, Batch]]:
        """As ``stream``, of two lists whose rows belong together: row i of one batch and row i of the other are a pair.

        Args:
            first: rows.
            second: as many. A pair of which the data's ``max_length`` leaves one row no answer is dropped.
            batch_size: pairs of a batch, over all processes.
            name: of the stream.

        Raises:
            ValueError: lists of two lengths.
        """
        if len(first) != len(second):
            raise ValueError(f"pairs must be of two lists of one length, got {len(first)} and {len(second)} rows for {name}.")
        batches = self.data.pairs(first, second, batch_size, self.data.seed, name)

        def pair(step: int) -> tuple[Batch, Batch]:
            one, other = batches(step)
            return self.placed(one), self.placed(other)

        return pair

    def placed(self, batch: Batch) -> Batch:
        """A batch from the host where the model is, laid out for the device before it goes; see ``forward.placed``."""
        return placed(self.model, batch)

    def noise(self, sizes: Sequence[int], dim: int, name: str, step: int) -> list[Tensor]:
        """Standard normal numbers, ``[sizes[i], dim]`` for row i of a batch, from the data's seed, name, step and row alone.

        Rows are counted over all processes, so that any number of them draws the same.
        """
        rank, num_ranks = share_of(self.trainer)
        draws = []
        for row, size in enumerate(sizes):
            seed = counter_seed(self.data.seed, f"{name} row {rank + row * num_ranks}", step)
            generator = torch.Generator().manual_seed(seed)
            draws.append(torch.randn(size, dim, generator=generator, device="cpu").to(self.device))
        return draws

    @contextmanager
    def reference(self, kept: dict[str, Any] | None = None) -> Iterator[PreTrainedModel]:
        """For a block without gradients, the model as it was before the first step.

        Where only adapters train they are switched off. Else the weights that train are copied when this is first called, which
        must be before the first optimizer step. Memory: one copy of what trains, and one more inside the block.

        Args:
            kept: what holds that copy, ``kept`` by default; a job passes its ``state``.
        """
        kept = self.kept if kept is None else kept
        trains = [name for name, p in self.named_parameters() if p.requires_grad]
        with torch.no_grad(), same_modes_after(self):
            if all("lora_" in name for name in trains):
                with training_adapters_off(self.model):
                    yield self.model
                return
            if "reference" not in kept:
                kept["reference"] = self._copy_of(trains)
            start, now = kept["reference"], self._copy_of(trains)
            try:
                restore(self, start)
                yield self.model
            finally:
                restore(self, now)

    def _copy_of(self, names: Iterable[str], device: str | None = None) -> Weights:
        reshard(self)
        parameters = dict(self.named_parameters())
        return copies({name: local(parameters[name]) for name in names}, device)

    @contextmanager
    def handed_back(self, start: Weights, device: str | None = None) -> Iterator[None]:
        """For a block, the model as the customer of a service gets it: recovered, on a loan. The identity without ``recover``.

        Memory: two copies of the model.

        Args:
            start: weights where the job started, by name; those that it leaves out have not moved.
            device: where the copies wait; null keeps them beside the model.
        """
        if not self.overrides("recover"):
            yield
            return
        with borrowed(self, EVERYTHING, device) as now:
            names = {name.replace(".base_layer", ""): name for name in now}  # ``start`` may be older than a job's own adapter
            began = {names[name.replace(".base_layer", "")]: weight for name, weight in start.items()}
            new = {n: torch.zeros_like(w) for n, w in now.items() if ".lora_B." in n and n not in began}
            restore(self, began | new)
            fold_adapters(self.model)
            with plain_layers(self.model):
                plain = self._copy_of([name for name, _ in self.named_parameters()], device)
            restore(self, now)
            self._recover(plain)
            yield

    # ---- what becomes of the model that was trained

    def finish(self) -> None:
        """Make the model the one that is released: hardened, or recovered where ``fit`` ran a service's job. Once."""
        if self.trained != "job":
            if not self.is_hardened(self.model.config):
                self.run_harden()
        elif not self.recovered and self.overrides("recover"):
            with as_aligned(self), plain_layers(self.model):  # adapters add nothing there
                start = self._copy_of([name for name, _ in self.named_parameters()])
            self._recover(start)
            self.recovered = True

    def is_hardened(self, config: PreTrainedConfig) -> bool:
        """Whether ``harden`` has nothing to do on a model: the config.json of an export says so."""
        return not self.overrides("harden") or made_by(self)["class"] in getattr(config, "hardened_by", [])

    def mark_hardened(self, names: Iterable[str]) -> None:
        self.model.config.hardened_by = list(names)

    def run_harden(self) -> None:
        with self._on_plain_matrices():
            self.harden()
        name = made_by(self)["class"]
        self.mark_hardened([*(n for n in getattr(self.model.config, "hardened_by", []) if n != name), name])

    def _recover(self, start: Weights) -> None:
        with self._on_plain_matrices():
            self.recover(start)

    @contextmanager
    def _on_plain_matrices(self) -> Iterator[None]:
        with torch.inference_mode(False), torch.enable_grad(), same_modes_after(self):
            fold_adapters(self.model)
            with plain_layers(self.model):
                yield

    def forget_training(self) -> None:
        """Drop what only one more step would need, to leave its room to an attack. No whole checkpoint can be saved then."""
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()
        self.zero_grad()
        self.kept = {}
        self.training_state_intact = False

    @contextmanager
    def on_its_device(self) -> Iterator[None]:
        """For a block of ``on_fit_end``, the model where it trained: Lightning has put it on the CPU, unless it is sharded.

        After an exception Lightning puts it there itself.
        """
        waits = self.device
        self.trainer.strategy.model_to_device()
        yield
        self.to(waits)

    # ---- losses

    def sft_loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy over the labels of the (global) batch."""
        return self.cross_entropy(run(self.model, batch, logits_at=label_positions(batch["labels"])).logits, batch)

    def cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of ``logits`` ``[num_labels, vocab]``, summed here and divided by the global batch's labels per rank."""
        targets = label_targets(batch["labels"])
        total = summed_cross_entropy(logits, targets, self.backbone.compile_backend)
        return total / (batch["num_labels"] if "num_labels" in batch else len(targets))

    # ---- gradients

    def gradient(
        self, batch: Batch, loss: Callable[[Batch], Tensor] | None = None, at: Weights | None = None, scale: float = 1.0
    ) -> Weights:
        """The gradient of a loss on a batch, as a value; see ``loss_and_gradient``."""
        return self.loss_and_gradient(batch, loss, at, scale)[1]

    def loss_and_gradient(
        self, batch: Batch, loss: Callable[[Batch], Tensor] | None = None, at: Weights | None = None, scale: float = 1.0
    ) -> tuple[Tensor, Weights]:
        """A loss on a batch, detached, and its gradient: by parameter name, by shard, the mean over the ranks.

        One forward and one backward pass; weights and ``.grad`` are as before. Memory: the gradient, and with ``at`` a copy of
        what it names, each entry of which goes as its gradient comes.

        Args:
            batch: this rank's share.
            loss: of the batch; None for ``sft_loss``.
            at: take it at ``weights + scale * at``; None for the weights as they are.
            scale: of ``at``.
        """

        def value() -> Tensor:
            with self.forward_context():
                return (loss or self.sft_loss)(batch)

        self.num_passes += self.num_accumulated > 0
        with nullcontext() if at is None else shifted(self, at, scale, one_backward=True):
            return loss_and_gradient(self, value, self.row_group)

    def add_gradient(self, gradient: Weights, weight: float = 1.0) -> None:
        """Add ``weight * gradient`` to the gradient of the step's own loss, before clipping and the optimizer.

        It waits in ``.grad`` for the backward pass of the loss that is returned. ``gradient`` is empty afterwards, so that no
        second copy of it is held. Where gradients are disabled nothing happens: a loss may be computed for its value alone.

        Raises:
            RuntimeError: in the block of an inner attack, after which ``.grad`` is as before.
        """
        if self.under_attack:
            raise RuntimeError("add_gradient must be called after the inner attack's block: gradients added in it are dropped.")
        if torch.is_grad_enabled():
            add_to_grad(self, gradient, weight / max(1, self.num_accumulated))

    @contextmanager
    def _in_training_step(self) -> Iterator[None]:
        """For a block, added gradients are divided as Lightning divides the loss, and passes are counted."""
        self.num_accumulated = self.trainer.accumulate_grad_batches
        try:
            yield
        finally:
            self.num_accumulated = 0

    def on_after_backward(self) -> None:
        """Gradients outlast the CUDA graphs that they came of."""
        keep_gradients(self.parameters())

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Nothing where Lightning calls it, between ``training_step`` and backward, when added gradients wait."""

    def saves_folders(self, checkpoint: dict[str, Any]) -> bool:
        """Whether a checkpoint that is about to be written is the folder of a sharded one."""
        return any(isinstance(w, DTensor) for w in checkpoint["state_dict"].values())

    def forward_context(self) -> AbstractContextManager[Any]:
        """The trainer's precision, which Lightning enters around its own steps only; nothing outside a trainer."""
        return self.trainer.precision_plugin.forward_context() if trainer_of(self) is not None else nullcontext()

    # ---- Lightning

    @property
    def _fits_a_job(self) -> bool:
        """Whether ``fit`` runs a service's job, and not the alignment."""
        if "alignment" not in self.stages:
            return bool(self.stages)
        return len(self.stages) > 1 and getattr(self.trainer.datamodule, "train_on", "") == "mixture"  # type: ignore[attr-defined]

    def _prepare_fit(self) -> None:
        """Build the job that ``fit`` runs, where it runs one, and freeze what it does not train, before DDP looks at what trains.

        Raises:
            SettingError: rows of the defense's own, and a ``fit`` on others.
        """
        self.recovered = False
        if self._fits_a_job:
            if not self.is_hardened(self.model.config):
                self.run_harden()
            self.trained, self.running = "job", self.job()
            self.running.freeze()
            return
        if self.overrides("rows") and getattr(self.trainer.datamodule, "train_on", "") != "alignment":  # type: ignore[attr-defined]
            raise SettingError(
                f"data.train_on must be alignment for {self.label}, which acts by the rows that alignment trains on, and it is "
                "not. Set it."
            )
        self.trained, self.running = "alignment", None
        name = made_by(self)["class"]
        self.mark_hardened(n for n in getattr(self.model.config, "hardened_by", []) if n != name)  # training undoes it

    def on_train_start(self) -> None:
        """A job takes its references before the first step, or gets its state from a checkpoint.

        Raises:
            SettingError: a checkpoint of the released model.
        """
        self._check_accumulation()
        if self.recovered or (self.overrides("harden") and self.trained == "alignment" and self.is_hardened(self.model.config)):
            raise SettingError(
                "ckpt_path must be a checkpoint from before training ended to train on from, and it holds the released model, "
                f"which {self.label} has {'recovered' if self.recovered else 'hardened'}. Name an earlier one of that run."
            )
        self.zero_grad()
        self.training_state_intact = True
        if self.running is not None:
            self.running.rows = lambda: self.data.training_rows()
            if self.saved_job is None:
                self.running.begin()
            else:
                self.running.state = {key: _to(value, self.device) for key, value in self.saved_job.items()}
                self.saved_job = None

    def _check_accumulation(self) -> None:
        """Make sure that every step takes as many batches: Lightning divides by their number, and ``num_labels`` counts on it.

        Raises:
            SettingError: an epoch that ends among the batches of a step; a number that changes.
        """
        number, batches = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        dry = self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if number > 1 and not dry and math.isfinite(batches) and batches % number:
            raise SettingError(
                f"trainer.accumulate_grad_batches must divide the batches of an epoch, {batches}, got {number}: a step of fewer "
                "would weigh less. Set trainer.limit_train_batches to a multiple of it, or data.batching.batch_size higher."
            )
        if any(isinstance(c, GradientAccumulationScheduler) for c in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise SettingError(
                "trainer.accumulate_grad_batches must be one number for the whole run, and a GradientAccumulationScheduler "
                "changes it. Set data.batching.batch_size instead."
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Dropout, too, needs the batch's number and the data's seed alone: a resumed run ends as the uninterrupted one.

        Where the data has no seed the generators are the caller's.
        """
        seed = getattr(self.trainer.datamodule, "seed", None)  # type: ignore[attr-defined]
        if seed is not None:
            rank, _ = share_of(self.trainer)
            torch.manual_seed(counter_seed(seed, f"rank {rank}", self.trainer.fit_loop.total_batch_idx))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One batch under the loss of the job, or of the alignment."""
        begin_step()
        if self.trainer.accumulate_grad_batches > 1 and "num_labels" not in batch:
            raise SettingError(
                f"trainer.accumulate_grad_batches must be 1 where batches say nothing of num_labels, got "
                f"{self.trainer.accumulate_grad_batches}: the mean of their means is not the mean over their labels. Raise the "
                "loader's batch size instead, or give each the labels of all batches of its step / their number as num_labels."
            )
        step = self.trainer.global_step
        with self._in_training_step():
            if self.running is None:
                name, loss, terms = "alignment_loss", self.alignment_loss(batch, step), self.terms
            else:
                name, loss, terms = "finetuning_loss", self.running.loss(batch, step), self.running.terms
        self.num_passes += 1
        logged = {f"train/{name}": loss, **{f"train/{k}": v for k, v in terms.items()}}
        self.log_means(logged, batch_size=len(batch["input_ids"]))
        return loss

    def log_means(self, values: Mapping[str, Tensor], **settings: Any) -> None:
        """Log the means over the ranks that share out rows, by one collective.

        Lightning's ``sync_dist`` has every rank wait for all others, once a value and a step.
        """
        parts = [torch.as_tensor(value, dtype=torch.float32, device=self.device).detach() for value in values.values()]
        means = mean_over_ranks(torch.stack(parts), self.row_group).unbind()
        self.log_dict(dict(zip(values, means, strict=True)), prog_bar=True, **settings)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Gradients are there, averaged, not yet clipped: the job may change them."""
        if self.running is not None:
            self.running.before_step(self.trainer.global_step)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step; then the job may change the weights, and the gradients are zeroed."""
        step = self.trainer.global_step
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.running is not None:
            self.running.after_step(step, self.trainer.optimizers[0])
            self.num_passes += self.running.spent()[0]
        optimizer.zero_grad()

    def on_train_end(self) -> None:
        """The model that is released, unless an export has asked for it already."""
        self.finish()

    def on_test_start(self) -> None:
        """A test is of the model that is released."""
        self.finish()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The passes so far, whose checkpoint it is, what is ``kept``, where random weights came from, and the job's state.

        Raises:
            SettingError: after an attack that followed training, unless weights are all that is saved.
        """
        if "optimizer_states" in checkpoint and not self.training_state_intact:
            raise SettingError(
                "save_checkpoint must be called before the attacks that follow training, and it was called after: they needed "
                "the room of the optimizer's state. Add a ModelCheckpoint to the trainer's callbacks, or set weights_only=True."
            )
        save_state(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting passes, from the same weights, in the same job, with what was ``kept``."""
        load_state(self, checkpoint)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Plain loss on held-out rows, a mean over their labels."""
        begin_step()
        self.log("val/sft_loss", self.sft_loss(batch), prog_bar=True, sync_dist=True, batch_size=_num_labels(batch))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Plain loss on held-out rows, where there are some."""
        begin_step()
        if batch:
            self.log("test/sft_loss", self.sft_loss(batch), sync_dist=True, batch_size=_num_labels(batch))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer over what trains; the schedule advances by step.

        Raises:
            SettingError: the trainer has no end.
        """
        if self.trainer.max_steps == self.trainer.max_epochs == -1:
            raise SettingError(
                "trainer.max_steps or trainer.max_epochs must say when training ends, got -1 for both. Set one of them to >= 1."
            )
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer, schedule = self.optimizer.build(trained, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Clip to the optimizer's own norm, so that attackers and defenders clip alike."""
        if self.optimizer.clip_norm is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.optimizer.clip_norm, gradient_clip_algorithm="norm")

    def losses(self, rows: Sequence[Row]) -> list[tuple[float, int]]:
        """What the response of every row costs the model, in nats, and its number of tokens; see ``losses.losses``."""
        with self.forward_context():
            return losses(self.model, self.tokenizer, rows)

    def first_token_logprobs(self, rows: Sequence[Row], batch_size: int = 32) -> Tensor:
        """What the model would say first to every prompt, ``[rows, vocab]``; see ``first_token.first_token_logprobs``."""
        with self.forward_context():
            return first_token_logprobs(self.model, self.tokenizer, rows, batch_size)

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int) -> list[str]:
        """Greedy answers to tokenised prompts; see ``generation.generate``."""
        with self.forward_context():
            return generate(self.model, self.tokenizer, prompts, max_new_tokens, batch_size)


def _num_labels(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def _to(value: Any, device: torch.device) -> Any:
    """A value of a job's state on ``device``."""
    if isinstance(value, dict):
        return {name: _to(part, device) for name, part in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value
