"""What an evaluation is: a name, a function of a task, and the rows and figures that it gives.

One of your own is a file that registers one, named in `config.plugins`:

    from attnpo_jax.evaluate import Evaluator, Result, figure, register

    def run(task):
        records = task.responses(prompts)
        rows = [{"id": r["id"], "short": float(len(r["response"]) < 80)} for r in records]
        return Result(rows, {"short": figure(rows, "short")})

    register(Evaluator("short-answers", run))
"""

import dataclasses
import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attnpo_jax.runtime import intervals
from attnpo_jax.runtime.errors import UsageError

if TYPE_CHECKING:
    from attnpo_jax.evaluate.task import Task

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number, with its 95% interval.

    Attributes:
      value: the number.
      low, high: the interval's ends; NaN where there is none.
      count: rows that it is taken over.
      column: the rows' field whose mean it is, over those that have it: two models' rows then give
        paired differences. None for what is no mean.
      detail: whether it is for the file alone, and neither for the table nor for metrics.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    count: int = 0
    column: str | None = None
    detail: bool = False

    def facts(self) -> dict[str, Any]:
        """The figure as JSON has it, where what is no number is null."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in dataclasses.asdict(self).items()
        }

    def cells(self) -> tuple[str, str]:
        """The value and the interval as tables show them."""
        value = "none" if math.isnan(self.value) else _short(self.value)
        there = math.isfinite(self.low) and math.isfinite(self.high)
        return value, f"{_short(self.low)} to {_short(self.high)}" if there else ""


def _short(x: float) -> str:
    return f"{x:.3g}" if x == 0 or 1e-4 <= abs(x) < 1e6 else f"{x:.1e}"


def figure(rows: Sequence[Row], column: str, *, detail: bool = False) -> Figure:
    """The mean of a field over the rows that have it."""
    values = [float(row[column]) for row in rows if row.get(column) is not None]
    value = math.fsum(values) / len(values) if values else math.nan
    low, high = intervals.mean(values) if values else (math.nan, math.nan)
    return Figure(value, low, high, len(values), column, detail)


@dataclasses.dataclass(frozen=True)
class Result:
    """What an evaluation gives.

    Attributes:
      rows: one a prompt or pair, with its `id` and what was found of it; JSON values.
      figures: by name, in the order in which they are shown.
      about: what else is to be known: counts, settings that were in force.
    """

    rows: Sequence[Row]
    figures: Mapping[str, Figure]
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """An evaluation.

    Attributes:
      name: as it is called for. Its config section, if it has one, is `evaluate.NAME`, with `_` for
        each `-`.
      run: does it. Of several processes all run it; what the first one returns counts.
      needs_model: whether it looks at a model, or at files alone.
      needs_pairs: whether it is about the config's held-out pairs, where `source` or `prompts` of
        its section names nothing else.
      of_files: of its config section, whether that names files which it looks at in the model's
        place.
      compares: whether it holds the model against another one by itself.
      reads: beside its section, the fields of the config that decide its figures, or what they
        begin with. Where one has changed, a finished evaluation is not taken for the one wanted.
      others: of a config, the models beside the one at hand that decide its figures; see
        `generate.model.load`.
      version: raised where the same settings come to give other figures.
    """

    name: str
    run: Callable[["Task"], Result]
    needs_model: bool = True
    of_files: Callable[[Any], bool] = lambda section: False
    needs_pairs: bool = False
    compares: bool = False
    reads: tuple[str, ...] = ("data.", "generate.", "judge.", "model.", "evaluate.judge.model")
    others: Callable[[Any], Sequence[str]] = lambda config: ()
    version: int = 1

    @property
    def section(self) -> str:
        return self.name.replace("-", "_")


# By name, the modules that have them as `EVALUATOR`.
_BUILTIN = {
    "checks": "attnpo_jax.evaluate.checks.evaluation",
    "pairs": "attnpo_jax.evaluate.pairs.evaluation",
    "alpaca-eval": "attnpo_jax.evaluate.alpaca_eval",
    "arena-hard": "attnpo_jax.evaluate.arena_hard",
    "harness": "attnpo_jax.evaluate.harness",
    "mt-bench": "attnpo_jax.evaluate.mt_bench",
    "versus": "attnpo_jax.evaluate.versus",
}
_registered: dict[str, Evaluator] = {}


def register(evaluator: Evaluator) -> Evaluator:
    """Makes an evaluation known by its name.

    Running the same definition again (a notebook cell, a reloaded module) replaces it.

    Raises:
      ValueError: there is one of that name, or it is no name.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", evaluator.name):
        raise ValueError(f"evaluation {evaluator.name!r}; accepted: a name such as short-answers")
    known = _registered.get(evaluator.name, evaluator).run
    same = (known.__module__, known.__qualname__) == (
        evaluator.run.__module__,
        evaluator.run.__qualname__,
    )
    if evaluator.name in _BUILTIN or not same:
        raise ValueError(f"evaluation {evaluator.name!r} is registered already")
    _registered[evaluator.name] = evaluator
    return evaluator


def names() -> list[str]:
    """All names, the package's own first."""
    return [*_BUILTIN, *_registered]


def find(name: str) -> Evaluator:
    """The evaluation of a name.

    Raises:
      UsageError: there is none.
    """
    if name in _BUILTIN:
        return importlib.import_module(_BUILTIN[name]).EVALUATOR
    if name in _registered:
        return _registered[name]
    raise UsageError(f"no evaluation {name!r}; accepted: {', '.join(names())}")
