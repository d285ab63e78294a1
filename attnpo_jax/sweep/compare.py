"""What runs of a sweep come to: means over seeds, and paired differences to one of them."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from attnpo_jax.evaluate.evaluator import Figure
from attnpo_jax.evaluate.report import by_id
from attnpo_jax.runtime import intervals
from attnpo_jax.runtime.errors import UsageError
from attnpo_jax.runtime.printable import plain, say
from attnpo_jax.sweep.running import Outcome

RANKING = "pairs/accuracy"
# Of a whole table; narrower terminals are rare.
WIDTH = 80
_SHOWN_OF_PAIRS = (RANKING, "pairs/margin")

_BySeed = Mapping[int, Outcome]


@dataclasses.dataclass(frozen=True)
class Line:
    """One figure of the runs that differ in their seed alone.

    Attributes:
      name: `EVALUATION/FIGURE`.
      group: what these runs are called.
      mean: over the seeds, with Student's t interval of that, and how many seeds there are.
      difference: the mean difference to the baseline at the same seeds, with how many rows it is
        taken over (None: over seeds alone); None where there is none.
    """

    name: str
    group: str
    mean: Figure
    difference: Figure | None

    @property
    def tied(self) -> bool:
        """Whether the interval of the difference holds 0, or can't be told."""
        found = self.difference
        return found is not None and not (found.low > 0 or found.high < 0)

    def facts(self) -> dict[str, Any]:
        """The line as JSON has it."""
        mean, difference = self.mean.facts(), self.difference and self.difference.facts()
        return {
            "figure": self.name,
            "group": self.group,
            "mean": mean["value"],
            "low": mean["low"],
            "high": mean["high"],
            "seeds": mean["count"],
            "difference": difference
            and {key: difference[key] for key in ("value", "low", "high")}
            | {"rows": difference["count"], "tied": self.tied},
        }


def figures_of(outcome: Outcome) -> dict[str, Figure]:
    """All figures of a finished run that are no details, by `EVALUATION/FIGURE`."""
    found = {
        f"{name}/{key}": figure
        for name, evaluation in outcome.evaluations.items()
        for key, figure in evaluation.result.figures.items()
        if not figure.detail
    }
    return found if outcome.loss is None else found | {"loss": Figure(outcome.loss)}


def compare(outcomes: Sequence[Outcome], baseline: str | None = None) -> list[Line]:
    """Lines by figure; of each, the groups in the order of their accuracy, best first.

    Args:
      outcomes: of runs; those that failed are left out.
      baseline: the group that others are held against; None for the grid's first.

    Raises:
      UsageError: there is no such group.
    """
    names = list(dict.fromkeys(outcome.point.group for outcome in outcomes))
    baseline = baseline or names[0]
    if baseline not in names:
        raise UsageError(f"--baseline={baseline}; accepted: {', '.join(names)}")
    groups: dict[str, dict[int, Outcome]] = collections.defaultdict(dict)
    for outcome in outcomes:
        if outcome.failed is None:
            groups[outcome.point.group][outcome.point.config.seed] = outcome
    keys = dict.fromkeys(
        key for held in groups.values() for o in held.values() for key in figures_of(o)
    )
    lines = [
        Line(key, group, _mean(values), _difference(key, groups.get(baseline, {}), held))
        for key in keys
        for group, held in groups.items()
        if (values := _values(key, held))
    ]
    ranks = {line.group: -line.mean.value for line in lines if line.name == RANKING}
    places = {key: place for place, key in enumerate(keys)}
    return sorted(lines, key=lambda line: (places[line.name], ranks.get(line.group, math.inf)))


def _values(key: str, held: _BySeed) -> list[float]:
    found = (figures_of(outcome).get(key) for outcome in held.values())
    return [figure.value for figure in found if figure and math.isfinite(figure.value)]


def _mean(values: Sequence[float]) -> Figure:
    return Figure(math.fsum(values) / len(values), *intervals.student(values), len(values))


def _difference(key: str, base: _BySeed, own: _BySeed) -> Figure | None:
    """The difference of two groups at the seeds that both have."""
    shared = [seed for seed in base if seed in own and base[seed] is not own[seed]]
    sides = [[figures_of(held[seed]).get(key) for seed in shared] for held in (base, own)]
    if not shared or any(figure is None for side in sides for figure in side):
        return None
    columns = {figure.column for side in sides for figure in side}
    if columns == {None}:
        values = [own_.value - base_.value for base_, own_ in zip(*sides, strict=True)]
        finite = [value for value in values if math.isfinite(value)]
        return dataclasses.replace(_mean(finite), count=0) if finite else None
    if len(columns) > 1:
        return None
    first, second = _crossed(
        key, columns.pop(), [base[s] for s in shared], [own[s] for s in shared]
    )
    if not first.size:
        return None
    value = float(np.mean(second - first))
    return Figure(value, *intervals.crossed_difference(first, second), first.shape[1])


def _crossed(key: str, column: str, *sides: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray]:
    """A column's values of both sides, (seeds, rows), of the rows that all have."""
    name = key.partition("/")[0]
    tables = [[by_id(one.evaluations[name], column) for one in side] for side in sides]
    every = [table for side in tables for table in side]
    ids = [id for id in every[0] if all(id in table for table in every)]
    first, second = (
        np.array([[table[id] for id in ids] for table in side], np.float64) for side in tables
    )
    return first, second


def show(console: Console, lines: Sequence[Line], baseline: str) -> None:
    """Prints tables of at most `WIDTH` columns: accuracy and margin of the held-out pairs, and the
    first figure of each other evaluation.
    """
    first_of: dict[str, str] = {}
    for line in lines:
        first_of.setdefault(line.name.partition("/")[0], line.name)
    shown = [*_SHOWN_OF_PAIRS, *(v for k, v in first_of.items() if k not in ("pairs", "loss"))]
    for name in shown:
        own = [line for line in lines if line.name == name]
        if own:
            console.print(_table(name, own), width=min(WIDTH, console.width))
    some = [line for line in lines if line.name in shown]
    if any(line.difference is not None for line in some):
        one = any(line.difference is not None and line.mean.count == 1 for line in some)
        resampled = "rows" if one else "rows and seeds"
        say(
            console,
            f"differences to {baseline!r}, paired; 95% intervals over {resampled}; = a tie: the\n"
            "interval holds 0",
        )


def _table(name: str, lines: Sequence[Line]) -> Table:
    table = Table(title=plain(name), box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")
    several = any(line.mean.count > 1 for line in lines)
    compared = any(line.difference is not None for line in lines)
    heads = ["seeds", "mean ± 95%" if several else "value"]
    heads += ["difference", "95% interval"] if compared else []
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for line in lines:
        cells = [str(line.mean.count), _with_half(line.mean)]
        if compared:
            cells += ["", ""] if line.difference is None else _marked(line)
        table.add_row(plain(line.group), *cells)
    return table


def _with_half(mean: Figure) -> str:
    half = (mean.high - mean.low) / 2
    return f"{mean.value:.4g}" + (f" ± {half:.2g}" if math.isfinite(half) else "")


def _marked(line: Line) -> list[str]:
    found = line.difference
    interval = f"{found.low:.3g} to {found.high:.3g}" if math.isfinite(found.low) else "unknown"
    return [f"{'= ' if line.tied else ''}{found.value:+.3g}", interval]
