"""Means over judgments of which a row has several, more in one row than in another."""

from collections.abc import Sequence

import numpy as np


def linearized(sums: Sequence[float], counts: Sequence[float]) -> np.ndarray:
    """Values of rows whose plain mean is the mean over all judgments, and whose spread is its own.

    A row's judgments belong together, so an interval has to be taken over rows. Where every row has
    as many judgments, this is each row's own mean; elsewhere the linearization of the ratio of two
    means (Cochran, Sampling Techniques, 1977, section 6.3), so that intervals and paired
    differences may treat it as they do any mean.

    Args:
      sums: (n,) sum of a row's judgments.
      counts: (n,) how many it has, or their weights together; not all 0.

    >>> linearized([16.0, 7.0], [2, 1])  # of 9, 7 and 7
    array([8.11111111, 7.22222222])
    """
    total, number = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    mean = total.sum() / number.sum()
    return mean + (total - mean * number) / number.mean()
