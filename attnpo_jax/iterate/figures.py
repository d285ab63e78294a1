"""What rounds come to: figures, lines of metrics, and a table."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from attnpo_jax.evaluate.files import Evaluation
from attnpo_jax.parallel import processes
from attnpo_jax.runtime import metrics
from attnpo_jax.runtime.printable import plain, say

if TYPE_CHECKING:
    from attnpo_jax.run import Run

Result = Mapping[str, Any]  # what `rounds.Round.result` gives

# Of a whole table; narrower terminals are rare.
WIDTH = 80
_MOST_EVALUATIONS = 3
_HEADS = {
    "pairs": "pairs",
    "pass_rate": "pass",
    "agreement": "agree",
    "reward": "reward",
    "tokens": "tokens",
    "eval_accuracy": "held-out",
}
_WHOLE = ("pairs", "tokens")


def evaluated(found: Mapping[str, Evaluation]) -> dict[str, dict[str, list[float | None]]]:
    """Evaluations' figures that are no details, with their intervals, as JSON has them."""
    return {
        name: {
            key: [facts[part] for part in ("value", "low", "high")]
            for key, figure in one.result.figures.items()
            if not figure.detail and (facts := figure.facts())
        }
        for name, one in found.items()
    }


def of_training(run: "Run", step: int) -> dict[str, float]:
    """The held-out pairs' figures of a round's result, and the steps that it took."""
    lines = [line for line in metrics.read(run.workdir) if line["step"] == step]
    told = {"steps": float(step)}
    for name, metric in (
        ("eval_loss", "eval_loss"),
        ("eval_accuracy", "eval_rewards/accuracies"),
        ("eval_margin", "eval_rewards/margins"),
    ):
        values = [line[metric] for line in lines if metric in line]
        if values and math.isfinite(values[-1]):
            told[name] = float(values[-1])
    return told


def record(run: "Run", results: Sequence[Result]) -> None:
    """Writes a line of `metrics.jsonl` for each round, whose number is the line's step."""
    if not processes.is_first():
        return
    there = {line["step"] for line in metrics.read(run.workdir)}
    known = next((k for k in range(len(results)) if k + 1 not in there), len(results))
    if known == len(results):
        return
    with metrics.MetricsWriter(
        run.workdir, known, log=run.config.log, config=run.config.to_dict()
    ) as writer:
        for number, result in enumerate(results[known:], known + 1):
            writer.write(number, _line(result))
        writer.flush()


def _line(result: Result) -> dict[str, float]:
    line = {f"iterate/{name}": value for name, value in result["figures"].items()}
    for why, count in result["without a pair"].items():
        line[f"iterate/without a pair, {why}"] = count
    for name, of_one in result["evaluations"].items():
        line |= {f"eval_{name}/{key}": values[0] for key, values in of_one.items()}
    return {name: value for name, value in line.items() if value is not None}


def show(console: Console, results: Sequence[Result], width: int = WIDTH) -> None:
    """Prints a table with a row for each round, and one for the model that they started from."""
    heads = {
        name: head
        for name, head in _HEADS.items()
        if any(name in result["figures"] for result in results)
    }
    before = results[0]["evaluations before"]
    columns = [
        (name, next(iter(of_one)))
        for name, of_one in results[-1]["evaluations"].items()
        if of_one and name != "pairs"
    ][:_MOST_EVALUATIONS]
    table = Table(box=box.SIMPLE_HEAD, width=min(width, WIDTH), pad_edge=False)
    for head in ("round", *heads.values(), *(name for name, _ in columns)):
        table.add_column(plain(head), justify="right")
    if columns:
        table.add_row("start", *([""] * len(heads)), *(_of(before, *one) for one in columns))
    for number, result in enumerate(results, 1):
        cells = [_cell(name, result["figures"].get(name)) for name in heads]
        table.add_row(
            str(number), *cells, *(_of(result["evaluations"], *column) for column in columns)
        )
    console.print(table)
    for name, key in columns:
        say(console, f"{name}: {key}")


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if name in _WHOLE else f"{value:.3f}"


def _of(evaluations: Mapping[str, Any], name: str, key: str) -> str:
    values = evaluations.get(name, {}).get(key)
    return "" if values is None or values[0] is None else f"{values[0]:.3f}"
