"""The length-controlled win rate of AlpacaEval 2 (Dubois et al. 2024, arXiv:2404.04475).

The verdicts are explained by the difference of lengths, the difficulty of the instruction and the
model; the win rate is what that predicts where lengths are equal:

    logit P(model wins) = a tanh((len_1 - len_2) / std) + b difficulty + c

The package adds verdicts on models that were told to be short or long, at a small weight and
without c, so that a has a value where a model's lengths vary little. Its fit has a penalty, which
cross-validation chooses: next to none where verdicts say something, and one that makes everything a
half where they look like chance. The figure here is the same. Its interval is that of fits without
a penalty, which does not vanish then.
"""

import csv
import dataclasses
import math
import pathlib

import numpy as np
from scipy.special import expit

from attnpo_jax.evaluate import logistic
from attnpo_jax.runtime import intervals
from attnpo_jax.runtime.errors import UserError

FILE = "df_gamed.csv"
WHERE = f"{FILE} of https://huggingface.co/datasets/tatsu-lab/alpaca_eval"

COLUMNS = (
    "index",
    "preference",
    "std_delta_len",
    "instruction_difficulty",
    "not_gamed_baseline",
)
# The package's regularization to the baseline, 0.2, over the two models that were told so.
_WEIGHT = 0.2 / 2
_DRAWS = 1000
# The package's choice of a penalty: scikit-learn's grid of its inverse, over five folds.
_INVERSE_PENALTIES = np.logspace(-4, 4, 10)
_FOLDS = 5


@dataclasses.dataclass(frozen=True)
class LengthData:
    """What the package's data file holds.

    Attributes:
      features_N3: of its verdicts: tanh of the scaled difference of lengths, difficulty, whether
        the model is its own.
      targets_N: how likely the second output wins, 0 to 1.
      weights_N: of its verdicts.
      difficulty: by the place of an instruction in AlpacaEval, from 0.
    """

    features_N3: np.ndarray
    targets_N: np.ndarray
    weights_N: np.ndarray
    difficulty: dict[int, float]

    @classmethod
    def read(cls, path: pathlib.Path) -> "LengthData":
        """Reads `df_gamed.csv`, or that of a folder.

        Raises:
          UserError: it has other columns, or a cell is no number.
          OSError: it can't be read.
        """
        file = path / FILE if path.is_dir() else path
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines)
            try:
                lacks = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
                found = [] if lacks else [[_number(row[name]) for name in COLUMNS] for row in rows]
            except (ValueError, csv.Error) as error:
                line = rows.line_num
                raise UserError(f"{file}, line {line}: {error}; accepted: {WHERE}") from None
        if lacks:
            raise UserError(f"{file}: no column {', '.join(lacks)}; accepted: {WHERE}")
        if not found:
            raise UserError(f"{file}: no rows; accepted: {WHERE}")
        index, preference, length, difficulty, own = np.array(found).T
        features = np.stack([np.tanh(length), difficulty, own], axis=1)
        by_index: dict[int, float] = {}
        for place, value in zip(index, difficulty, strict=True):
            by_index.setdefault(int(place), float(value))
        return cls(features, preference, np.where(own > 0, 1.0, _WEIGHT), by_index)


def _number(cell: str | None) -> float:
    text = (cell or "").strip()
    if text in ("True", "False"):
        return float(text == "True")
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


@dataclasses.dataclass(frozen=True)
class LengthControlled:
    """The length-controlled win rate.

    Attributes:
      wins_R: for each annotation, how likely the model wins at equal lengths; the win rate is their
        mean.
      coefficients: a, b and c.
      penalty: what was chosen for it.
      unpenalized: the win rate of a fit without a penalty.
      low, high: the 95% interval of that, by a bootstrap over annotations, each with a fit of its
        own.
    """

    wins_R: np.ndarray
    coefficients: tuple[float, float, float]
    penalty: float
    unpenalized: float
    low: float
    high: float


def length_controlled(
    wins_R: np.ndarray, lengths_R2: np.ndarray, data: LengthData
) -> LengthControlled:
    """Fits the verdicts of AlpacaEval's instructions, in its order.

    Args:
      wins_R: how likely the model wins, 0 to 1; NaN where that is not known.
      lengths_R2: characters of the baseline's output, and of the model's.
      data: see `LengthData`.

    Raises:
      UserError: there are more annotations than instructions with a difficulty.
    """
    rows = len(wins_R)
    unknown = [place for place in range(rows) if place not in data.difficulty]
    if unknown:
        raise UserError(
            f"annotation {unknown[0] + 1} of {rows} has no difficulty in {FILE}, which knows "
            f"{len(data.difficulty)} instructions; accepted: annotations of AlpacaEval's "
            "instructions, in its order"
        )
    delta = lengths_R2[:, 0] - lengths_R2[:, 1]
    spread = delta.std(ddof=1) if rows > 1 else 0.0
    scaled = np.tanh(delta / spread) if spread else np.zeros(rows)
    difficulty = np.array([data.difficulty[place] for place in range(rows)])
    features = np.stack([scaled, difficulty, np.ones(rows)], axis=1)
    equal = features * [0.0, 1.0, 1.0]
    known = np.flatnonzero(np.isfinite(wins_R))
    x = np.concatenate([data.features_N3, features[known]])
    y = np.concatenate([data.targets_N, wins_R[known]])
    weights = np.concatenate([data.weights_N, np.ones(len(known))])
    penalty = _chosen_penalty(x, y, weights)
    coefficients = logistic.fit_l1(x, y, weights, penalty)
    free = logistic.fit(x, y, weights)

    def win_rate(drawn: np.ndarray) -> float:
        times = np.bincount(drawn, minlength=rows)
        again = np.concatenate([data.weights_N, times[known]])
        return float(times @ expit(equal @ logistic.fit(x, y, again, start_F=free))) / rows

    low, high = intervals.bootstrap(rows, win_rate, draws=_DRAWS)
    a, b, c = (float(value) for value in coefficients)
    at_equal = expit(equal @ coefficients)
    unpenalized = float(expit(equal @ free).mean())
    return LengthControlled(at_equal, (a, b, c), penalty, unpenalized, low, high)


def _chosen_penalty(x_NF: np.ndarray, y_N: np.ndarray, weights_N: np.ndarray) -> float:
    """The penalty whose fits to all folds but one explain that one best, on the mean of folds; the
    largest of those that are as good.
    """
    # As scikit-learn's GroupKFold deals them, a verdict a group.
    fold = np.arange(len(y_N))[::-1] % _FOLDS
    losses = np.zeros(len(_INVERSE_PENALTIES))
    for out in range(min(_FOLDS, len(y_N))):
        x, y, w = (values[fold != out] for values in (x_NF, y_N, weights_N))
        for k, inverse in enumerate(_INVERSE_PENALTIES):
            b = logistic.fit_l1(x, y, w, 1 / inverse)
            z, targets = x_NF[fold == out] @ b, y_N[fold == out]
            surprise = np.logaddexp(0, z) - targets * z
            losses[k] += np.mean(weights_N[fold == out] * surprise)
    return 1 / float(_INVERSE_PENALTIES[np.argmin(losses)])
