"""Calibration, and intervals over seeds: `pytest tests/test_calibration.py`, about 5 s"""

from dataclasses import replace

import numpy as np
import pytest
from scipy import special, stats

from lit_gpt.classifier.calibration import (
    N_BINS,
    calibrate,
    confidences_and_hits,
    error_by_chance,
    expected_calibration_error,
    fit_temperature,
    log_softmax,
)
from lit_gpt.classifier.scores import accuracy_interval, f1_interval, score_log_probabilities
from lit_gpt.classifier.texts import few_labels
from lit_gpt.scores.over_seeds import (
    bootstrap_two_ways,
    difference_over_seeds,
    in_words_over_seeds,
    interval_over_seeds,
)
from lit_gpt.scores.paired import bootstrap, interval_of, paired_difference
from lit_gpt.scores.record_scores import shares


def logits_and_labels(n: int, temperature: float, n_classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels that are as likely as softmax(logits / temperature) says."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (n, n_classes))
    cumulated = special.softmax(logits / temperature, 1).cumsum(1)
    labels = (rng.random((n, 1)) > cumulated[:, :-1]).sum(1)
    return logits, labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_temperature_is_found(temperature) -> None:
    """And with it the error is the one that chance makes."""
    logits, labels = logits_and_labels(4000, temperature)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.08)
    error, by_chance = {}, {}
    for divisor in (1.0, found):
        confidences, hits = confidences_and_hits(log_softmax(logits / divisor), labels)
        error[divisor] = expected_calibration_error(confidences, hits)
        by_chance[divisor] = error_by_chance(confidences)
    assert error[found] < 2 * by_chance[found]
    assert temperature == 1 or error[1.0] > 4 * by_chance[1.0]


def test_few_texts_that_are_all_right_are_no_certainty() -> None:
    logits = np.tile([2.0, 0.0], (20, 1))
    assert 0.3 < fit_temperature(logits, np.zeros(20, int)) < 1
    assert fit_temperature(logits[:0], np.zeros(0, int)) == 1


def test_the_calibration_error_is_that_of_its_formula() -> None:
    rng = np.random.default_rng(0)
    confidences = np.append(rng.random(500), [0.0, 1.0, 0.2])
    hits = rng.random(503) < 0.6
    expected = 0.0
    for number in range(N_BINS):
        low, high = number / N_BINS, (number + 1) / N_BINS
        inside = (confidences >= low) & ((confidences < high) | (number == N_BINS - 1))
        expected += inside.mean() * abs(hits[inside].mean() - confidences[inside].mean())
    assert expected_calibration_error(confidences, hits) == pytest.approx(expected)


def test_scored_texts_do_not_choose_their_own_temperature() -> None:
    """Each half has the one of the other; equal texts are in one half."""
    logits, labels = logits_and_labels(60, 2.0)
    texts = [f"text {i % 40}" for i in range(60)]
    calibration = calibrate(logits, labels, None, texts, seed=3)
    divisors = (logits - logits.max(1, keepdims=True)).min(1)
    after = calibration.after - calibration.after.max(1, keepdims=True)
    divisors = (divisors / after.min(1)).round(6)
    (first, second) = np.unique(divisors)
    for own, other in ((first, second), (second, first)):
        assert fit_temperature(logits[divisors == other], labels[divisors == other]) == pytest.approx(own, rel=1e-5)
    assert {t for t, d in zip(texts, divisors, strict=True) if d == first}.isdisjoint(
        t for t, d in zip(texts, divisors, strict=True) if d == second
    )
    assert calibration.is_cross_fitted and calibration.temperature == fit_temperature(logits, labels)
    test_logits = logits[:9] + 1
    elsewhere = calibrate(logits, labels, test_logits, texts, seed=3)
    assert not elsewhere.is_cross_fitted and elsewhere.temperature == calibration.temperature
    assert np.allclose(elsewhere.after, special.log_softmax(test_logits / calibration.temperature, 1))


# ---- intervals


def test_all_texts_right_is_no_certainty() -> None:
    """The bootstrap would say 1 to 1."""
    ids = [str(i) for i in range(40)]
    for n_right in (40, 0):
        hits = shares("accuracy", [n_right > 0] * 40, ids)
        expected = stats.binomtest(n_right, 40).proportion_ci()
        found = accuracy_interval([hits])
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    hits = shares("accuracy", [1] * 30 + [0] * 10, ids)
    assert accuracy_interval([hits]) == interval_of(hits)


def test_the_interval_of_f1_is_that_of_drawn_texts() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    predicted = np.where(rng.random(60) < 0.7, labels, rng.integers(0, 3, 60))
    ids = [str(i) for i in range(60)]

    def score(chosen: np.ndarray):
        return score_log_probabilities(labels[chosen], np.log(np.eye(3)[predicted[chosen]] + 1e-9), ids)

    means = [score(rng.integers(0, 60, 60)).f1.mean() for _ in range(2000)]
    found = f1_interval(score(np.arange(60)).confusion)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.015)


def test_intervals_over_seeds_hold_where_trainings_differ() -> None:
    """Three seeds of 60 records, of which a third is scored by two or three of them."""
    rng = np.random.default_rng(0)
    n_held = {"both": 0, "records alone": 0}
    for draw in range(200):
        weights = (rng.random((3, 100)) < 0.6).astype(float)
        of_record, of_seed = rng.normal(0, 0.2, 100), rng.normal(0, 0.05, (3, 1))
        values = weights * (0.1 + of_record + of_seed + rng.normal(0, 0.2, (3, 100)))
        low, high = bootstrap_two_ways(values, weights, draw, draws=400)
        n_held["both"] += low <= 0.1 <= high
        scored = weights.sum(0) > 0
        totals = weights.sum(0)[scored]
        low, high = bootstrap(values.sum(0)[scored] / totals, totals, draw, draws=400)
        n_held["records alone"] += low <= 0.1 <= high
    assert n_held["both"] >= 0.92 * 200 and n_held["records alone"] < 0.88 * 200


def test_seeds_are_no_records() -> None:
    """The same scores three times are not known better than once; one seed is a plain comparison."""
    rng = np.random.default_rng(0)
    ids = [f"r{i}" for i in range(50)]
    first, second = (shares("accuracy", rng.random(50) < share, ids) for share in (0.6, 0.8))
    once, thrice = interval_over_seeds([first]), interval_over_seeds([first] * 3)
    assert once == interval_of(first) and thrice.mean == pytest.approx(once.mean) and thrice.n == 50
    assert thrice.high - thrice.low > 0.95 * (once.high - once.low)
    assert difference_over_seeds([first], [second]) == paired_difference(first, second)
    # seeds that say the contrary: more records would not help
    contrary = difference_over_seeds(
        [first, first], [second, shares("accuracy", 2 * first.values - second.values, ids)]
    )
    contrary = replace(contrary, needed=10)
    assert "and 2 seeds; more seeds may show one" in in_words_over_seeds(contrary, 2, "it")
    assert difference_over_seeds([first] * 2, [second.choose(ids[::-1])] * 2).mean == pytest.approx(
        second.mean - first.mean
    )


def test_few_labels_are_nested_and_stratified() -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation([0] * 140 + [1] * 50 + [2] * 10)
    for seed in (0, 1):
        longest = few_labels(labels, 200, seed)
        assert sorted(longest) == list(range(200))
        for n in (3, 8, 20, 64, 150):
            chosen = few_labels(labels, n, seed)
            assert chosen.tolist() == longest[:n].tolist()
            counts = np.bincount(labels[chosen], minlength=3)
            assert counts.min() >= 1 and np.abs(counts - n * np.array([0.7, 0.25, 0.05])).max() <= 1.5
    assert few_labels(labels, 20, 0).tolist() != few_labels(labels, 20, 1).tolist()
