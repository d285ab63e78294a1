"""How well weights find marked tokens: pure functions of arrays.

Shapes: R responses, K kinds of weights, T a response's text tokens.
"""

from collections.abc import Hashable, Sequence

import numpy as np

# Unmarked tokens that a marked one is held against at its place, at least.
LEAST = 20


def auc(weights_KT: np.ndarray, marked_T: np.ndarray) -> np.ndarray:
    """How often a marked token of a response weighs more than an unmarked one: (K,).

    The area under the ROC curve (Mann and Whitney's U over the number of token pairs), ties count
    half; NaN where all tokens are marked, or none is.

    >>> auc(np.array([[1.0, 3.0, 2.0, 0.0]]), np.array([False, False, True, False])).round(3)
    array([0.667])
    """
    marked, others = int(marked_T.sum()), int((~marked_T).sum())
    if not marked or not others:
        return np.full(len(weights_KT), np.nan)
    from scipy import stats

    ranks_KT = stats.rankdata(weights_KT, axis=1)
    wins = ranks_KT[:, marked_T].sum(axis=1) - marked * (marked + 1) / 2
    return wins / (marked * others)


def lift(weights_KT: np.ndarray, marked_T: np.ndarray) -> np.ndarray:
    """The mean weight of a response's marked tokens, where uniform weights have 1: (K,)."""
    if not marked_T.any():
        return np.full(len(weights_KT), np.nan)
    mean = weights_KT.mean(axis=1)
    return weights_KT[:, marked_T].mean(axis=1) / np.where(mean > 0, mean, np.nan)


def at_place(
    weights: Sequence[np.ndarray],
    marked: Sequence[np.ndarray],
    strata: Sequence[Hashable],
    groups: Sequence[Hashable],
    *,
    least: int = LEAST,
) -> tuple[np.ndarray, np.ndarray]:
    """As `auc` and `lift`, but against unmarked tokens that stand where the marked one does.

    Weights fall along a response, and marks stand early or late: a kind of weights may find them
    by their place alone. So each marked token is held against the unmarked tokens of other
    responses (of its stratum, but not of its own group) at the same place, counted from the
    response's first token; where fewer than `least` stand there, those of the places around count
    too, as far to the left as to the right, until there are so many. Weights that depend on the
    place alone then have an AUC of 1/2 and a lift of 1, as uniform ones do.

    Args:
      weights: by response, (K, T).
      marked: by response, bool (T,).
      strata, groups: by response.

    Returns:
      AUC and lift, (R, K) each: means over a response's marked tokens; NaN where there is none, or
      nothing to hold it against.
    """
    kinds = len(weights[0]) if weights else 0
    aucs, lifts = (np.full((len(weights), kinds), np.nan) for _ in range(2))
    for stratum in dict.fromkeys(strata):
        rows = [r for r, of in enumerate(strata) if of == stratum]
        numbers = {group: g for g, group in enumerate(dict.fromkeys(groups[r] for r in rows))}
        others = _Others(
            np.concatenate([weights[r][:, ~marked[r]] for r in rows], axis=1),
            np.concatenate([np.flatnonzero(~marked[r]) for r in rows]),
            np.concatenate([np.full((~marked[r]).sum(), numbers[groups[r]]) for r in rows]),
        )
        for r in rows:
            places = np.flatnonzero(marked[r])
            if len(places):
                each = [
                    others.against(weights[r][:, at], at, numbers[groups[r]], least)
                    for at in places
                ]
                aucs[r], lifts[r] = np.mean(each, axis=0)
    return aucs, lifts


class _Others:
    """The unmarked tokens of some responses, by place: weights (K, N), places and groups (N,)."""

    def __init__(self, weights_KN: np.ndarray, places_N: np.ndarray, groups_N: np.ndarray):
        order = np.argsort(places_N, kind="stable")
        self._weights, self._groups = weights_KN[:, order], groups_N[order]
        self._places = places_N[order]

    def against(
        self, weights_K: np.ndarray, place: int, group: int, least: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """How often a token weighs more than those at its place, and how much more: (K,) each."""
        last = int(self._places[-1]) if len(self._places) else -1
        for width in range(max(place, last - place) + 1):
            start, stop = np.searchsorted(self._places, [place - width, place + width + 1])
            if np.count_nonzero(self._groups[start:stop] != group) >= least:
                break
        else:
            start, stop = 0, len(self._places)
        others_KN = self._weights[:, start:stop][:, self._groups[start:stop] != group]
        if not others_KN.shape[1]:
            nothing = np.full(len(weights_K), np.nan)
            return nothing, nothing
        x_K1 = weights_K[:, None]
        above_K = (x_K1 > others_KN).mean(axis=1) + 0.5 * (x_K1 == others_KN).mean(axis=1)
        mean_K = others_KN.mean(axis=1, dtype=np.float64)
        return above_K, weights_K / np.where(mean_K > 0, mean_K, np.nan)
