"""Whether one model is better than another: the paired difference of their scores, and how sure it is.

Both models were scored on the same records, so that what makes a record hard falls out of the difference: it is known
much better than either mean. How far it would be off with other records of the same kind is found by drawing records,
with replacement, thousands of times (the bootstrap, Efron 1979). 95 of 100 such intervals have the true difference in
them. That percentiles of the draws are a little too narrow is mended as in Hesterberg, What Teachers Should Know About
the Bootstrap, 2015, section 3.4: they are taken as much further out as t is wider than a normal distribution.

The interval is about the records, and nothing else: another seed of the training gives another model.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from lit_gpt.errors import InputError
from lit_gpt.scores.record_scores import RecordScores

LEVEL = 0.95
POWER = 0.8  # `needed` records show a difference of this size in four of five tries
DRAWS = 4000
MOST_NUMBERS = 2**22  # that are drawn at a time
MOST_DIGITS = 8  # after the point


@dataclass(frozen=True)
class Interval:
    """A mean over records, and between which bounds that of all such records is, 95 times in 100."""

    mean: float
    low: float
    high: float
    n: int
    """How many records."""


@dataclass(frozen=True)
class Difference(Interval):
    """By how much the mean of the second model is higher, and its interval."""

    lower_is_better: bool
    needed: int | None
    """How many records would show a difference of this size. None if all differences are alike."""

    @property
    def is_seen(self) -> bool:
        """Whether zero is outside of the interval. One record has none."""
        return self.n > 1 and (self.low > 0 or self.high < 0)

    @property
    def gain(self) -> float:
        """By how much the second model is better; negative if it is worse."""
        return -self.mean if self.lower_is_better else self.mean


def interval_of(scores: RecordScores, seed: int = 0) -> Interval:
    """The mean of a model, and its interval.

    `seed` is that of the draws, so that the same scores have the same interval.
    """
    first = scores.values[0]
    is_share = not scores.unit and first in (0, 1)
    if is_share and (scores.values == first).all():
        low, high = bounds_of_all_alike(first, len(scores))
    else:
        low, high = bootstrap(scores.values, scores.weights, seed)
    return Interval(scores.mean, low, high, len(scores))


def bounds_of_all_alike(value: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, where all of n records are right, `value` 1, or all wrong, 0.

    No draw of such records is another one. The interval is that of Clopper and Pearson (1934): n records are all right
    in 2.5 of 100 cases if the share of right ones is 0.025^(1/n).
    """
    farthest = 1 - ((1 - LEVEL) / 2) ** (1 / n)
    return (1 - farthest, 1.0) if value else (0.0, farthest)


def paired_difference(scores: RecordScores, other: RecordScores, seed: int = 0) -> Difference:
    """The mean of `other` minus that of `scores`, on the records that both have.

    Each record weighs as much as it does in `scores`; `seed` is that of the draws.

    Raises:
        InputError: they have no record in common.
    """
    scores, other = in_common(scores, other)
    differences = other.values - scores.values
    mean = float((scores.weights * differences).sum() / scores.weights.sum())
    low, high = bootstrap(differences, scores.weights, seed)
    return Difference(mean, low, high, len(scores), scores.lower_is_better, records_needed(differences, scores.weights))


def in_common(scores: RecordScores, other: RecordScores) -> tuple[RecordScores, RecordScores]:
    """Both, with the records alone that both have, in one order."""
    theirs = set(other.ids)
    ids = [name for name in scores.ids if name in theirs]
    if not ids:
        raise InputError(
            f"The two have no record in common, of {len(scores):,} and {len(other):,} with a {scores.measure}. Compare"
            " scores of the same records."
        )
    return scores.choose(ids), other.choose(ids)


def bootstrap(values: np.ndarray, weights: np.ndarray, seed: int = 0, draws: int = DRAWS) -> tuple[float, float]:
    """The 95 % interval of a weighted mean of `values` (n,) over records that were drawn by chance.

    Both ends are the mean itself if there is one record: it says nothing about others.
    """
    n = len(values)
    mean = float((weights * values).sum() / weights.sum())
    if n < 2 or (values == values[0]).all():
        return mean, mean

    # the means of many draws, some of them at a time
    rng = np.random.default_rng(seed)
    weighted = weights * values
    means = []
    for n_draws in some_at_a_time(draws, n):
        drawn = rng.integers(0, n, (n_draws, n))
        means.append(weighted[drawn].sum(1) / weights[drawn].sum(1))

    low, high = ends_of(np.concatenate(means), n)
    return float(low), float(high)


def some_at_a_time(draws: int, n_records: int) -> Iterator[int]:
    """Parts of all draws, each of as many as there is memory for."""
    at_once = max(1, MOST_NUMBERS // n_records)
    for start in range(0, draws, at_once):
        yield min(at_once, draws - start)


def ends_of(means: np.ndarray, n_records: int) -> np.ndarray:
    """The percentiles of drawn means that are the ends of the interval, (2,); the head of this file says which."""
    tail = NormalDist().cdf(-math.sqrt(n_records / (n_records - 1)) * t_quantile(n_records - 1))
    return np.quantile(means, [tail, 1 - tail])


def t_quantile(freedom: int) -> float:
    """The 0.975 quantile of Student's t, by its expansion in 1 / freedom (Abramowitz and Stegun, 26.7.5).

    It is right to three digits from seven degrees of freedom on, and too low below.
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def records_needed(differences: np.ndarray, weights: np.ndarray) -> int | None:
    """How many records it takes to see the mean of `differences` (n,) in four of five tries, if it is as large.

    n = (z_0.975 + z_0.8)^2 (standard deviation / mean)^2, of two digits. None if there is nothing to tell it by.
    """
    if len(differences) < 2:
        return None
    mean = (weights * differences).sum() / weights.sum()
    # of one record in a weighted mean, by its linear approximation
    deviation = (weights * (differences - mean)).std(ddof=1) / weights.mean()
    if not mean or not deviation:
        return None
    z = NormalDist().inv_cdf((1 + LEVEL) / 2) + NormalDist().inv_cdf(POWER)
    needed = (z * deviation / mean) ** 2
    return max(2, int(float(f"{needed:.2g}")))


# ---- words


def interval_text(interval: Interval, sign: bool = False) -> str:
    """A mean and its interval, such as `0.432 [0.401, 0.463]`, with as many digits as the interval is sure of."""
    digits = digits_of(interval.high - interval.low, interval.mean)
    nearest = min(abs(interval.low), abs(interval.high))
    while nearest and digits < MOST_DIGITS and round(nearest, digits) == 0:
        digits += 1  # an end beside zero is not zero
    plus = "+" if sign else ""
    if interval.n == 1:
        return f"{interval.mean:{plus}.{digits}f}"
    return f"{interval.mean:{plus}.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def digits_of(width: float, value: float) -> int:
    """Digits after the point with which two of an interval's width can be read; four at the least for a small one."""
    size = width or abs(value)
    if not size:
        return 3
    return min(MOST_DIGITS, max(3, 1 - math.floor(math.log10(size))))


def in_words(difference: Difference, name: str, of: str = "records") -> str:
    """The difference in a sentence, in which `name` is the second model: "LoRA is better by 0.013 [0.004, 0.022]".

    `of` is what was compared, in the plural.
    """
    n = f"{difference.n:,}"
    if not difference.mean and difference.low == difference.high:
        return f"no difference: all {n} {of} are alike"
    if difference.n == 1:
        return f"{interval_text(difference, sign=True)}, of one of the {of} alone"
    if not difference.is_seen:
        needed = difference.needed
        if needed is None or needed > 1_000_000:
            return f"no difference can be seen with {n} {of}"
        # a difference that just fails to be seen may need fewer: more are needed for the next try, too
        more = f"; about {needed:,} would be needed" if needed > difference.n else "; with more it may"
        return f"no difference can be seen with {n} {of}{more}"
    is_better = difference.gain > 0
    sign = 1 if difference.mean > 0 else -1
    low, high = sorted((sign * difference.low, sign * difference.high))
    size = Interval(abs(difference.mean), low, high, difference.n)
    return f"{name} is {'better' if is_better else 'worse'} by {interval_text(size)}"
