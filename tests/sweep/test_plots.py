"""Plots of a sweep: what is drawn where, and that nothing lies over anything else."""

import json

import numpy as np
import pytest

from attnpo_jax.evaluate.compare import RANKING, Line, compare, shown
from attnpo_jax.runtime import figures
from attnpo_jax.sweep import plots
from attnpo_jax.sweep.running import folder_of
from tests.sweep.outcomes import outcome

LONG = "attention, layer=(0, 6, 14, 21, 29), beta=0.05, lr=1e-5, no {}"
HOSTILE = "$\\alpha$ <b> \x1b[31m {}"


def groups_of(count, name):
    rng = np.random.default_rng(0)
    rates = np.linspace(0.3, 0.9, count)
    return [
        outcome(name.format(k), seed, rng.random(100) < rate)
        for k, rate in enumerate(rates)
        for seed in range(3)
    ]


def boxes_of(texts, figure):
    renderer = figure.canvas.get_renderer()
    return [text.get_window_extent(renderer) for text in texts if text.get_text()]


def apart(boxes):
    return not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize(("count", "name"), [(20, LONG), (2, HOSTILE)])
def test_a_comparison_has_dots_intervals_and_differences_with_ties_marked(count, name):
    outcomes = groups_of(count, name)
    base = outcomes[0].point.group
    lines = [line for line in compare(outcomes, base) if line.name == RANKING]
    figure = plots.comparison(RANKING, lines, base)
    left, right = figure.axes
    figure.draw_without_rendering()
    labels = left.get_yticklabels()
    assert [text.get_text() for text in labels] == [
        figures.label(line.group, plots._NAME_WIDTH) for line in lines
    ]
    boxes = boxes_of([*labels, *left.texts, *right.texts], figure)
    assert apart(boxes + [axes.get_window_extent() for axes in figure.axes[:1]])
    assert all(0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    # In each row the seeds, the interval from end to end, and the mean.
    drawn = [list(one.get_xdata()) for one in left.lines]
    for line in lines:
        for expected in (list(line.values.values()), [line.mean.low, line.mean.high],
                         [line.mean.value]):  # fmt: skip
            assert expected in drawn
    drawn = {tuple(one.get_xdata()): one for one in right.lines}
    marks = [text for text in right.texts if text.get_text() == "="]
    ties = [line for line in lines if line.tied]
    assert len(marks) == len(ties) and len(lines) - 1 > len(ties)
    for line in lines:
        if line.difference is not None:
            assert (line.difference.low, line.difference.high) in drawn
            face = drawn[(line.difference.value,)].get_markerfacecolor()
            assert (face == "white") == line.tied
    assert [text.get_text() for text in right.texts].count("baseline") == 1


def write_metrics(workdir, outcomes):
    for one in outcomes:
        folder = folder_of(workdir, one.point)
        folder.mkdir(parents=True)
        # The last seed has stopped early.
        last = 3 if one.point.config.seed < 2 else 2
        rows = [{"step": s, "eval_loss": 1.0 - s / 10 + one.point.config.seed} for s in range(last)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_curves_go_over_the_steps_that_all_seeds_have_with_bands(tmp_path):
    outcomes = groups_of(4, LONG) + [outcome("failed", 0, [], failed="x")]
    write_metrics(tmp_path, outcomes[:-1])
    found = plots.curves(tmp_path, outcomes)
    assert list(found) == ["eval_loss"] and len(found["eval_loss"]) == 4
    first = found["eval_loss"][0]
    assert list(first.steps) == [0, 1]
    np.testing.assert_allclose(first.of_seeds, [[1, 0.9], [2, 1.9], [3, 2.9]])
    figure = plots.over_steps("eval_loss", found["eval_loss"], outcomes[0].point.group)
    figure.draw_without_rendering()
    of_first, of_second = figure.axes[:2]
    mean = of_first.lines[-1]
    np.testing.assert_allclose(mean.get_ydata(), [2, 1.9])
    # Student's: 4.3027 times 1 over the root of three seeds.
    band = of_first.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((1.9 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert len(of_second.lines) == len(of_first.lines) + 1  # the baseline's, in grey
    assert of_second.lines[0].get_color() == figures.GREY
    titles = [axes.title for axes in figure.axes if axes.get_title(loc="left") == ""]
    assert apart(boxes_of([axes._left_title for axes in figure.axes] + titles, figure))


def test_plots_are_files_beside_the_results(tmp_path):
    outcomes = groups_of(2, HOSTILE)
    write_metrics(tmp_path, outcomes)
    lines = compare(outcomes)
    folder = plots.write(tmp_path, outcomes, lines, shown(lines)[:1], outcomes[0].point.group)
    assert sorted(path.name for path in folder.iterdir()) == [
        "comparison-pairs-accuracy.png", "comparison-pairs-accuracy.svg",
        "curve-eval_loss.png", "curve-eval_loss.svg",
    ]  # fmt: skip
    for path in folder.glob("*.svg"):
        assert "$\\alpha$ &lt;b&gt; \\x1b[31m" in path.read_text()
    assert plots.write(tmp_path, [], [], [], "x") is None


def test_one_group_has_no_differences():
    (only,) = [line for line in compare(groups_of(1, "{}")) if line.name == RANKING]
    assert len(plots.comparison(RANKING, [only], "0").axes) == 1
    assert isinstance(only, Line)
