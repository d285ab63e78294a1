"""`attnpo evaluate checks`: how often responses do what prompts ask of their form."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attnpo_jax.evaluate.checks.rows import CheckedPrompt, load
from attnpo_jax.evaluate.evaluator import Evaluator, Figure, Result, Row, figure
from attnpo_jax.runtime import intervals

if TYPE_CHECKING:
    from attnpo_jax.evaluate.task import Task

WAYS = ("strict", "loose")


def run(task: "Task") -> Result:
    """Samples responses to the prompts, and checks them; see `result`."""
    section = task.section
    prompts = load(section.prompts, task.run.config.data.max_example_bytes)
    prompts = prompts[: section.count or None]
    records = task.responses(
        [one.prompt for one in prompts],
        samples=1,
        temperature=section.temperature,
        max_new_tokens=section.max_new_tokens,
    )
    return result(prompts, {record["id"]: record["response"] for record in records})


def result(prompts: Sequence[CheckedPrompt], responses: dict[str, str]) -> Result:
    """Checks responses.

    Args:
      prompts: with their checks.
      responses: by the prompts' ids. A prompt without one is failed.

    Returns:
      A row a prompt: `strict` and `loose` say whether all its checks are passed (1 or 0), `checks`
      which are, and fields such as `strict bullets` what part of its checks of a kind is. Figures:
      the pass rates of prompts and of single checks, strict and loose (see
      `Check.passes_loosely`), and, as details, those of each kind.
    """
    rows = [_row(one, responses.get(one.prompt.id, "")) for one in prompts]
    figures = {f"prompts, {way}": figure(rows, way) for way in WAYS}
    figures |= {f"checks, {way}": _of_checks(rows, way) for way in WAYS}
    for kind in sorted({check["kind"] for row in rows for check in row["checks"]}):
        for way in WAYS:
            figures[f"{kind}, {way}"] = figure(rows, f"{way} {kind}", detail=True)
    unanswered = sum(one.prompt.id not in responses for one in prompts)
    about = {"prompts without an answer, failed": unanswered} if unanswered else {}
    return Result(rows, figures, about)


def _row(one: CheckedPrompt, response: str) -> Row:
    checks: list[dict[str, Any]] = [
        {
            "kind": check.kind,
            "strict": check.passes(response),
            "loose": check.passes_loosely(response),
        }
        for check in one.checks
    ]
    row: dict[str, Any] = {"id": one.prompt.id, "response": response}
    for way in WAYS:
        row[way] = float(all(check[way] for check in checks))
        for kind in dict.fromkeys(check["kind"] for check in checks):
            of_kind = [check[way] for check in checks if check["kind"] == kind]
            row[f"{way} {kind}"] = sum(of_kind) / len(of_kind)
    return row | {"checks": checks}


def _of_checks(rows: Sequence[Row], way: str) -> Figure:
    """The part of all checks that are passed; the interval has those of a prompt go together."""
    passed = np.array([sum(check[way] for check in row["checks"]) for row in rows])
    total = np.array([len(row["checks"]) for row in rows])

    def rate(of_rows: np.ndarray) -> float:
        return float(passed[of_rows].sum() / total[of_rows].sum())

    value = rate(np.arange(len(rows)))
    if 0 < value < 1:
        low, high = intervals.bootstrap(len(rows), rate)
    else:  # of rows that are all alike there is no spread to resample
        low, high = intervals.mean([value] * len(rows))
    return Figure(value, low, high, int(total.sum()))


EVALUATOR = Evaluator("checks", run, reads=("generate.", "model."))
