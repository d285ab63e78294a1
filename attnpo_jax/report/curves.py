"""Curves of all metrics of one run or several, a figure each."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnpo_jax.report.blocks import Paragraph, Picture
from attnpo_jax.runtime import figures

# What says where a line is, or how large its step was.
_NO_METRICS = ("step", "epoch", "pairs", "tokens")
_EVAL = "eval_"
# Points of a curve that a page has room for; more are averaged over neighbours.
_MOST_POINTS = 240
_MOST_MARKERS = 40
# More are listed by name: each takes some 15 KB.
_MOST_FIGURES = 80
_FIRST = ("loss", "unweighted_loss", "rewards/weighted_accuracies", "rewards/accuracies")


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve's points.

    Attributes:
      name: in the legend.
      steps, values: (n,) each.
      place: of its look among the others, see `figures.look`.
      averaged: over how many logged steps a point is the mean.
    """

    name: str
    steps: np.ndarray
    values: np.ndarray
    place: int
    averaged: int = 1


def blocks(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Any]:
    """Figures of all metrics.

    Args:
      runs: lines of `metrics.jsonl`, by what the run is called.
    """
    by_metric: dict[str, list[Series]] = collections.defaultdict(list)
    for place, (run, lines) in enumerate(runs.items()):
        for name, (steps, values) in _by_name(lines).items():
            metric, held_out = name.removeprefix(_EVAL), name.startswith(_EVAL)
            what = "held-out pairs" if held_out else "training"
            label = what if len(runs) == 1 else f"{run}, {what}"
            look = (1 if held_out else 0) if len(runs) == 1 else place
            by_metric[metric].append(_short(Series(label, steps, values, look)))
    names = sorted(by_metric, key=_order)
    found: list[Any] = [_picture(name, by_metric[name]) for name in names[:_MOST_FIGURES]]
    if len(names) > _MOST_FIGURES:
        listed = ", ".join(names[_MOST_FIGURES:])
        found.append(Paragraph(f"Not drawn, since there are so many: {listed}."))
    averaged = max((one.averaged for of in by_metric.values() for one in of), default=1)
    if averaged > 1:
        text = f"Of long curves a point is the mean of up to {averaged} logged steps."
        found.insert(0, Paragraph(text))
    return found


def _by_name(lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
    for line in lines:
        for name, value in line.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name not in _NO_METRICS and number:
                found[name].append((line["step"], float(value)))
    return {
        name: (np.array([step for step, _ in points]), np.array([value for _, value in points]))
        for name, points in found.items()
    }


def _order(name: str) -> tuple[int, str]:
    return (_FIRST.index(name), "") if name in _FIRST else (len(_FIRST), name)


def _short(series: Series) -> Series:
    """The series with neighbouring points averaged, where there are too many."""
    each = -(-len(series.steps) // _MOST_POINTS)
    if each <= 1:
        return series
    starts = np.arange(0, len(series.steps), each)
    ends = np.minimum(starts + each, len(series.steps))
    means = np.add.reduceat(series.values, starts) / (ends - starts)
    return dataclasses.replace(
        series, steps=series.steps[ends - 1], values=means, averaged=int(each)
    )


def _picture(metric: str, series: Sequence[Series]) -> Picture:
    figure, (axes,) = figures.new_figure(width=4.2, height=2.3)
    axes.set_title(figures.label(metric))
    axes.set_xlabel("step")
    several = len(series) > 1
    for one in series:
        name = one.name if several else None
        figures.curve(axes, one.steps, one.values, place=one.place, name=name)
        if len(one.steps) > _MOST_MARKERS:
            axes.lines[-1].set_marker("")
    if several and len(series) <= 6:
        axes.legend()
    told = "; ".join(_told(one) for one in series[:6])
    return Picture(figures.svg_text(figure, f"curve of {metric}"), f"{metric} by step: {told}")


def _told(series: Series) -> str:
    """A curve in words."""
    finite = series.values[np.isfinite(series.values)]
    if not len(finite):
        return f"{series.name}: no finite value"
    first, last = (f"{value:.3g}" for value in (series.values[0], series.values[-1]))
    low, high = f"{finite.min():.3g}", f"{finite.max():.3g}"
    places = f"steps {series.steps[0]} to {series.steps[-1]}"
    lost = len(series.values) - len(finite)
    not_finite = f", {lost} not finite" if lost or not math.isfinite(series.values[-1]) else ""
    return f"{series.name}, {places}: from {first} to {last}, within {low} to {high}{not_finite}"
