"""Objectives that read the divergence of the reference's and the policy's distributions by token.

Shape suffixes: B pairs.
"""

from typing import Literal

import jax

from attnpo_jax.losses.pairwise import pair_logits, smoothed_sigmoid
from attnpo_jax.losses.registration import register
from attnpo_jax.losses.scores import ResponseScores, check


@register(needs=("reference_kl",), margin=True)
def tdpo(
    chosen: ResponseScores,
    rejected: ResponseScores,
    *,
    beta: float = 0.1,
    version: Literal[1, 2] = 2,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """DPO with the responses' sequential KL divergences in the logits: TDPO.

    With D the sum over a response's tokens of KL(reference || policy):
    loss = -log sigmoid(beta (h - (D(rejected) - D(chosen)))) is TDPO1; TDPO2 multiplies the second
    difference by alpha, and no gradient flows through D(chosen). Where policy and reference agree,
    it is log 2.

    "Token-level Direct Preference Optimization" (https://arxiv.org/abs/2404.11999).

    Args:
      chosen: scores (B,) of the chosen responses, with `kl_B`.
      rejected: scores (B,) of the rejected responses, likewise.
      beta: strength of the pull towards the reference, > 0.
      version: 1 for TDPO1, 2 for TDPO2.
      alpha: of TDPO2, weight of the divergences, 0 or more.
      label_smoothing: assumed share of pairs whose label is wrong, in [0, 0.5).

    Returns:
      Loss per pair, (B,).

    Raises:
      ValueError: the scores lack `kl_B`.

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones(1)
    >>> def scores(kl):
    ...     return ResponseScores(policy_B=ones, reference_B=ones, weight_B=ones, length_B=ones,
    ...                           kl_B=kl * ones)
    >>> round(float(tdpo(scores(1.0), scores(3.0), beta=0.5, version=1)[0]), 4)  # log(1 + e)
    1.3133
    """
    check(chosen, rejected, "kl_B")
    if version == 1:
        divergence_B = rejected.kl_B - chosen.kl_B
    else:
        divergence_B = alpha * (rejected.kl_B - jax.lax.stop_gradient(chosen.kl_B))
    logits_B = pair_logits(chosen, rejected, beta) - beta * divergence_B
    return smoothed_sigmoid(logits_B, label_smoothing)
