"""Objectives that hold each response's log-ratio to the reference, and not their difference alone.

With lc and lr the weighted log-ratios of the chosen and the rejected response.

Shape suffixes: B pairs.
"""

import jax
import jax.numpy as jnp

from attnpo_jax.losses.registration import register
from attnpo_jax.losses.scores import ResponseScores, check


@register
def nca(chosen: ResponseScores, rejected: ResponseScores, *, beta: float = 0.1) -> jax.Array:
    """Noise contrastive alignment of a pair: the chosen response's own likelihood is held up.

    loss = -log sigmoid(beta lc) - 1/2 log sigmoid(-beta lc) - 1/2 log sigmoid(-beta lr).
    Where policy and reference agree, it is 2 log 2.

    "Noise Contrastive Alignment of Language Models with Explicit Rewards"
    (https://arxiv.org/abs/2402.05369).

    Args:
      chosen: scores (B,) of the chosen responses.
      rejected: scores (B,) of the rejected responses.
      beta: strength of the pull towards the reference, > 0.

    Returns:
      Loss per pair, (B,).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones(1)
    >>> chosen = ResponseScores(policy_B=ones, reference_B=ones, weight_B=ones, length_B=ones)
    >>> round(float(nca(chosen, chosen)[0]), 4)  # 2 log 2
    1.3863
    """
    check(chosen, rejected)
    chosen_B, rejected_B = beta * chosen.log_ratio_B, beta * rejected.log_ratio_B
    noise_B = jax.nn.log_sigmoid(-chosen_B) + jax.nn.log_sigmoid(-rejected_B)
    return -jax.nn.log_sigmoid(chosen_B) - 0.5 * noise_B


@register
def bco(chosen: ResponseScores, rejected: ResponseScores, *, beta: float = 0.1) -> jax.Array:
    """Binary classification of chosen and rejected responses, pair by pair: BCO.

    loss = -log sigmoid(beta lc) - log sigmoid(-beta lr). Where policy and reference agree, it is
    2 log 2. The rewards' running mean, which the paper subtracts from both, is left out: a step is
    a function of its batch alone.

    "Binary Classifier Optimization for Large Language Model Alignment"
    (https://arxiv.org/abs/2404.04656).

    Args:
      chosen: scores (B,) of the chosen responses.
      rejected: scores (B,) of the rejected responses.
      beta: strength of the pull towards the reference, > 0.

    Returns:
      Loss per pair, (B,).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones(1)
    >>> chosen = ResponseScores(policy_B=ones, reference_B=ones, weight_B=ones, length_B=ones)
    >>> round(float(bco(chosen, chosen)[0]), 4)  # 2 log 2
    1.3863
    """
    check(chosen, rejected)
    return -jax.nn.log_sigmoid(beta * chosen.log_ratio_B) - jax.nn.log_sigmoid(
        -beta * rejected.log_ratio_B
    )


@register
def sppo(chosen: ResponseScores, rejected: ResponseScores, *, beta: float = 0.1) -> jax.Array:
    """Squared distances of both log-ratios to those of a sure win and a sure loss: SPPO.

    loss = (lc - 1 / (2 beta))^2 + (lr + 1 / (2 beta))^2. Where policy and reference agree, it is
    1 / (2 beta^2).

    "Self-Play Preference Optimization for Language Model Alignment" with hard labels
    (https://arxiv.org/abs/2405.00675), whose 1 / eta is `beta`.

    Args:
      chosen: scores (B,) of the chosen responses.
      rejected: scores (B,) of the rejected responses.
      beta: regularization; the target log-ratios are 1 / (2 beta) and -1 / (2 beta), > 0.

    Returns:
      Loss per pair, (B,).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones(1)
    >>> chosen = ResponseScores(policy_B=ones, reference_B=ones, weight_B=ones, length_B=ones)
    >>> sppo(chosen, chosen, beta=0.5).tolist()
    [2.0]
    """
    check(chosen, rejected)
    target = 0.5 / beta
    return jnp.square(chosen.log_ratio_B - target) + jnp.square(rejected.log_ratio_B + target)


@register
def apo_zero(chosen: ResponseScores, rejected: ResponseScores, *, beta: float = 0.1) -> jax.Array:
    """Chosen responses become likelier, rejected ones less so: APO for a policy worse than them.

    loss = 1 - sigmoid(beta lc) + sigmoid(beta lr). Where policy and reference agree, it is 1.

    "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in
    Alignment" (https://arxiv.org/abs/2408.06266).

    Args:
      chosen: scores (B,) of the chosen responses.
      rejected: scores (B,) of the rejected responses.
      beta: strength of the pull towards the reference, > 0.

    Returns:
      Loss per pair, (B,).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones(1)
    >>> chosen = ResponseScores(policy_B=ones, reference_B=ones, weight_B=ones, length_B=ones)
    >>> apo_zero(chosen, chosen).tolist()
    [1.0]
    """
    check(chosen, rejected)
    return jax.nn.sigmoid(-beta * chosen.log_ratio_B) + jax.nn.sigmoid(beta * rejected.log_ratio_B)


@register
def apo_down(chosen: ResponseScores, rejected: ResponseScores, *, beta: float = 0.1) -> jax.Array:
    """Both responses become less likely, rejected ones more so: APO for a policy better than both.

    loss = sigmoid(beta lc) + 1 - sigmoid(beta (lc - lr)). Where policy and reference agree, it
    is 1.

    "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in
    Alignment" (https://arxiv.org/abs/2408.06266).

    Args:
      chosen: scores (B,) of the chosen responses.
      rejected: scores (B,) of the rejected responses.
      beta: strength of the pull towards the reference, > 0.

    Returns:
      Loss per pair, (B,).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones(1)
    >>> chosen = ResponseScores(policy_B=ones, reference_B=ones, weight_B=ones, length_B=ones)
    >>> apo_down(chosen, chosen).tolist()
    [1.0]
    """
    check(chosen, rejected)
    h_B = chosen.log_ratio_B - rejected.log_ratio_B
    return jax.nn.sigmoid(beta * chosen.log_ratio_B) + jax.nn.sigmoid(-beta * h_B)
