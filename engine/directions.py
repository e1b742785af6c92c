"""Directions of the residual stream: the states that tell them, and a model that writes nothing along one."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from casehard.datamodules.chat import IGNORED
from casehard.engine.anatomy import decoder_layers, residual_parameters
from casehard.engine.forward import Batch, run, uncompiled
from casehard.engine.sharding import edit


def last_prompt_states(model: PreTrainedModel, layers: Sequence[int], batch: Batch) -> Tensor:
    """Sum over the rows of a batch of the states of each prompt's last token, ``[layers, dim]``, in float32.

    Args:
        model: any causal language model of transformers.
        layers: decoder layers, from 0 and rising, where the states enter them.
        batch: rows with answers; a prompt ends where the labels begin.
    """
    labels, mask = batch["labels"], batch["attention_mask"]
    last = (labels[:, 1:] != IGNORED).int().argmax(dim=1)
    rows = torch.arange(len(mask), device=mask.device)
    column = (mask.cumsum(dim=1) - 1)[rows, last]  # padded on the right, as it runs
    states: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        states.append(args[0][rows, column].float().sum(dim=0))

    every = decoder_layers(model)
    handles = [every[layer].register_forward_pre_hook(look) for layer in layers]
    try:
        with uncompiled(model):
            run(model, batch, fold=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(states)


def without(weight: Tensor, direction: Tensor, axis: int) -> Tensor:
    """``weight`` without its part along ``direction`` (of length 1) in dimension ``axis``, in float32.

    For a matrix and dimension 0 it is W - r r^T W, with ``direction`` for r.
    """
    rows = weight.float().movedim(axis, -1)
    return (rows - (rows @ direction)[..., None] * direction).movedim(-1, axis)


@torch.no_grad()
def ablate(model: PreTrainedModel, direction: Tensor) -> None:
    """Edit, in place, all that writes to the residual stream, so that nothing is written along ``direction``, ``[dim]``.

    Embeddings, attention outputs and MLP outputs, biases and adapters included; with tied embeddings the unembedding, too. It
    stays in the stream where an architecture normalises what a layer adds (Gemma 2 and 3, OLMo 2). Sharded models too, each rank
    with the same direction. Memory: two matrices, whole and in float32.
    """
    for parameter, axis in residual_parameters(model):
        edit(parameter, partial(without, direction=direction, axis=axis))
