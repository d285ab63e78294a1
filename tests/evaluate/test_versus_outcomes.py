"""Verdicts to win rates, against figures worked out by hand."""

import functools
import math

import numpy as np
import pytest
from scipy import optimize, special

from attnpo_jax.evaluate.versus import outcomes as of

NAN = math.nan


@pytest.mark.parametrize(
    "verdicts, outcome, first",
    [
        ([0.1, 2.0], 1.0, 0.5),  # preferred at A, and at B
        ([-0.1, -2.0], 0.0, 0.5),
        ([0.5, -3.0], 0.5, 1.0),  # A both times
        ([-0.5, 3.0], 0.5, 0.0),  # B both times
        ([0.0, 1.0], 0.5, 0.25),
        ([NAN, 1.0], 0.5, 0.0),
        ([NAN, -1.0], 0.5, 1.0),
    ],
)
def test_only_what_both_orders_say_is_decided(verdicts, outcome, first):
    assert of.outcome(verdicts) == outcome
    assert of.first_shown(verdicts) == first


def test_pairs_that_were_not_read_say_nothing_of_position():
    assert of.outcome([NAN, NAN]) == 0.5 and math.isnan(of.first_shown([NAN, NAN]))


@pytest.mark.parametrize(
    "text, top, verdict",
    [
        ("A", [{"A": -0.1, "B": -2.1}], 2.0),
        # p(A) = 0.2 + 0.1, p(B) = 0.6
        (" B", [{" B": math.log(0.6), "A": math.log(0.2), " A": math.log(0.1)}], -math.log(2)),
        ("A", [{"A": -0.1, "The": -3.0, "I": -5.1}], 5.0),  # B is no likelier than "I"
        ("The", [{"The": -0.1, "I": -3.0}], NAN),
        ("**B**: it is shorter", [{"**": -0.1, "I": -3.0}], -1.0),
        ("A.", [], 1.0),
        ("Answer A", [], NAN),
        ("Blue", [], NAN),
        ("", [], NAN),
        ("B", [{"B": -0.2}], -1.0),
    ],
)
def test_letters_are_read_from_log_probs_or_from_the_text(text, top, verdict):
    np.testing.assert_allclose(of.letters_verdict(text, top), verdict, rtol=1e-12)


def test_win_rates_and_their_intervals():
    value, low, high = of.win_rate([1.0] * 60 + [0.0] * 20 + [0.5] * 20)
    assert value == 0.7
    # The standard error is sqrt((0.65 - 0.49) / 100) = 0.04.
    np.testing.assert_allclose([low, high], [0.7 - 1.96 * 0.04, 0.7 + 1.96 * 0.04], atol=0.006)
    value, low, high = of.win_rate([0.5] * 10)
    assert value == 0.5 and low < 0.3 and high > 0.7  # ties alone are no certainty
    assert all(map(math.isnan, of.win_rate([])))


def test_intervals_hold_a_known_win_rate_as_often_as_they_say():
    rng = np.random.default_rng(0)
    chances, wins = [0.45, 0.2, 0.35], np.array([1.0, 0.0, 0.5])
    held = 0
    for _ in range(60):
        _, low, high = of.win_rate(rng.choice(wins, 150, p=chances))
        held += low <= 0.625 <= high
    assert held >= 52  # 57 are expected, give or take 1.7


def test_without_differences_in_length_the_win_rate_stays_as_it_is():
    outcomes = [1.0, 1.0, 0.5, 0.0, 1.0]
    value, low, high = of.length_controlled(outcomes, [9] * 5, [9] * 5)
    np.testing.assert_allclose(value, 0.7, atol=0.002)
    assert low < 0.7 < high


def test_two_lengths_by_hand():
    """Longer by d: 9 of 10 won; shorter by d: 5 of 10. Half-way in logits, they are equal."""
    outcomes = [1.0] * 9 + [0.0] + [1.0] * 5 + [0.0] * 5
    lengths = [150] * 10 + [50] * 10
    value, *_ = of.length_controlled(outcomes, lengths, [100] * 20, ridge=0.0)
    np.testing.assert_allclose(value, special.expit((math.log(9) + 0) / 2), rtol=1e-6)  # 0.75
    shrunk, *_ = of.length_controlled(outcomes, lengths, [100] * 20)
    assert 0.74 < shrunk < value


def test_the_fit_is_that_of_a_general_minimizer():
    rng = np.random.default_rng(3)
    lengths, others = rng.integers(20, 900, (2, 80))
    d = (lengths - others) / (lengths - others).std(ddof=1)
    outcomes = rng.choice([0.0, 0.5, 1.0], 80, p=[0.2, 0.2, 0.6])

    def loss(at):
        logits = at[0] * np.tanh(d) + at[1]
        return np.sum(np.logaddexp(0, logits) - outcomes * logits) + 0.005 * at @ at

    expected = special.expit(optimize.minimize(loss, [0.0, 0.0], tol=1e-12).x[1])
    value, low, high = of.length_controlled(outcomes, lengths, others)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert low < value < high


def test_a_preference_for_length_alone_is_taken_out():
    rng = np.random.default_rng(5)
    lengths, others = rng.normal(600, 100, 400), rng.normal(400, 100, 400)
    d = (lengths - others) / (lengths - others).std(ddof=1)
    outcomes = (rng.random(400) < special.expit(3 * np.tanh(d))).astype(float)
    value, low, high = of.length_controlled(outcomes, lengths, others)
    assert np.mean(outcomes) > 0.8 and low < 0.5 < high and high - low < 0.4


@pytest.mark.parametrize("outcome, expected", [(1.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_outcomes_that_are_all_the_same(outcome, expected):
    value, low, high = of.length_controlled([outcome] * 6, range(6), [3] * 6)
    np.testing.assert_allclose(value, expected, atol=1e-4)
    assert math.isnan(low) and math.isnan(high)
    assert all(map(math.isnan, of.length_controlled([], [], [])))


def test_lengths_that_tell_all_give_a_finite_fit():
    found = of.length_controlled([1.0, 1.0, 0.0, 0.0], [9, 8, 1, 2], [5] * 4)
    np.testing.assert_allclose(found[0], 0.5, atol=0.1)


@pytest.mark.parametrize("probabilities", [(0.5, 0.2, 0.3), (0.65, 0.1, 0.25)])
def test_the_interval_of_a_win_rate_holds_it_in_93_to_97_of_100_draws(probabilities):
    """Wins, ties and losses of 150 pairs, drawn 2,000 times."""
    rng = np.random.default_rng(11)
    truth = probabilities[0] + probabilities[1] / 2

    @functools.cache
    def interval(wins, ties, losses):  # the order of pairs is nothing to it
        return of.win_rate([1.0] * wins + [0.5] * ties + [0.0] * losses)[1:]

    found = [interval(*counts) for counts in rng.multinomial(150, probabilities, 2000).tolist()]
    holds = np.mean([low <= truth <= high for low, high in found])
    assert 0.93 <= holds <= 0.97
