"""Finished evaluations: `evaluations/NAME/MODEL.json`, and `MODEL.rows.jsonl` beside it."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from attnpo_jax.evaluate.evaluator import Figure, Result
from attnpo_jax.runtime import atomic, json_files, schema
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.printable import plain, say

_NUMBER = schema.Maybe(schema.Number())
_FIGURE = schema.Table(
    {
        "value": _NUMBER,
        "low": _NUMBER,
        "high": _NUMBER,
        "count": schema.Whole(),
        "column": schema.Maybe(schema.Text()),
        "detail": schema.Flag(),
    }
)
_FORM = schema.Table(
    {
        "evaluation": schema.Text(),
        "model": schema.Text(),
        "settings": schema.Mapped(schema.Anything()),
        "figures": schema.Mapped(_FIGURE),
        "about": schema.Mapped(schema.Anything()),
    }
)
_REMEDY = "remove it, and evaluate again"


class EvaluationMismatch(UserError):
    """There is an evaluation of that name, and it was made with other settings."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A finished evaluation of one model.

    Attributes:
      name: the evaluation.
      model: what the model's files are called.
      settings: what was in force, by field.
      result: rows and figures.
    """

    name: str
    model: str
    settings: Mapping[str, Any]
    result: Result

    def facts(self) -> dict[str, Any]:
        """All but the rows, as JSON has it."""
        figures = {}
        for name, figure in self.result.figures.items():
            values = dataclasses.asdict(figure)
            figures[name] = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in values.items()
            }
        return {
            "evaluation": self.name,
            "model": self.model,
            "settings": dict(self.settings),
            "figures": figures,
            "about": dict(self.result.about),
        }

    def write(self, folder: pathlib.Path) -> None:
        """Writes both files, the rows first: where the figures are, the evaluation is finished."""
        atomic.write_json_lines(_rows_file(folder, self.model), self.result.rows)
        atomic.write_json(folder / f"{self.model}.json", self.facts())


def _rows_file(folder: pathlib.Path, model: str) -> pathlib.Path:
    return folder / f"{model}.rows.jsonl"


def read(file: pathlib.Path) -> Evaluation:
    """A finished evaluation.

    Raises:
      UserError: the file, or that of its rows, is not what `Evaluation.write` wrote.
      OSError: it can't be read.
    """
    facts = json_files.read(file, _FORM, _REMEDY)
    figures = {
        name: Figure(**{k: math.nan if v is None and k != "column" else v for k, v in one.items()})
        for name, one in facts["figures"].items()
    }
    rows = _read_rows(_rows_file(file.parent, facts["model"]))
    result = Result(rows, figures, facts["about"])
    return Evaluation(facts["evaluation"], facts["model"], facts["settings"], result)


def _read_rows(file: pathlib.Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines() if file.exists() else (), 1):
        try:
            row = json_files.loads(line)
            if not isinstance(row, dict) or "id" not in row:
                raise ValueError("no row of an evaluation")
        except ValueError as error:
            raise UserError(f"{file}, line {number}: {error}; {_REMEDY}") from None
        rows.append(row)
    return rows


def show(
    console: Console, evaluations: Sequence[Evaluation], *, folder: pathlib.Path | None = None
) -> None:
    """Prints the figures of one evaluation, of one model or several side by side."""
    table = Table(title=plain(evaluations[0].name))
    table.add_column("")
    for one in evaluations:
        table.add_column(plain(one.model or "value"), justify="right")
        table.add_column("95% interval", justify="right")
    table.add_column("rows", justify="right")
    shown = (key for one in evaluations for key, f in one.result.figures.items() if not f.detail)
    for name in dict.fromkeys(shown):
        figures = [one.result.figures.get(name) for one in evaluations]
        cells = [cell for figure in figures for cell in _cells(figure)]
        table.add_row(plain(name), *cells, str(next(f.count for f in figures if f is not None)))
    console.print(table)
    for one in evaluations:
        of = f"{one.model}, " if len(evaluations) > 1 else ""
        for key, value in one.result.about.items():
            say(console, f"{of}{key}: {value}")
    if folder is not None:
        say(console, f"rows and figures in {folder}")


def _cells(figure: Figure | None) -> tuple[str, str]:
    if figure is None:
        return "", ""
    value = "none" if math.isnan(figure.value) else f"{figure.value:.4g}"
    there = math.isfinite(figure.low) and math.isfinite(figure.high)
    return value, f"{figure.low:.4g} to {figure.high:.4g}" if there else ""
