"""Style control: the win rate of a Bradley-Terry fit that also explains verdicts by style.

    logit P(model wins) = strength(model) - strength(baseline) + c . style

with `style` the scaled difference of lengths and of counts of markdown marks
(https://lmsys.org/blog/2024-08-28-style-control/). v0.1 and v2 scale differently; v0.1 also
regularizes the fit, as scikit-learn does unless told otherwise.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import expit

from attnpo_jax.evaluate import logistic
from attnpo_jax.evaluate.arena_hard.files import Answer, Judgment, Style
from attnpo_jax.evaluate.evaluator import Figure
from attnpo_jax.runtime import intervals
from attnpo_jax.runtime.errors import UserError

NAMES = ("length", "headers", "lists", "bold")
_COLUMNS = {"length": (0,), "markdown": (1, 2, 3)}
# A model's column has the logarithm of ten in v0.1, since ratings are in tens there, and each
# battle stands in the fit twice: with scikit-learn's C = 1 that decides how much is regularized.
_V01_COLUMN, _V01_TIMES, _V01_RIDGE = math.log(10), 2.0, 1.0
_DRAWS = 400


@dataclasses.dataclass(frozen=True)
class Battles:
    """Games of one category.

    Attributes:
      games: judgment, how the model does from 0 to 1, and how often that counts.
      old: whether they are of v0.1.
    """

    games: Sequence[tuple[Judgment, float, float]]
    old: bool


def win_rates(
    battles: Battles,
    control: Sequence[str],
    answers: Mapping[str, Mapping[str, Answer]],
) -> tuple[dict[str, Figure], dict[str, float]]:
    """Style-controlled win rates, 0 to 1, with bootstrap intervals over questions.

    Args:
      battles: the games.
      control: `length`, `markdown`, or both; without any, the win rates are the weighted means (of
        v0.1, but for its regularization).
      answers: by model and question.

    Returns:
      Win rates by model, and the coefficients of `NAMES` that are controlled for.

    Raises:
      UserError: an answer, or its style, is missing.
    """
    models = list(dict.fromkeys(judgment.model for judgment, _, _ in battles.games))
    if not models:
        return {}, {}
    places: dict[str, int] = {}
    question = np.array([places.setdefault(one.id, len(places)) for one, _, _ in battles.games])
    wins = np.array([value for _, value, _ in battles.games])
    times = np.array([count for _, _, count in battles.games])
    of_model = np.zeros((len(wins), len(models) + 1))
    for row, (judgment, _, _) in enumerate(battles.games):
        of_model[row, models.index(judgment.model)] = 1.0
    columns = sorted(column for name in control for column in _COLUMNS[name])
    styles = _styles(battles, answers, times)[:, columns]
    if battles.old:
        of_model[:, -1] = -1.0  # The baseline's: regularized too.
        x = np.concatenate([of_model * _V01_COLUMN, styles], axis=1)
        scale, weights, ridge = _V01_COLUMN, times * _V01_TIMES, _V01_RIDGE
    else:
        x = np.concatenate([of_model, styles], axis=1)
        scale, weights, ridge = 1.0, times, 0.0

    def rates(coefficients: np.ndarray) -> np.ndarray:
        return expit(scale * (coefficients[: len(models)] - coefficients[len(models)]))

    fitted = logistic.fit(x, wins, weights, ridge=ridge)

    rng = np.random.default_rng(0)
    found = []
    for _ in range(_DRAWS):
        drawn = np.bincount(rng.integers(0, len(places), len(places)), minlength=len(places))
        again = logistic.fit(x, wins, weights * drawn[question], ridge=ridge, start_F=fitted)
        found.append(rates(again))
    ends = [(1 - intervals.LEVEL) / 2, (1 + intervals.LEVEL) / 2]
    low, high = np.quantile(np.array(found), ends, axis=0)
    figures = {
        model: Figure(float(value), float(low[k]), float(high[k]), len(places))
        for k, (model, value) in enumerate(zip(models, rates(fitted), strict=True))
    }
    of_styles = fitted[len(models) + 1 :]
    return figures, {NAMES[k]: float(v) for k, v in zip(columns, of_styles, strict=True)}


def _styles(
    battles: Battles, answers: Mapping[str, Mapping[str, Answer]], times: np.ndarray
) -> np.ndarray:
    """(games, 4) differences of style, model less baseline, of mean 0 and deviation 1."""
    difference = _v01_difference if battles.old else _v2_difference
    x = np.array(
        [
            difference(_style(answers, one.model, one.id), _style(answers, one.baseline, one.id))
            for one, _, _ in battles.games
        ]
    )
    mean = np.average(x, axis=0, weights=times)
    # Over games as often as they count; of v2, an estimate from a sample of them.
    freedom = times.sum() - (0 if battles.old else 1)
    deviation = np.sqrt((times[:, None] * (x - mean) ** 2).sum(axis=0) / max(freedom, 1))
    # A style that is the same everywhere explains nothing.
    return (x - mean) / np.where(deviation > 0, deviation, 1.0)


def _style(answers: Mapping[str, Mapping[str, Answer]], model: str, id: str) -> Style:
    answer = answers.get(model, {}).get(id)
    if answer is None or answer.style is None:
        what = "no answer" if answer is None else "no style (token_len, header_count, ...)"
        raise UserError(
            f"style control: {what} of {model} to {id}; accepted: answers of all models and of the "
            "baseline with the metadata that Arena-Hard's add_markdown_info.py puts there"
        )
    return answer.style


def _v01_difference(model: Style, baseline: Style) -> list[float]:
    pairs = zip((model.tokens, *model.marks), (baseline.tokens, *baseline.marks), strict=True)
    return [(a - b) / (a + b + 1) for a, b in pairs]


def _v2_difference(model: Style, baseline: Style) -> list[float]:
    length = model.tokens + baseline.tokens
    found = [(model.tokens - baseline.tokens) / length if length else 0.0]
    for a, b in zip(model.marks, baseline.marks, strict=True):
        a, b = a / (model.tokens + 1), b / (baseline.tokens + 1)
        found.append((a - b) / (a + b + 1))
    return found
