"""Differences of two prepared datasets, counted by hand."""

import numpy as np
import pytest

from benchmarks.int8_change import change


def row(chosen, chosen_logps, rejected_logps, verdict):
    return {
        "judge_chosen": np.array(chosen, np.float32),
        "judge_rejected": np.ones((2, 1, 2), np.float32),
        "ref_chosen_logps": np.array(chosen_logps, np.float32),
        "ref_rejected_logps": np.array(rejected_logps, np.float32),
        "judge_verdict": np.array(verdict, np.float32),
    }


def test_change():
    full = [row([[[2, 1, 1]], [[1, 0, 1]]], [-1, -2], [-3, -4], [0.5, -0.25])]
    int8 = [row([[[1, 1, 2]], [[1, 0, 1]]], [-1.5, -2], [-3, -3.75], [0.25, 0.25])]
    changed = change(full, int8, layers=[7])
    figures = changed["figures"]
    assert figures["nats_a_token"] == pytest.approx((0.5 + 0 + 0 + 0.25) / 4)
    # Linear between the two largest of four: 2.97 of the 3 steps from 0 to 0.5.
    assert figures["nats_a_token_99th_percentile"] == pytest.approx(0.25 + 0.97 * 0.25)
    assert figures["nats_a_pairs_difference"] == pytest.approx(0.5 + 0.25)
    assert figures["nats_a_verdict"] == pytest.approx((0.25 + 0.5) / 2)
    assert (figures["verdicts"], figures["verdicts_changed"]) == (2, 1)
    (point,) = changed["points"]
    # Chosen: shares 1/2, 1/8, 3/8 become 3/8, 1/8, 1/2; rejected stays, flat: no correlation.
    assert point["layer"] == 7
    assert point["share_moved"] == pytest.approx(1 / 16)
    assert point["share_moved_at_most"] == pytest.approx(1 / 8)
    deviations = np.array([1 / 6, -5 / 24, 1 / 24])
    turned = deviations[::-1]
    expected = (deviations @ turned) / (deviations @ deviations)
    assert point["correlation"] == pytest.approx(expected)
    assert point["correlation_at_least"] == pytest.approx(expected)
