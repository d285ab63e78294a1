import math

import numpy as np
import pytest
from scipy import stats

from attnpo_jax.runtime import intervals


@pytest.mark.parametrize("wins, n", [(8, 10), (0, 12), (30, 30), (499, 1000)])
def test_of_a_proportion_it_is_wilsons(wins, n):
    found = intervals.mean([1.0] * wins + [0.0] * (n - wins))
    expected = stats.binomtest(wins, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("values", [[2.0, 4.0, 9.0], [-1.0, 0.5, 0.25, 3.0]])
def test_of_other_values_it_is_students(values):
    expected = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    np.testing.assert_allclose(intervals.mean(values), expected)


def test_of_one_value_or_none_there_is_none():
    assert all(map(math.isnan, intervals.mean([3.0])))
    assert all(map(math.isnan, intervals.mean([])))
    assert all(map(math.isnan, intervals.bootstrap(0, lambda rows: 1.0)))


@pytest.mark.parametrize("probabilities", [(0.5, 0.2, 0.3), (0.75, 0.1, 0.15), (0.9, 0.0, 0.1)])
@pytest.mark.parametrize("n", [40, 300])
def test_it_holds_a_known_win_rate_in_93_to_97_of_100_draws(probabilities, n):
    """Wins, ties at a half and losses, drawn 2,000 times."""
    rng = np.random.default_rng(7)
    draws = rng.choice([1.0, 0.5, 0.0], (2000, n), p=probabilities)
    truth = probabilities[0] + 0.5 * probabilities[1]
    holds = np.mean([low <= truth <= high for low, high in map(intervals.mean, draws)])
    assert 0.93 <= holds <= 0.97


@pytest.mark.parametrize("p_both, p_first, p_second", [(0.4, 0.2, 0.1), (0.6, 0.1, 0.15)])
def test_paired_differences_hold_the_true_one(p_both, p_first, p_second):
    rng = np.random.default_rng(5)
    cells = np.array([[1, 1], [1, 0], [0, 1], [0, 0]])
    p = [p_both, p_first, p_second, 1 - p_both - p_first - p_second]
    holds = 0
    for _ in range(2000):
        drawn = cells[rng.choice(4, 120, p=p)]
        low, high = intervals.paired_difference(drawn[:, 0], drawn[:, 1])
        holds += low <= p_second - p_first <= high
    assert 0.93 <= holds / 2000 <= 0.97


def test_paired_differences_of_scores_are_students():
    """Of many that differ by a hundredth, it is no wider than their spread says."""
    rng = np.random.default_rng(5)
    first = rng.uniform(0.2, 0.8, 100)
    second = first + 0.01 + rng.normal(0, 0.01, 100)
    low, high = intervals.paired_difference(first, second)
    expected = stats.ttest_rel(second, first).confidence_interval(0.95)
    np.testing.assert_allclose((low, high), expected)
    assert 0 < low < 0.01 < high < 0.02


def test_bootstrap_of_a_mean_holds_it():
    rng = np.random.default_rng(3)
    holds = 0
    for draw in range(300):
        x = rng.exponential(size=80)
        low, high = intervals.bootstrap(80, lambda rows, x=x: x[rows].mean(), draws=300, seed=draw)
        holds += low <= 1 <= high
    assert 0.88 <= holds / 300 <= 0.98


def test_sign_test():
    assert intervals.sign_test(0, 0) == 1
    # Of ten tosses, eight or more of one side: 2 (45 + 10 + 1) / 1024.
    assert intervals.sign_test(8, 2) == pytest.approx(112 / 1024)


def test_means_of_columns_have_scipys_percentile_intervals():
    values = np.random.default_rng(0).normal(size=(60, 2)) * [1.0, 5.0]
    for column, found in enumerate(intervals.bootstrap_means(values, draws=4000)):
        expected = stats.bootstrap(
            (values[:, column],), np.mean, method="percentile", n_resamples=4000
        ).confidence_interval
        atol = 0.05 * (found.high - found.low)
        np.testing.assert_allclose(found[1:], expected, atol=atol)
        assert found.value == pytest.approx(values[:, column].mean())


def test_columns_are_resampled_alike_and_what_is_missing_is_left_out():
    one = np.array([0.0, 1.0, 4.0, 2.0])
    missing = np.where([True, True, False, True], 3.0, np.nan)
    alone = np.array([np.nan, np.nan, 5.0, np.nan])
    first, shifted, of_three, of_one = intervals.bootstrap_means(
        np.stack([one, one + 1, missing, alone], 1)
    )
    np.testing.assert_allclose(np.subtract(shifted, first), 1.0)
    assert of_three == (3.0, 3.0, 3.0)
    assert of_one.value == 5.0 and math.isnan(of_one.low) and math.isnan(of_one.high)
    (of_none,) = intervals.bootstrap_means(np.zeros((0, 1)))
    assert np.isnan(of_none).all()
