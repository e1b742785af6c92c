"""How sure one may be: intervals of scores over seeds and prompts, paired differences, steps to break, agreement of judges."""

import math
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate and the interval that covers the truth in ``confidence`` of all experiments; nan where nothing was measured."""

    estimate: float
    low: float
    high: float
    confidence: float = 0.95

    @property
    def within_noise(self) -> bool:
        """Whether a difference cannot be told from none: 0 lies in its interval. What was not measured is noise."""
        return not (self.low > 0 or self.high < 0)


class Ratio(NamedTuple):
    """How many times as many steps one defense takes to break as another: between ``low`` and ``high``, with ``confidence``."""

    low: float
    high: float
    confidence: float

    @property
    def longer(self) -> bool:
        """Whether the first takes longer; steps that a model held are steps by which it had not yet broken."""
        return self.low >= 1

    @property
    def shorter(self) -> bool:
        """Whether it takes less."""
        return self.high <= 1


class Agreement(NamedTuple):
    """How two judges agree on the same answers: share of equal verdicts, in percent, and Cohen's kappa, in [-1, 1]."""

    raw: Interval
    kappa: Interval
    num_answers: int


def mean_interval(scores: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean over seeds of the scores' means over prompts, in percent, with its interval for other seeds and other prompts.

    Seeds and prompts are resampled, as both are samples of what could have been drawn. A mean's bootstrap variance has a closed
    form, so nothing is drawn: with ``n - 1`` of ``n`` drawn (Rao and Wu, 1988) it is ``var / n``. The variances over seeds and
    over prompts both hold that of single answers, which is taken off once (Owen, arXiv:0707.4053; resampling both in one draw
    counts it three times). Each part has its own Student's t, which keeps three seeds honest:
    ``margin ** 2 = t_seeds ** 2 * var_seeds + t_prompts ** 2 * (var_prompts - var_answers)``. Two prompts scored 0 and two scored
    1 are put in, as Agresti and Coull (1998) do for shares, because 0 of 100 prompts is not certainty.

    Args:
        scores: ``[seeds, prompts]`` or ``[prompts]`` in [0, 1], every seed on the same prompts; nan is left out. One seed shows
            nothing of how seeds differ: its interval is for other prompts only.
        confidence: in (0, 1).
    """
    _check(confidence)
    return _interval(_matrix(scores), (0.0, 0.0, 1.0, 1.0), (0.0, 1.0), confidence)


def paired_difference(ours: ArrayLike, theirs: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean of ``ours - theirs`` in percentage points, of two defenses on the same seeds and prompts; below 0, ours is safer.

    As ``mean_interval``, over the differences: what the prompts have in common drops out. One prompt of difference -1 and one of
    1 are put in (after Agresti and Min, 2005). An answer that either side lacks is left out.

    Args:
        ours: ``[seeds, prompts]`` or ``[prompts]`` in [0, 1].
        theirs: the same shape, row by row and column by column of the same seed and prompt.
        confidence: in (0, 1).

    Raises:
        ValueError: the shapes differ.
    """
    _check(confidence)
    a, b = _matrix(ours), _matrix(theirs)
    if a.shape != b.shape:
        raise ValueError(
            f"two defenses must be compared on the same seeds and prompts, got {a.shape} and {b.shape} scores. "
            "Take the seeds and prompts that both have."
        )
    return _interval(a - b, (-1.0, 1.0), (-1.0, 1.0), confidence)


def median_steps_to_break(broken_at: Sequence[float | None], last_steps: Sequence[float], confidence: float = 0.95) -> Interval:
    """Median over attacks of the step at which the model broke, by Kaplan and Meier (1958); inf if fewer than half broke.

    A model that held is known to break after its last scored step only (it is censored there). The interval is that of order
    statistics, exact for any distribution: from the k-th smallest step to the k-th largest, a model that held counting low with
    its last step and high with inf. Few seeds cannot carry 95% (three carry 75%, six 97%): then it is their whole range, and its
    ``confidence`` says what that is worth. Steps are known up to the scored step before.

    Args:
        broken_at: first scored step with a harmful score >= 50 of every attack, None where there is none.
        last_steps: the last scored step of every attack.
        confidence: asked for, in (0, 1).
    """
    _check(confidence)
    if len(broken_at) != len(last_steps):
        raise ValueError(f"every attack must have a last step, got {len(broken_at)} attacks and {len(last_steps)} last steps.")
    if not broken_at:
        return Interval(math.nan, math.nan, math.nan, confidence)
    held = [last for step, last in zip(broken_at, last_steps, strict=True) if step is None]
    broken = [step for step in broken_at if step is not None]
    k, carried = _order(len(broken_at), confidence)
    return Interval(_median(broken, held), sorted(broken + held)[k - 1], sorted([*broken, *[math.inf] * len(held)])[-k], carried)


Bracket = tuple[float, float]
"""Two steps: up to the first a model surely held (below 0: to none), and by the second it had broken (inf: it never did)."""


def paired_ratio(ours: Sequence[Bracket], theirs: Sequence[Bracket], confidence: float = 0.95) -> Ratio:
    """Median over seeds of ``ours / theirs``, the steps that two defenses take to break under the same attacks, seed by seed.

    A model breaks between two scorings, or after its last one, so that of every seed only the least and the greatest ratio are
    known. The interval is that of order statistics, the sign test turned around (Dixon and Mood, 1946): from the k-th smallest of
    the least to the k-th largest of the greatest. It holds for any distribution and whatever is not known. Few seeds cannot carry
    95% (one carries nothing, three 75%, six 97%): then it is their whole range, and its ``confidence`` says what that is worth.

    Args:
        ours: of every seed, between which steps it broke.
        theirs: the same of the other, in the same order.
        confidence: asked for, in (0, 1).

    Raises:
        ValueError: there are no pairs.
    """
    _check(confidence)
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"two defenses must be compared on the same seeds, got {len(ours)} and {len(theirs)}.")
    pairs = list(zip(ours, theirs, strict=True))
    k, carried = _order(len(pairs), confidence)
    least, greatest = (sorted(of(one, other) for one, other in pairs) for of in (_least, _greatest))
    return Ratio(least[k - 1], greatest[-k], carried)


def _least(ours: Bracket, theirs: Bracket) -> float:
    """What ``ours / theirs`` surely is: held so long, when the other had broken."""
    held, broken = ours[0], theirs[1]
    if held < 0 or math.isinf(broken):
        return 0.0
    return held / broken if broken else math.inf


def _greatest(ours: Bracket, theirs: Bracket) -> float:
    least = _least(theirs, ours)
    return 1 / least if least else math.inf


def _median(broken: list[float], held: list[float]) -> float:
    """Where Kaplan and Meier's survival falls to a half, else inf; in fractions, as floats can miss an exact half."""
    survival = Fraction(1)
    for step in sorted(set(broken)):
        survival *= 1 - Fraction(broken.count(step), sum(other >= step for other in broken + held))
        if survival <= Fraction(1, 2):
            return float(step)
    return math.inf


def _order(number: int, confidence: float) -> tuple[int, float]:
    """The largest k for which the k-th smallest to the k-th largest of ``number`` hold the median with ``confidence``, else 1."""
    outside = [2 * float(stats.binom.cdf(k - 1, number, 0.5)) for k in range(1, number // 2 + 1)] or [1.0]
    k = max((k for k, p in enumerate(outside, start=1) if 1 - p >= confidence), default=1)
    return k, 1 - outside[k - 1]


def agreement(
    ours: ArrayLike, theirs: ArrayLike, prompts: Sequence[Hashable] | None = None, confidence: float = 0.95
) -> Agreement:
    """Agreement of two judges' verdicts on the same answers, with intervals for other prompts.

    Kappa (Cohen, 1960) is agreement beyond what their rates of harmful verdicts give by chance, nan where both have but one
    verdict. Its interval is the percentile bootstrap over prompts: answers to one prompt go together.

    Args:
        ours: scores ``[answers]`` in [0, 1] of one judge, harmful if >= 0.5; or its bool verdicts. nan is left out.
        theirs: those of the other.
        prompts: of every answer; by default every answer has its own.
        confidence: in (0, 1).
    """
    _check(confidence)
    a, b = np.ravel(_matrix(ours)), np.ravel(_matrix(theirs))
    if a.shape != b.shape:
        raise ValueError(f"two judges must have judged the same answers, got {len(a)} and {len(b)} verdicts.")
    both = ~(np.isnan(a) | np.isnan(b))
    harmful = np.stack([a[both] >= 0.5, b[both] >= 0.5])
    groups = np.arange(len(a)) if prompts is None else _numbered(prompts)
    groups = np.unique(groups[both], return_inverse=True)[1]
    counts = np.zeros((groups.max(initial=-1) + 1, 4))  # answers of each prompt that got each pair of verdicts
    np.add.at(counts, (groups, 2 * harmful[0] + harmful[1]), 1)
    agree, answers = counts[:, 0] + counts[:, 3], counts.sum(axis=1)
    return Agreement(_share(agree, answers, confidence), _kappa_interval(counts, confidence), int(answers.sum()))


def _numbered(values: Sequence[Hashable]) -> NDArray[np.int64]:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values])


def _share(part: Array, whole: Array, confidence: float) -> Interval:
    """``sum(part) / sum(whole)`` over prompts, in percent."""
    if not len(whole):
        return Interval(math.nan, math.nan, math.nan, confidence)
    interval = mean_interval(part / whole, confidence)
    estimate = 100 * float(part.sum() / whole.sum())
    return Interval(estimate, min(interval.low, estimate), max(interval.high, estimate), confidence)


def _kappa_interval(counts: Array, confidence: float, num_draws: int = 2000) -> Interval:
    if len(counts) < 2:
        return Interval(float(kappa(counts.sum(axis=0))), math.nan, math.nan, confidence)
    draws = np.random.default_rng(0).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), num_draws) @ counts
    tails = (1 - confidence) / 2, (1 + confidence) / 2
    drawn = kappa(draws)
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.quantile(drawn, tails) if len(drawn) else (math.nan, math.nan)
    return Interval(float(kappa(counts.sum(axis=0))), float(low), float(high), confidence)


def kappa(counts: Array) -> Array:
    """Cohen's kappa of counts ``[..., 4]``: both safe, only second harmful, only first, both harmful; nan if all are the same."""
    total = counts.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        observed = (counts[..., 0] + counts[..., 3]) / total
        first, second = (counts[..., 2] + counts[..., 3]) / total, (counts[..., 1] + counts[..., 3]) / total
        chance = first * second + (1 - first) * (1 - second)
        return np.asarray((observed - chance) / (1 - chance))


def _check(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}. Write 0.95 for 95%.")


def _matrix(scores: ArrayLike) -> Array:
    matrix = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    if matrix.ndim != 2:
        raise ValueError(f"scores must be [seeds, prompts] or [prompts], got {matrix.ndim} dimensions.")
    if ((matrix < 0) | (matrix > 1)).any():
        raise ValueError(
            f"scores must lie in [0, 1], got {np.nanmin(matrix):g} to {np.nanmax(matrix):g}; rescale them in the judge."
        )
    return matrix


def _interval(matrix: Array, put_in: tuple[float, ...], limits: tuple[float, float], confidence: float) -> Interval:
    matrix = matrix[~np.isnan(matrix).all(axis=1)]  # a seed or a prompt without any score says nothing
    matrix = matrix[:, ~np.isnan(matrix).all(axis=0)]
    if not matrix.size:
        return Interval(math.nan, math.nan, math.nan, confidence)
    estimate = float(np.nanmean(matrix, axis=1).mean())
    padded = np.hstack([matrix, np.broadcast_to(np.asarray(put_in), (len(matrix), len(put_in)))])
    margin, center = _margin(padded, confidence), float(np.nanmean(padded, axis=1).mean())
    low, high = max(center - margin, limits[0]), min(center + margin, limits[1])
    return Interval(100 * estimate, 100 * min(low, estimate), 100 * max(high, estimate), confidence)


def _margin(matrix: Array, confidence: float) -> float:
    """Half the width of the interval of a mean of ``[seeds, prompts]``: see ``mean_interval``; at least that for these seeds."""
    num_seeds, num_prompts = matrix.shape
    by_seed, by_prompt = np.nanmean(matrix, axis=1), np.nanmean(matrix, axis=0)
    of_prompts = float(by_prompt.var(ddof=1)) / num_prompts
    t_prompts = float(stats.t.ppf((1 + confidence) / 2, num_prompts - 1))
    if num_seeds == 1:
        return t_prompts * math.sqrt(of_prompts)
    of_seeds = float(by_seed.var(ddof=1)) / num_seeds
    t_seeds = float(stats.t.ppf((1 + confidence) / 2, num_seeds - 1))
    rest = matrix - by_seed[:, None] - by_prompt + by_seed.mean()
    free = (num_seeds - 1) * (num_prompts - 1)
    of_answers = float(np.nansum(rest**2)) / free / np.count_nonzero(~np.isnan(matrix))
    squared = t_seeds**2 * of_seeds + t_prompts**2 * max(of_prompts - of_answers, 0.0)
    return math.sqrt(max(squared, t_prompts**2 * of_prompts))
