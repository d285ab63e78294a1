"""Weightings of published methods against figures of their public code, and by hand."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax import losses, weighting
from attnpo_jax.weighting import ResponseTokens
from tests.weighting.responses import from_toy

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


@pytest.fixture(scope="module")
def toy():
    return json.loads((GOLDENS / "objectives.json").read_text())


@pytest.fixture(scope="module")
def methods():
    return json.loads((GOLDENS / "methods.json").read_text())


def scores(weights, response):
    """Scores of the chosen and of the rejected responses."""

    def side(first):
        w = weights[first::2]
        return losses.ResponseScores(
            policy_B=jnp.sum(w * response.policy_logps_BT[first::2], -1),
            reference_B=jnp.sum(w * response.reference_logps_BT[first::2], -1),
            weight_B=jnp.sum(w, -1),
            length_B=jnp.sum(response.mask_BT[first::2], -1),
        )

    return side(0), side(1)


@pytest.mark.golden
def test_confpo_with_simpo_is_the_public_code(toy, methods):
    response = from_toy(toy)
    chosen, rejected = scores(weighting.confpo(response), response)
    margin = chosen.policy_B / chosen.weight_B - rejected.policy_B / rejected.weight_B
    loss = -jax.nn.log_sigmoid(2 * margin - 1)
    np.testing.assert_allclose(loss, methods["confpo"]["loss_per_pair"], atol=1e-5)


@pytest.mark.golden
def test_tgdpo_with_sigmoid_is_the_public_formula(toy, methods):
    teacher = np.array(methods["tgdpo"]["teacher_logps"])[:, None]
    response = from_toy(toy, ready_BKT=teacher, weight_columns=("teacher",))
    weights = weighting.tgdpo(response, column="teacher", alpha=0.5, beta=0.1)
    loss = losses.sigmoid(*scores(weights, response), beta=0.1)
    np.testing.assert_allclose(loss, methods["tgdpo"]["loss_per_pair"], atol=1e-5)
    np.testing.assert_allclose(weights[1, 0], 1 - 0.05 * -0.05, rtol=1e-6)  # -0.85 against -0.8
    plain = losses.sigmoid(*scores(weighting.tgdpo(response, column=-1, alpha=0.0), response))
    np.testing.assert_allclose(plain, toy["loss_per_pair"]["sigmoid"], atol=1e-5)


@pytest.mark.golden
def test_tis_dpo_transforms_as_the_public_code(methods):
    golden = methods["tis_transform"]
    (x,) = raw = np.array([golden["scores"]], np.float32)
    response = ResponseTokens.of(
        np.ones((2, len(x)), bool),
        is_chosen=[True, False],
        ready_BKT=np.tile(raw, (2, 1, 1)),
        weight_columns=("positive",),
    )
    chosen, rejected = np.asarray(weighting.tis_dpo(response, column="positive"))
    np.testing.assert_allclose(chosen, golden["threshold_and_scale"], atol=1e-6)
    np.testing.assert_allclose(rejected, 2 - chosen, atol=1e-6)  # the sign is turned
    # Against a second column instead of the reference: where both agree, all weigh 1.
    same = weighting.tis_dpo(response, column="positive", against="positive")
    np.testing.assert_array_equal(same, np.ones((2, len(x))))


@pytest.mark.golden
@pytest.mark.parametrize("alpha", [0, 0.5])
def test_ld_dpo_with_sigmoid_is_trl_s(toy, alpha):
    response = from_toy(toy)
    weights = weighting.ld_dpo(response, alpha=alpha)
    loss = losses.sigmoid(*scores(weights, response), beta=0.1)
    golden = toy["loss_per_pair"][f"sigmoid ld_alpha={alpha}"]
    np.testing.assert_allclose(loss, golden, atol=1e-5)


def test_d2po_counts_from_one_and_covers_closing_tokens():
    mask = [[True, True, True, False], [False] * 4]
    response = ResponseTokens.of(mask, text_mask_BT=[[True, True, False, False], [False] * 4])
    np.testing.assert_allclose(
        weighting.d2po(response, gamma=0.9), [[0.9, 0.81, 0.729, 0], [0] * 4], rtol=1e-6
    )
    np.testing.assert_array_equal(weighting.d2po(response, gamma=1.0), np.array(mask))


def test_surprisal_and_entropies_are_shares_of_the_length():
    mask = [[True, True, True, False], [True, True, False, False], [False] * 4]
    values = np.array([[3.0, 0, 3, 9], [0, 0, 0, 0], [0] * 4])
    expected = [[1.5, 0, 1.5, 0], [1, 1, 0, 0], [0] * 4]
    response = ResponseTokens.of(mask, reference_logps_BT=-values, policy_entropy_BT=values)
    np.testing.assert_allclose(weighting.reference_surprisal(response), expected)
    np.testing.assert_allclose(weighting.policy_entropy(response), expected)
    of_reference = ResponseTokens.of(mask, reference_entropy_BT=values)
    np.testing.assert_allclose(weighting.reference_entropy(of_reference), expected)
    with pytest.raises(ValueError, match="policy_entropy_BT is not known here.*declares"):
        weighting.policy_entropy(ResponseTokens.of(mask))


def test_critical_tokens_by_hand():
    # p of the right answers' model, q of the wrong ones', in both responses; the third is closing.
    p, q = np.log([0.8, 0.1, 1.0]), np.log([0.2, 0.4, 1.0])
    text = [[True, True, False]] * 2
    response = ResponseTokens.of(
        [[True] * 3] * 2,
        text_mask_BT=text,
        is_chosen=[True, False],
        ready_BKT=np.tile(np.stack([p, q]), (2, 1, 1)),
        weight_columns=("right", "wrong"),
    )
    weights = weighting.critical_tokens(response, column="right", against="wrong")
    np.testing.assert_allclose(weights, [[0.8, 0.2, 1], [0.2, 0.8, 1]], rtol=1e-5)
    squared = weighting.critical_tokens(
        response, column="right", against="wrong", beta=2.0, rejected_only=True
    )
    np.testing.assert_allclose(squared, [[1, 1, 1], [1 / 17, 16 / 17, 1]], rtol=1e-5)


def test_sepo_takes_the_highest_of_the_chosen_and_the_lowest_of_the_rejected():
    rewards = np.tile(np.arange(10.0), (2, 1))
    response = ResponseTokens.of(
        np.ones((2, 11), bool),
        text_mask_BT=np.tile(np.arange(11) < 10, (2, 1)),
        is_chosen=[True, False],
        ready_BKT=np.pad(rewards - 1, ((0, 0), (0, 1)))[:, None],
        reference_logps_BT=np.full((2, 11), -1.0),
        weight_columns=("oracle",),
    )
    weights = np.asarray(weighting.sepo(response, column="oracle", share=0.3))
    assert [np.flatnonzero(row).tolist() for row in weights] == [[7, 8, 9], [0, 1, 2]]
    one = np.asarray(weighting.sepo(response, column="oracle", share=0.01))
    assert [np.flatnonzero(row).tolist() for row in one] == [[9], [0]]


def test_top_tokens_are_as_many_as_the_share_says():
    top = jax.jit(weighting.top_tokens, static_argnames="share")
    for n, share, kept in (
        (10, 0.3, 3),
        (10, 0.31, 4),
        (3, 1.0, 3),
        (1, 0.001, 1),
        (1000, 0.7, 700),
    ):
        found = top(jnp.zeros((1, 1024)), jnp.arange(1024)[None] < n, share=share)
        assert int(found.sum()) == kept and found[0, :kept].all()  # of equals, the first ones


def common_length(a, b):
    """Length of the longest common subsequence, by the table."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            both = table[i, j] + 1 if x == y else 0
            table[i + 1, j + 1] = max(table[i, j + 1], table[i + 1, j], both)
    return table[-1, -1]


def test_diff_marks_all_but_a_longest_common_subsequence():
    rng = np.random.default_rng(0)
    B, T, U = 64, 12, 9
    lengths, others = rng.integers(0, T + 1, B), rng.integers(0, U + 1, B)
    tokens = np.where(np.arange(T) < lengths[:, None], rng.integers(0, 4, (B, T)), -1)
    partners = np.where(np.arange(U) < others[:, None], rng.integers(0, 4, (B, U)), -1)
    shared = np.asarray(jax.jit(weighting.in_common)(tokens, partners))
    sizes = set()
    for row in range(B):
        a, b = tokens[row, : lengths[row]], partners[row, : others[row]]
        marked = a[shared[row, : lengths[row]]].tolist()
        rest = iter(b.tolist())
        assert all(token in rest for token in marked)  # in the same order in the other response
        assert len(marked) == common_length(a, b)
        assert not shared[row, lengths[row] :].any()
        sizes.add(len(marked))
    assert {0, 5} < sizes


def test_diff_leaves_nothing_of_equal_responses():
    ids = [[4, 4, 2, -1]]
    response = ResponseTokens.of([[True, True, True, False]], tokens_BT=ids, partner_tokens_BT=ids)
    np.testing.assert_array_equal(weighting.diff(response), [[0, 0, 0, 0]])
    with pytest.raises(ValueError, match="tokens_BT is not known here"):
        weighting.diff(ResponseTokens.of([[True]]))
