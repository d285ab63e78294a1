"""Token weightings: how much each token of a response counts.

Each is a pure function of the responses' tokens, registered by name; `functions` says what it may
read. By family: `shares` of attention, `positions` in the response and against the other one,
`likelihoods` under policy and reference, `contrasts` of other models' log-probs. `shaping` has what
may be made of any of them.
"""

from attnpo_jax.weighting.contrasts import critical_tokens, sepo, tgdpo, tis_dpo
from attnpo_jax.weighting.functions import (
    MIN_TOKENS_FOR_SINK_FIX,
    NEEDS,
    ResponseTokens,
    annotations,
    bind,
    get,
    hyperparameters,
    names,
    needs,
    read_column,
    register,
    registry,
    select_columns,
    to_length,
    top_tokens,
    uniform,
)
from attnpo_jax.weighting.likelihoods import (
    confpo,
    policy_entropy,
    reference_entropy,
    reference_surprisal,
)
from attnpo_jax.weighting.positions import d2po, diff, in_common, ld_dpo
from attnpo_jax.weighting.shaping import shaped
from attnpo_jax.weighting.shares import attention, attention_shares, column
from attnpo_jax.weighting.sources import ROLLOUT, Source, select_sources

__all__ = [
    "MIN_TOKENS_FOR_SINK_FIX",
    "NEEDS",
    "ROLLOUT",
    "ResponseTokens",
    "Source",
    "annotations",
    "attention",
    "attention_shares",
    "bind",
    "column",
    "confpo",
    "critical_tokens",
    "d2po",
    "diff",
    "get",
    "hyperparameters",
    "in_common",
    "ld_dpo",
    "names",
    "needs",
    "policy_entropy",
    "read_column",
    "reference_entropy",
    "reference_surprisal",
    "register",
    "registry",
    "select_columns",
    "select_sources",
    "sepo",
    "shaped",
    "tgdpo",
    "tis_dpo",
    "to_length",
    "top_tokens",
    "uniform",
]
