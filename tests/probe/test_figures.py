"""Means over responses, pairs and groups, by hand."""

import numpy as np
import pytest

from attnpo_jax.probe.figures import Marks, against_itself, find_marks
from attnpo_jax.probe.weights import Kind, layer_kind


def row(chosen, rejected, ids=None):
    """A pair whose one layer looks so in both orders; all tokens differ but for the first."""
    ids = ids or ([1, *range(10, 9 + len(chosen))], [1, *range(20, 19 + len(rejected))])
    return {
        "chosen_ids": np.array(ids[0]),
        "rejected_ids": np.array(ids[1]),
        "chosen_text_length": len(chosen),
        "rejected_text_length": len(rejected),
        "judge_chosen": np.tile(np.float32(chosen), (2, 1, 1)),
        "judge_rejected": np.tile(np.float32(rejected), (2, 1, 1)),
        "ref_chosen_logps": np.zeros(len(chosen), np.float32),
        "ref_rejected_logps": np.zeros(len(rejected), np.float32),
    }


def marks(*masks, subsets, groups):
    return Marks([np.array(mask, bool) for mask in masks], subsets, subsets, groups)


def test_figures_are_means_over_groups_of_means_over_their_pairs():
    rows = [
        row([4.0, 1.0, 2.0, 1.0], [1.0, 1.0]),  # AUC 1 on the first token; rejected: 1/2
        row([1.0, 3.0], [1.0, 2.0]),  # rejected only, on the second: 1
        row([1.0, 1.0], [2.0, 1.0]),  # rejected only, on the second: 0
        row([1.0, 1.0], [1.0, 1.0]),  # nothing is marked
    ]
    given = marks(
        [1, 0, 0, 0], [1, 0], [0, 0], [0, 1], [0, 0], [0, 1], [0, 0], [0, 0],
        subsets=["s", "t", "t", "t"], groups=["a", "a", "b", "c"],
    )  # fmt: skip
    assert given.marked == [0, 1, 2]
    found = {
        one.kind: one
        for one in find_marks([rows[i] for i in given.marked], given.of(given.marked), (0,))
    }
    assert [mask.tolist() for mask in given.of([1]).masks] == [[False, False], [False, True]]
    layer = found[layer_kind(0)]
    # Group a: pair 0 has (1 + 1/2) / 2, pair 1 has 1; group b has 0.
    np.testing.assert_allclose(layer.auc_G, [0.875, 0.0])
    assert layer.all["auc"].value == pytest.approx(0.4375)
    assert (layer.all["auc_chosen"].value, layer.all["auc_rejected"].value) == (1.0, 0.375)
    # Lifts: pair 0 has (2 + 1) / 2, pair 1 4/3, pair 2 2/3.
    assert layer.all["lift"].value == pytest.approx(((1.5 + 4 / 3) / 2 + 2 / 3) / 2)
    assert layer.subsets["s"]["auc"].value == 0.75
    assert layer.subsets["t"]["auc"].value == 0.5
    assert found[Kind("uniform")].all["auc"] == (0.5, 0.5, 0.5)
    assert found[Kind("uniform")].all["lift"] == (1.0, 1.0, 1.0)
    # Pair 0's chosen mark is the token that both have, the others are not: 0 and 0, 1, 1.
    np.testing.assert_allclose(found[Kind("diff")].auc_G, [0.5, 1.0])


def test_what_an_answer_keeps_of_its_lift_against_itself():
    rows = [row([1.0, 1.0], [1.0, 3.0]), row([1.0, 1.0], [1.0, 1.0])]
    alone = [row([1.0, 2.0], [1.0, 2.0]), row([1.0, 2.0], [3.0, 1.0])]
    masks = [np.array([False, True])] * 2
    (found,) = against_itself(rows, alone, masks, (0,))
    # Lifts 3/2 and 1 with the other answer, 4/3 and 1/2 without.
    assert found.lift.value == pytest.approx((4 / 3 + 1 / 2) / 2)
    assert found.kept.value == pytest.approx((4 / 3 + 1 / 2) / 2.5)
    assert found.kept.low == pytest.approx(0.5) and found.kept.high == pytest.approx(8 / 9)
