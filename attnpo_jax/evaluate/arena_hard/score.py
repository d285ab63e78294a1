"""Figures of Arena-Hard from its judgments: win rates against the baseline."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from attnpo_jax.evaluate import pooled
from attnpo_jax.evaluate.arena_hard import style
from attnpo_jax.evaluate.arena_hard.files import Answer, Judgment
from attnpo_jax.evaluate.arena_hard.style import Battles
from attnpo_jax.evaluate.evaluator import Figure, Result
from attnpo_jax.runtime import intervals

# By label, how A does, and how often the verdict counts.
_V01 = {
    "A>>B": (1.0, 3),
    "A>B": (1.0, 1),
    "A=B": (0.5, 1),
    "B>A": (0.0, 1),
    "B>>A": (0.0, 3),
}
_V2 = _V01 | {
    "B<<A": (1.0, 3),
    "B<A": (1.0, 1),
    "B=A": (0.5, 1),
    "A<B": (0.0, 1),
    "A<<B": (0.0, 3),
}


@dataclasses.dataclass(frozen=True)
class _Won:
    """What a question's games come to: weight of the verdicts, and of those that the model wins."""

    weight: float
    won: float


def games(judgment: Judgment) -> list[tuple[float, int] | None]:
    """How the model does in both games, 0 to 1, and how often each counts; None: unreadable.

    In v2, a game whose other one is unreadable is none either.
    """
    labels = _V01 if judgment.old else _V2
    first, second = (labels.get(verdict or "") for verdict in judgment.verdicts)
    if not judgment.old and (first is None or second is None):
        return [None, None]
    return [None if first is None else (1 - first[0], first[1]), second]


def score(
    judgments: Sequence[Judgment],
    control: Sequence[str] = (),
    answers: Mapping[str, Mapping[str, Answer]] | None = None,
) -> Result:
    """Win rates, 0 to 1, of each model against its category's baseline.

    `A>>B` counts three times, a tie a half. Where every model meets the baseline alone, this
    weighted mean is the win rate of an unregularized Bradley-Terry fit. Its interval is a bootstrap
    over questions, since a question's games belong together.

    Args:
      judgments: of one layout.
      control: `length`, `markdown` or both: what a style-controlled win rate is taken at equal
        values of, see `style`.
      answers: by model and question, with their style; needed for that.

    Returns:
      A row a judgment. Figures have the category's and the model's names before where there are
      several.

    Raises:
      UserError: an answer, or its style, is missing.
    """
    categories = list(dict.fromkeys(one.category for one in judgments))
    models = list(dict.fromkeys(one.model for one in judgments))
    rows: list[dict[str, Any]] = []
    figures: dict[str, Figure] = {}
    about: dict[str, Any] = {}
    for category in categories:
        of_it = [one for one in judgments if one.category == category]
        controlled = {}
        if control:
            controlled, weights = style.win_rates(_battles(of_it), control, answers or {})
            about[_name(categories, category, "style_coefficients")] = weights
        for model in dict.fromkeys(one.model for one in of_it):
            own = [one for one in of_it if one.model == model]
            before = _name(categories, category, _name(models, model, ""))
            column = "win" if len(categories) == 1 else f"win_{category}"
            made, figure, facts = _of_one(own, _name(models, model, ""), column)
            if len(models) > 1:  # Their rows are no pairs with those of another file's model.
                figure = dataclasses.replace(figure, column=None)
            rows += made
            figures[before + "win_rate"] = figure
            if model in controlled:
                figures[before + "style_controlled_win_rate"] = controlled[model]
            about |= {before + key: value for key, value in facts.items()}
    return Result(rows, figures, about)


def _name(among: Sequence[str], one: str, rest: str) -> str:
    return f"{one}/{rest}" if len(among) > 1 else rest


def _of_one(
    judgments: Sequence[Judgment], before: str, column: str
) -> tuple[list[dict[str, Any]], Figure, dict[str, Any]]:
    """Rows, win rate and counts of one model in one category."""
    found = [games(one) for one in judgments]
    won = [_won(both) for both in found]
    known = [k for k, one in enumerate(won) if one.weight]
    rows: list[dict[str, Any]] = [
        {
            "id": before + one.id,
            "category": one.category,
            "verdicts": list(one.verdicts),
        }
        for one in judgments
    ]
    sums = np.array([won[k].won for k in known])
    counts = np.array([won[k].weight for k in known])
    figure = Figure(float("nan"))
    if known:
        for k, value in zip(known, pooled.linearized(sums, counts), strict=True):
            rows[k][column] = float(value)
        low, high = intervals.bootstrap(
            len(known), lambda drawn: float(sums[drawn].sum() / counts[drawn].sum())
        )
        figure = Figure(float(sums.sum() / counts.sum()), low, high, len(known), column)
    labels = _V01 if judgments[0].old else _V2
    return (
        rows,
        figure,
        {
            "baseline": judgments[0].baseline,
            "judgments": len(judgments),
            "unreadable_games": sum(v not in labels for one in judgments for v in one.verdicts),
            "games_left_out": sum(game is None for both in found for game in both),
        },
    )


def _won(both: Sequence[tuple[float, int] | None]) -> _Won:
    known = [game for game in both if game is not None]
    return _Won(
        float(sum(times for _, times in known)), sum(value * times for value, times in known)
    )


def _battles(judgments: Sequence[Judgment]) -> Battles:
    return Battles(list(_each(judgments)), judgments[0].old)


def _each(judgments: Sequence[Judgment]) -> Iterator[tuple[Judgment, float, float]]:
    for judgment in judgments:
        for game in games(judgment):
            if game is not None:
                yield judgment, game[0], float(game[1])
