"""Weights from how sure the policy, or the reference, is of a token.

Shape suffixes: as in `functions`.
"""

import jax
import jax.numpy as jnp

from attnpo_jax.weighting.functions import ResponseTokens, check_mask, register, to_length


@register
def confpo(response: ResponseTokens) -> jax.Array:
    """Weight 1 on the tokens whose probability under the policy is not above the response's mean.

    "ConfPO: Exploiting Policy Model Confidence for Critical Token Selection in Preference
    Optimization" (https://arxiv.org/abs/2506.08712). The mean is that of the probabilities, over
    all tokens of the response; the choice follows the policy as it trains. The paper's objective is
    SimPO, of the chosen tokens' mean log-prob.

    Args:
      response: mask (B, T) and the policy's log-probs (B, T).

    Returns:
      Weights (B, T), float32: 1 or 0, at least one 1 where there is a token.

    >>> import jax.numpy as jnp
    >>> r = ResponseTokens.of([[True, True, True, False]],
    ...                       policy_logps_BT=jnp.log(jnp.array([[0.9, 0.2, 0.4, 1.0]])))
    >>> confpo(r).tolist()  # the mean is 0.5
    [[0.0, 1.0, 1.0, 0.0]]
    """
    mask_BT = response.mask_BT
    check_mask(mask_BT, "mask_BT")
    p_BT = jnp.exp(jax.lax.stop_gradient(response.policy_logps_BT))
    count_B1 = jnp.maximum(jnp.sum(mask_BT, axis=-1, keepdims=True), 1)
    mean_B1 = jnp.sum(jnp.where(mask_BT, p_BT, 0.0), axis=-1, keepdims=True) / count_B1
    # Rounding may put the mean of equal probabilities below all of them.
    least_B1 = jnp.min(jnp.where(mask_BT, p_BT, jnp.inf), axis=-1, keepdims=True)
    selected_BT = (p_BT <= jnp.maximum(mean_B1, least_B1)).astype(jnp.float32)
    # A NaN is in no comparison true; it shall show.
    return jnp.where(mask_BT, selected_BT + 0.0 * p_BT, 0.0)


@register(needs=("reference_logps",))
def reference_surprisal(response: ResponseTokens) -> jax.Array:
    """Weight in proportion to -log p of the token under the reference: what it did not expect.

    The information content of a token (Shannon 1948, "A Mathematical Theory of Communication"),
    scaled so that a response's weights sum to its number of tokens.

    Args:
      response: mask (B, T) and the reference's log-probs (B, T).

    Returns:
      Weights (B, T), float32, 0 off `mask_BT`; 1 on every token where all are certain.

    >>> r = ResponseTokens.of([[True, True, False]], reference_logps_BT=[[-3.0, -1.0, 0.0]])
    >>> reference_surprisal(r).tolist()
    [[1.5, 0.5, 0.0]]
    """
    check_mask(response.mask_BT, "mask_BT")
    surprisal_BT = -jax.lax.stop_gradient(response.reference_logps_BT)
    return to_length(jnp.maximum(surprisal_BT, 0.0), response.mask_BT)


@register(needs=("reference_entropy",))
def reference_entropy(response: ResponseTokens) -> jax.Array:
    """Weight in proportion to the entropy of the reference's distribution of the token.

    How open the reference was about what comes next, whatever came (Shannon 1948, "A Mathematical
    Theory of Communication"); its `reference_surprisal` is that of the token that came. The choice
    by entropy is that of "Beyond the 80/20 Rule" (see `policy_entropy`), but of a model that does
    not move: `prepare` computes it once. Scaled so that a response's weights sum to its number of
    tokens.

    Args:
      response: mask (B, T) and the reference's entropy (B, T).

    Returns:
      Weights (B, T), float32, 0 off `mask_BT`; 1 on every token where all are certain.

    Raises:
      RegistryError: the entropy is not known.

    >>> r = ResponseTokens.of([[True, True, False]], reference_entropy_BT=[[0.5, 1.5, 9.0]])
    >>> reference_entropy(r).tolist()
    [[0.5, 1.5, 0.0]]
    """
    return _by_entropy(response, "reference_entropy_BT")


@register(needs=("policy_entropy",))
def policy_entropy(response: ResponseTokens) -> jax.Array:
    """Weight in proportion to the entropy of the policy's distribution of the token.

    "Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for
    LLM Reasoning" (https://arxiv.org/abs/2506.01939) trains on the fifth of the tokens with the
    highest entropy alone: `shaping.top_share` does so. Weights are scaled so that a response's sum
    to its number of tokens. The entropy takes another pass over the vocabulary in each step.

    Args:
      response: mask (B, T) and the policy's entropy (B, T).

    Returns:
      Weights (B, T), float32, 0 off `mask_BT`; 1 on every token where all are certain.

    Raises:
      RegistryError: the entropy is not known.

    >>> r = ResponseTokens.of([[True, True, False]], policy_entropy_BT=[[0.5, 1.5, 9.0]])
    >>> policy_entropy(r).tolist()
    [[0.5, 1.5, 0.0]]
    """
    return _by_entropy(response, "policy_entropy_BT")


def _by_entropy(response: ResponseTokens, field: str) -> jax.Array:
    check_mask(response.mask_BT, "mask_BT")
    entropy_BT = response.known(field)
    # Rounding may make it a little less than 0.
    return to_length(jnp.maximum(entropy_BT, 0.0), response.mask_BT)
