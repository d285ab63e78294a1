"""Logistic fits: what a verdict owes to the model, and what to a length or a style."""

import numpy as np
from scipy.special import expit

_MOST_STEPS = 100
_MOST_ROUNDS = 1000
# Of what the loss still falls by, as a part of the sum of weights.
_TOLERANCE = 1e-12


def fit(
    features_NF: np.ndarray,
    targets_N: np.ndarray,
    weights_N: np.ndarray | None = None,
    *,
    ridge: float = 0.0,
    start_F: np.ndarray | None = None,
) -> np.ndarray:
    """The coefficients b that minimize sum w (log(1 + exp(x b)) - y x b) + ridge / 2 |b|^2.

    Newton's method, with shorter steps where a whole one leads up. There is no intercept but a
    column of ones. Where the targets can be told apart for certain, the minimum is at infinity, and
    what is returned predicts them up to about 1e-10.

    Args:
      features_NF: x, a row a verdict.
      targets_N: y, from 0 to 1: who won, a tie at a half, or how likely it is.
      weights_N: w, 0 or more; None for 1 each.
      ridge: of the penalty.
      start_F: where to begin, such as the coefficients of nearly the same rows.

    Returns:
      (F,) b; the shortest one where several are as good, as with a column of zeros.

    >>> fit(np.ones((4, 1)), np.array([1.0, 1.0, 1.0, 0.0])).round(4)  # log(3)
    array([1.0986])
    """
    x, y = np.asarray(features_NF, np.float64), np.asarray(targets_N, np.float64)
    w = np.ones(len(y)) if weights_N is None else np.asarray(weights_N, np.float64)
    b = np.zeros(x.shape[1]) if start_F is None else np.array(start_F, np.float64)
    loss = _loss(x, y, w, b, ridge)
    for _ in range(_MOST_STEPS):
        p = expit(x @ b)
        slope = x.T @ (w * (p - y)) + ridge * b
        bend = (x * (w * p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(b))
        step = np.linalg.lstsq(bend, slope, rcond=1e-12)[0]
        size = 1.0
        while (new := _loss(x, y, w, b - size * step, ridge)) > loss and size > 1e-6:
            size /= 2
        if not new < loss:
            break
        b, fell, loss = b - size * step, loss - new, new
        if fell <= _TOLERANCE * max(float(w.sum()), 1.0):
            break
    return b


def fit_l1(
    features_NF: np.ndarray, targets_N: np.ndarray, weights_N: np.ndarray, penalty: float
) -> np.ndarray:
    """The coefficients b that minimize sum w (log(1 + exp(x b)) - y x b) + penalty |b|_1.

    Newton's method, each step's quadratic model minimized coordinate by coordinate (Friedman et al.
    2010, Regularization Paths for Generalized Linear Models via Coordinate Descent).

    Args:
      features_NF, targets_N, weights_N: as of `fit`.
      penalty: of the absolute values, above 0.

    Returns:
      (F,) b; exactly 0 where a feature does not pay for its penalty.
    """
    x, y, w = features_NF, targets_N, weights_N
    b = np.zeros(x.shape[1])
    loss = _loss(x, y, w, b, 0.0)
    for _ in range(_MOST_STEPS):
        p = expit(x @ b)
        slope = x.T @ (w * (p - y))
        bend = (x * (w * p * (1 - p))[:, None]).T @ x
        step = _l1_minimum(bend, slope, b, penalty) - b
        size = 1.0
        while (new := _l1_loss(x, y, w, b + size * step, penalty)) > loss and size > 1e-6:
            size /= 2
        if not new < loss:
            break
        b, fell, loss = b + size * step, loss - new, new
        if fell <= _TOLERANCE * max(float(w.sum()), 1.0):
            break
    return b


def _l1_minimum(
    bend_FF: np.ndarray, slope_F: np.ndarray, at_F: np.ndarray, penalty: float
) -> np.ndarray:
    """Where slope (c - at) + (c - at) bend (c - at) / 2 + penalty |c|_1 is least."""
    c = at_F.copy()
    for _ in range(_MOST_ROUNDS):
        before = c.copy()
        for k in np.flatnonzero(np.diag(bend_FF) > 0):
            own = bend_FF[k, k]
            free = c[k] - (slope_F[k] + bend_FF[k] @ (c - at_F)) / own
            c[k] = np.sign(free) * max(abs(free) - penalty / own, 0.0)
        if np.abs(c - before).max() <= 1e-10:
            break
    return c


def _l1_loss(x: np.ndarray, y: np.ndarray, w: np.ndarray, b: np.ndarray, penalty: float) -> float:
    return _loss(x, y, w, b, 0.0) + penalty * float(np.abs(b).sum())


def _loss(x: np.ndarray, y: np.ndarray, w: np.ndarray, b: np.ndarray, ridge: float) -> float:
    z = x @ b
    return float(np.sum(w * (np.logaddexp(0, z) - y * z)) + ridge / 2 * b @ b)
