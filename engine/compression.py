"""What weights become on their way through a smaller format, and back in their own."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from casehard.engine.adapters import fold_adapters, matrices
from casehard.engine.forward import run
from casehard.engine.gradients import sum_over_ranks
from casehard.engine.outputs import uncompiled
from casehard.engine.sharding import edit, max_over_ranks
from casehard.engine.weights import EVERYTHING, Changes, reshard

Way = Literal["int8", "int4", "bfloat16", "Q8_0", "Q4_0", "magnitude", "wanda"]
GGUF, PRUNING = ("Q8_0", "Q4_0"), ("magnitude", "wanda")
BLOCK = 32  # weights of a GGUF block: rows that are no multiple of it stay as they are


def quantised(weight: Tensor, num_bits: int) -> Tensor:
    """``weight`` ``[..., row]`` rounded to the nearest of ``2 ** num_bits - 1`` levels, evenly spaced around 0 in every row."""
    largest = 2 ** (num_bits - 1) - 1
    scale = weight.abs().amax(dim=-1, keepdim=True).float() / largest
    rounded = (weight.float() / scale.where(scale > 0, 1.0)).round()
    return (rounded * scale).to(weight.dtype)


def through_gguf(weight: Tensor, kind: str) -> Tensor:
    """``weight`` ``[..., row]`` as a GGUF file of a kind (Q8_0, Q4_0) holds it, by the package ``gguf``, in float32."""
    from gguf import GGMLQuantizationType, quants

    if weight.shape[-1] % BLOCK:
        return weight
    stored = GGMLQuantizationType[kind]
    blocks = quants.quantize(weight.float().cpu().numpy(), stored)
    return torch.from_numpy(quants.dequantize(blocks, stored)).to(weight.device)


def pruned(weight: Tensor, share: float, scale: Tensor | None = None) -> Tensor:
    """``weight`` ``[..., row]`` with a share of the entries of every row set to zero: those of the least ``|w| * scale``.

    Args:
        weight: a matrix ``[out, in]``, or a stack.
        share: rounded down to whole entries.
        scale: of every input, ``[in]``: for Wanda (arXiv:2306.11695) its norm over some text; None for the magnitude alone.
    """
    importance = weight.abs() if scale is None else weight.abs() * scale
    least = importance.argsort(dim=-1, stable=True)[..., : int(share * weight.shape[-1])]
    return weight.scatter(-1, least, 0.0)


def passing(model: PreTrainedModel, way: Way) -> dict[int, Tensor]:
    """The parameters that go that way, by their ``id``; adapters stay.

    The decoder's matrices; through GGUF embeddings, too, and through bfloat16 all.
    """
    reshard(model)
    if way in GGUF or way == "bfloat16":
        plain = [p for name, p in model.named_parameters() if "lora_" not in name]
        return {id(p): p for p in plain if p.ndim > 1 or way == "bfloat16"}
    return {id(matrix.weight): matrix.weight for matrix in matrices(model)}


def written(module: nn.Module, model: PreTrainedModel, way: Way) -> Changes:
    """What ``send_through`` writes of a model, by the names of ``module``, which holds it: all where it has adapters."""
    chosen = passing(model, way)  # puts shards back first, which are other objects
    names = {name: id(p) for name, p in module.named_parameters()}
    if any("lora_" in name for name in names):
        return EVERYTHING
    return {name for name, number in names.items() if number in chosen}.__contains__


@torch.no_grad()
def send_through(model: PreTrainedModel, way: Way, share: float = 0.0, scales: Mapping[int, Tensor] | None = None) -> int:
    """Send weights there and back, in place: they keep their dtype. Sharded ones are put together one at a time.

    Adapters are folded into the weights first: who gets the model gets it merged.

    Args:
        model: sharded or not.
        way: int8 and int4 round to nearest, row by row.
        share: that magnitude and wanda set to zero.
        scales: of wanda, by the ``id`` of a weight; a weight without goes by its magnitude.

    Returns:
        How many entries came back as another value.
    """
    fold_adapters(model)
    parameters, changed = passing(model, way), 0
    turned = {id(matrix.weight): matrix.transposed for matrix in matrices(model)}

    def cut(weight: Tensor, of: int) -> Tensor:
        rows = weight.mT if turned[of] else weight
        new = pruned(rows, share, (scales or {}).get(of))
        return new.mT if turned[of] else new

    changes: dict[str, Callable[..., Tensor]] = {
        "int8": partial(quantised, num_bits=8),
        "int4": partial(quantised, num_bits=4),
        "bfloat16": lambda weight: weight.to(torch.bfloat16),
        **{kind: partial(through_gguf, kind=kind) for kind in GGUF},
    }

    def sent(weight: Tensor, of: int) -> Tensor:
        nonlocal changed
        new = (cut(weight, of) if way in PRUNING else changes[way](weight)).to(weight.dtype)
        changed += int((new != weight).sum())
        return new

    for number, parameter in parameters.items():
        edit(parameter, partial(sent, of=number))
    return changed


@torch.no_grad()
def input_norms(model: PreTrainedModel, rows: Sequence[list[int]], group: dist.ProcessGroup | None) -> dict[int, Tensor]:
    """The norm of every input of a linear layer of the decoder over all tokens of rows, ``[in]``, by the ``id`` of its weight.

    Args:
        model: in eval mode. Where it is sharded every rank must call this.
        rows: token ids of this rank's share.
        group: ranks that share the rows out.
    """
    reshard(model)
    squares: dict[int, Tensor] = {}

    def look(_: nn.Module, args: tuple[Tensor, ...], number: int) -> None:
        squares[number] += args[0].flatten(0, -2).float().square().sum(dim=0)

    def read(ids: list[int]) -> None:  # by itself: no padding is seen
        row = torch.tensor([ids], device=model.device)
        run(model, {"input_ids": row, "attention_mask": torch.ones_like(row)}, fold=False)

    with uncompiled(model):
        with ExitStack() as stack:
            for matrix in matrices(model):
                if not matrix.still and matrix.weight.ndim == 2:
                    number, size = id(matrix.weight), matrix.weight.shape[0 if matrix.transposed else 1]
                    squares[number] = torch.zeros(size, device=model.device)
                    stack.callback(matrix.layer.register_forward_pre_hook(partial(look, number=number)).remove)
            for ids in rows:
                read(ids)
        for _ in range(max_over_ranks(model, len(rows)) - len(rows)):  # to keep step with
            read([0])
    return {number: sum_over_ranks(total, group).sqrt() for number, total in squares.items()}
