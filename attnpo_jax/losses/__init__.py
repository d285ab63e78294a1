"""Objectives: what a loss makes of a pair's weighted log-ratios.

An objective is a pure function `(chosen: ResponseScores, rejected: ResponseScores,
**hyperparameters) -> loss_B`, one loss a pair; whoever calls averages. It works under jit, grad,
vmap, pmap and shard_map. Add one with a decorator, here or in a file named in `config.plugins`;
its keyword-only arguments are its fields in `config.objective`:

    @losses.register
    def exponential(chosen, rejected, *, beta: float = 0.1):
        return jnp.exp(-beta * (chosen.log_ratio_B - rejected.log_ratio_B))

By family: `pairwise` (of the difference of the log-ratios), `anchored` (of each log-ratio),
`reference_free`, `token_level`, and `mixture` (sums of others).
"""

from attnpo_jax.losses.anchored import apo_down, apo_zero, bco, nca, sppo
from attnpo_jax.losses.mixture import mixture
from attnpo_jax.losses.pairwise import (
    discopop,
    dpop,
    exo,
    hinge,
    ipo,
    rdpo,
    robust,
    sigmoid,
    sigmoid_norm,
)
from attnpo_jax.losses.reference_free import cpo, nll, orpo, simpo
from attnpo_jax.losses.registration import (
    Traits,
    annotations,
    bind,
    get,
    hyperparameters,
    names,
    policy_weighted,
    register,
    registry,
    traits,
)
from attnpo_jax.losses.scores import ResponseScores
from attnpo_jax.losses.token_level import tdpo

__all__ = [
    "ResponseScores",
    "Traits",
    "annotations",
    "apo_down",
    "apo_zero",
    "bco",
    "bind",
    "cpo",
    "discopop",
    "dpop",
    "exo",
    "get",
    "hinge",
    "hyperparameters",
    "ipo",
    "mixture",
    "names",
    "nca",
    "nll",
    "orpo",
    "policy_weighted",
    "rdpo",
    "register",
    "registry",
    "robust",
    "sigmoid",
    "sigmoid_norm",
    "simpo",
    "sppo",
    "tdpo",
    "traits",
]
