"""The rows of a batch laid out for one pass with little to compute: no padding, and what rows have in common only once.

Rows of chat begin alike: a system prompt, the instruction of a task. In a causal model the tokens of a common beginning have the
same states in every row, so rows fold into a tree, of which each row is a path: a token sees those before it on its paths and
nothing else. No state and no gradient changes, only the number of tokens to work through.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

WIDEST = 1024  # most tokens of a pack, unless a row alone has more: a pack's ``sight`` is its square


class Packed(NamedTuple):
    """What a model runs on, and where each token of the batch has gone."""

    input_ids: Tensor  # [packs, width]
    positions: Tensor  # [packs, width], of a token in its row
    sight: Tensor | None  # [packs, width, width] bool, true where a token (dim 1) sees another (dim 2); None: all before it
    place: Tensor  # [batch, seq], index into the flattened ``input_ids``; 0 for padding


def padded(input_ids: Tensor, attention_mask: Tensor) -> Packed:
    """Every row by itself and padded on the right, where no token of a causal model sees the padding."""
    mask = attention_mask.bool()
    lengths = mask.sum(dim=1, keepdim=True)
    positions = torch.arange(int(lengths.max()), device=mask.device).expand(len(mask), -1)
    real = positions < lengths
    place = torch.zeros_like(input_ids).masked_scatter(mask, real.flatten().nonzero()[:, 0])
    return Packed(torch.zeros_like(positions).masked_scatter(real, input_ids[mask]), positions, None, place)


def split(lengths: Sequence[int], common: Sequence[int], width: int) -> list[tuple[int, int]]:
    """Rows and tokens of each pack where rows are folded, in order, into packs of at most ``width`` tokens.

    Args:
        lengths: tokens of each row, none more than ``width``.
        common: how many tokens each row begins with in common with the row before it.
        width: most tokens of a pack.
    """
    packs: list[tuple[int, int]] = []
    for length, known in zip(lengths, common, strict=True):
        rows, tokens = packs[-1] if packs else (0, width)
        if tokens + length - known <= width:
            packs[-1] = (rows + 1, tokens + length - known)
        else:
            packs.append((1, length))
    return packs


def pack(input_ids: Tensor, attention_mask: Tensor, reach: float) -> Packed:
    """The cheapest layout of the rows, folded or padded.

    Args:
        input_ids: ``[batch, seq]``.
        attention_mask: ``[batch, seq]``, 1 for real tokens, wherever they stand.
        reach: how many tokens a token must attend to for that to cost as much as everything else about it.
    """
    mask = attention_mask.bool().cpu()
    rows = [ids[real].tolist() for ids, real in zip(input_ids.cpu(), mask, strict=True)]
    order = sorted(range(len(rows)), key=rows.__getitem__)  # rows that begin alike are neighbours
    common = [0] + [_common(rows[a], rows[b]) for a, b in pairwise(order)]
    lengths = [len(rows[i]) for i in order]
    longest = max(lengths)
    totals = accumulate(length - known for length, known in zip(lengths, common, strict=True))
    widths = {longest} | {total for total in totals if longest < total <= WIDEST}
    cost, packs = min((_cost(packs, reach), packs) for packs in (split(lengths, common, width) for width in widths))
    if len(rows) * longest * (1 + longest / 2 / reach) <= cost:  # without a mask, attention skips what is not before a token
        return padded(input_ids, attention_mask)
    return _folded(rows, order, common, packs, mask, input_ids.device)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two rows begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _cost(packs: list[tuple[int, int]], reach: float) -> float:
    widest = max(tokens for _, tokens in packs)
    return len(packs) * widest * (1 + widest / reach)


def _folded(
    rows: list[list[int]], order: list[int], common: list[int], packs: list[tuple[int, int]], mask: Tensor, device: torch.device
) -> Packed:
    width = max(tokens for _, tokens in packs)
    input_ids, positions = torch.zeros(2, len(packs), width, dtype=torch.long)
    sight = torch.eye(width, dtype=torch.bool).repeat(len(packs), 1, 1)
    paths: dict[int, Tensor] = {}  # of each row, its places in the flattened packs
    first = 0
    for number, (num_rows, num_tokens) in enumerate(packs):
        ids: list[int] = []
        depth: list[int] = []
        path: list[int] = []
        on_path = torch.zeros(num_rows, num_tokens)
        for k, i in enumerate(order[first : first + num_rows]):
            known = common[first + k] if k else 0
            path = path[:known] + list(range(len(ids), len(ids) + len(rows[i]) - known))
            ids += rows[i][known:]
            depth += range(known, len(rows[i]))
            on_path[k, path] = 1
            paths[i] = torch.tensor(path) + number * width
        input_ids[number, :num_tokens], positions[number, :num_tokens] = torch.tensor(ids), torch.tensor(depth)
        sight[number, :num_tokens, :num_tokens] = (on_path.T @ on_path).tril() > 0
        first += num_rows
    place = torch.zeros(mask.shape, dtype=torch.long).masked_scatter(mask, torch.cat([paths[i] for i in range(len(rows))]))
    return Packed(*(tensor.to(device) for tensor in (input_ids, positions, sight, place)))
