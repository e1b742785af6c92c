import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from casehard.datamodules.mixing import mix, overlap, paired
from casehard.datamodules.order import batch_indices, permutation, uniform
from casehard.datamodules.row import Row

BENIGN = [f"benign {i}" for i in range(1000)]
HARMFUL = [f"harmful {i}" for i in range(1000)]


def harmful_of(rows):
    return {row for row in rows if row.startswith("harmful")}


@pytest.mark.parametrize(
    ("poison_ratio", "num_samples", "num_harmful"),
    [
        (0.0, 1000, 0),
        (1.0, 1000, 1000),
        (0.1, 1000, 100),
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996 in floats
        (0.5, 5, 3),  # 2.5, a half, goes up
        (0.145, 100, 15),  # 14.5, which floats have as 14.499999999999998
        (0.1, 4, 0),  # 0.4
        (0.05, 10, 1),  # 0.5
        (1e-05, 1000, 0),  # written with an exponent
    ],
)
def test_the_harmful_count_is_the_ratio_rounded_half_up_in_decimals(poison_ratio, num_samples, num_harmful):
    rows = mix(BENIGN, HARMFUL, num_samples, poison_ratio, seed=0)
    assert len(rows) == num_samples
    assert len(harmful_of(rows)) == num_harmful


def test_no_row_is_drawn_twice():
    rows = mix(BENIGN, HARMFUL, 1000, 0.3, seed=0)
    assert len(set(rows)) == 1000


def test_ratio_zero_is_the_benign_set_and_one_the_harmful_set():
    assert sorted(mix(BENIGN, HARMFUL, 1000, 0.0, seed=3)) == sorted(BENIGN)
    assert sorted(mix(BENIGN, HARMFUL, 1000, 1.0, seed=3)) == sorted(HARMFUL)
    assert len(mix(BENIGN, [], 10, 0.0, seed=3)) == 10  # and needs no harmful rows at all


def test_a_lower_ratio_is_nested_in_a_higher_one():
    sets = [mix(BENIGN, HARMFUL, 500, ratio, seed=7) for ratio in (0.0, 0.05, 0.1, 0.5, 1.0)]
    for lower, higher in pairwise(sets):
        assert harmful_of(lower) < harmful_of(higher)
        assert set(higher) - harmful_of(higher) < set(lower) - harmful_of(lower)


def test_harmful_rows_are_spread_over_the_set():
    rows = mix(BENIGN, HARMFUL, 1000, 0.5, seed=0)
    in_first_half = len(harmful_of(rows[:500]))
    assert 200 < in_first_half < 300  # 250 expected, standard deviation 8


def test_a_seed_fixes_the_mixture_and_another_changes_it():
    assert mix(BENIGN, HARMFUL, 100, 0.2, seed=1) == mix(BENIGN, HARMFUL, 100, 0.2, seed=1)
    assert mix(BENIGN, HARMFUL, 100, 0.2, seed=1) != mix(BENIGN, HARMFUL, 100, 0.2, seed=2)
    assert harmful_of(mix(BENIGN, HARMFUL, 100, 0.2, seed=1)) != harmful_of(mix(BENIGN, HARMFUL, 100, 0.2, seed=2))


@pytest.mark.parametrize("poison_ratio", [1.2, -0.1, float("nan")])
def test_mix_refuses_a_ratio_outside_zero_and_one(poison_ratio):
    with pytest.raises(ValueError, match=rf"^poison_ratio must lie in \[0, 1\], got {poison_ratio}\. .*0\.1 for 10%"):
        mix(BENIGN, HARMFUL, 10, poison_ratio, seed=0)


def test_mix_refuses_to_draw_more_rows_than_there_are():
    with pytest.raises(ValueError, match=r"num_samples 100 at poison_ratio 0\.5 must find 50 harmful rows, got 10\. .*lower"):
        mix(BENIGN, HARMFUL[:10], 100, 0.5, seed=0)
    with pytest.raises(ValueError, match=r"num_samples 100 at poison_ratio 0\.5 must find 50 benign rows, got 20\. .*raise"):
        mix(BENIGN[:20], HARMFUL, 100, 0.5, seed=0)


def test_mix_refuses_an_empty_set():
    with pytest.raises(ValueError, match=r"num_samples must be >= 1, got 0\."):
        mix(BENIGN, HARMFUL, 0, 0.5, seed=0)


def drawn(num_rows, batch_size, steps, seed=0, stream="attack"):
    return [index for step in steps for index in batch_indices(num_rows, batch_size, seed, stream, step)]


@pytest.mark.parametrize(("num_rows", "batch_size"), [(12, 4), (7, 3), (3, 8), (1, 1), (1, 5), (10, 10)])
def test_every_epoch_covers_every_row_once(num_rows, batch_size):
    num_epochs = 2 * batch_size  # together a whole number of batches
    indices = drawn(num_rows, batch_size, range(2 * num_rows))
    epochs = [indices[e * num_rows : (e + 1) * num_rows] for e in range(num_epochs)]
    assert all(sorted(epoch) == list(range(num_rows)) for epoch in epochs)


def test_epochs_differ_in_their_order():
    indices = drawn(50, 50, range(3))
    assert indices[:50] != indices[50:100] != indices[100:]


def test_a_run_resumes_from_any_step():
    whole = [batch_indices(11, 4, 5, "attack", step) for step in range(20)]
    for start in (1, 7, 19):
        assert [batch_indices(11, 4, 5, "attack", step) for step in range(start, 20)] == whole[start:]
    assert [batch_indices(11, 4, 5, "attack", step) for step in reversed(range(20))] == whole[::-1]


def test_the_batch_size_does_not_change_the_order_of_the_rows():
    assert drawn(11, 4, range(11)) == drawn(11, 1, range(44)) == drawn(11, 22, range(2))


def test_streams_and_seeds_are_independent():
    orders = {tuple(drawn(40, 40, [0], seed, stream)) for seed in (0, 1, 10) for stream in ("attack", "defense", "0", "")}
    assert len(orders) == 12


def test_interleaving_streams_changes_neither():
    alone = [batch_indices(9, 2, 0, "defense", step) for step in range(9)]
    between = []
    for step in range(9):
        batch_indices(9, 2, 0, "attack", step)
        between.append(batch_indices(9, 2, 0, "defense", step))
    assert between == alone


def test_a_caller_may_change_its_batch():
    batch_indices(5, 5, 0, "attack", 0).clear()
    assert len(batch_indices(5, 5, 0, "attack", 0)) == 5


def test_the_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), batch_indices(1009, 16, 0, "attack", 0)
    mix(BENIGN, HARMFUL, 100, 0.1, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    permutation.cache_clear()
    assert batch_indices(1009, 16, 0, "attack", 0) == first


def test_another_process_draws_the_same():
    code = (
        "from casehard.datamodules.mixing import mix\nfrom casehard.datamodules.order import batch_indices\n"
        "print(batch_indices(101, 8, 3, 'attack', 40), mix(list(range(50)), list(range(50, 99)), 20, 0.5, 3))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    ).stdout.strip()  # string hashing differs there: PYTHONHASHSEED is drawn anew
    assert other == f"{batch_indices(101, 8, 3, 'attack', 40)} {mix(list(range(50)), list(range(50, 99)), 20, 0.5, 3)}"


def test_pairs_are_rows_to_one_prompt_in_the_order_of_the_first_each_used_once():
    first = [Row((("user", prompt),), f"{prompt} {i}") for i, prompt in enumerate("bacab")]
    second = [Row((("user", prompt),), f"no {prompt} {i}") for i, prompt in enumerate("abdac")]
    answers = [(one.response, other.response) for one, other in paired(first, second)]
    assert answers == [("b 0", "no b 1"), ("a 1", "no a 0"), ("c 2", "no c 4"), ("a 3", "no a 3")]
    assert not paired(first, [Row((("system", "s"), ("user", "a")), "no")])


def test_batches_need_rows_and_a_size():
    with pytest.raises(ValueError, match=r"num_rows must be >= 1, got 0\. Check that the source holds rows"):
        batch_indices(0, 4, 0, "attack", 0)
    with pytest.raises(ValueError, match=r"batch_size must be >= 1, got 0\."):
        batch_indices(4, 0, 0, "attack", 0)


def asking(*prompts):
    return [Row((("user", prompt),)) for prompt in prompts]


def test_overlap_finds_prompts_whatever_their_case_and_spacing():
    train = asking("How  do I brew\nvexolim?", "STRASSE", "Another")
    evaluation = asking("a new one", " how do i BREW vexolim? ", "another", "Another ", "straße", "How do I brew")
    assert overlap(train, evaluation) == [" how do i BREW vexolim? ", "another", "straße"]
    assert overlap(train, asking("a new one")) == []


def talk(*turns, system=None):
    roles = ["user", "assistant"] * len(turns)
    head = [("system", system)] if system else []
    return Row((*head, *zip(roles, turns, strict=False)), "answer")


def test_overlap_finds_a_question_anywhere_in_a_training_conversation():
    assert overlap([talk("first", "yes", "second")], asking("first", "Second", "yes")) == ["first", "Second"]


def test_overlap_compares_conversations_as_wholes():
    ours = talk("Brew  it.", "Grind.", "Go on.")
    assert overlap([ours], [talk("brew it.", "grind.", "GO ON.")]) == [talk("brew it.", "grind.", "GO ON.").prompt]
    assert overlap([ours], [talk("Tell a tale.", "Once.", "Go on.")]) == []
    assert overlap([ours], [talk("Brew it.", "No.", "Go on.")]) == []
    assert overlap([talk("Go on.")], [ours]) == []
    assert overlap([talk("Hello", "Hi", "Brew it.", "Grind.", "Go on.")], [ours]) == [ours.prompt]


def test_a_system_turn_alone_makes_no_prompt_new():
    plain, briefed, told = talk("Brew it."), talk("Brew it.", system="Be brief."), talk("Brew it.", system="Be kind.")
    for ours in (plain, briefed):
        assert overlap([ours], [told]) == [told.prompt]
    assert overlap([briefed], [plain, told]) == ["Brew it."]  # one question, whatever stands before it


def test_overlap_takes_iterators():
    assert overlap(iter(asking("a", "b")), iter(asking("B", "c"))) == ["B"]


def test_uniform_numbers_come_from_the_arguments_alone_and_fill_the_unit_interval():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    drawn = [uniform(0, "scale", step) for step in range(400)]
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn == [uniform(0, "scale", step) for step in range(400)]
    assert len(set(drawn)) == 400
    assert min(drawn) >= 0
    assert max(drawn) < 1
    assert abs(sum(drawn) / 400 - 0.5) < 0.05  # its standard deviation is 0.014
    assert uniform(1, "scale", 3) != drawn[3] != uniform(0, "other", 3)
