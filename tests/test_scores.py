"""Scores, their files, and intervals that hold what they promise: `pytest tests/test_scores.py`, about 15 s"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lit_gpt import InputError
from lit_gpt.scores.paired import (
    Interval,
    bootstrap,
    in_words,
    interval_of,
    interval_text,
    paired_difference,
    t_quantile,
)
from lit_gpt.scores.record_scores import RecordScores, ids_of_texts, losses, read_scores, shares, write_scores

Generator = np.random.Generator
N_COMPARISONS = 2000


def differences_of_losses(n: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Records of very different lengths; short ones vary more, and some got much worse."""
    weights = np.ceil(rng.lognormal(3, 0.8, n))
    return rng.normal(-0.02, 0.3, n) / np.sqrt(weights / 20) + rng.gamma(1, 0.05, n), weights


def differences_of_answers(n: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong: the same for most, 10 % gained, 6 % lost."""
    chance = rng.random(n)
    return (chance < 0.10).astype(float) - ((chance >= 0.10) & (chance < 0.16)), np.ones(n)


@pytest.mark.parametrize("differences", [differences_of_losses, differences_of_answers])
def test_95_of_100_intervals_have_the_truth_in_them(differences: Callable) -> None:
    rng = np.random.default_rng(1)
    values, weights = differences(2_000_000, rng)
    truth = (values * weights).sum() / weights.sum()
    n_right = 0
    for seed in range(N_COMPARISONS):
        low, high = bootstrap(*differences(100, rng), seed, draws=1000)
        n_right += low <= truth <= high
    assert abs(n_right / N_COMPARISONS - 0.95) <= 0.015


def test_t_quantile() -> None:
    for freedom in (7, 9, 30, 1000):
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-3)


def two_models(n: int, gain: float, lower_is_better: bool = True) -> tuple[RecordScores, RecordScores]:
    """Losses that lie far apart between records, and close together between models."""
    rng = np.random.default_rng(2)
    ids = [f"r{i}" for i in range(n)]
    weights = rng.integers(1, 50, n).astype(float)
    first = rng.normal(3, 1, n)
    second = first - gain + rng.normal(0, 0.05, n)
    return tuple(RecordScores("loss", values, weights, ids, lower_is_better) for values in (first, second))


def test_a_pair_is_known_better_than_either() -> None:
    first, second = two_models(100, gain=0.03)
    difference = paired_difference(first, second)
    assert difference.mean == pytest.approx(second.mean - first.mean) and difference.gain == -difference.mean
    assert difference.is_seen and in_words(difference, "LoRA").startswith("LoRA is better by 0.03")
    # each on its own is as unsure as its records are unlike
    alone = interval_of(first)
    assert alone.low < second.mean < alone.high
    # seen from the other side; an order of its own and records of its own change nothing
    back = paired_difference(second, first)
    assert in_words(back, "base").startswith("base is worse by 0.03")
    shuffled = second.choose(second.ids[::-1])
    more = RecordScores("loss", np.append(shuffled.values, 9), np.append(shuffled.weights, 9), [*shuffled.ids, "new"])
    assert paired_difference(first, more) == difference


def test_too_few_records_say_how_many_are_needed() -> None:
    first, second = two_models(40, gain=0.006)
    difference = paired_difference(first, second)
    words = in_words(difference, "LoRA")
    assert words == f"no difference can be seen with 40 records; about {difference.needed:,} would be needed"
    # with as many, in four of five tries
    seen = []
    rng = np.random.default_rng(3)
    for _ in range(200):
        drawn = rng.normal(0.1, 1, difference_needed := 800)
        low, high = bootstrap(drawn, np.ones(difference_needed), draws=500)
        seen.append(low > 0)
    needed = paired_difference(
        shares("x", np.zeros(5000), [str(i) for i in range(5000)]),
        shares("x", rng.normal(0.1, 1, 5000), [str(i) for i in range(5000)]),
    ).needed
    assert 600 <= needed <= 1000 and 0.7 <= np.mean(seen) <= 0.9


def test_an_end_beside_zero_is_not_written_as_zero() -> None:
    assert interval_text(Interval(0.0272, 0.0003, 0.0604, 64)) == "0.0272 [0.0003, 0.0604]"
    assert interval_text(Interval(0.432, 0.401, 0.463, 64)) == "0.432 [0.401, 0.463]"


def test_models_that_answer_alike() -> None:
    ids = [str(i) for i in range(7)]
    same = shares("exact match", [1, 0, 1, 1, 0, 0, 1], ids)
    assert in_words(paired_difference(same, same), "LoRA", of="answers") == "no difference: all 7 answers are alike"


def test_answers_that_are_all_right_may_be_wrong_elsewhere() -> None:
    """As scipy's exact interval of a share has it."""
    for n, value in ((4, 1.0), (30, 0.0)):
        found = interval_of(shares("exact match", [value] * n, [str(i) for i in range(n)]))
        exact = stats.binomtest(round(value * n), n).proportion_ci(method="exact")
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    none_forgotten = RecordScores("KL to the base", np.zeros(3), np.ones(3), ["a", "b", "c"], True, "nats per token")
    assert interval_of(none_forgotten).high == 0


def test_records_in_common_are_needed() -> None:
    first, second = shares("x", [0, 1], ["a", "b"]), shares("x", [0, 1], ["b", "c"])
    one = paired_difference(first, second)
    assert one.mean == -1 and not one.is_seen and in_words(one, "LoRA") == "-1.000, of one of the records alone"
    with pytest.raises(InputError, match="no record in common, of 2 and 1 with a x"):
        paired_difference(first, shares("x", [0], ["d"]))


def test_a_file_of_scores(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    ids = ids_of_texts([b"a", b"b", b"a"])
    assert len(set(ids)) == 3 and ids[2] == f"{ids[0]}-2"
    written = [losses([3.0, 1.25, 7], [2, 1, 70], ids), shares("contains, 60 %", [1, 0], ids[:2])]
    write_scores(path, written)
    for one, other in zip(read_scores(path), written, strict=True):
        assert (one.measure, one.ids, one.lower_is_better, one.unit) == (
            other.measure, other.ids, other.lower_is_better, other.unit,
        )  # fmt: skip
        assert (one.values == other.values).all() and (one.weights == other.weights).all()
        assert one.mean == other.mean

    lines = path.read_text().splitlines()
    for damaged in (
        "",
        "a,b\n1,2\n",
        lines[0],
        "\n".join([lines[0], "x,one,2,"]),
        "\n".join([*lines, lines[1]]),
        "\0\n",
    ):
        path.write_text(damaged)
        with pytest.raises(InputError, match="is no file of scores"):
            read_scores(path)
