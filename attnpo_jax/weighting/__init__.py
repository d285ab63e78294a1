"""Token weightings: how much each token of a response counts.

Each is a pure function of the responses' tokens, registered by name; see `functions`.
"""

from attnpo_jax.weighting.functions import (
    MIN_TOKENS_FOR_SINK_FIX,
    ResponseTokens,
    annotations,
    attention,
    bind,
    column,
    get,
    hyperparameters,
    names,
    register,
    registry,
    select_columns,
    select_sources,
    uniform,
)

__all__ = [
    "MIN_TOKENS_FOR_SINK_FIX",
    "ResponseTokens",
    "annotations",
    "attention",
    "bind",
    "column",
    "get",
    "hyperparameters",
    "names",
    "register",
    "registry",
    "select_columns",
    "select_sources",
    "uniform",
]
