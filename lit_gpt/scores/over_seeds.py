"""Whether one way of training is better than another: paired differences over records and over seeds.

Each seed is one training, on its own records or in its own order, and is scored on its own or on the same records. So
a mean is off for two reasons: other records, and another training. Both are drawn, seeds and records each by
themselves, and a score counts as often as its seed and its record were drawn, together (Owen, The pigeonhole bootstrap,
2007). A record that is scored in several seeds is one record: it is drawn with all of its scores.

    seed \\ record    a    b    c    d          drawn: seeds 0, 0, 1; records a, b, b, d
    0                 1    0    1                the 1 of seed 0 and record a counts 2 times 1
    1                 1         0    1           the 0 of seed 0 and record b counts 2 times 2
    2                      1    1    0
"""

import math
from collections.abc import Sequence

import numpy as np

from lit_gpt.scores.paired import (
    DRAWS,
    Difference,
    Interval,
    ends_of,
    in_common,
    in_words,
    interval_of,
    paired_difference,
    records_needed,
    some_at_a_time,
)
from lit_gpt.scores.record_scores import RecordScores


def interval_over_seeds(scores: Sequence[RecordScores]) -> Interval:
    """The mean of one way of training, from its scores in each seed, and its interval.

    With one seed it is that of `interval_of`, which knows of no other training.
    """
    if len(scores) == 1:
        return interval_of(scores[0])
    values, weights = by_seed_and_record(scores)
    low, high = bootstrap_two_ways(values, weights)
    return Interval(float(np.average(values, weights=weights)), low, high, values.shape[1])


def difference_over_seeds(scores: Sequence[RecordScores], others: Sequence[RecordScores]) -> Difference:
    """By how much `others` are higher; entry i of both is of the same seed. Records are paired within a seed.

    With one seed it is `paired_difference`, which knows of no other training.

    Raises:
        InputError: the scores of a seed have no record in common.
    """
    if len(scores) == 1:
        return paired_difference(scores[0], others[0])
    differences = []
    for one, other in zip(scores, others, strict=True):
        first, second = in_common(one, other)
        differences.append(RecordScores(first.measure, second.values - first.values, first.weights, first.ids))
    values, weights = by_seed_and_record(differences)
    low, high = bootstrap_two_ways(values, weights)

    # how many records would show it: by the mean of each record over the seeds
    weight_of_record = weights.sum(0)
    of_record = (weights * values).sum(0) / weight_of_record
    return Difference(
        mean=float(np.average(values, weights=weights)),
        low=low,
        high=high,
        n=values.shape[1],
        lower_is_better=scores[0].lower_is_better,
        needed=records_needed(of_record, weight_of_record),
    )


def in_words_over_seeds(difference: Difference, n_seeds: int, name: str, of: str = "records") -> str:
    """The sentence of `in_words`, but for a difference that more seeds would show rather than more records."""
    needed = difference.needed
    if n_seeds == 1 or difference.is_seen or needed is None or needed > difference.n:
        return in_words(difference, name, of)
    return f"no difference can be seen with {difference.n:,} {of} and {n_seeds} seeds; more seeds may show one"


def by_seed_and_record(scores: Sequence[RecordScores]) -> tuple[np.ndarray, np.ndarray]:
    """The values and the weights of all seeds, each (n_seeds, n_records); both are 0 where a seed scores no record."""
    ids = list(dict.fromkeys(name for one in scores for name in one.ids))
    place = {name: i for i, name in enumerate(ids)}
    values = np.zeros((len(scores), len(ids)))
    weights = np.zeros((len(scores), len(ids)))
    for row, one in enumerate(scores):
        places = [place[name] for name in one.ids]
        values[row, places] = one.values
        weights[row, places] = one.weights
    return values, weights


def bootstrap_two_ways(
    values: np.ndarray, weights: np.ndarray, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float]:
    """The 95 % interval of the weighted mean of `values` (n_seeds, n_records), of two seeds or more.

    Three seeds vary less among themselves than all seeds do, by (n - 1) / n in the variance: the interval is wider by
    the root of that. The tails are those of `paired.bootstrap`.
    """
    n_seeds, n_records = values.shape
    mean = float(np.average(values, weights=weights))
    scored = values[weights > 0]
    if n_records < 2 or (scored == scored[0]).all():
        return mean, mean

    # the means of many draws, some of them at a time
    rng = np.random.default_rng(seed)
    weighted = weights * values
    means = []
    for n_draws in some_at_a_time(draws, n_records):
        seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), n_draws)
        records = rng.multinomial(n_records, np.full(n_records, 1 / n_records), n_draws)
        totals = ((seeds @ weights) * records).sum(1)
        sums = ((seeds @ weighted) * records).sum(1)
        drawn = totals > 0  # of few records, none may belong to the seeds that were drawn
        means.append(sums[drawn] / totals[drawn])

    ends = ends_of(np.concatenate(means), n_records)
    low, high = mean + math.sqrt(n_seeds / (n_seeds - 1)) * (ends - mean)
    return float(low), float(high)
