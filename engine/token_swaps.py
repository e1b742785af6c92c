"""Search over tokens by swaps of single ones (GCG, arXiv:2307.15043): which tokens to try where, by a gradient."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from casehard.datamodules.control_tokens import control_tokens
from casehard.engine.sharding import whole_of
from casehard.engine.soft_tokens import soft_tokens, table_shape
from casehard.engine.weights import local, reshard


def token_gradient(model: PreTrainedModel, ids: Sequence[int], loss: Callable[[], Tensor]) -> Tensor:
    """How a loss changes, to first order, with every token that could stand in the place of every one of ``ids``.

    In ``loss`` the id ``table_shape(model)[0] + i`` stands for ``ids[i]``. Where the model is sharded every rank must call this.

    Returns:
        ``[len(ids), vocab]``, in float32; differences along a row are the changes.
    """
    tokens = torch.tensor(ids, device=model.device)
    added = torch.zeros(len(ids), table_shape(model)[1], device=model.device, requires_grad=True)
    with torch.enable_grad(), soft_tokens(model, tokens, added):
        loss().backward(inputs=[added])
    reshard(model)
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    assert added.grad is not None
    return added.grad @ whole_of(local(weight).detach(), weight).float().mT


def plain_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> Tensor:
    """Which ids of a vocabulary of ``size`` are text in print and no control token, ``[size]`` bool."""
    control, plain = control_tokens(tokenizer), torch.zeros(size, dtype=torch.bool)
    texts = tokenizer.batch_decode([[i] for i in range(min(size, len(tokenizer)))])
    for number, text in enumerate(texts):
        plain[number] = text.isprintable() and bool(text) and "\ufffd" not in text and not control.search(text)
    return plain


def swaps(ids: Sequence[int], gradient: Tensor, top_k: int, num_swaps: int, seed: int) -> list[list[int]]:
    """``ids`` with one token swapped, ``num_swaps`` times: at a random place a random one of the ``top_k`` that promise most.

    Args:
        ids: tokens.
        gradient: of the loss by ``token_gradient``, ``[len(ids), vocab]``; inf where a token must not stand.
        top_k: tokens of a place to draw from.
        num_swaps: how many.
        seed: of the draws.
    """
    best = gradient.topk(min(top_k, gradient.shape[1]), dim=1, largest=False).indices
    promising = best.sort(dim=1).values.tolist()  # an order that rounding does not change
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(len(ids), (num_swaps,), generator=generator).tolist()
    picks = torch.randint(len(promising[0]), (num_swaps,), generator=generator).tolist()
    return [[*ids[:place], promising[place][pick], *ids[place + 1 :]] for place, pick in zip(places, picks, strict=True)]


def places_of(parts: Sequence[Sequence[int]], ids: Sequence[int]) -> list[int] | None:
    """Places of all tokens of ``parts`` in ``ids``, where these hold one part after the other; None where they do not."""
    places: list[int] = []
    for part in parts:
        begins = range(places[-1] + 1 if places else 0, len(ids) - len(part) + 1)
        start = next((i for i in begins if list(ids[i : i + len(part)]) == list(part)), None)
        if start is None:
            return None
        places += range(start, start + len(part))
    return places


def standing_in(ids: Sequence[int], places: Sequence[int], size: int) -> list[int]:
    """``ids`` with those at ``places`` replaced by ``size``, ``size + 1``, ...: how ``token_gradient`` has them read."""
    numbers = dict(zip(places, range(size, size + len(places)), strict=True))
    return [numbers.get(place, token) for place, token in enumerate(ids)]
