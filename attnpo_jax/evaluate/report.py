"""`attnpo evaluate report`: models side by side, with paired differences to one of them."""

import collections
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from attnpo_jax.evaluate import files
from attnpo_jax.evaluate.evaluator import Figure
from attnpo_jax.evaluate.files import Evaluation
from attnpo_jax.generate.model import BASE
from attnpo_jax.runtime import intervals
from attnpo_jax.runtime.errors import UsageError
from attnpo_jax.runtime.printable import plain, say

if TYPE_CHECKING:
    from attnpo_jax.run import Run


@dataclasses.dataclass(frozen=True)
class Line:
    """One figure of one model.

    Attributes:
      evaluation, name: of the figure.
      model: what the model is called in the table.
      figure: the figure.
      difference: to the baseline, over the rows that both have; None where there is none, or the
        model is the baseline.
    """

    evaluation: str
    name: str
    model: str
    figure: Figure
    difference: Figure | None

    def facts(self) -> dict[str, Any]:
        """The line as JSON has it."""
        facts = {"evaluation": self.evaluation, "figure": self.name, "model": self.model}
        difference = self.difference and self.difference.facts()
        return facts | self.figure.facts() | {"difference": difference}


def report(
    run: "Run",
    *,
    workdirs: str | None = None,
    baseline: str | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> list[Line]:
    """Shows all that was evaluated in some workdirs.

    Args:
      run: whose workdir is shown where no others are named.
      workdirs: folders, with commas between.
      baseline: the model that the others are held against, as the table calls it. None: the first
        one called `base`, else the first.
      as_json: print JSON in place of tables.
      console: where they go; None for standard output.

    Raises:
      UsageError: there is no evaluation there, or no such baseline.
      UserError: a file is damaged.
    """
    folders = [pathlib.Path(text).expanduser() for text in (workdirs or "").split(",") if text]
    if not folders and run.workdir is None:
        raise UsageError("evaluate report needs --workdirs=DIR,DIR or --workdir=DIR")
    folders = folders or [run.workdir]
    several = len(folders) > 1
    found = [
        (f"{folder.resolve().name}/{one.model}" if several else one.model, one)
        for folder in folders
        for one in files.of_workdir(folder)
    ]
    if not found:
        raise UsageError(
            f"no evaluations in {', '.join(map(str, folders))}; accepted: workdirs in which "
            "`attnpo run` or `attnpo evaluate` has been"
        )
    lines = compare(found, baseline)
    if as_json:
        print(json.dumps([line.facts() for line in lines], indent=2), flush=True)
    else:
        show(console or Console(), lines)
    return lines


def compare(
    evaluations: Sequence[tuple[str, Evaluation]], baseline: str | None = None
) -> list[Line]:
    """Lines of a report, by evaluation and figure.

    Args:
      evaluations: each with what its model is called.
      baseline: see `report`.

    Raises:
      UsageError: no model is called so.
    """
    models = list(dict.fromkeys(model for model, _ in evaluations))
    if baseline is None:
        bases = [model for model in models if os.path.basename(model) == BASE]
        baseline = (bases or models)[0]
    elif baseline not in models:
        raise UsageError(f"--baseline={baseline}; accepted: {', '.join(models)}")
    by_name: dict[str, dict[str, Evaluation]] = collections.defaultdict(dict)
    for model, one in evaluations:
        by_name[one.name][model] = one
    return [
        Line(evaluation, name, model, figure, _difference(held.get(baseline), one, figure))
        for evaluation, held in by_name.items()
        for name in dict.fromkeys(key for one in held.values() for key in one.result.figures)
        for model, one in held.items()
        if (figure := one.result.figures.get(name)) is not None
    ]


def _difference(base: Evaluation | None, other: Evaluation, figure: Figure) -> Figure | None:
    if base is None or base is other or figure.column is None:
        return None
    first, second = (by_id(one, figure.column) for one in (base, other))
    shared = [id for id in first if id in second]
    if not shared:
        return None
    a, b = ([values[id] for id in shared] for values in (first, second))
    value = math.fsum(y - x for x, y in zip(a, b, strict=True)) / len(shared)
    return Figure(value, *intervals.paired_difference(a, b), len(shared))


def by_id(evaluation: Evaluation, column: str) -> Mapping[str, float]:
    """A column's values by id; where several rows have one, their mean."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for row in evaluation.result.rows:
        if row.get(column) is not None:
            found[str(row["id"])].append(float(row[column]))
    return {id: sum(values) / len(values) for id, values in found.items()}


def show(console: Console, lines: Sequence[Line]) -> None:
    """Prints lines as one table for each evaluation: under each figure, the models."""
    differs = False
    for evaluation in dict.fromkeys(line.evaluation for line in lines):
        own = [one for one in lines if one.evaluation == evaluation and not one.figure.detail]
        compared = any(line.difference is not None for line in own)
        differs |= compared
        counts = {line.figure.count for line in own}
        alike = f", {counts.pop()} rows" if len(counts) == 1 else ""
        table = Table(title=plain(evaluation + alike), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("", max_width=27)
        heads = ["value", "95% interval", *([] if alike else ["rows"])]
        heads += ["difference", "95% interval"] if compared else []
        for head in heads:
            table.add_column(head, justify="right")
        last = None
        for line in own:
            if line.name != last:
                table.add_row(plain(line.name), style="bold")
            last = line.name
            cells = [*line.figure.cells(), *([] if alike else [str(line.figure.count)])]
            if compared:
                cells += _marked(line.difference)
            table.add_row(plain(f"  {line.model}"), *cells)
        console.print(table)
    if differs:
        say(console, "differences are paired, row by row; = where their interval holds 0")


def _marked(difference: Figure | None) -> tuple[str, str]:
    if difference is None:
        return "", ""
    value, interval = difference.cells()
    same = difference.low <= 0 <= difference.high
    return f"{'= ' if same else ''}{'+' if difference.value > 0 else ''}{value}", interval
