"""Weights from log-probs of other models: scorers of the config, or columns of the data.

A scorer (`config.prepare.scorers`), or the data's columns `chosen_weights_<name>` and
`rejected_weights_<name>`, hold one number a token, here its log-prob under another model. Read is
the text of a response; closing template tokens weigh 1 where the method weighs all tokens.

Shape suffixes: as in `functions`.
"""

import jax
import jax.numpy as jnp

from attnpo_jax.weighting.functions import (
    ResponseTokens,
    check_mask,
    read_column,
    register,
    top_tokens,
)


def _needs(*, against, **_) -> tuple[str, ...]:
    return ("reference_logps",) if against is None else ()


def _contrast(response, column, against) -> jax.Array:
    """Log-ratio (B, T) of two columns on the text, 0 elsewhere; None: against the reference."""
    check_mask(response.text_mask_BT, "text_mask_BT")
    if against is None:
        other_BT = jax.lax.stop_gradient(response.reference_logps_BT)
    else:
        other_BT = read_column(response, against)
    return jnp.where(response.text_mask_BT, read_column(response, column) - other_BT, 0.0)


def _sign(response) -> jax.Array:
    """+1 for chosen responses, -1 for rejected ones: (B, 1)."""
    return jnp.where(response.is_chosen, 1.0, -1.0)[:, None]


@register(needs=_needs)
def tis_dpo(
    response: ResponseTokens,
    *,
    column: int | str,
    against: int | str | None = None,
    limit: float = 1.5,
    scale: float = 0.2,
) -> jax.Array:
    """Weight 1 + scale s clip(r, -limit, limit), with r the log-ratio of two models on the token.

    s is +1 in the chosen response and -1 in the rejected one, and
    r = log p(token | a model trained towards the chosen responses) - log p(token | one trained
    towards the rejected ones).

    "TIS-DPO: Token-level Importance Sampling for Direct Preference Optimization With Estimated
    Weights" (https://arxiv.org/abs/2410.04350). Its equation has the exponential of the clipped
    log-ratio; its public code is linear, as here: weights from 0.7 to 1.3.

    Args:
      response: masks (B, T), columns (B, K, T) and `is_chosen` (B,).
      column: with the log-probs of the first model.
      against: with those of the second; None for the reference's.
      limit: log-ratios beyond it count as much as it does, > 0.
      scale: what a log-ratio of 1 adds to the weight.

    Returns:
      Weights (B, T), float32, 0 off `mask_BT`; 1 on closing tokens.

    Raises:
      RegistryError: a column that the data lack.

    >>> r = ResponseTokens.of([[True, True, True]], ready_BKT=[[[0.0, -3.0, -1.5]]],
    ...                       weight_columns=("pos",), reference_logps_BT=[[-1.0, -1.0, -1.0]])
    >>> [[round(w, 2) for w in row] for row in tis_dpo(r, column="pos").tolist()]
    [[1.2, 0.7, 0.9]]
    """
    ratio_BT = jnp.clip(_contrast(response, column, against), -limit, limit)
    return jnp.where(response.mask_BT, 1.0 + scale * _sign(response) * ratio_BT, 0.0)


@register(needs=_needs)
def tgdpo(
    response: ResponseTokens,
    *,
    column: int | str,
    against: int | str | None = None,
    alpha: float = 0.5,
    beta: float = 0.1,
) -> jax.Array:
    """Weight 1 + s alpha beta r, with beta r a teacher's token reward against the reference.

    s is +1 in the chosen response and -1 in the rejected one, and
    r = log p(token | teacher) - log p(token | reference): the teacher, a model trained by DPO, say,
    tells each token's part of the reward. Weights may be negative.

    "TGDPO: Harnessing Token-Level Reward Guidance for Enhancing Direct Preference Optimization"
    (https://arxiv.org/abs/2506.14574), as in its public code.

    Args:
      response: masks (B, T), columns (B, K, T), the reference's log-probs and `is_chosen` (B,).
      column: with the teacher's log-probs.
      against: with the log-probs of the model that it started from; None for the reference's.
      alpha: how much the reward counts; 0 is DPO.
      beta: the reward's scale; in the paper, that of the objective.

    Returns:
      Weights (B, T), float32, 0 off `mask_BT`; 1 on closing tokens.

    Raises:
      RegistryError: a column that the data lack.

    >>> r = ResponseTokens.of([[True, True]], ready_BKT=[[[-1.0, -4.0]]], weight_columns=("dpo",),
    ...                       reference_logps_BT=[[-2.0, -2.0]])
    >>> tgdpo(r, column="dpo", alpha=0.5, beta=0.5).tolist()
    [[1.25, 0.5]]
    """
    reward_BT = beta * _contrast(response, column, against)
    return jnp.where(response.mask_BT, 1.0 + alpha * _sign(response) * reward_BT, 0.0)


@register(needs=_needs)
def critical_tokens(
    response: ResponseTokens,
    *,
    column: int | str,
    against: int | str | None = None,
    beta: float = 1.0,
    rejected_only: bool = False,
) -> jax.Array:
    """Weight by how much likelier a token is on the way to a right answer than to a wrong one.

    With p of a model of right answers and q of one of wrong ones,
    u = sigmoid(beta (log p - log q)) = p^beta / (p^beta + q^beta). A token of the
    chosen response weighs u, one of the rejected response 1 - u: those that lead astray count.

    "Critical Tokens Matter: Token-Level Contrastive Estimation Enhances LLM's Reasoning Capability"
    (https://arxiv.org/abs/2411.19943), cDPO. There p^(1 + beta) / q^beta is normalized over the
    vocabulary; columns have the token's own log-probs alone, so here the two models are weighed
    against each other. Where they agree, u is 1/2.

    Args:
      response: masks (B, T), columns (B, K, T) and `is_chosen` (B,).
      column: with the log-probs of the model of right answers.
      against: with those of the model of wrong answers; None for the reference's.
      beta: strength of the contrast, > 0.
      rejected_only: whether every token of a chosen response weighs 1.

    Returns:
      Weights (B, T), float32, 0 off `mask_BT`; 1 on closing tokens.

    Raises:
      RegistryError: a column that the data lack.

    >>> r = ResponseTokens.of([[True, True]] * 2, is_chosen=[True, False],
    ...                       ready_BKT=[[[-1.0, -9.0]]] * 2, weight_columns=("right",),
    ...                       reference_logps_BT=[[-1.0, -1.0]] * 2)
    >>> critical_tokens(r, column="right").round(3).tolist()
    [[0.5, 0.0], [0.5, 1.0]]
    """
    text_BT = response.text_mask_BT
    contrast_BT = beta * _contrast(response, column, against)
    weights_BT = jax.nn.sigmoid(_sign(response) * contrast_BT)
    if rejected_only:
        weights_BT = jnp.where(response.is_chosen[:, None], 1.0, weights_BT)
    return jnp.where(text_BT, weights_BT, response.mask_BT.astype(jnp.float32))


@register(needs=_needs)
def sepo(
    response: ResponseTokens,
    *,
    column: int | str,
    against: int | str | None = None,
    share: float = 0.3,
) -> jax.Array:
    """Weight 1 on the share of tokens with the most telling rewards, 0 on the others.

    With r = log p(token | an oracle trained by DPO) - log p(token | reference): the highest r of
    the chosen response, the lowest of the rejected one. "Selective Preference Optimization via
    Token-Level Reward Function Estimation" (https://arxiv.org/abs/2408.13518), whose objective is
    free of a reference, and of the chosen tokens' mean log-prob.

    Args:
      response: masks (B, T), columns (B, K, T), the reference's log-probs and `is_chosen` (B,).
      column: with the oracle's log-probs.
      against: with the log-probs of the model that it started from; None for the reference's.
      share: of the text tokens, above 0 and up to 1; rounded up, so at least one is kept.

    Returns:
      Weights (B, T), float32: 1 or 0; 0 on closing tokens.

    Raises:
      RegistryError: a column that the data lack.

    >>> r = ResponseTokens.of([[True] * 4], ready_BKT=[[[-1.0, -9.0, -0.5, -2.0]]],
    ...                       weight_columns=("dpo",))
    >>> sepo(r, column="dpo", share=0.5).tolist()
    [[1.0, 0.0, 1.0, 0.0]]
    """
    reward_BT = _contrast(response, column, against)
    return top_tokens(_sign(response) * reward_BT, response.text_mask_BT, share).astype(jnp.float32)
