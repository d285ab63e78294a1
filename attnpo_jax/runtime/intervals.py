"""95% intervals of what is estimated from rows: means, paired differences, win rates.

All are of the mean over a population that the rows are drawn from independently, one row a prompt.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import numpy as np
from scipy import special

LEVEL = 0.95
_Z = float(special.ndtri((1 + LEVEL) / 2))

_DRAWN_AT_ONCE = 1 << 17  # rows, of all draws together: they stay in the cache
Interval = tuple[float, float]


class Estimate(NamedTuple):
    """A value with its interval; NaN where there is none."""

    value: float
    low: float
    high: float

    @classmethod
    def of_mean(cls, values: Sequence[float]) -> Self:
        """The mean of those values that are no NaN, with the interval that `mean` gives.

        >>> Estimate.of_mean([0.5, 0.5, math.nan]).value
        0.5
        """
        x = np.asarray(values, np.float64)
        x = x[~np.isnan(x)]
        return cls(float(x.mean()), *mean(x)) if len(x) else cls(math.nan, math.nan, math.nan)

    def facts(self) -> list[float | None]:
        """The three as JSON has them, to six decimals; null for NaN."""
        return [round(float(x), 6) if math.isfinite(x) else None for x in self]


def mean(values: Sequence[float]) -> Interval:
    """The interval of a mean.

    Values from 0 to 1 (passes, accuracies, wins with ties at a half) get Wilson's score interval
    (1927), with the count of rows that a proportion of the same standard error would have: it stays
    within 0 and 1, and holds near them too. Any other values get Student's t interval.

    Args:
      values: (n,) one a row.

    Returns:
      Low and high end; NaN for fewer than two values that are not from 0 to 1.

    >>> "%.4f %.4f" % mean([1.0] * 8 + [0.0] * 2)
    '0.4902 0.9433'
    """
    x = np.asarray(values, np.float64)
    n = len(x)
    if n and x.min() >= 0 and x.max() <= 1:
        p = float(x.mean())
        # Of 0 and 1 alone, the same as n; rows that all say the same tell nothing of their spread.
        effective = n * p * (1 - p) / v if (v := float(x.var())) > 0 else n
        center = (p + _Z**2 / (2 * effective)) / (1 + _Z**2 / effective)
        half = math.sqrt(p * (1 - p) / effective + (_Z / (2 * effective)) ** 2)
        half *= _Z / (1 + _Z**2 / effective)
        # At the ends without what rounding leaves.
        return max(0.0, center - half) if p > 0 else 0.0, min(1.0, center + half) if p < 1 else 1.0
    return student(x)


def student(values: Sequence[float]) -> Interval:
    """Student's t interval of a mean, as for values that are themselves means of many.

    Args:
      values: (n,).

    Returns:
      Low and high end; NaN for fewer than two values.

    >>> "%.4f %.4f" % student([0.7, 0.8, 0.9])
    '0.5516 1.0484'
    """
    x, n = np.asarray(values, np.float64), len(values)
    if n < 2:
        return math.nan, math.nan
    half = float(special.stdtrit(n - 1, (1 + LEVEL) / 2)) * float(x.std(ddof=1)) / math.sqrt(n)
    return float(x.mean()) - half, float(x.mean()) + half


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The interval of the mean of `second - first`, rows of the same prompts.

    Of passes and losses, and ties at a half, one difference of 1 and one of -1 are added, as Bonett
    and Price (2012) do for paired proportions: without them, models that agree on all rows of a
    small set would be equal for certain. Any other values get Student's t interval.

    Args:
      first, second: (n,) the two models' values, row by row.

    >>> "%.4f %.4f" % paired_difference([0, 0, 1, 1], [0, 0, 1, 1])
    '-0.4620 0.4620'
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    difference = b - a
    if len(a) and np.isin([a, b], [0.0, 0.5, 1.0]).all():
        added = np.concatenate([difference, [1.0, -1.0]])
        center, half = float(added.mean()), _Z * float(added.std()) / math.sqrt(len(added))
        return max(-1.0, center - half), min(1.0, center + half)
    return mean(difference)


def bootstrap(
    rows: int, statistic: Callable[[np.ndarray], float], *, draws: int = 2000, seed: int = 0
) -> Interval:
    """The percentile interval of a statistic over resampled rows (Efron 1979).

    Args:
      rows: how many there are.
      statistic: of rows' numbers (rows,), drawn with replacement.
      draws: how many times.
      seed: of the draws.

    Returns:
      Low and high end; NaN where there are no rows, or the statistic is not finite for most draws.
    """
    if not rows:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    found = np.array([statistic(rng.integers(0, rows, rows)) for _ in range(draws)])
    found = found[np.isfinite(found)]
    if 2 * len(found) < draws:
        return math.nan, math.nan
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bootstrap_means(values_RC: np.ndarray, *, draws: int = 2000, seed: int = 0) -> list[Estimate]:
    """Columns' means with their percentile intervals over resampled rows, as `bootstrap` has them.

    All columns are resampled alike.

    Args:
      values_RC: one row a prompt, (rows, columns); NaN where a row has no value, which is left out.
      draws: how many times.
      seed: of the draws.

    Returns:
      By column. There is no interval for fewer than two values, or where half of the draws have
      none.

    >>> bootstrap_means(np.array([[1.0, 0.5], [0.0, 0.5], [0.5, 0.5]]))[1]
    Estimate(value=0.5, low=0.5, high=0.5)
    """
    values_RC = np.asarray(values_RC, np.float64)
    rows, columns = values_RC.shape
    known_RC = np.isfinite(values_RC)
    values_RC = np.where(known_RC, values_RC, 0.0)
    number_C = known_RC.sum(axis=0)
    mean_C = np.where(number_C > 0, values_RC.sum(axis=0) / np.maximum(number_C, 1), math.nan)
    ends_2C = np.full((2, columns), math.nan)
    if rows > 1:
        # How often each draw has each row.
        counts_DR = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), draws)
        number_DC = counts_DR @ known_RC.astype(np.float64)
        means_DC = counts_DR @ values_RC / np.where(number_DC > 0, number_DC, math.nan)
        enough_C = (number_C > 1) & (2 * (number_DC > 0).sum(axis=0) >= draws)
        ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
        ends_2C[:, enough_C] = np.nanquantile(means_DC[:, enough_C], ends, axis=0)
    return [Estimate(*map(float, one)) for one in zip(mean_C, *ends_2C, strict=True)]


def crossed_difference(
    first: np.ndarray, second: np.ndarray, *, draws: int = 2000, seed: int = 0
) -> Interval:
    """The interval of the mean of `second - first` over seeds and rows, all rows at each seed.

    Seeds and rows are resampled independently of each other (the pigeonhole bootstrap, Owen 2007).
    Of n seeds, n - 1 are drawn, which makes the variance that comes of them unbiased (Rao and Wu
    1988); with one seed, rows alone are resampled. Of values from 0 to 1, a row that differs by 1
    and one that differs by -1 are added, see `paired_difference`.

    Args:
      first, second: (seeds, rows), the two sides' values at the same seeds, of the same rows.
      draws: how many times.
      seed: of the draws.

    Returns:
      Low and high end; NaN where there are no rows or seeds.

    >>> same = np.ones((3, 8))
    >>> low, high = crossed_difference(same, same)
    >>> low < 0 < high
    True
    """
    difference = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    if not difference.size:
        return math.nan, math.nan
    if min(np.min(first), np.min(second)) >= 0 and max(np.max(first), np.max(second)) <= 1:
        added = np.broadcast_to([1.0, -1.0], (len(difference), 2))
        difference = np.concatenate([difference, added], axis=1)
    seeds, rows = difference.shape
    rng = np.random.default_rng(seed)
    drawn = max(1, seeds - 1)
    found = []
    for part in np.array_split(np.arange(draws), 1 + draws * rows // _DRAWN_AT_ONCE):
        times = rng.multinomial(drawn, np.full(seeds, 1 / seeds), len(part))
        of_seeds = times @ difference / drawn  # (draws, rows)
        chosen = rng.integers(0, rows, of_seeds.shape, np.int32)
        found.append(np.take_along_axis(of_seeds, chosen, axis=1).mean(axis=1))
    low, high = np.quantile(np.concatenate(found), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def sign_test(wins: int, losses: int) -> float:
    """The two-sided p-value of as many wins if both sides were as good; 1 without any.

    >>> round(sign_test(8, 2), 4)
    0.1094
    """
    # At even odds both tails are alike.
    return min(1.0, 2 * float(special.bdtr(min(wins, losses), wins + losses, 0.5)))
