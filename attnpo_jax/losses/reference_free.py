"""Objectives of the policy's log-probs alone, with rewards of their own for the metrics.

Shape suffixes: B pairs.
"""

import jax
import jax.numpy as jnp

from attnpo_jax.losses.pairwise import smoothed_sigmoid
from attnpo_jax.losses.registration import register
from attnpo_jax.losses.scores import ResponseScores, beyond_margin, check

# A mean log-prob of 0 has infinite odds; responses this close to it count as this likely.
_MOST_LIKELY = -1e-6


def _mean_log_prob(scores: ResponseScores, *, beta: float) -> jax.Array:
    """The reward beta times the (weighted) mean log-prob, (B,)."""
    return beta * scores.per_weight(scores.policy_B)


@register(reference_free=True, reward=_mean_log_prob, margin=True)
def simpo(
    chosen: ResponseScores,
    rejected: ResponseScores,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Logistic loss on the difference of the mean log-probs beyond a margin: SimPO.

    With m the mean log-prob of a response (the weighted one, where tokens are weighted):
    loss = -log sigmoid(beta (m(chosen) - m(rejected)) - gamma).
    Where both responses are as likely per token, it is log(1 + exp(gamma)).

    "SimPO: Simple Preference Optimization with a Reference-Free Reward", eq. 6
    (https://arxiv.org/abs/2405.14734).

    Args:
      chosen: scores (B,) of the chosen responses.
      rejected: scores (B,) of the rejected responses.
      beta: scale of the rewards, > 0.
      gamma: the margin that the rewards are to reach, 0 or more.
      label_smoothing: assumed share of pairs whose label is wrong, in [0, 0.5).

    Returns:
      Loss per pair, (B,).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones(1)
    >>> chosen = ResponseScores(policy_B=-4 * ones, reference_B=ones, weight_B=8 * ones,
    ...                         length_B=8 * ones)
    >>> rejected = ResponseScores(policy_B=-ones, reference_B=ones, weight_B=ones, length_B=ones)
    >>> round(float(simpo(chosen, rejected, beta=2.0, gamma=1.0)[0]), 4)  # log 2
    0.6931
    """
    check(chosen, rejected)
    margin_B = _mean_log_prob(chosen, beta=beta) - _mean_log_prob(rejected, beta=beta)
    return smoothed_sigmoid(beyond_margin(margin_B - gamma, chosen), label_smoothing)


@register(reference_free=True, reward=_mean_log_prob, margin=True)
def orpo(chosen: ResponseScores, rejected: ResponseScores, *, beta: float = 0.1) -> jax.Array:
    """Negative log-likelihood of the chosen response and the log odds ratio of both: ORPO.

    With m the mean log-prob of a response (the weighted one, where tokens are weighted), odds =
    exp(m) / (1 - exp(m)), and nll the mean of -log p over the chosen response's tokens:
    loss = nll - beta log sigmoid(log odds(chosen) - log odds(rejected)).
    Where both responses are as likely per token, it is nll + beta log 2.

    "ORPO: Monolithic Preference Optimization without Reference Model", eq. 6
    (https://arxiv.org/abs/2403.07691), whose lambda is `beta`.

    Args:
      chosen: scores (B,) of the chosen responses.
      rejected: scores (B,) of the rejected responses.
      beta: weight of the odds ratio, > 0.

    Returns:
      Loss per pair, (B,).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones(1)
    >>> chosen = ResponseScores(policy_B=-ones, reference_B=ones, weight_B=ones, length_B=ones)
    >>> round(float(orpo(chosen, chosen, beta=0.1)[0]), 4)  # 1 + 0.1 log 2
    1.0693
    """
    check(chosen, rejected)
    log_odds_B = []
    for scores in (chosen, rejected):
        mean_B = jnp.minimum(scores.per_weight(scores.policy_B), _MOST_LIKELY)
        log_odds_B.append(mean_B - jnp.log(-jnp.expm1(mean_B)))
    logits_B = beyond_margin(log_odds_B[0] - log_odds_B[1], chosen)
    return chosen.negative_log_likelihood_B - beta * jax.nn.log_sigmoid(logits_B)


@register(reference_free=True, margin=True)
def cpo(
    chosen: ResponseScores,
    rejected: ResponseScores,
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """DPO with a uniform reference, and the chosen response's negative log-likelihood: CPO.

    With p the (weighted) sum of a response's log-probs, and nll the mean of -log p over the chosen
    response's tokens: loss = -log sigmoid(beta (p(chosen) - p(rejected))) + nll_weight nll.
    Where both responses are as likely, it is log 2 + nll_weight nll.

    "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine
    Translation" (https://arxiv.org/abs/2401.08417); likelihoods per token, as in the
    paper's code.

    Args:
      chosen: scores (B,) of the chosen responses.
      rejected: scores (B,) of the rejected responses.
      beta: scale of the rewards, > 0.
      nll_weight: weight of the negative log-likelihood, 0 or more.
      label_smoothing: assumed share of pairs whose label is wrong, in [0, 0.5).

    Returns:
      Loss per pair, (B,).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones(1)
    >>> chosen = ResponseScores(policy_B=-ones, reference_B=ones, weight_B=ones, length_B=ones)
    >>> round(float(cpo(chosen, chosen)[0]), 4)  # log 2 + 1
    1.6931
    """
    check(chosen, rejected)
    logits_B = beyond_margin(beta * (chosen.policy_B - rejected.policy_B), chosen)
    preference_B = smoothed_sigmoid(logits_B, label_smoothing)
    return preference_B + nll_weight * chosen.negative_log_likelihood_B


@register(reference_free=True)
def nll(chosen: ResponseScores, rejected: ResponseScores) -> jax.Array:
    """Negative log-likelihood of the chosen response per token: supervised fine-tuning.

    The mean of -log p over the chosen response's tokens, each counted once; the rejected response
    is not read. A term for `mixture`, as in "RPO" of "Iterative Reasoning Preference Optimization",
    eq. 1 (https://arxiv.org/abs/2404.19733).

    Args:
      chosen: scores (B,) of the chosen responses.
      rejected: scores (B,) of the rejected responses.

    Returns:
      Loss per pair, (B,).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones(1)
    >>> chosen = ResponseScores(policy_B=-3 * ones, reference_B=ones, weight_B=ones,
    ...                         length_B=2 * ones)
    >>> nll(chosen, chosen).tolist()
    [1.5]
    """
    check(chosen, rejected)
    return chosen.negative_log_likelihood_B
