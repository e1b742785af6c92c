"""The rows of a batch laid out for one pass with little to compute: no padding, and shared prefixes only once.

Rows of chat begin alike: a system prompt, the instruction of a task. In a causal model the tokens of a shared prefix have the
same states in every row, so the rows form a prefix tree, of which each row is a path: a token attends to those before it on its
paths and to nothing else. No state and no gradient changes, only the number of tokens to compute.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from casehard.engine.layouts import Packed, padded

WIDEST = 1024  # widest pack in tokens (a longer row still fits): the attention mask grows with its square

Tokens = list[int]
Sizes = list[tuple[int, int]]
"""Rows and tokens of each pack, in order."""


def pack(input_ids: Tensor, attention_mask: Tensor, break_even_length: float) -> Packed:
    """The cheapest layout of the rows: prefix trees, or padded rows.

    Args:
        input_ids: ``[batch, seq]``.
        attention_mask: ``[batch, seq]``, 1 for real tokens, wherever they stand.
        break_even_length: how many tokens a token must attend to for that to cost as much as everything else about it.
    """
    device, mask = input_ids.device, attention_mask.bool().cpu()
    rows = [ids[real].tolist() for ids, real in zip(input_ids.cpu(), mask, strict=True)]
    order = sorted(range(len(rows)), key=rows.__getitem__)  # rows that begin alike are neighbours
    rows = [rows[i] for i in order]
    common = [0] + [_in_common(row, following) for row, following in pairwise(rows)]
    lengths = [len(row) for row in rows]
    cost, sizes = min((_cost(sizes, break_even_length), sizes) for sizes in fillings(lengths, common))
    # without a mask, attention skips what comes later
    if len(rows) * max(lengths) * (1 + max(lengths) / 2 / break_even_length) <= cost:
        return padded(input_ids, attention_mask)
    ids, positions, tree_mask, places = _trees(rows, common, sizes)
    index = torch.zeros(mask.shape, dtype=torch.long, device="cpu")  # another may be torch's default, as while a model loads
    index[order] = index.masked_scatter(mask[order], places)
    return Packed(ids, positions, tree_mask, index).to(device)


def fillings(lengths: Sequence[int], common: Sequence[int]) -> Iterator[Sizes]:
    """The packs that ``fill`` makes at every width where they change, from the longest row to the widest allowed."""
    width = max(lengths)
    widest = max(WIDEST, width + min(lengths))  # else a short row, such as an anchor, is padded to the longest
    while True:
        sizes = fill(lengths, common, width)
        yield sizes
        starts = accumulate(rows for rows, _ in sizes[:-1])  # of every pack but the first: a row that did not fit before it
        wider = (tokens + lengths[i] - common[i] for i, (_, tokens) in zip(starts, sizes, strict=False))
        width = min(wider, default=widest + 1)
        if width > widest:
            return


def fill(lengths: Sequence[int], common: Sequence[int], width: int) -> Sizes:
    """Put rows, in order, into as few packs of at most ``width`` tokens as they take.

    Args:
        lengths: tokens of each row, none more than ``width``.
        common: how many tokens each row begins with in common with the row before it.
        width: the largest number of tokens of a pack.
    """
    sizes: Sizes = []
    for length, known in zip(lengths, common, strict=True):
        if sizes and sizes[-1][1] + length - known <= width:
            sizes[-1] = (sizes[-1][0] + 1, sizes[-1][1] + length - known)
        else:
            sizes.append((1, length))
    return sizes


def _in_common(a: Tokens, b: Tokens) -> int:
    """How many tokens two rows begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _cost(sizes: Sizes, break_even_length: float) -> float:
    widest = max(tokens for _, tokens in sizes)
    return len(sizes) * widest * (1 + widest / break_even_length)


def _tree(rows: Sequence[Tokens], common: Sequence[int]) -> tuple[Tokens, list[int], list[list[int]]]:
    """Tokens of the prefix tree of the rows, the position of each in its rows, and the path of every row through them."""
    tokens: Tokens = []
    positions: list[int] = []
    paths: list[list[int]] = []
    for row, known in zip(rows, common, strict=True):
        path = paths[-1][:known] if paths else []
        new = row[len(path) :]
        paths.append(path + list(range(len(tokens), len(tokens) + len(new))))
        positions += range(len(path), len(row))
        tokens += new
    return tokens, positions, paths


def _trees(rows: Sequence[Tokens], common: Sequence[int], sizes: Sizes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``input_ids``, ``positions`` and ``attention_mask`` of the packs, and the index of the rows' tokens, row after row."""
    width = max(tokens for _, tokens in sizes)
    input_ids, positions = torch.zeros(2, len(sizes), width, dtype=torch.long, device="cpu")
    attention_mask = torch.eye(width, dtype=torch.bool, device="cpu").repeat(
        len(sizes), 1, 1
    )  # padding sees itself, or it would be nan
    places: list[int] = []
    start = 0
    for number, (num_rows, num_tokens) in enumerate(sizes):
        these = slice(start, start := start + num_rows)
        tokens, depths, paths = _tree(rows[these], common[these])
        input_ids[number, :num_tokens] = torch.tensor(tokens, device="cpu")
        positions[number, :num_tokens] = torch.tensor(depths, device="cpu")
        on_path = torch.zeros(num_rows, num_tokens, device="cpu")
        for row, path in zip(on_path, paths, strict=True):
            row[path] = 1
            places += [number * width + step for step in path]
        attention_mask[number, :num_tokens, :num_tokens] = (on_path.T @ on_path).tril() > 0
    return input_ids, positions, attention_mask, torch.tensor(places, device="cpu")
