"""From verdicts to a win rate: pure functions of numbers."""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

from attnpo_jax.evaluate import logistic
from attnpo_jax.runtime import intervals

# Keeps the fit finite where length alone tells wins from losses, as it may among few pairs; of 200
# pairs of ordinary lengths it takes less than a thousandth off the coefficients.
_RIDGE = 0.01
_LETTER = re.compile(r"\W*([AB])\b")


def outcome(verdicts: Sequence[float]) -> float:
    """What both orders of a pair come to: 1 a win, 0 a loss, a half for a tie.

    Args:
      verdicts: (2,) by order, log p(letter of the model's answer) - log p(other letter); NaN for
        one that can't be read.

    Returns:
      A win or loss only where both orders say so.

    >>> outcome([0.3, 2.0]), outcome([-1.0, -0.1]), outcome([0.3, -0.3])
    (1.0, 0.0, 0.5)
    """
    if all(verdict > 0 for verdict in verdicts):
        return 1.0
    return 0.0 if all(verdict < 0 for verdict in verdicts) else 0.5


def first_shown(verdicts: Sequence[float]) -> float:
    """The share of a pair's orders in which the answer at A was preferred; NaN if none is read.

    Args:
      verdicts: as for `outcome`; in the first order, the model's answer is at A.
    """
    toward_first = [sign * verdict for sign, verdict in zip((1, -1), verdicts, strict=True)]
    shares = [0.5 * (1 + np.sign(one)) for one in toward_first if not math.isnan(one)]
    return float(np.mean(shares)) if shares else math.nan


def letters_verdict(text: str, top_logprobs: Sequence[Mapping[str, float]]) -> float:
    """log p(A) - log p(B) of a judge's answer.

    From the likeliest tokens in the first place, where they hold a letter: what each letter has
    with spaces before or after counts together, and one that is not among them counts as the least
    likely that is. Else from the text, if it begins with a letter: 1 for A, -1 for B.

    Returns:
      The log-odds; NaN where there is no letter.

    >>> letters_verdict("B", [{"B": -0.5, " A": -1.5, "C": -4.0}])
    -1.0
    >>> letters_verdict("**A** is better.", [])
    1.0
    """
    likeliest = top_logprobs[0] if top_logprobs else {}
    found = {
        letter: [logprob for token, logprob in likeliest.items() if token.strip() == letter]
        for letter in "AB"
    }
    if len(likeliest) > 1 and any(found.values()):
        least = min(likeliest.values())
        a, b = (np.logaddexp.reduce(found[letter] or [least]) for letter in "AB")
        return float(a - b)
    begins = _LETTER.match(text)
    return math.nan if begins is None else (1.0 if begins[1] == "A" else -1.0)


def win_rate(outcomes: Sequence[float]) -> tuple[float, float, float]:
    """The mean of outcomes, ties a half, and its 95% bootstrap interval over pairs.

    Where nothing was won or nothing lost, resampled pairs tell too little of what else might have
    come; the interval is that of `intervals.mean` then. NaN without pairs.
    """
    x = np.asarray(outcomes, np.float64)
    if not len(x):
        return math.nan, math.nan, math.nan
    if _has_both(x):
        return float(x.mean()), *intervals.bootstrap(len(x), lambda drawn: float(x[drawn].mean()))
    return float(x.mean()), *intervals.mean(x)


def _has_both(outcomes: np.ndarray) -> bool:
    """Whether something was won and something lost."""
    return {0.0, 1.0} <= {*outcomes.tolist()}


def length_controlled(
    outcomes: Sequence[float],
    lengths: Sequence[float],
    baseline_lengths: Sequence[float],
    *,
    ridge: float = _RIDGE,
) -> tuple[float, float, float]:
    """The win rate if the answers were as long as the baseline's, and its 95% bootstrap interval.

    As in length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475), without its terms of
    prompts' difficulty, which need many models: P(win) = sigmoid(a tanh(d / std(d)) + c), where d
    is the difference of lengths in characters, is fitted to the outcomes by maximum likelihood, a
    tie counting as half a win and half a loss; the rate is sigmoid(c). A small penalty,
    ridge / 2 (a^2 + c^2), keeps both finite. Draws of the bootstrap keep std(d); where nothing was
    won or nothing lost, they tell too little, and there is no interval.

    Args:
      outcomes: (n,) 1, 0 or a half.
      lengths, baseline_lengths: (n,) characters.

    Returns:
      The rate and the ends of the interval; NaN without pairs.
    """
    y = np.asarray(outcomes, np.float64)
    if not len(y):
        return math.nan, math.nan, math.nan
    d = np.asarray(lengths, np.float64) - np.asarray(baseline_lengths, np.float64)
    spread = d.std(ddof=1) if len(d) > 1 else 0.0
    if len({*y.tolist()}) == 1:
        return float(y[0]), math.nan, math.nan
    x = np.stack([np.tanh(d / spread) if spread > 0 else np.zeros_like(d), np.ones_like(d)], 1)
    whole = logistic.fit(x, y, ridge=ridge)

    def rate(rows: np.ndarray) -> float:
        return float(special.expit(logistic.fit(x[rows], y[rows], ridge=ridge, start_F=whole)[1]))

    none = math.nan, math.nan
    interval = intervals.bootstrap(len(y), rate) if _has_both(y) else none
    return float(special.expit(whole[1])), *interval
