"""Directions of the residual stream: the states that tell them, and a model that writes less along them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from casehard.datamodules.chat import collate
from casehard.engine.anatomy import blocks, decoder_layers, residual_parameters, written_by
from casehard.engine.forward import last_positions, placed, run
from casehard.engine.sharding import edit, max_over_ranks
from casehard.engine.weights import reshard
from casehard.metrics.errors import SettingError


@dataclass(frozen=True)
class Kernel:
    """How much of a direction is taken out of every layer: most at one depth, linearly less around it, nothing further away.

    Depths are 0 at the first decoder layer and 1 at the last.

    Args:
        strength: share taken out at ``position``: 0 nothing, 1 all; above 1 the rest points the other way.
        position: depth of the most, in [0, 1].
        floor: share of ``strength`` that is left at the edge, in [0, 1].
        half_width: depth from ``position`` to the edge, > 0.
    """

    strength: float = 1.0
    position: float = 0.8
    floor: float = 0.5
    half_width: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.position <= 1 and 0 <= self.floor <= 1 and self.half_width > 0):
            raise SettingError(f"a kernel must have position and floor in [0, 1] and half_width > 0, got {self}.")

    def at(self, depth: float) -> float:
        """The strength at a depth."""
        distance = abs(depth - self.position) / self.half_width
        return self.strength * (1 - (1 - self.floor) * distance) if distance <= 1 else 0.0


@torch.no_grad()
def prompt_states(
    model: PreTrainedModel, prompts: Sequence[list[int]], layers: Sequence[int], num_positions: int, batch_size: int = 32
) -> Iterator[Tensor]:
    """States of the last tokens of prompts where they enter decoder layers, in float64 on the CPU.

    Where the model is sharded every rank must take all of them, with prompts or without.

    Args:
        model: any causal language model of transformers.
        prompts: token ids of each, ``num_positions`` or more.
        layers: decoder layers, from 1.
        num_positions: tokens of every prompt, counted from its end.
        batch_size: prompts of a pass.

    Yields:
        ``[batch, num_positions, layers, dim]``, batch by batch; at times of no prompts.
    """
    chunks = [list(prompts[first : first + batch_size]) for first in range(0, len(prompts), batch_size)]
    chunks += [[]] * (max_over_ranks(model, len(chunks)) - len(chunks))  # to keep step with
    before = [decoder_layers(model)[layer - 1] for layer in layers]
    ahead = torch.arange(num_positions - 1, -1, -1, device=model.device)
    for chunk in chunks:
        examples = [{"input_ids": ids, "labels": ids} for ids in chunk or [[0] * num_positions]]
        batch = placed(model, collate(examples, 0, "right"))
        at = last_positions(batch["attention_mask"])[:, None] - ahead
        states = torch.stack(run(model, batch, states_at=at.flatten(), layers=before).states, dim=1)
        yield states.unflatten(0, at.shape)[: len(chunk)].cpu().double()


def orthonormal(vectors: Tensor, basis: Tensor) -> Tensor:
    """``vectors``, ``[num, dim]``, made orthogonal to the rows of ``basis`` and to each other (Gram-Schmidt), of length 1.

    One that lies among those before it has no direction of its own and is left out.
    """
    own = basis
    for vector in vectors:
        rest = vector
        for _ in range(2):  # once leaves a rounding error, which counts where little is left
            rest = rest - (own @ rest) @ own
        if rest.norm() > 1e-6 * vector.norm():
            own = torch.cat([own, rest[None] / rest.norm()])
    return own[len(basis) :]


def without(weight: Tensor, basis: Tensor, axis: int, strength: float = 1.0, keep_norms: bool = False) -> Tensor:
    """``weight`` with ``strength`` of its part along ``basis`` taken out of dimension ``axis``, in float32.

    For a matrix and dimension 0 it is W - strength * R^T R W, with ``basis`` for R.

    Args:
        weight: a matrix, a stack of them, or a bias.
        basis: orthonormal rows, ``[num, dim]``.
        axis: of ``weight`` that is the stream's.
        strength: share that is taken out.
        keep_norms: scale every row of a matrix, the weights of one coordinate of the stream, back to the norm that it had.
    """
    basis = basis.to(weight.device, torch.float32)
    columns = weight.float().movedim(axis, -1)
    less = columns - strength * (columns @ basis.mT) @ basis
    if keep_norms:
        norms, new = (rows.norm(dim=-2, keepdim=True) for rows in (columns, less))
        less = less * (norms / new).where(new > 0, 1.0)
    return less.movedim(-1, axis)


@torch.no_grad()
def ablate(model: PreTrainedModel, basis: Tensor) -> None:
    """Edit, in place, all that writes to the residual stream, so that nothing is written along ``basis``, ``[num, dim]``.

    Embeddings, attention outputs and MLP outputs, biases and adapters included; with tied embeddings the unembedding, too. It
    stays in the stream where an architecture normalises what a layer adds (Gemma 2 and 3, OLMo 2). Sharded models too, each rank
    with the same basis. Memory: two matrices, whole and in float32.
    """
    for parameter, axis in residual_parameters(model):
        edit(parameter, partial(without, basis=basis, axis=axis))


@torch.no_grad()
def weaken(model: PreTrainedModel, basis: Tensor, attention: Kernel, mlp: Kernel, keep_norms: bool = False) -> None:
    """Edit, in place, what attention and MLP of every layer write along ``basis``, by a kernel of the depth each.

    Embeddings stay. What is in neither, such as a recurrent mixer, goes with the attention. Memory: as ``ablate``.

    Args:
        model: whose layers have an MLP; it may be sharded or have adapters, each factor of which is edited by itself.
        basis: orthonormal rows, ``[num, dim]``.
        attention: how much of the attention's outputs.
        mlp: how much of the MLP's, of every expert alike.
        keep_norms: see ``without``; biases are not scaled.
    """
    reshard(model)
    biases = {id(p) for name, p in model.named_parameters() if "bias" in name}
    found, dim = blocks(model, "mlp"), model.config.get_text_config().hidden_size
    for number, block in enumerate(found):
        inside = set(block.mlp.modules()) if block.mlp is not None else set()
        for writer in block.writers:
            strength = (mlp if writer in inside else attention).at(number / max(1, len(found) - 1))
            for parameter, axis in written_by(writer, dim) if strength else ():
                keep = keep_norms and id(parameter) not in biases
                edit(parameter, partial(without, basis=basis, axis=axis, strength=strength, keep_norms=keep))
