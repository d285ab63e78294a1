"""The files of a sweep: `results.csv` and `results.jsonl`, a line a run, and `comparison.jsonl`."""

import csv
import io
import pathlib
from collections.abc import Sequence
from typing import Any

from attnpo_jax.evaluate.compare import Line, figures_of
from attnpo_jax.runtime import atomic
from attnpo_jax.sweep.running import RUNS, Outcome

CSV, JSON_LINES, COMPARISON = "results.csv", "results.jsonl", "comparison.jsonl"


def facts(outcome: Outcome) -> dict[str, Any]:
    """A run, as a line of `results.jsonl` has it."""
    point = outcome.point
    return {
        "run": point.name,
        "folder": f"{RUNS}/{point.name}",
        "group": point.group,
        "variant": point.variant,
        "seed": point.config.seed,
        "values": dict(point.values),
        "step": outcome.step,
        "figures": {name: one.facts()["value"] for name, one in figures_of(outcome).items()},
        "failed": outcome.failed,
    }


def write(workdir: pathlib.Path, outcomes: Sequence[Outcome], lines: Sequence[Line]) -> None:
    """Writes all three files, each whole or not at all."""
    found = [facts(outcome) for outcome in outcomes]
    atomic.write_json_lines(workdir / JSON_LINES, found)
    atomic.write_json_lines(workdir / COMPARISON, [line.facts() for line in lines])
    fields = dict.fromkeys(field for one in found for field in one["values"])
    figures = dict.fromkeys(name for one in found for name in one["figures"])
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    plain = ("run", "group", "variant", "step", "failed")
    writer.writerow([*plain, "seed", *(field for field in fields if field != "seed"), *figures])
    for one in found:
        values = {"seed": one["seed"]} | {
            field: one["values"].get(field) for field in fields if field != "seed"
        }
        row = [*(one[key] for key in plain), *values.values(), *map(one["figures"].get, figures)]
        writer.writerow(["" if cell is None else cell for cell in row])
    atomic.write_atomically(workdir / CSV, text.getvalue().encode())
