import random
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from casehard.datamodules.chat import collate
from casehard.engine import prefix_tree
from casehard.engine.prefix_tree import Packed, fill, fillings, pack, padded

BREAK_EVEN = 40.0


def rows_of(seed: int, num_rows: int = 6, longest: int = 9, vocabulary: int = 3) -> list[list[int]]:
    """Rows of so few different tokens that many begin alike."""
    rng = random.Random(seed)
    return [[rng.randrange(vocabulary) for _ in range(rng.randint(1, longest))] for _ in range(num_rows)]


def batch_of(rows: list[list[int]], padding_side: str = "right") -> tuple[Tensor, Tensor]:
    batch = collate([{"input_ids": row, "labels": row} for row in rows], 0, padding_side)
    return batch["input_ids"], batch["attention_mask"]


def tree_size(rows: list[list[int]]) -> int:
    """Tokens of a prefix tree: the rows' different beginnings."""
    return len({tuple(row[: i + 1]) for row in rows for i in range(len(row))})


def in_common(rows: list[list[int]]) -> list[int]:
    shared = [next((i for i in range(min(len(a), len(b))) if a[i] != b[i]), min(len(a), len(b))) for a, b in pairwise(rows)]
    return [0, *shared]


def read(packed: Packed, number: int, place: int) -> list[tuple[int, int]]:
    """Positions and tokens that the token at ``place`` of a pack sees."""
    assert packed.attention_mask is not None
    seen = packed.attention_mask[number, place].nonzero()[:, 0]
    return list(zip(packed.positions[number, seen].tolist(), packed.input_ids[number, seen].tolist(), strict=True))


def test_three_rows_make_the_tree_made_by_hand():
    ids, mask = batch_of([[5, 6, 7], [5, 6, 8, 9], [4]])
    packed = pack(ids, mask, torch.inf)
    assert packed.input_ids.tolist() == [[4, 5, 6, 7, 8, 9]]
    assert packed.positions.tolist() == [[0, 0, 1, 2, 2, 3]]
    assert packed.token_index.tolist() == [[1, 2, 3, 0], [1, 2, 4, 5], [0, 0, 0, 0]]
    assert packed.attention_mask.int().tolist() == [
        [
            [1, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0],
            [0, 1, 1, 1, 0, 0],
            [0, 1, 1, 0, 1, 0],
            [0, 1, 1, 0, 1, 1],
        ]
    ]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("break_even_length", [5.0, 20.0, torch.inf])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_every_token_is_found_and_sees_its_row_up_to_itself_and_nothing_else(seed, break_even_length, padding_side):
    rows = rows_of(seed)
    ids, mask = batch_of(rows, padding_side)
    packed = pack(ids, mask, break_even_length)
    width = packed.input_ids.shape[1]
    for row, places in zip(rows, (place[real.bool()] for place, real in zip(packed.token_index, mask, strict=True)), strict=True):
        assert packed.input_ids.flatten()[places].tolist() == row
        assert packed.positions.flatten()[places].tolist() == list(range(len(row)))
        for i, place in enumerate(places.tolist()):
            if packed.attention_mask is None:
                assert packed.input_ids[place // width, : place % width + 1].tolist() == row[: i + 1]
            else:
                assert read(packed, place // width, place % width) == list(enumerate(row[: i + 1]))


def test_padding_sees_itself_alone_and_is_seen_by_nothing():
    first, second = [1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15, 16]
    ids, mask = batch_of([[*first, 7], [*first, 8], [*first, 9], [*second, 7], [*second, 8]])
    packed = pack(ids, mask, 20.0)
    assert packed.input_ids.shape == (2, 9)
    real = torch.zeros(18, dtype=torch.bool)
    real[packed.token_index[mask.bool()]] = True
    assert real.sum() == 17
    for number, place in (~real).view(2, 9).nonzero().tolist():
        assert packed.attention_mask[number, place].nonzero().flatten().tolist() == [place]
        assert packed.attention_mask[number, :, place].nonzero().flatten().tolist() == [place]


def test_real_tokens_may_stand_anywhere():
    ids = torch.tensor([[9, 1, 9, 2, 3], [1, 2, 9, 9, 4]])
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 0, 0, 1]])
    for packed in (pack(ids, mask, torch.inf), padded(ids, mask)):
        assert torch.equal(packed.input_ids.flatten()[packed.token_index][mask.bool()], ids[mask.bool()])
        assert packed.input_ids.max() == 4
    assert padded(ids, mask).input_ids.tolist() == [[1, 2, 3], [1, 2, 4]]


def test_a_single_pack_holds_every_beginning_once():
    for seed in range(20):
        rows = rows_of(seed)
        assert pack(*batch_of(rows), torch.inf).input_ids.shape == (1, tree_size(rows))


def test_rows_that_share_no_prefix_are_left_as_they_are():
    ids, mask = batch_of([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    packed = pack(ids, mask, BREAK_EVEN)
    assert packed.attention_mask is None
    assert torch.equal(packed.input_ids, ids)
    assert torch.equal(packed.token_index, torch.arange(9).view(3, 3))


def test_rows_make_a_tree_unless_attending_to_them_all_costs_more_than_it_spares():
    ids, mask = batch_of([[1, 2, 3], [1, 4, 5]])  # 5 tokens that attend to 5 each, or 6 that attend to 1.5 each, on average
    assert pack(ids, mask, 10.0).attention_mask is None  # 5 + 25 / 10 > 6 + 9 / 10
    assert pack(ids, mask, 20.0).attention_mask is not None  # 5 + 25 / 20 < 6 + 9 / 20


@pytest.mark.parametrize("rows", [[[1, 2]], [[1, 2], [1, 2]], [[1, 2], [1, 2, 3]], [[1]]], ids=str)
def test_equal_rows_and_rows_within_rows_need_nothing_of_their_own(rows):
    assert pack(*batch_of(rows), BREAK_EVEN).input_ids.shape == (1, max(map(len, rows)))


def test_packs_are_filled_in_order_as_by_hand():
    assert fill([3, 4, 2, 5], [0, 1, 0, 2], 5) == [(1, 3), (1, 4), (2, 5)]
    assert fill([3, 4, 2, 5], [0, 1, 0, 2], 6) == [(2, 6), (2, 5)]
    assert fill([3, 4, 2, 5], [0, 1, 0, 2], 11) == [(4, 11)]


@pytest.mark.parametrize("seed", range(60))
def test_no_other_split_into_neighbours_is_cheaper(seed):
    rows = sorted(rows_of(seed, num_rows=7, longest=12, vocabulary=2))

    def cost(splits: tuple[int, ...]) -> float:
        packs = [rows[a:b] for a, b in pairwise((0, *splits, len(rows)))]
        width = max(tree_size(p) for p in packs)
        return len(packs) * width * (1 + width / BREAK_EVEN)

    every = [cost(splits) for n in range(len(rows)) for splits in combinations(range(1, len(rows)), n)]
    found = list(fillings([len(row) for row in rows], in_common(rows)))
    assert all(sum(n for n, _ in sizes) == len(rows) for sizes in found)
    assert min(prefix_tree._cost(sizes, BREAK_EVEN) for sizes in found) == pytest.approx(min(every))
    packed = pack(*batch_of(rows), BREAK_EVEN)
    by_themselves = len(rows) * max(map(len, rows)) * (1 + max(map(len, rows)) / 2 / BREAK_EVEN)
    if packed.attention_mask is None:
        assert by_themselves <= min(every)
    else:
        assert (
            by_themselves > packed.input_ids.numel() * (1 + packed.input_ids.shape[1] / BREAK_EVEN) == pytest.approx(min(every))
        )


def test_a_pack_is_no_wider_than_the_limit_or_than_its_longest_row_and_the_shortest(monkeypatch):
    rows = rows_of(0, num_rows=12, longest=30, vocabulary=9)
    lengths = sorted(map(len, rows))
    monkeypatch.setattr(prefix_tree, "WIDEST", 60)
    assert pack(*batch_of(rows), torch.inf).input_ids.shape[1] <= 60
    monkeypatch.setattr(prefix_tree, "WIDEST", 5)
    assert lengths[-1] <= pack(*batch_of(rows), torch.inf).input_ids.shape[1] <= lengths[-1] + lengths[0]


def test_a_short_row_goes_with_one_of_several_long_ones(monkeypatch):
    monkeypatch.setattr(prefix_tree, "WIDEST", 40)
    rows = [[number, *range(10, 49)] for number in (3, 1, 5, 4)] + [[2, 60, 61]]
    assert pack(*batch_of(rows), 1e6).input_ids.shape == (4, 43)
