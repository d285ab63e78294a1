"""Objectives: what a loss makes of a pair's weighted log-ratios.

Each is a pure function of the two responses' scores, registered by name; see `objectives`.
"""

from attnpo_jax.losses.objectives import (
    ResponseScores,
    annotations,
    bind,
    get,
    hinge,
    hyperparameters,
    ipo,
    names,
    register,
    registry,
    sigmoid,
)

__all__ = [
    "ResponseScores",
    "annotations",
    "bind",
    "get",
    "hinge",
    "hyperparameters",
    "ipo",
    "names",
    "register",
    "registry",
    "sigmoid",
]
