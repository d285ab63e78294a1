"""Finished evaluations: `evaluations/NAME/MODEL.json`, and `MODEL.rows.jsonl` beside it."""

import dataclasses
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from attnpo_jax.evaluate.evaluator import Figure, Result
from attnpo_jax.runtime import atomic, json_files, schema
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.printable import plain, say

FOLDER = "evaluations"

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
    },
    {"check": schema.Text()},  # which files of old lack
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
        return {
            "evaluation": self.name,
            "model": self.model,
            "settings": dict(self.settings),
            "figures": {name: one.facts() for name, one in self.result.figures.items()},
            "about": dict(self.result.about),
        }

    def write(self, folder: pathlib.Path) -> None:
        """Writes both files, the rows first: where the figures are, the evaluation is finished."""
        rows = _rows_file(folder, self.model)
        atomic.write_json_lines(rows, self.result.rows)
        facts = self.facts()
        # Figures in their order.
        text = json.dumps(facts | {"check": _check(facts, rows)}, indent=2) + "\n"
        atomic.write_atomically(folder / f"{self.model}.json", text.encode())


def _rows_file(folder: pathlib.Path, model: str) -> pathlib.Path:
    return folder / f"{model}.rows.jsonl"


def _check(facts: Mapping[str, Any], rows: pathlib.Path) -> str:
    """sha256 (hex) of what an evaluation's two files hold."""
    digest = hashlib.sha256(json.dumps(facts).encode())  # in their order
    digest.update(rows.read_bytes() if rows.exists() else b"")
    return digest.hexdigest()


def read(file: pathlib.Path) -> Evaluation:
    """A finished evaluation.

    Raises:
      UserError: the file, or that of its rows, is not what `Evaluation.write` wrote.
      OSError: it can't be read.
    """
    facts = json_files.read(file, _FORM, _REMEDY)
    check, rows_file = facts.pop("check", None), _rows_file(file.parent, facts["model"])
    rows = _read_rows(rows_file)
    if check is not None and check != _check(facts, rows_file):
        raise UserError(
            f"{file}: damaged (it, or {rows_file.name}, holds something else than was written); "
            f"{_REMEDY}"
        )
    figures = {
        name: Figure(**{k: math.nan if v is None and k != "column" else v for k, v in one.items()})
        for name, one in facts["figures"].items()
    }
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


def of_workdir(workdir: pathlib.Path) -> list[Evaluation]:
    """All finished evaluations of a run, oldest model first where its files are called by a step.

    Raises:
      UserError: a file is damaged.
    """
    found = (workdir / FOLDER).glob("*/*.json")
    return [read(file) for file in sorted(found, key=lambda file: (file.parent.name, _order(file)))]


def _order(file: pathlib.Path) -> tuple[int, int, str]:
    step = re.fullmatch(r"step-(\d+)", file.stem)
    return (1, int(step[1]), "") if step else (0, 0, file.stem)


def show(console: Console, evaluation: Evaluation) -> None:
    """Prints the figures of one evaluation."""
    table = Table(title=plain(f"{evaluation.name}, {evaluation.model}"))
    table.add_column("")
    for head in ("value", "95% interval", "rows"):
        table.add_column(head, justify="right")
    for name, figure in evaluation.result.figures.items():
        if not figure.detail:
            table.add_row(plain(name), *figure.cells(), str(figure.count))
    console.print(table)
    for key, value in evaluation.result.about.items():
        say(console, f"{key}: {value}")
