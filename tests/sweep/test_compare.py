"""What runs come to: means over seeds, paired differences, ties, tables; from made-up rows."""

import csv
import io
import json

import numpy as np
import pytest
from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax.evaluate.evaluator import Figure, Result, figure
from attnpo_jax.evaluate.files import Evaluation
from attnpo_jax.runtime import intervals
from attnpo_jax.runtime.errors import UsageError
from attnpo_jax.sweep import results
from attnpo_jax.sweep.compare import RANKING, compare, show
from attnpo_jax.sweep.grid import Point
from attnpo_jax.sweep.running import Outcome


def outcome(group, seed, accuracies, *, checks=None, failed=None):
    config = config_lib.default_config()
    config.seed = seed
    point = Point(f"{group},seed={seed}", group, group, {"seed": str(seed)}, config)
    if failed:
        return Outcome(point, failed=failed)
    rows = [
        {"id": f"p{k}", "accuracy": float(a), "margin": a - 0.25} for k, a in enumerate(accuracies)
    ]
    figures = {name: figure(rows, name) for name in ("accuracy", "margin")}
    figures["hidden"] = figure(rows, "margin", detail=True)
    evaluations = {"pairs": Evaluation("pairs", "step-2", {}, Result(rows, figures))}
    if checks is not None:
        result = Result([], {"checks, strict": Figure(checks)})
        evaluations["checks"] = Evaluation("checks", "step-2", {}, result)
    return Outcome(point, 2, 0.5, evaluations)


def by_group(lines, name):
    return {line.group: line for line in lines if line.name == name}


def test_means_over_seeds_and_differences_row_by_row():
    base, better = np.tile([1, 0, 0, 1, 0, 0, 0, 1], 10), np.tile([1, 1, 1, 1, 1, 0, 1, 1], 10)
    outcomes = [
        *(outcome("dpo", seed, np.roll(base, seed), checks=0.25 + seed / 10) for seed in range(3)),
        *(outcome("new", seed, np.roll(better, seed), checks=0.5 + seed / 10) for seed in range(3)),
    ]
    lines = compare(outcomes)
    found = by_group(lines, RANKING)
    assert list(found) == ["new", "dpo"]  # the best first
    assert (found["dpo"].mean.value, found["dpo"].mean.count) == (0.375, 3)
    assert found["dpo"].difference is None
    difference = found["new"].difference
    # Four of eight rows are won, whatever the seed.
    assert (difference.value, difference.count) == (0.5, 80)
    assert 0 < difference.low < 0.5 < difference.high and not found["new"].tied
    # Of a figure without rows, over the seeds: 0.25 at each of them.
    checks = by_group(lines, "checks/checks, strict")
    assert checks["new"].difference.value == pytest.approx(0.25)
    assert checks["new"].difference.low == pytest.approx(0.25) and not checks["new"].tied
    assert checks["new"].mean.low == intervals.student([0.5, 0.6, 0.7])[0]
    assert not by_group(lines, "pairs/hidden")
    of_new = by_group(compare(outcomes, "new"), RANKING)
    assert (of_new["new"].difference, of_new["dpo"].difference.value) == (None, -0.5)


def test_only_seeds_and_groups_that_finished_count():
    rows = [1, 0, 1, 1]
    outcomes = [
        outcome("a", 0, rows),
        outcome("a", 1, rows, failed="loss is nan"),
        outcome("b", 0, rows),
        outcome("b", 1, [0, 0, 0, 0]),
        outcome("c", 0, rows, failed="x"),
    ]
    found = by_group(compare(outcomes), RANKING)
    assert {group: line.mean.count for group, line in found.items()} == {"a": 1, "b": 2}
    # At seed 0 alone, where all rows are alike: a tie, and not for certain.
    difference = found["b"].difference
    assert difference.value == 0 and difference.low < 0 < difference.high and found["b"].tied
    with pytest.raises(UsageError, match="--baseline=d; accepted: a, b, c"):
        compare(outcomes, "d")
    # Of a baseline that has failed there are no differences.
    assert all(line.difference is None for line in compare(outcomes, "c"))


def test_the_interval_counts_seeds_and_rows():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1, 4000))
    zero = np.zeros((4, 4000))
    # Seeds differ by 1 as a standard deviation, and rows hardly do: t's interval is wider, which
    # the bootstrap of so few can't know.
    shift = np.array([[-1.0], [0.0], [1.0], [2.0]])
    low, high = intervals.crossed_difference(zero, zero + shift)
    error = shift.std(ddof=1) / 2
    assert low == pytest.approx(0.5 - 1.96 * error, abs=0.35)
    assert high == pytest.approx(0.5 + 1.96 * error, abs=0.35)
    # Of one seed, rows alone: the standard error is 1 / sqrt(4000).
    low, high = intervals.crossed_difference(zero[:1], rows)
    assert high - low == pytest.approx(2 * 1.96 * rows.std() / 4000**0.5, rel=0.1)
    assert np.isnan(intervals.crossed_difference(zero[:, :0], zero[:, :0])).all()


def test_tables_fit_and_mark_ties():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, 200)
    # Ten rows of 200 that fell either way, five each: no difference but by chance.
    other = base.copy()
    other[:5], other[5:10] = 0, 1
    name = "attention, layer=(0, 6, 14, 21, 29), beta=0.05, learning_rate=0.00001"
    outcomes = [outcome("dpo", s, base, checks=0.5) for s in range(3)]
    outcomes += [outcome(name, s, other, checks=0.5 + s / 7) for s in range(3)]
    console = Console(file=io.StringIO(), width=200)
    lines = compare(outcomes)
    show(console, lines, "dpo")
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("= ") >= 3 and "= a tie" in text and "±" in text
    for title in (RANKING, "pairs/margin", "checks/checks, strict"):
        assert title in text
    assert "loss" not in text


def test_files_have_a_line_a_run(tmp_path):
    outcomes = [outcome("a", 0, [1, 0]), outcome("b", 0, [], failed="no\nway")]
    results.write(tmp_path, outcomes, compare(outcomes))
    with (tmp_path / results.CSV).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["pairs/accuracy"] for row in rows] == ["0.5", ""]
    assert [row["failed"] for row in rows] == ["", "no\nway"]
    first, second = map(json.loads, (tmp_path / results.JSON_LINES).read_text().splitlines())
    assert first["figures"] == {"pairs/accuracy": 0.5, "pairs/margin": 0.25, "loss": 0.5}
    assert (second["figures"], second["failed"], second["seed"]) == ({}, "no\nway", 0)
    lines = [json.loads(line) for line in (tmp_path / results.COMPARISON).read_text().splitlines()]
    assert lines[0] == {
        "figure": "pairs/accuracy", "group": "a", "mean": 0.5, "low": None, "high": None,
        "seeds": 1, "difference": None,
    }  # fmt: skip
