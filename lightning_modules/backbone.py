"""How a model is loaded: its settings, and the weights that come of them on one process or split over many."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from casehard.engine.adapters import LoRA, add_adapter
from casehard.engine.anatomy import decoder_layers
from casehard.engine.checkpoint import load_model, load_tokenizer, require_rows_for_tokens
from casehard.engine.graphs import use_graphs
from casehard.engine.kernels import fuse, require_installed
from casehard.engine.layouts import LAYOUTS
from casehard.engine.weights import group_of
from casehard.metrics.errors import SettingError

MODES = ("default", GRAPHS := "reduce-overhead", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Backbone:
    """How the model of a checkpoint is loaded.

    Args:
        random_weights: take only the sizes from the checkpoint and start from random weights.
        sizes: other values for some sizes in ``config.json``, such as ``{num_hidden_layers: 2}``; only where weights are random.
        tokenizer: folder or hub id, where the checkpoint has none; null takes the checkpoint's.
        activation_checkpointing: compute a layer's activations again in the backward pass instead of keeping them: less memory,
            a third more time.
        compile_backend: of ``torch.compile`` for the decoder layers, such as inductor; null runs them as they are. Answers are
            generated without it.
        compile_mode: of inductor: default; reduce-overhead, CUDA graphs for a model so small that launching its kernels takes the
            time; max-autotune-no-cudagraphs, longer to compile.
        kernels: liger for the fused norms, rotations and gated MLPs of liger-kernel, on a CUDA device; null for the model's own.
        layout: of the rows of a batch in a pass. ``prefix_tree``: shared prefixes once, least to compute, another size and mask
            at every step. ``varlen``: end to end, without padding between them or a mask. ``padded``: side by side, or end to
            end under a mask where that is less to compute. The last two have few sizes. auto takes the tree on a CPU; on an
            NVIDIA GPU in bfloat16 varlen if the model's attention allows it; else padded. All give the same results, up to
            rounding.
        weights_dtype: of the model's weights in memory, float32 or bfloat16.
        export_dtype: of the weights that ``fit`` leaves in Hugging Face format; null keeps ``weights_dtype``.
    """

    random_weights: bool = False
    sizes: dict[str, int] | None = None
    tokenizer: str | None = None
    activation_checkpointing: bool = False
    compile_backend: str | None = None
    compile_mode: Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs"] = "default"
    kernels: Literal["liger"] | None = None
    layout: Literal["auto", "prefix_tree", "varlen", "padded"] = "auto"
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    export_dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def __post_init__(self) -> None:
        if self.sizes and not self.random_weights:
            raise SettingError(
                f"sizes must be left out unless random_weights is set, got {self.sizes}: weights that are read have theirs."
            )
        if self.compile_backend is not None and self.compile_backend not in (known := torch.compiler.list_backends(None)):
            raise SettingError(f"compile_backend must be null or one of {', '.join(known)}, got {self.compile_backend!r}.")
        if self.compile_mode not in MODES:
            raise SettingError(f"compile_mode must be one of {', '.join(MODES)}, got {self.compile_mode!r}.")
        if self.compile_mode != "default" and self.compile_backend != "inductor":
            raise SettingError(
                f"compile_mode must be default unless compile_backend is inductor, got {self.compile_mode} and "
                f"{self.compile_backend or 'null'}. Set compile_backend to inductor."
            )
        if self.compile_mode == GRAPHS and self.activation_checkpointing:
            raise SettingError(
                f"compile_mode must not be {GRAPHS} with activation_checkpointing: layers run again in the backward pass, where "
                "CUDA graphs may write over what is still to be read. Leave one of them out."
            )
        if self.kernels is not None:
            if self.kernels != "liger":
                raise SettingError(f"kernels must be liger or null, got {self.kernels!r}.")
            if self.compile_backend is not None:
                raise SettingError(
                    f"kernels must be null beside compile_backend {self.compile_backend}, which fuses the same operations, got "
                    f"{self.kernels}. Choose one of them."
                )
            require_installed()
        if self.layout not in (layouts := ("auto", *LAYOUTS)):
            raise SettingError(f"layout must be one of {', '.join(layouts)}, got {self.layout!r}.")

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights in memory."""
        return getattr(torch, self.weights_dtype)  # type: ignore[no-any-return]

    @property
    def exported_dtype(self) -> torch.dtype | None:
        """Of the weights that are exported, where it is another."""
        return None if self.export_dtype is None else getattr(torch, self.export_dtype)

    def load_tokenizer(self, checkpoint: str) -> PreTrainedTokenizerBase:
        """Its own, or the checkpoint's."""
        return load_tokenizer(self.tokenizer or checkpoint)

    def load(self, checkpoint: str) -> PreTrainedModel:
        """The checkpoint's model, whole, on the CPU; random weights are drawn from torch's global generator."""
        return load_model(checkpoint, self.dtype, self.random_weights, self.sizes)

    def prepared(self, lora: LoRA | None) -> Callable[[PreTrainedModel], None]:
        """What makes a loaded model, or one on meta, the one that trains."""

        def prepare(model: PreTrainedModel) -> None:
            if self.activation_checkpointing:
                enable = (
                    getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
                )  # before 5.23
                enable()
            if self.kernels is not None:
                fuse(model)
            if lora is not None:
                add_adapter(model, lora, "defense")

        return prepare

    def load_prepared(self, checkpoint: str, lora: LoRA | None, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """The model to train, whole."""
        model = self.load(checkpoint).train()
        require_rows_for_tokens(model, tokenizer)
        self.prepared(lora)(model)
        return model

    def compile(self, model: PreTrainedModel) -> None:
        """Compile the decoder layers, in place, where that is set; sharded ones after they were sharded.

        Raises:
            SettingError: CUDA graphs for shards, which are put together in other memory at every step.
        """
        if self.compile_backend is None:
            return
        mode = {} if self.compile_mode == "default" else {"mode": self.compile_mode}
        if self.compile_mode == GRAPHS:
            if group_of(model) is not None:
                raise SettingError(
                    f"compile_mode must not be {GRAPHS} under FSDP2: weights are put together in other memory at every step, and "
                    "CUDA graphs read theirs from one place. Set it to default, or take another strategy."
                )
            use_graphs()
        for layer in decoder_layers(model):
            layer.compile(dynamic=True, backend=self.compile_backend, **mode)


def shard_mesh(device_mesh: DeviceMesh | None, num_roles: int) -> DeviceMesh | None:
    """The ranks over which the weights are sharded; None where every rank holds them whole.

    Args:
        device_mesh: the strategy's, of dimensions data_parallel and tensor_parallel.
        num_roles: parts that the ranks play, each of which has the model.

    Raises:
        SettingError: a mesh of another number of roles, such as for tensor parallelism, which nothing here does.
    """
    if device_mesh is None:
        return None
    if (size := device_mesh["tensor_parallel"].size()) != num_roles:
        raise SettingError(
            f"tensor_parallel_size must be {num_roles}, the number of roles, got {size}: weights are sharded over the "
            "data-parallel ranks (FSDP2). Set data_parallel_size to the number of processes."
        )
    rows = device_mesh["data_parallel"]
    if num_roles > 1 and rows.size() == 1:  # with one role Lightning's own loader is used, which takes shards alone
        return None
    names = ("fsdp",)  # by which peft knows that modules run whole
    return DeviceMesh.from_group(rows.get_group(), device_mesh.device_type, mesh_dim_names=names)


def mixed_precision(precision: str) -> MixedPrecisionPolicy:
    """Under bf16-mixed, float32 shards that are put together in bfloat16; their gradients are averaged in float32."""
    if precision != "bf16-mixed":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
