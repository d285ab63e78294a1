"""Plots of a sweep, beside its tables: figures of the variants, and metrics over training's steps.

`plots/comparison-FIGURE` has, of each figure that the tables have, the mean over the seeds with its
95% interval, single seeds as dots, and the paired difference to the baseline. `plots/curve-METRIC`
has how a metric of the held-out pairs went while training. Each is a .png and an .svg.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from attnpo_jax.evaluate.compare import Line
from attnpo_jax.runtime import figures, intervals, metrics
from attnpo_jax.sweep.running import Outcome, folder_of

FOLDER = "plots"
CURVES = ("eval_rewards/accuracies", "eval_rewards/margins", "eval_loss")
_SUFFIXES = (".png", ".svg")
_NAME_WIDTH = 32  # characters of a line of a variant's name
_COLUMNS = 3
_DOTS = {"markersize": 4, "alpha": 0.45, "markeredgewidth": 0}


@dataclasses.dataclass(frozen=True)
class Curve:
    """A metric of runs that differ in their seed alone, over the steps that all of them have.

    Attributes:
      group: what the runs are called.
      steps: (n,) ascending.
      of_seeds: (seeds, n).
    """

    group: str
    steps: Sequence[int]
    of_seeds: np.ndarray


def write(
    workdir: pathlib.Path,
    outcomes: Sequence[Outcome],
    lines: Sequence[Line],
    names: Sequence[str],
    baseline: str,
) -> pathlib.Path | None:
    """Draws what there is to draw.

    Args:
      workdir: the sweep's.
      outcomes: of its runs.
      lines: of the comparison.
      names: the figures that are shown, see `compare.shown`.
      baseline: the group that others are held against.

    Returns:
      The folder; None if there was nothing to draw.
    """
    drawn = {
        f"comparison-{name}": comparison(name, own, baseline)
        for name in names
        if (own := [line for line in lines if line.name == name])
    }
    order = list(dict.fromkeys(line.group for line in lines))
    every = curves(workdir, outcomes)
    for metric, found in every.items():
        found = sorted(found, key=lambda one: order.index(one.group))
        drawn[f"curve-{metric}"] = over_steps(metric, found, baseline)
    folder = workdir / FOLDER
    for name, figure in drawn.items():
        folder.mkdir(exist_ok=True)
        for suffix in _SUFFIXES:
            figures.save(figure, folder / f"{_file_name(name)}{suffix}")
    return folder if drawn else None


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", name, flags=re.ASCII)[:150].strip("-")


@figures.style()
def comparison(name: str, lines: Sequence[Line], baseline: str):
    """One figure of the comparison: variants from the top down, in the order of the lines."""
    compared = any(line.difference is not None for line in lines)
    labels = [figures.label(line.group, _NAME_WIDTH) for line in lines]
    heights = [0.12 + figures.LINE_HEIGHT * (1 + label.count("\n")) for label in labels]
    places = np.cumsum(heights) - np.array(heights) / 2
    figure, (left, *rest) = figures.new_figure(
        width=9.0 if compared else 6.0,
        height=1.1 + sum(heights),
        columns=1 + compared,
        sharey=True,
    )
    left.set_yticks(places, labels=labels)
    left.set_ylim(sum(heights) + 0.05, -0.05)
    left.set_title(figures.label(name, 60))
    several = max(len(line.values) for line in lines) > 1
    dot = _span(lines) / 60
    left.set_xlabel("mean over seeds, 95% interval; dots: seeds" if several else "one seed each")
    for place, line in zip(places, lines, strict=True):
        colour = figures.GREY if line.group == baseline else figures.COLOURS[0]
        values = list(line.values.values())
        if len(values) > 1:
            # Below the interval, which would hide them; those that are alike below each other.
            below = [sum(abs(y - x) <= dot for y in values[:k]) for k, x in enumerate(values)]
            left.plot(values, [place + 0.08 + 0.035 * b for b in below], "o", color=colour, **_DOTS)
        _with_interval(left, place, line.mean, colour, filled=True)
    if compared:
        _differences(rest[0], places, lines, baseline)
    return figure


def _span(lines: Sequence[Line]) -> float:
    every = [x for one in lines for x in (*one.values.values(), one.mean.low, one.mean.high)]
    every = [x for x in every if math.isfinite(x)]
    return max(every) - min(every)


def _differences(axes, places: Sequence[float], lines: Sequence[Line], baseline: str) -> None:
    axes.set_title("paired difference, 95% interval")
    axes.set_xlabel(figures.label(f"minus {baseline}", 50, lines=2) + "\n= and hollow: a tie")
    axes.axvline(0.0, color="black", linewidth=0.8)
    for place, line in zip(places, lines, strict=True):
        if line.difference is None:
            note = "baseline" if line.group == baseline else "none"
            axes.annotate(
                note, (0.0, place), (4, 0), textcoords="offset points", va="center",
                fontsize=8, color=figures.GREY,
            )  # fmt: skip
            continue
        colour = figures.GREY if line.tied else figures.COLOURS[0]
        _with_interval(axes, place, line.difference, colour, filled=not line.tied)
        if line.tied:
            axes.annotate(
                "=", (1.0, place), (4, 0), xycoords=("axes fraction", "data"),
                textcoords="offset points", va="center", color=figures.GREY, annotation_clip=False,
            )  # fmt: skip


def _with_interval(axes, place: float, found, colour: str, *, filled: bool) -> None:
    if math.isfinite(found.low) and math.isfinite(found.high):
        axes.plot([found.low, found.high], [place, place], color=colour, linewidth=1.6)
    axes.plot(
        [found.value], [place], "D", color=colour, markersize=6, zorder=3,
        markerfacecolor=colour if filled else "white", markeredgewidth=1.4,
    )  # fmt: skip


def curves(workdir: pathlib.Path, outcomes: Sequence[Outcome]) -> dict[str, list[Curve]]:
    """By metric, the curves of all groups that were evaluated at two steps or more."""
    by_group: dict[str, list[list[dict]]] = {}
    for outcome in outcomes:
        if outcome.failed is None:
            lines = metrics.read(folder_of(workdir, outcome.point))
            by_group.setdefault(outcome.point.group, []).append(lines)
    found: dict[str, list[Curve]] = {}
    for metric in CURVES:
        for group, runs in by_group.items():
            curve = _curve(group, metric, runs)
            if len(curve.steps) > 1:
                found.setdefault(metric, []).append(curve)
    return found


def _curve(group: str, metric: str, runs: Sequence[Sequence[Mapping]]) -> Curve:
    values = [{line["step"]: line[metric] for line in lines if metric in line} for lines in runs]
    steps = sorted(set.intersection(*map(set, values)))
    of_seeds = np.array([[of_run[step] for step in steps] for of_run in values], np.float64)
    return Curve(group, steps, of_seeds)


@figures.style()
def over_steps(metric: str, found: Sequence[Curve], baseline: str):
    """A metric over the steps: a panel for each group, with the baseline's mean in grey."""
    columns = min(_COLUMNS, len(found))
    rows = -(-len(found) // columns)
    titles = [figures.label(curve.group, _NAME_WIDTH) for curve in found]
    most = 1 + max(title.count("\n") for title in titles)
    figure, panels = figures.new_figure(
        width=3.0 * columns + 0.4,
        height=0.5 + rows * (1.6 + figures.LINE_HEIGHT * most),
        rows=rows,
        columns=columns,
        sharex=True,
        sharey=True,
    )
    base = next((curve for curve in found if curve.group == baseline), None)
    for axes, curve, title in zip(panels, found, titles, strict=False):
        axes.set_title(title, fontsize=8)
        if base is not None and base is not curve:
            figures.curve(axes, base.steps, base.of_seeds.mean(axis=0), place=None)
        for of_seed in curve.of_seeds if len(curve.of_seeds) > 1 else ():
            axes.plot(curve.steps, of_seed, color=figures.COLOURS[0], linewidth=0.6, alpha=0.5)
        low, high = _band(curve)
        figures.curve(axes, curve.steps, curve.of_seeds.mean(axis=0), low, high)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in panels[max(0, len(found) - columns) : len(found)]:
        axes.tick_params(labelbottom=True)  # the lowest of each column
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    several = any(len(curve.of_seeds) > 1 for curve in found)
    told = "mean over seeds, with 95% intervals; thin: seeds" if several else "one seed each"
    told += f"; dashed grey: {baseline}" if base is not None and len(found) > 1 else ""
    figure.suptitle(figures.label(metric, 80), x=0.01, ha="left")
    figure.supxlabel(f"step ({figures.label(told, 40 * columns)})", fontsize=8)
    return figure


def _band(curve: Curve) -> tuple[list[float], list[float]]:
    found = [intervals.student(of_step) for of_step in curve.of_seeds.T]
    return [low for low, _ in found], [high for _, high in found]
