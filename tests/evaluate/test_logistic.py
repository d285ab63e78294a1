import numpy as np
import pytest
from scipy import optimize
from scipy.special import expit

from attnpo_jax.evaluate import logistic, pooled


def test_without_features_it_is_the_log_odds_of_the_weighted_mean():
    y, w = np.array([1.0, 0.25, 0.0]), np.array([2.0, 4.0, 1.0])
    mean = (2 * 1 + 4 * 0.25) / 7
    assert logistic.fit(np.ones((3, 1)), y, w) == pytest.approx([np.log(mean / (1 - mean))])


@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_it_is_the_minimum_that_another_method_finds(ridge):
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(80, 4)), rng.uniform(size=80), rng.uniform(size=80)

    def loss(b):
        p = expit(x @ b)
        return -np.sum(w * (y * np.log(p) + (1 - y) * np.log(1 - p))) + ridge / 2 * b @ b

    found = optimize.minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-9})
    assert logistic.fit(x, y, w, ridge=ridge) == pytest.approx(found.x, abs=1e-6)
    assert logistic.fit(x, y, w, ridge=ridge, start_F=found.x + 3) == pytest.approx(
        found.x, abs=1e-6
    )


def test_what_can_be_told_apart_for_certain_is_predicted_so():
    x = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    p = expit(x @ logistic.fit(x, np.array([1.0, 1.0, 0.0, 0.0])))
    assert p == pytest.approx([1, 1, 0, 0], abs=1e-9)


def test_columns_that_say_nothing_get_nothing():
    x = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert logistic.fit(x, np.array([1.0, 1.0, 0.0])) == pytest.approx([np.log(2), 0.0])


def test_linearized_rows_have_the_pooled_mean_and_are_plain_means_where_counts_are_equal():
    assert pooled.linearized([3.0, 5.0], [2, 2]) == pytest.approx([1.5, 2.5])
    sums, counts = [3.0, 1.0, 9.0], [3, 1, 2]
    assert pooled.linearized(sums, counts).mean() == pytest.approx(13 / 6)


def test_linearized_rows_have_the_spread_of_the_pooled_mean():
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 7, 400)
    sums = np.array([rng.normal(2, 1, n).sum() for n in counts]) + rng.normal(0, 1, 400) * counts
    drawn = rng.integers(0, 400, (2000, 400))
    spread = (sums[drawn].sum(1) / counts[drawn].sum(1)).std()
    values = pooled.linearized(sums, counts)
    assert values.std(ddof=1) / 20 == pytest.approx(spread, rel=0.06)


@pytest.mark.parametrize("penalty", [1e-4, 1.0, 4.0, 1e4])
def test_an_absolute_penalty_is_paid_for_as_the_conditions_of_the_minimum_say(penalty):
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(80, 4)), rng.uniform(size=80), rng.uniform(size=80)
    y[x[:, 0] > 0] = 1.0
    b = logistic.fit_l1(x, y, w, penalty)
    slope = x.T @ (w * (expit(x @ b) - y))
    assert (b == 0).all() == (penalty == 1e4)
    assert slope[b != 0] == pytest.approx(-penalty * np.sign(b[b != 0]), abs=1e-6)
    assert (np.abs(slope[b == 0]) <= penalty + 1e-9).all()
