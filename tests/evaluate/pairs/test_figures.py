"""Figures of pairs, by hand."""

import math

import pytest

from attnpo_jax.evaluate.pairs import figures, rewardbench
from attnpo_jax.evaluate.pairs.scores import FIELDS


def row(id, margin, lengths=(3, 3), subset=None, tie=False, weighted_margin=0.25):
    scores = dict.fromkeys(FIELDS, 0.0)
    for of, m, t in (("", margin, tie), ("weighted_", weighted_margin, False)):
        scores[f"{of}margin"], scores[f"{of}tie"] = m, float(t)
        scores[f"{of}accuracy"] = float(m > 0 and not t)
    return figures.row_of(id, subset, lengths, scores)


def logit(p):
    return math.log(p / (1 - p))


def test_accuracy_of_the_longer_one_and_against_it():
    """Chosen longer, as long, and twice shorter; of the latter one is right."""
    rows = [
        row("a", 1.0, (5, 3)),
        row("b", 1.0, (3, 3)),
        row("c", 1.0, (2, 3)),
        row("d", -1.0, (1, 9)),
    ]
    found = figures.result(rows, weighted=True).figures
    assert found["accuracy of the longer one"].value == 1.5 / 4
    assert found["accuracy where the longer one is rejected"].value == 1 / 2
    assert found["accuracy where the longer one is rejected"].count == 2
    assert found["weighted accuracy where the longer one is rejected"].value == 1
    assert (found["accuracy"].value, found["accuracy"].column) == (3 / 4, "accuracy")
    plain = figures.result(rows, weighted=False).figures
    assert plain.keys() == {name for name in found if not name.startswith("weighted")}


def test_brier_score_and_calibration_error():
    """Confidences 0.8 (right), 0.8 (wrong), 0.62 (right), 0.5 (a tie): gaps of 0.3, 0.38 and 0."""
    margins = [logit(0.8), -logit(0.8), logit(0.62), 1e-9]
    rows = [row(str(i), margin, tie=i == 3) for i, margin in enumerate(margins)]
    found = figures.result(rows, weighted=False).figures
    assert found["Brier score"].value == pytest.approx((0.04 + 0.64 + 0.38**2 + 0.25) / 4)
    error = found["calibration error"]
    assert error.value == pytest.approx((2 * 0.3 + 0.38 + 0) / 4)
    assert error.low <= error.value <= error.high and error.column is None
    bins = {name: f for name, f in found.items() if "at confidence" in name}
    assert {name: round(f.value, 6) for name, f in bins.items()} == {
        "accuracy at confidence 0.50 to 0.55": 0.5,
        "mean confidence at confidence 0.50 to 0.55": 0.5,
        "accuracy at confidence 0.60 to 0.65": 1.0,
        "mean confidence at confidence 0.60 to 0.65": 0.62,
        "accuracy at confidence 0.80 to 0.85": 0.5,
        "mean confidence at confidence 0.80 to 0.85": 0.8,
    }
    assert all(f.detail for f in bins.values())
    assert [f.count for name, f in bins.items() if name.startswith("acc")] == [1, 1, 2]


def test_a_margin_of_any_size_has_a_probability():
    rows = [row("a", 2000.0), row("b", -2000.0)]
    found = figures.result(rows, weighted=False).figures
    assert (found["Brier score"].value, found["calibration error"].value) == (0.5, 0.5)


def test_subsets_have_accuracies_of_their_own():
    rows = [row("a", 1.0, subset="x"), row("b", -1.0, subset="x"), row("c", 1.0, subset="y")]
    found = figures.result([*rows, row("d", 1.0)], weighted=False).figures
    assert (found["accuracy, x"].value, found["accuracy, x"].count) == (0.5, 2)
    assert (found["accuracy, y"].value, found["accuracy, y"].column) == (1.0, "accuracy y")
    assert not found["accuracy, x"].detail and not any("RewardBench" in name for name in found)


def test_rewardbench_s_sections_count_subsets_as_the_benchmark_does():
    """984 for math-prm, 164 for each language, whatever the numbers of pairs at hand."""
    subsets = ["math-prm", "hep-cpp", "hep-cpp", "mt-bench-hard", None]
    found = rewardbench.sections(subsets, [1.0, 0.0, 1.0, 0.0, 1.0])
    assert {name: f.value for name, f in found.items()} == {
        "RewardBench, Chat Hard": 0.0,
        "RewardBench, Reasoning": pytest.approx((984 * 1 + 164 * 0.5) / (984 + 164)),
    }
    assert [f.count for f in found.values()] == [1, 3]
    assert found["RewardBench, Chat Hard"].low == 0 < found["RewardBench, Chat Hard"].high
    whole = rewardbench.sections(
        ["alpacaeval-easy", "mt-bench-med", *subsets, "donotanswer"],
        [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0],
    )
    chat, reasoning = 100 / 140, (984 + 82) / 1148
    assert whole["RewardBench, Chat"].value == pytest.approx(chat)
    assert whole["RewardBench, score"].value == pytest.approx((chat + 0 + 1 + reasoning) / 4)
    assert whole["RewardBench, score"].count == 7
    assert not rewardbench.is_of(["failure", None])


def test_rewardbench_has_four_sections_and_as_much_mathematics_as_code():
    sizes = {name: sum(counts.values()) for name, counts in rewardbench.SECTIONS.items()}
    assert sizes == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 2 * 984}
