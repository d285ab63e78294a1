"""Figures of MT-Bench from its judgments."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attnpo_jax.evaluate import pooled
from attnpo_jax.evaluate.evaluator import Figure, Result, figure
from attnpo_jax.evaluate.mt_bench.files import UNREADABLE


def score(
    judgments: Sequence[Mapping[str, Any]], category_of: Mapping[str, str] | None = None
) -> Result:
    """Mean scores, by turn and category; those of several models, each with its name before.

    A mean is over all judgments that have a score, as FastChat's `show_result` has it, and its
    interval over questions. Without any, it is NaN.

    Args:
      judgments: of single answers; several of one turn all count.
      category_of: by question id; without it there are no means by category.

    Returns:
      A row a question (and model). In `about`, the judgments whose score is `UNREADABLE`, and those
      that repeat another.
    """
    category_of = category_of or {}
    models = list(dict.fromkeys(one["model"] for one in judgments))
    rows: list[dict[str, Any]] = []
    figures: dict[str, Figure] = {}
    about: dict[str, Any] = {}
    for model in models:
        own = [one for one in judgments if one["model"] == model]
        before = f"{model}/" if len(models) > 1 else ""
        of_model = _rows(own, category_of, before)
        rows += of_model
        turns = sorted({one["turn"] for one in own})
        found = _figures(of_model, turns, category_of)
        figures |= {before + name: one for name, one in found.items()}
        about |= {before + name: one for name, one in _about(own).items()}
    return Result(rows, figures, about)


def _rows(
    judgments: Iterable[Mapping[str, Any]], category_of: Mapping[str, str], before: str
) -> list[dict[str, Any]]:
    """A row a question: for each mean that it is part of, see `pooled.linearized`."""
    scores: dict[str, dict[int, list[float]]] = {}
    for one in judgments:
        turns = scores.setdefault(str(one["question_id"]), {})
        readable = turns.setdefault(one["turn"], [])
        if one["score"] != UNREADABLE:
            readable.append(float(one["score"]))
    rows: dict[str, dict[str, Any]] = {
        id: {"id": before + id, "category": category_of.get(id)} for id in scores
    }
    for turn in sorted({turn for turns in scores.values() for turn in turns}):
        _put(rows, f"turn_{turn}", {id: turns.get(turn, []) for id, turns in scores.items()})
    every = {id: sum(turns.values(), []) for id, turns in scores.items()}
    _put(rows, "score", every)
    for category in dict.fromkeys(category_of.get(id) for id in scores):
        if category is not None:
            of_it = {id: found for id, found in every.items() if category_of.get(id) == category}
            _put(rows, _column(category), of_it)
    return list(rows.values())


def _put(
    rows: Mapping[str, dict[str, Any]], column: str, scores: Mapping[str, Sequence[float]]
) -> None:
    """Gives rows their part of a mean; those without a score have none in it."""
    with_any = {id: found for id, found in scores.items() if found}
    if with_any:
        sums = [sum(found) for found in with_any.values()]
        counts = [len(found) for found in with_any.values()]
        for id, value in zip(with_any, pooled.linearized(sums, counts), strict=True):
            rows[id][column] = float(value)


def _column(category: str) -> str:
    return f"score_{category}"


def _figures(
    rows: Sequence[Mapping[str, Any]], turns: Sequence[int], category_of: Mapping[str, str]
) -> dict[str, Figure]:
    """The mean of all, of each turn, of each category."""
    there = {row["category"] for row in rows}
    figures = {name: figure(rows, name) for name in ("score", *(f"turn_{k}" for k in turns))}
    for category in dict.fromkeys(category_of.values()):
        if category in there:
            figures[category] = figure(rows, _column(category))
    return figures


def _about(judgments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    unreadable = Counter(one["turn"] for one in judgments if one["score"] == UNREADABLE)
    keys = Counter((str(one["question_id"]), one["turn"]) for one in judgments)
    judges = dict.fromkeys(str(one["judge"][0]) for one in judgments if one.get("judge"))
    return {
        "judge": ", ".join(judges),
        "judgments": len(judgments),
        "unreadable": sum(unreadable.values()),
        "unreadable_by_turn": {str(turn): unreadable[turn] for _, turn in keys},
        "repeated": len(judgments) - len(keys),
    }
