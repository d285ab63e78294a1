"""AUC and lift on marked tokens, against values worked out by hand."""

import numpy as np
import pytest

from attnpo_jax.probe import measures


def mask(*places, length):
    return np.isin(np.arange(length), places)


def test_auc_counts_pairs_of_a_marked_and_an_unmarked_token_and_ties_by_half():
    weights = np.array(
        [
            [4.0, 1.0, 3.0, 2.0],  # marked 4 and 3 beat both others: 4 of 4
            [1.0, 1.0, 1.0, 1.0],  # all ties
            [0.0, 5.0, 3.0, 2.0],  # 3 beats 2 and loses to 5, 0 loses twice: 1 of 4
            [2.0, 1.0, 1.0, 0.0],  # 2 beats both, 1 ties with 1 and beats 0: 3.5 of 4
        ]
    )
    found = measures.auc(weights, mask(0, 2, length=4))
    np.testing.assert_allclose(found, [1.0, 0.5, 0.25, 0.875])
    for nothing in (mask(length=4), mask(0, 1, 2, 3, length=4)):
        assert np.isnan(measures.auc(weights, nothing)).all()


def test_lift_is_the_marked_tokens_mean_weight_in_units_of_the_response_s():
    weights = np.array([[4.0, 0.0, 2.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    np.testing.assert_allclose(measures.lift(weights, mask(0, 2, length=4)), [1.5, 1.0])
    assert np.isnan(measures.lift(weights, mask(length=4))).all()


def test_at_its_place_a_token_is_held_against_other_groups_unmarked_tokens_there():
    weights = [np.array([[1.0, 6.0, 2.0]]), np.array([[1.0, 2.0, 2.0]]), np.array([[9.0, 6.0]])]
    marked = [mask(1, length=3), mask(length=3), mask(length=2)]
    found = measures.at_place(weights, marked, "aaa", "xyz", least=2)
    # Against 2 and 6: one win, one tie; their mean is 4.
    assert (found[0][0], found[1][0]) == (0.75, 1.5)
    assert np.isnan(found[0][1:]).all()
    # With 3 wanted, the places around count too: 1, 2, 2, 9 and 6 with mean 4.
    auc, lift = measures.at_place(weights, marked, "aaa", "xyz", least=3)
    assert (auc[0], lift[0]) == (pytest.approx((3 + 0.5) / 5), 1.5)
    # Another subset's and its own group's tokens are none to be held against.
    for subsets, groups in (("abb", "xyz"), ("aaa", "xxx")):
        assert np.isnan(measures.at_place(weights, marked, subsets, groups)[0]).all()


@pytest.mark.parametrize("lengths", [(30, 30, 30, 30), (12, 30, 17, 25)])
def test_weights_that_depend_on_the_place_alone_find_nothing_there(lengths):
    rng = np.random.default_rng(0)
    number = 40
    lengths = [lengths[r % 4] for r in range(number)]
    weights = [np.exp(-0.2 * np.arange(n))[None] for n in lengths]
    marked = [mask(*rng.integers(0, 6, 2), length=n) for n in lengths]
    auc, lift = measures.at_place(weights, marked, ["a"] * number, range(number))
    np.testing.assert_allclose(auc, 0.5)
    np.testing.assert_allclose(lift, 1.0)
    # Without the place divided out, they find marks that stand early.
    assert np.mean([measures.auc(w, m) for w, m in zip(weights, marked, strict=True)]) > 0.8
