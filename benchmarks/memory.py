"""What a full-parameter step holds, byte by byte, computed from a model's sizes: no weights, no device, no processes are needed.

The step is casehard's own code on tensors without values (torch's FakeTensorMode), under FSDP2 on a process group that sends
nothing. Every tensor is counted from the operation that makes it until the last reference to it goes, as torch's allocator would.
Not counted: the allocator's rounding and gaps, workspaces of cuBLAS, what kernels need within a call, and the CUDA context.
"""

import gc
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jsonargparse import CLI
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from casehard import Backbone, LoRA, Optimizer
from casehard.engine.anatomy import decoder_layers
from casehard.engine.cross_entropy import summed_cross_entropy
from casehard.engine.gradients import add_to_grad, loss_and_gradient
from casehard.engine.sharding import fill, shard
from casehard.engine.weights import Weights, local, shifted
from casehard.lightning_modules.backbone import mixed_precision

WEIGHTS, HALVES, GRADIENTS, MOMENTS = "weights", "in bfloat16", "gradients", "moments"
BUCKETS, EXTRA, SAVED, LOGITS, PASSING = "DDP", "Patcher", "activations", "logits", "passing"
KINDS = {
    WEIGHTS: "as they are trained",
    HALVES: "copies of weights that autocast keeps until the pass is over, or that FSDP2 has put together",
    GRADIENTS: "of what trains",
    MOMENTS: "AdamW's two",
    BUCKETS: "the buckets in which DDP averages gradients",
    EXTRA: "starting weights or attack vector, shifted weights, the defender's moments under an attack",
    SAVED: "kept for the backward pass",
    LOGITS: "of the labels, what their loss keeps, and their gradients",
    PASSING: "what an operation takes or gives and nobody keeps",
}
HOST = "on the CPU"
UNMASKED = "causal_without_a_mask"  # what transformers finds out by looking at values: rows without padding need no mask
GIB = 2**30


def _unmasked(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Any, **more: Any) -> tuple[Tensor, None]:
    return sdpa_attention_forward(module, query, key, value, None, **more)


AttentionInterface.register(UNMASKED, _unmasked)


class Meter(TorchDispatchMode):
    """Bytes of the tensors that are there, by kind, and those of the moment when they were most.

    Args:
        model: whose weights are there already.
        num_labels: predictions of a pass, by which logits are known.
    """

    def __init__(self, model: PreTrainedModel, num_labels: int) -> None:
        super().__init__()
        self.held: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.records: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()  # by storage: its kind and size
        self.naming: str | None = None
        self.vocabulary, self.num_labels = model.config.get_text_config().vocab_size, num_labels
        for tensor in [*model.parameters(), *model.buffers()]:
            self.note(tensor, WEIGHTS)
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: self.note(p.grad, GRADIENTS, over=(PASSING, LOGITS)))
        for module in model.modules():  # whose weights FSDP2 has put together by then
            module.register_forward_pre_hook(self._whole)
        for layer in decoder_layers(model):  # all that is kept of one whose activations are computed again
            layer.register_forward_pre_hook(lambda _, given: self.note(given[0], SAVED, over=(PASSING,)))

    @contextmanager
    def looking(self) -> Iterator[None]:
        """For a block, count."""
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:  # FSDP2 takes and gives back what it puts together
            done = resize(storage, size)
            if storage in self.records:
                self._set(self.records[storage], HALVES, size)
            return done

        def keep(tensor: Tensor) -> Tensor:
            self.note(tensor, SAVED, over=(PASSING,))
            return tensor

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), self:
                yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    @contextmanager
    def named(self, kind: str) -> Iterator[None]:
        """For a block, all that is made is of ``kind``."""
        before, self.naming = self.naming, kind
        try:
            yield
        finally:
            self.naming = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.note(tensor, self.naming or self._kind(func, args, tensor))
        if func.namespace == "c10d" and "reduce_scatter" in str(func):
            self.note(args[0], GRADIENTS, over=(PASSING,))
        return out

    def _whole(self, module: nn.Module, _: Any) -> None:
        for p in module.parameters(recurse=False):
            self.note(p, HALVES, over=(PASSING,))

    def _kind(self, func: Any, args: Any, out: Tensor) -> str:
        if func.namespace == "fsdp" and "all_gather" in str(func):
            return HALVES
        if func is torch.ops.aten._to_copy.default and self.records.get(args[0].untyped_storage(), [""])[0] == WEIGHTS:
            return HALVES
        of_labels = out.ndim > 1 and out.shape[-1] == self.vocabulary and out.numel() == self.num_labels * self.vocabulary
        return LOGITS if of_labels else PASSING

    def note(self, tensor: Any, kind: str, over: tuple[str, ...] = ()) -> None:
        """Take a tensor's memory for one of ``kind``, if it is new or was taken for one of ``over``."""
        if not isinstance(tensor, Tensor):
            return
        tensor = local(tensor)
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        record = self.records.get(storage)
        if record is None:
            self.records[storage] = record = [kind, 0]
            weakref.finalize(storage, self._set, record, None, 0)
            self._set(record, kind, storage.nbytes())
        elif record[0] in over:
            self._set(record, kind, record[1])

    def _set(self, record: list[Any], kind: str | None, size: int) -> None:
        self.held[record[0]] -= record[1]
        record[:] = [kind or record[0], size]
        self.held[record[0]] += size
        if self.held.total() - self.held[HOST] > self.most.total() - self.most[HOST]:
            self.most = self.held.copy()


@dataclass(frozen=True)
class Step:
    """A training step, on one of the processes that share the work.

    Args:
        checkpoint: folder with a config.json, such as models/sizes/llama3_8b; only the sizes are read.
        layers: so many instead of the architecture's.
        batch_size: rows a process.
        length: tokens of a row, of which the second half is learnt.
        precision: float32; bf16-mixed: float32 weights, bfloat16 passes; bf16: bfloat16 throughout.
        strategy: one device, DDP or FSDP2.
        processes: of FSDP2.
        activation_checkpointing: compute a layer's activations again in the backward pass.
        method: SFT, or of Patcher the defender's step or a step of the inner attack.
        copy_device: cpu keeps on the CPU what Patcher's ``copy_device: cpu`` does.
        lora_rank: of adapters that train; null trains all.
        loss_at_once: the loss of all labels in one, as F.cross_entropy takes it, and not as casehard does.
    """

    checkpoint: str
    layers: int | None = None
    batch_size: int = 8
    length: int = 1024
    precision: Literal["float32", "bf16-mixed", "bf16"] = "bf16-mixed"
    strategy: Literal["one", "ddp", "fsdp2"] = "one"
    processes: int = 1
    activation_checkpointing: bool = False
    method: Literal["SFT", "Patcher", "inner attack"] = "SFT"
    copy_device: Literal["cpu"] | None = None
    lora_rank: int | None = None
    loss_at_once: bool = False

    @property
    def num_labels(self) -> int:
        """Predictions of a pass."""
        return self.batch_size * (self.length // 2)

    def model(self) -> PreTrainedModel:
        """On meta, as it trains."""
        backbone = Backbone(
            random_weights=True,
            sizes={} if self.layers is None else {"num_hidden_layers": self.layers},
            weights_dtype="bfloat16" if self.precision == "bf16" else "float32",
            activation_checkpointing=self.activation_checkpointing,
        )
        model = backbone.load(self.checkpoint, torch.device("meta")).train()
        with torch.device("meta"):
            backbone.prepared(None if self.lora_rank is None else LoRA(rank=self.lora_rank))(model)
        return model

    def held(self) -> Counter[str]:
        """Bytes by kind at the moment of the step when they are most, on one process."""
        with ExitStack() as stack:
            model = self.model()
            if self.strategy == "fsdp2":
                dist.init_process_group("fake", rank=0, world_size=self.processes, store=FakeStore())
                stack.callback(dist.destroy_process_group)
                mesh = init_device_mesh("cpu", (self.processes,), mesh_dim_names=("fsdp",))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            if self.strategy == "fsdp2":
                shard(model, mesh, mixed_precision(self.precision))
                model.to_empty(device="cpu")
            else:
                fill(model, {name: torch.empty(p.shape, dtype=p.dtype) for name, p in model.named_parameters()})
                for name, buffer in list(model.named_buffers()):
                    parent, _, last = name.rpartition(".")
                    setattr(model.get_submodule(parent), last, torch.empty(buffer.shape, dtype=buffer.dtype))
            model.set_attn_implementation(UNMASKED)
            return self.counted(model)

    def counted(self, model: PreTrainedModel, ids: Tensor | None = None) -> Counter[str]:
        """``held`` of a model whose parameters are there, with values or without."""
        ids = torch.zeros(self.batch_size, self.length, dtype=torch.long) if ids is None else ids
        meter = Meter(model, self.num_labels)
        trained = [p for p in model.parameters() if p.requires_grad]
        with meter.looking():
            optimizer, _ = Optimizer().build(trained, 2)
            with meter.named(MOMENTS):
                for p in trained:
                    p.grad = torch.zeros_like(p)
                optimizer.step()
            optimizer.zero_grad()
            extra = HOST if self.copy_device else EXTRA
            with meter.named(extra):
                kept: list[Weights] = []
                if self.method != "SFT":  # the attack vector, or the weights where the attack starts
                    kept = [{n: torch.empty_like(local(p)) for n, p in model.named_parameters() if p.requires_grad}]
                if self.method == "inner attack":  # the defender's moments, beside the attacker's
                    kept += [{n: torch.empty_like(part) for n, part in kept[0].items()} for _ in range(2)]
            gc.collect()
            meter.most = Counter()
            if self.method == "Patcher":
                with ExitStack() as at:
                    with meter.named(EXTRA):
                        at.enter_context(shifted(model, kept[0], one_backward=True))
                    _, gradient = loss_and_gradient(model, lambda: self.loss(model, ids))
                add_to_grad(model, gradient, 0.5)
                for p in trained:
                    meter.note(p.grad, GRADIENTS, over=(PASSING,))
            self.loss(model, ids).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        most = meter.most
        if self.strategy == "ddp":  # made with the module, as large as what they average
            most[BUCKETS] = sum(p.nbytes for p in trained)
        return most

    def precise(self) -> AbstractContextManager[Any]:
        """The trainer's precision."""
        return torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16-mixed" else nullcontext()

    def loss(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """Cross-entropy of the second half of every row, as ``Defense.sft_loss`` takes it."""
        half = self.length // 2
        places = torch.arange(self.batch_size * self.length).view(self.batch_size, -1)[:, self.length - half - 1 : -1].flatten()
        targets = ids[:, self.length - half :].flatten()
        hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0].flatten(0, 1)[places][None],))
        try:
            with self.precise():
                logits = model(input_ids=ids, use_cache=False).logits[0]
                if self.loss_at_once:
                    return F.cross_entropy(logits.float(), targets, reduction="sum") / torch.tensor(float(len(targets)))
                return summed_cross_entropy(logits, targets) / torch.tensor(float(len(targets)))
        finally:
            hook.remove()


def lines_of(rows: list[list[str]]) -> str:
    """A table in Markdown, its head first."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def gib(size: int) -> str:
    return f"{size / GIB:.1f}" if size > GIB / 20 else ""


def by_kind(step: Step) -> str:
    """What each byte of a step is."""
    held = step.held()
    found = [(kind, meaning, held[kind]) for kind, meaning in KINDS.items()]
    found += [("together", "", held.total() - held[HOST]), (HOST, "what `copy_device: cpu` keeps there", held[HOST])]
    return lines_of([["", "", "GiB"], *([kind, meaning, f"{size / GIB:.2f}"] for kind, meaning, size in found)])


def ways(plain: Step) -> str:
    """The step in several ways, from what autocast holds to what torchtitan and torchtune hold."""
    attack = replace(plain, method="inner attack")
    steps = {
        "SFT": plain,
        "SFT, the loss at once": replace(plain, loss_at_once=True),
        "Patcher, the defender's step": replace(plain, method="Patcher"),
        "Patcher, inner attack": attack,
        "the same, `copy_device: cpu`": replace(attack, copy_device="cpu"),
        "Patcher, inner attack, the loss at once": replace(attack, loss_at_once=True),
        "SFT, `cluster/one_gpu.yaml`": replace(plain, strategy="fsdp2"),
        "SFT, activation checkpointing": replace(plain, activation_checkpointing=True),
        "SFT, both": replace(plain, strategy="fsdp2", activation_checkpointing=True),
    }
    rows = [["GiB", *KINDS, "together", HOST]]
    for name, step in tqdm(steps.items(), leave=False):
        held = step.held()
        kinds = [held[kind] for kind in KINDS]
        rows.append([name, *map(gib, (*kinds, sum(kinds), held[HOST]))])
    return lines_of(rows)


def fits(plain: Step) -> str:
    """What every process holds by FSDP2 in full-parameter training, with 1, 2 and 4 rows each."""
    plain = replace(plain, strategy="fsdp2")
    defends, attacks = replace(plain, method="Patcher"), replace(plain, method="inner attack")
    steps = {
        "SFT, SBR": plain,
        "Patcher, the defender's step": defends,
        "its vector on the CPU (`copy_device: cpu`)": replace(defends, copy_device="cpu"),
        "Patcher, inner attack": attacks,
        "the same, `copy_device: cpu`": replace(attacks, copy_device="cpu"),
    }
    shapes = list(product((False, True), (1, 2, 4)))
    rows = [["GiB", *(f"{number} row{'s' * (number > 1)}{', checkpointing' if less else ''}" for less, number in shapes), HOST]]
    for name, step in tqdm(steps.items(), leave=False):
        found = [replace(step, batch_size=number, activation_checkpointing=less).held() for less, number in shapes]
        rows.append([name, *(gib(held.total() - held[HOST]) for held in found), gib(found[0][HOST])])
    return lines_of(rows)


TABLES: dict[str, Callable[[Step], str]] = {"bytes": by_kind, "ways": ways, "fits": fits}


def main(step: Step, table: Literal["bytes", "ways", "fits"] = "bytes") -> None:
    """Print what a step holds.

    Args:
        step: the step.
        table: bytes: of this step; ways: of the same step in several ways; fits: by FSDP2, with 1, 2 and 4 rows a process.
    """
    print(TABLES[table](step))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    CLI(main, as_positional=False)
