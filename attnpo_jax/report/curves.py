"""Curves of all metrics of one run or several, a figure each."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnpo_jax.report.blocks import Paragraph, Picture
from attnpo_jax.runtime import figures

Lines = Sequence[Mapping[str, Any]]

# What says where a line is, or how large its step was.
_NO_METRICS = ("step", "epoch", "pairs", "tokens")
_EVAL = "eval_"
# Points of a curve that a page has room for; more are averaged over neighbours.
_MOST_POINTS = 240
_MOST_MARKERS = 40
_MOST_TOLD = 8  # curves of a figure that its legend and words tell of
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
      lows, highs: (n,) each, of the runs that it is the mean of; None for one run.
    """

    name: str
    steps: np.ndarray
    values: np.ndarray
    place: int
    averaged: int = 1
    lows: np.ndarray | None = None
    highs: np.ndarray | None = None


def blocks(groups: Mapping[str, Sequence[Lines]]) -> list[Any]:
    """Figures of all metrics.

    Args:
      groups: by what runs that differ in their seed are called, lines of `metrics.jsonl` of each; a
        curve is their mean, with a band from the lowest to the highest.
    """
    by_metric: dict[str, list[Series]] = collections.defaultdict(list)
    for place, (group, runs) in enumerate(groups.items()):
        named = [_by_name(lines) for lines in runs]
        for name in dict.fromkeys(name for of_run in named for name in of_run):
            metric, held_out = name.removeprefix(_EVAL), name.startswith(_EVAL)
            what = "held-out pairs" if held_out else "training"
            label = what if len(groups) == 1 else f"{group}, {what}"
            look = place if len(groups) > 1 else int(held_out)
            steps, values_RN = _aligned([of_run[name] for of_run in named if name in of_run])
            by_metric[metric].append(_short(label, look, steps, values_RN))
    names = sorted(by_metric, key=_order)
    found: list[Any] = [_picture(name, by_metric[name]) for name in names[:_MOST_FIGURES]]
    if len(names) > _MOST_FIGURES:
        listed = ", ".join(names[_MOST_FIGURES:])
        found.append(Paragraph(f"Not drawn, since there are so many: {listed}."))
    averaged = max((one.averaged for of in by_metric.values() for one in of), default=1)
    told = []
    if any(len(runs) > 1 for runs in groups.values()):
        told.append("A curve is the mean over seeds, with a band from the lowest to the highest.")
    if averaged > 1:
        told.append(f"Of long curves a point is the mean of up to {averaged} logged steps.")
    return [*([Paragraph(" ".join(told))] if told and names else []), *found]


def _aligned(runs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The steps that all runs have, and their values there, (runs, steps)."""
    if len(runs) == 1:
        return runs[0][0], runs[0][1][None]
    by_step = [dict(zip(steps.tolist(), values, strict=True)) for steps, values in runs]
    shared = [step for step in by_step[0] if all(step in one for one in by_step)]
    values = [[one[step] for step in shared] for one in by_step]
    return np.array(shared), np.array(values).reshape(len(runs), -1)


def _by_name(lines: Lines) -> dict[str, tuple[np.ndarray, np.ndarray]]:
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


def _short(name: str, place: int, steps: np.ndarray, values_RN: np.ndarray) -> Series:
    """The runs' mean, with neighbouring points averaged where there are too many."""
    each = max(1, -(-len(steps) // _MOST_POINTS))
    starts = np.arange(0, len(steps), each)
    ends = np.minimum(starts + each, len(steps))
    if each > 1:
        values_RN = np.add.reduceat(values_RN, starts, axis=1) / (ends - starts)
        steps = steps[ends - 1]
    band = (values_RN.min(axis=0), values_RN.max(axis=0)) if len(values_RN) > 1 else (None, None)
    return Series(name, steps, values_RN.mean(axis=0), place, each, *band)


def _picture(metric: str, series: Sequence[Series]) -> Picture:
    figure, (axes,) = figures.new_figure(width=4.2, height=2.3)
    axes.set_title(figures.label(metric))
    axes.set_xlabel("step")
    several = len(series) > 1
    for one in series:
        name = one.name if several else None
        points = one.steps, one.values, one.lows, one.highs
        figures.curve(axes, *points, place=one.place, name=name)
        if len(one.steps) > _MOST_MARKERS:
            axes.lines[-1].set_marker("")
    if several and len(series) <= _MOST_TOLD:
        axes.legend()
    told = "; ".join(_told(one) for one in series[:_MOST_TOLD])
    if len(series) > _MOST_TOLD:
        told += f"; and {len(series) - _MOST_TOLD} more"
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
