"""What a judge did, in numbers worked out by hand."""

import numpy as np
import pytest

from attnpo_jax.judge import figures
from attnpo_jax.judge.figures import judge_figures
from attnpo_jax.judge.summary import summary_lines
from attnpo_jax.runtime import intervals
from attnpo_jax.weighting import ResponseTokens, attention

EVEN = [[0.1, 0.1], [0.2, 0.2]]


def row(verdict, chosen, rejected, ids=((1, 2), (1, 3))):
    """A pair of one layer, its attention by order and token."""
    return {
        "judge_verdict": np.array(verdict, np.float32),
        "judge_chosen": np.array(chosen, np.float32)[:, None],
        "judge_rejected": np.array(rejected, np.float32)[:, None],
        "chosen_ids": np.array(ids[0]),
        "rejected_ids": np.array(ids[1]),
        "chosen_text_length": len(chosen[0]),
        "rejected_text_length": len(rejected[0]),
    }


def test_verdicts():
    found = judge_figures(
        [
            row([1.0, 2.0], EVEN, EVEN),  # right in both orders
            row([3.0, -1.0], EVEN, EVEN),  # prefers A both times
            row([-1.0, -2.0], EVEN, EVEN),  # wrong in both
            row([-1.0, 0.0], EVEN, EVEN),  # an even verdict does not agree
        ]
    ).verdict
    assert [x.value for x in (found.both, found.one, found.none)] == [0.25, 0.25, 0.5]
    assert tuple(found.both)[1:] == intervals.mean([1, 0, 0, 0])
    # Sums of 3, 2, -3 and -1.
    assert found.right.value == 0.5 and found.signal.value == pytest.approx(1 / 8)
    # Towards A: order 0 as it is, order 1 the other way round; by pair -1/2, 2, 1/2, -1/2.
    assert found.position_bias.value == pytest.approx(3 / 8)
    assert tuple(found.position_bias)[1:] == pytest.approx(intervals.student([-0.5, 2, 0.5, -0.5]))
    assert judge_figures([row([np.nan, np.nan], EVEN, EVEN)]).verdict is None


def test_how_weights_lie():
    found = judge_figures(
        [
            # Chosen: no attention, uniform, and then all on the first: shares 3/4 and 1/4.
            row([0, 0], [[0.0, 0.0], [0.3, 0.0]], EVEN),
            row([0, 0], EVEN, [[0.2], [0.1]], ids=((4, 5), (6,))),
        ]
    )
    (layer,) = found.layers
    spread = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))) / 2
    # A response of one token has none; a pair's figure is the mean of its responses'.
    assert layer.effective_share.value == pytest.approx(((spread + 1) / 2 + 1) / 2)
    assert layer.first_token.value == pytest.approx(((0.75 + 0.5) / 2 + (0.5 + 1) / 2) / 2)
    # Both begin with token 1, whose weights are 1.5 and 1; the second pair shares nothing.
    assert (found.shared, layer.prefix_gap.value) == (1, pytest.approx(0.5 / 2.5))


def test_shared_beginnings_end_with_the_text():
    # What follows the text is a closing token that both have, and no part of it.
    alike = row([0, 0], [[0.1, 0.2], [0.1, 0.2]], EVEN, ids=((1, 2, 9), (1, 2, 9)))
    found = judge_figures([alike])
    # Weights 2/3 and 4/3 against 1 and 1.
    assert found.layers[0].prefix_gap.value == pytest.approx((2 / 3) / 4)


def test_rows_of_a_group_count_once():
    rows = [row([1.0, 1.0], EVEN, EVEN)] * 3 + [row([-1.0, -1.0], EVEN, EVEN)]
    assert judge_figures(rows).verdict.right.value == 0.75
    found = judge_figures(rows, ["a", "a", "a", "b"]).verdict.right
    assert tuple(found) == (0.5, *intervals.mean([1, 0]))


def test_the_sink_fix_is_that_of_the_weighting():
    rng = np.random.default_rng(0)
    for T in (1, 4, 5, 9):
        judge_2ST = rng.uniform(size=(2, 3, T)).astype(np.float32)
        judge_2ST[:, 1, 1:] = 0
        own = figures.fixed(figures.shares(judge_2ST)) * T
        given = ResponseTokens.of([[True] * T], judge_B2ST=judge_2ST[None])
        for layer in range(3):
            np.testing.assert_allclose(own[layer], attention(given, layer=layer)[0], rtol=1e-5)


def test_effective_share_and_gap_at_their_ends():
    shares = np.array([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    np.testing.assert_allclose(figures.effective_share(shares), [1.0, 0.25, 0.5])
    apart = figures.gap(np.array([[1.0, 0], [1, 2], [0, 0]]), np.array([[0, 2.0], [1, 2], [0, 0]]))
    np.testing.assert_allclose(apart, [1.0, 0.0, np.nan])


def test_lines_say_figures_with_intervals():
    found = judge_figures([row([2.0, -1.0], EVEN, EVEN)] * 2)
    lines = dict(summary_lines(found, [7]))
    low, high = (f"{100 * x:.0f}" for x in intervals.mean([1, 1]))
    assert lines["by both orders together"] == f"right in 100% ({low} to {high})"
    assert lines["position bias, log-odds for A"] == "+1.50 (+1.50 to +1.50)"
    assert (
        lines["weights of layer 7"]
        == "effective share 100%, first token 50%, apart on shared starts 0%"
    )
