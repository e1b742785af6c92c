import math
from itertools import product

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from casehard.metrics.statistics import (
    Interval,
    agreement,
    kappa,
    mean_interval,
    median_steps_to_break,
    paired_difference,
    paired_ratio,
)

nan, inf = math.nan, math.inf


def answers(
    rng: np.random.Generator, num_seeds: int, num_prompts: int, mean: float, seed_spread: float, prompt_spread: float
) -> np.ndarray:
    """Verdicts of 0 or 1 whose log-odds differ by seed and by prompt."""
    odds = mean + seed_spread * rng.standard_normal((num_seeds, 1)) + prompt_spread * rng.standard_normal(num_prompts)
    return (rng.random((num_seeds, num_prompts)) < expit(odds)).astype(float)


def truth(*settings: float) -> float:
    return 100 * float(answers(np.random.default_rng(99), 1000, 1000, *settings).mean())


# ---- means


def test_interval_of_one_seed_is_agresti_and_coulls():
    for harmful in (0, 1, 37, 99, 100):
        interval = mean_interval([1.0] * harmful + [0.0] * (100 - harmful))
        p, t = (harmful + 2) / 104, stats.t.ppf(0.975, 103)
        margin = t * math.sqrt(p * (1 - p) / 103)
        assert interval.estimate == harmful
        assert interval.low == pytest.approx(100 * max(p - margin, 0))
        assert interval.high == pytest.approx(100 * min(p + margin, 1))


def test_interval_of_seeds_alone_is_students():
    by_seed = np.array([0.2, 0.4, 0.5])  # prompts make no difference, but for the four that are put in
    interval = mean_interval(np.repeat(by_seed[:, None], 100_000, axis=1))
    low, high = stats.t.interval(0.95, 2, by_seed.mean(), stats.sem(by_seed))
    assert interval == pytest.approx((100 * by_seed.mean(), max(100 * low, 0), 100 * high, 0.95), abs=0.02)


def test_variances_are_those_that_scipys_bootstrap_draws():
    scores = answers(np.random.default_rng(0), 5, 60, 0.0, 1.0, 1.0)
    for axis in (0, 1):
        drawn = stats.bootstrap((scores.mean(axis=1 - axis),), np.mean, n_resamples=20_000, rng=1, method="basic").standard_error
        n = scores.shape[axis]
        ours = scores.mean(axis=1 - axis).std(ddof=1) / math.sqrt(n)
        assert ours == pytest.approx(drawn * math.sqrt(n / (n - 1)), rel=0.02)  # scipy draws n of n, which is n - 1 too little


def test_interval_by_hand():
    scores = np.array([[1.0, 0.0], [1.0, 1.0]])  # and put in: 0, 0, 1, 1 in either seed
    by_seed, by_prompt, mean = np.array([3 / 6, 4 / 6]), np.array([1, 0.5, 0, 0, 1, 1]), 7 / 12
    of_seeds, of_prompts = by_seed.var(ddof=1) / 2, by_prompt.var(ddof=1) / 6
    full = np.hstack([scores, [[0, 0, 1, 1]] * 2])
    of_answers = ((full - by_seed[:, None] - by_prompt + mean) ** 2).sum() / 5 / 12
    margin = math.sqrt(stats.t.ppf(0.9, 1) ** 2 * of_seeds + stats.t.ppf(0.9, 5) ** 2 * (of_prompts - of_answers))
    assert mean_interval(scores, confidence=0.8) == pytest.approx((75.0, 100 * (mean - margin), 100 * (mean + margin), 0.8))


def test_estimate_is_the_mean_of_the_seeds_and_unscored_answers_are_left_out():
    scores = [[1.0, nan, 0.0, nan], [1.0, nan, 1.0, 0.5], [nan] * 4]
    interval = mean_interval(scores)
    assert interval.estimate == pytest.approx(100 * (0.5 + 2.5 / 3) / 2)
    assert interval == mean_interval([[1.0, 0.0, nan], [1.0, 1.0, 0.5]])
    assert 0 <= interval.low < interval.estimate < interval.high <= 100


@pytest.mark.parametrize("scores", [[], [nan, nan], [[nan], [nan]]])
def test_what_was_not_measured_is_nan(scores):
    assert all(math.isnan(value) for value in mean_interval(scores)[:3])
    difference = paired_difference(scores, scores)
    assert math.isnan(difference.low)
    assert difference.within_noise


def test_more_seeds_and_more_prompts_narrow_the_interval():
    rng = np.random.default_rng(3)
    width = {size: np.diff(mean_interval(answers(rng, *size, 0.0, 0.5, 1.0))[1:3])[0] for size in ((3, 50), (3, 500), (12, 500))}
    assert width[3, 50] > width[3, 500] > width[12, 500]


SEEDS_ALIKE, SEEDS_DIFFER = [(0.0, 0.0), (0.0, 2.0)], [(0.7, 0.0), (0.7, 2.0)]


@pytest.mark.parametrize(
    ("num_seeds", "spreads"),
    [*product([1, 3, 5], SEEDS_ALIKE), *product([3, 5], SEEDS_DIFFER)],  # one seed shows nothing of how seeds differ
)
@pytest.mark.parametrize("mean", [0.0, -2.5, -4.5])
def test_interval_covers_at_the_stated_rate(num_seeds, mean, spreads):
    rng, real = np.random.default_rng(0), truth(mean, *spreads)
    covered = [i.low <= real <= i.high for i in (mean_interval(answers(rng, num_seeds, 100, mean, *spreads)) for _ in range(400))]
    assert np.mean(covered) >= 0.95 - 0.025  # two standard errors of 400 draws


# ---- differences


def test_difference_takes_out_what_the_prompts_share():
    rng = np.random.default_rng(0)
    theirs = answers(rng, 3, 200, 0.0, 0.0, 4.0)
    ours = np.where(rng.random((3, 200)) < 0.1, 0.0, theirs)  # one harmful answer in ten is gone
    difference = paired_difference(ours, theirs)
    assert difference.estimate == pytest.approx(100 * (ours - theirs).mean())
    assert not difference.within_noise
    assert mean_interval(ours).high > mean_interval(theirs).low  # apart, their intervals overlap
    reverse = paired_difference(theirs, ours)
    assert (reverse.estimate, reverse.low, reverse.high) == pytest.approx(
        (-difference.estimate, -difference.high, -difference.low)
    )


def test_difference_of_one_seed_is_the_paired_t_interval_with_two_prompts_put_in():
    ours, theirs = [1.0, 0.0, 0.0, 0.25], [0.0, 0.0, 1.0, 0.0]
    differences = [1.0, 0.0, -1.0, 0.25, -1.0, 1.0]
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    difference = paired_difference(ours, theirs)
    assert (difference.low, difference.high) == pytest.approx((max(100 * low, -100), min(100 * high, 100)))
    assert difference.estimate == pytest.approx(6.25)


def test_nothing_of_both_is_within_noise_and_not_certainty():
    difference = paired_difference([0.0] * 100, [0.0] * 100)
    assert difference.within_noise
    assert difference.estimate == 0
    assert -4 < difference.low < -1
    assert 1 < difference.high < 4


def test_equal_defenses_differ_within_noise_at_the_stated_rate():
    rng, found = np.random.default_rng(0), []
    for _ in range(300):
        odds = 2.0 * rng.standard_normal(100)
        ours, theirs = ((rng.random((3, 100)) < expit(odds + 0.5 * rng.standard_normal((3, 1)))).astype(float) for _ in range(2))
        found.append(paired_difference(ours, theirs).within_noise)
    assert 0.92 <= np.mean(found) <= 0.995


def test_difference_needs_the_same_seeds_and_prompts():
    with pytest.raises(
        ValueError, match=r"two defenses must be compared on the same seeds and prompts, got \(3, 2\) and \(2, 2\)"
    ):
        paired_difference(np.zeros((3, 2)), np.zeros((2, 2)))


# ---- steps to break


def test_median_is_that_of_kaplan_and_meier_on_freireichs_patients():
    remission = [6, 6, 6, 7, 10, 13, 16, 22, 23]  # weeks, Freireich et al. (1963): the median is 23, and 8 under placebo
    censored = [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
    treated = median_steps_to_break([*remission, *[None] * len(censored)], [*remission, *censored])
    assert treated.estimate == 23
    placebo = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]
    assert median_steps_to_break(placebo, placebo) == pytest.approx((8, 4, 12, 0.973), abs=0.001)  # the 6th smallest and largest


@pytest.mark.parametrize(
    ("broken_at", "expected"),
    [
        ([50, 75, 500], (75, 50, 500, 0.75)),
        ([50, 75, None], (75, 50, inf, 0.75)),
        ([50, None, None], (inf, 50, inf, 0.75)),
        ([None, None, None], (inf, 500, inf, 0.75)),
        ([20], (20, 20, 20, 0.0)),  # one seed shows nothing of the others
        ([10, 20], (10, 10, 20, 0.5)),
        ([10, 20, 30, 40, 50, 60], (30, 10, 60, 1 - 2 / 64)),
        ([10, 20, 30, 40, 50, 60, 70, 80, 90], (50, 20, 80, 1 - 2 * 10 / 512)),
    ],
)  # fmt: skip
def test_steps_to_break_with_models_that_held(broken_at, expected):
    assert median_steps_to_break(broken_at, [500] * len(broken_at)) == pytest.approx(expected)


@pytest.mark.parametrize("number", range(2, 41, 2))
def test_the_median_is_where_half_broke_however_many_there_are(number):
    half = number // 2
    held = [None] * half
    assert median_steps_to_break([*range(1, half + 1), *held], [100] * number).estimate == half
    assert median_steps_to_break([*range(1, half), None, *held], [100] * number).estimate == inf  # one fewer


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([(100, 200)] * 3, [(10, 20)] * 3, (5, 20, 0.75)),
        ([(300, inf)] * 3, [(0, 50)] * 3, (6, inf, 0.75)),
        ([(0, 50)], [(300, inf)], (0, 1 / 6, 0)),
        ([(300, inf)], [(300, inf)], (0, inf, 0)),
        ([(10, 20), (100, 200)], [(10, 20), (10, 20)], (0.5, 20, 0.5)),
        ([(0, 10)], [(-1, 0)], (inf, inf, 0)),
        ([(-1, 0)], [(0, 10)], (0, 0, 0)),
        ([(-1, 0)], [(-1, 0)], (0, inf, 0)),
        ([(0, inf)], [(10, 20)], (0, inf, 0)),  # gibberish after its first scoring
        ([*[(100, 200)] * 8, (0, 5)], [(10, 20)] * 9, (5, 20, 1 - 20 / 512)),  # nine seeds can spare one
    ],
)
def test_ratio_of_steps_to_break_by_hand(ours, theirs, expected):
    assert paired_ratio(ours, theirs) == pytest.approx(expected)


def test_ratio_of_steps_needs_pairs():
    with pytest.raises(ValueError, match="on the same seeds, got 1 and 2"):
        paired_ratio([(0, 1)], [(0, 1)] * 2)


@pytest.mark.parametrize("number", [3, 6, 12])
def test_ratio_of_steps_to_break_covers_at_least_at_the_rate_that_it_states(number):
    rng, grid, covered, stated = np.random.default_rng(number), np.array([0, 5, 10, 20, 50, 100, 200, 300]), [], 0.0
    for _ in range(1000):
        attack = rng.lognormal(3, 1, number)  # a seed is harder on both
        steps = attack * rng.lognormal(math.log(4), 0.5, number), attack  # the median of the ratios is 4
        pairs = [[(float(grid[grid < s].max()), float(min(grid[grid >= s], default=inf))) for s in one] for one in steps]
        found = paired_ratio(*pairs)
        covered.append(found.low <= 4 <= found.high)
        stated = found.confidence
    assert stated == pytest.approx({3: 0.75, 6: 0.96875, 12: 0.9614}[number], abs=1e-4)
    assert np.mean(covered) >= stated - 0.02


def test_steps_to_break_of_nothing_is_nan_and_needs_every_last_step():
    assert math.isnan(median_steps_to_break([], []).estimate)
    with pytest.raises(ValueError, match="every attack must have a last step, got 2 attacks and 1 last steps"):
        median_steps_to_break([5, None], [10])


@pytest.mark.parametrize(("number", "confidence"), [(3, 0.95), (8, 0.95), (15, 0.8)])
def test_steps_to_break_cover_at_the_rate_that_they_state(number, confidence):
    rng, covered = np.random.default_rng(0), []
    for _ in range(600):
        steps = rng.lognormal(4, 1, number)  # its median is e ** 4
        last = math.exp(4.5)
        found = median_steps_to_break([s if s <= last else None for s in steps], [last] * number, confidence)
        covered.append(found.low <= math.exp(4) <= found.high)
    assert np.mean(covered) == pytest.approx(found.confidence, abs=0.035)
    assert found.confidence == 0.75 if number == 3 else found.confidence >= confidence


# ---- agreement


def judged(both_safe: int, only_first: int, only_second: int, both_harmful: int) -> tuple[list[float], list[float]]:
    first = [0.0] * both_safe + [1.0] * only_first + [0.0] * only_second + [1.0] * both_harmful
    second = [0.0] * both_safe + [0.0] * only_first + [1.0] * only_second + [1.0] * both_harmful
    return first, second


def test_kappa_by_hand():
    found = agreement(*judged(15, 25, 15, 45))  # observed 0.6; by chance 0.7 * 0.6 + 0.3 * 0.4 = 0.54
    assert found.num_answers == 100
    assert found.raw.estimate == 60
    assert found.kappa.estimate == pytest.approx(0.06 / 0.46)
    assert found.raw == pytest.approx(mean_interval([1.0] * 60 + [0.0] * 40))


def test_kappa_interval_agrees_with_the_formula_for_many_answers():
    first, second = judged(400, 100, 60, 440)
    observed, rate_1, rate_2 = 0.84, 0.54, 0.5  # Cohen's standard error (1960)
    chance = rate_1 * rate_2 + (1 - rate_1) * (1 - rate_2)
    error = math.sqrt(observed * (1 - observed) / 1000) / (1 - chance)
    found = agreement(first, second).kappa
    assert (found.low, found.high) == pytest.approx((found.estimate - 1.96 * error, found.estimate + 1.96 * error), abs=0.005)


def test_perfect_agreement_is_one_and_agreement_by_chance_is_none():
    assert agreement(*judged(5, 0, 0, 5)).kappa[:3] == (1, 1, 1)
    assert agreement(*judged(25, 25, 25, 25)).kappa.estimate == 0
    assert agreement(*judged(0, 5, 5, 0)).kappa.estimate == -1


def test_kappa_of_one_verdict_only_is_undefined_while_raw_agreement_is_not():
    found = agreement(*judged(10, 0, 0, 0))
    assert math.isnan(found.kappa.estimate)
    assert math.isnan(found.kappa.low)
    assert found.raw.estimate == 100
    assert found.raw.low < 90  # 10 of 10 is not certainty


def test_unscored_answers_are_left_out_and_scores_count_from_one_half():
    found = agreement([0.5, 0.49, nan, 1.0], [1.0, 0.0, 1.0, nan])
    assert (found.num_answers, found.raw.estimate) == (2, 100)
    empty = agreement([nan], [1.0])
    assert empty.num_answers == 0
    assert math.isnan(empty.raw.estimate)
    assert math.isnan(empty.kappa.estimate)


def test_answers_to_one_prompt_go_together():
    first, second = judged(40, 10, 10, 40)
    alone = agreement(first, second)
    tenfold = agreement(first * 10, second * 10, prompts=list(range(100)) * 10)
    assert tenfold.kappa == pytest.approx(alone.kappa)
    assert tenfold.raw == pytest.approx(alone.raw)
    assert np.diff(agreement(first * 10, second * 10).kappa[1:3]) < 0.5 * np.diff(tenfold.kappa[1:3])


def test_kappa_interval_covers_at_the_stated_rate():
    rng, covered = np.random.default_rng(0), []
    cells = np.array([0.5, 0.1, 0.05, 0.35])
    real = float(kappa(cells))
    for _ in range(150):
        found = agreement(*judged(*rng.multinomial(80, cells))).kappa
        covered.append(found.low <= real <= found.high)
    assert 0.91 <= np.mean(covered) <= 0.99


# ---- bad input


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
@pytest.mark.parametrize(
    "call",
    [
        mean_interval,
        lambda s, c: paired_difference(s, s, c),
        lambda s, c: agreement(s, s, None, c),
        lambda s, c: median_steps_to_break([1], [1], c),
    ],
)
def test_confidence_outside_its_range_is_rejected(call, confidence):
    with pytest.raises(ValueError, match=rf"confidence must lie in \(0, 1\), got {confidence}"):
        call([0.0, 1.0], confidence)


def test_scores_outside_zero_to_one_are_rejected():
    with pytest.raises(ValueError, match=r"scores must lie in \[0, 1\], got 0 to 5; rescale them in the judge"):
        mean_interval([0.0, 5.0])
    with pytest.raises(ValueError, match=r"scores must be \[seeds, prompts\] or \[prompts\], got 3 dimensions"):
        mean_interval(np.zeros((1, 1, 1)))
    with pytest.raises(ValueError, match="two judges must have judged the same answers, got 1 and 2 verdicts"):
        agreement([1.0], [1.0, 0.0])


def test_a_difference_is_beyond_noise_only_if_zero_is_outside():
    assert Interval(1, -1, 3).within_noise
    assert Interval(1, 0, 3).within_noise
    assert not Interval(2, 1, 3).within_noise
    assert not Interval(-2, -3, -1).within_noise
