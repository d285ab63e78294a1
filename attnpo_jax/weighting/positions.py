"""Weights from where a token stands, and from what the pair's other response is.

Shape suffixes: as in `functions`.
"""

import jax
import jax.numpy as jnp

from attnpo_jax.weighting.functions import ResponseTokens, check_mask, register


def _place(response: ResponseTokens) -> jax.Array:
    """The place (B, T) of each token in its response, from 1."""
    check_mask(response.mask_BT, "mask_BT")
    return jnp.cumsum(response.mask_BT, axis=-1)


@register
def d2po(response: ResponseTokens, *, gamma: float = 0.98) -> jax.Array:
    """Weight gamma^t on the t-th token of the response: earlier tokens count more.

    "Earlier Tokens Contribute More: Learning Direct Preference Optimization From Temporal Decay
    Perspective" (https://arxiv.org/abs/2502.14340). As in its code, the first token has t = 1.

    Args:
      response: mask (B, T); nothing else is read.
      gamma: decay by token, from 0 to 1; 1 is DPO.

    Returns:
      Weights (B, T), float32, 0 off `mask_BT`.

    >>> d2po(ResponseTokens.of([[True, True, True, False]]), gamma=0.5).tolist()
    [[0.5, 0.25, 0.125, 0.0]]
    """
    weights_BT = jnp.power(jnp.float32(gamma), _place(response).astype(jnp.float32))
    return jnp.where(response.mask_BT, weights_BT, 0.0)


@register
def ld_dpo(response: ResponseTokens, *, alpha: float = 0.5) -> jax.Array:
    """Weight alpha on the tokens beyond the other response's length, 1 on those before.

    So the longer response gains less from being long. "Length Desensitization in Direct Preference
    Optimization" (https://arxiv.org/abs/2409.06411); `ld_alpha` of TRL's DPOTrainer.

    Args:
      response: mask (B, T) and the other response's length (B,).
      alpha: weight of the surplus tokens, from 0 to 1; 1 is DPO.

    Returns:
      Weights (B, T), float32, 0 off `mask_BT`.

    Raises:
      RegistryError: the other response is not known.

    >>> r = ResponseTokens.of([[True, True, True, False]], partner_length_B=[2])
    >>> ld_dpo(r, alpha=0.25).tolist()
    [[1.0, 1.0, 0.25, 0.0]]
    """
    shared_BT = _place(response) <= response.known("partner_length_B")[:, None]
    return jnp.where(response.mask_BT, jnp.where(shared_BT, 1.0, alpha), 0.0).astype(jnp.float32)


@register
def diff(response: ResponseTokens) -> jax.Array:
    """Weight 1 on the tokens that are not in the longest common subsequence of both responses.

    What both responses say, in the same order, weighs 0, closing template tokens too. Of several
    longest subsequences the one that ends earliest counts. Where the responses are the same,
    all weights are 0, and the pair's gradient too.

    Args:
      response: mask (B, T), its tokens' ids (B, T) and the other response's (B, T).

    Returns:
      Weights (B, T), float32, 0 off `mask_BT`.

    Raises:
      RegistryError: the tokens are not known.

    >>> r = ResponseTokens.of([[True] * 4], tokens_BT=[[5, 6, 7, 2]],
    ...                       partner_tokens_BT=[[6, 9, 2, -1]])
    >>> diff(r).tolist()
    [[1.0, 0.0, 1.0, 0.0]]
    """
    check_mask(response.mask_BT, "mask_BT")
    tokens_BT = jnp.where(response.mask_BT, response.known("tokens_BT"), -2)
    shared_BT = in_common(tokens_BT, response.known("partner_tokens_BT"))
    return jnp.where(response.mask_BT & ~shared_BT, 1.0, 0.0)


def in_common(tokens_BT: jax.Array, others_BU: jax.Array) -> jax.Array:
    """Which tokens are in the longest common subsequence with the row's others: bool (B, T).

    Takes T steps forth and T back, each over all (B, U), and B T U small integers of memory.

    Args:
      tokens_BT: int32 ids; those below 0 are in no subsequence.
      others_BU: int32 ids, likewise.
    """
    T, U = tokens_BT.shape[1], others_BU.shape[1]
    dtype = jnp.int16 if max(T, U) < 2**15 else jnp.int32

    def add_token(above_BU, token_B):
        """Lengths of the longest subsequences of the tokens so far and the others up to each."""
        same_BU = (token_B[:, None] == others_BU) & (others_BU >= 0)
        before_BU = jnp.pad(above_BU, ((0, 0), (1, 0)))[:, :-1]
        found_BU = jnp.maximum(above_BU, jnp.where(same_BU, before_BU + 1, 0).astype(dtype))
        here_BU = jax.lax.cummax(found_BU, axis=1)
        return here_BU, above_BU

    def take_token(carry, above_BU):
        """Whether a token is in the subsequence, and up to which of the others the rest is."""
        last_B, here_BU = carry
        at_B1 = jnp.maximum(last_B, 0)[:, None]
        length_B1 = jnp.take_along_axis(here_BU, at_B1, axis=1)
        longer_B = (length_B1 > jnp.take_along_axis(above_BU, at_B1, axis=1))[:, 0]
        taken_B = longer_B & (last_B >= 0)
        # Lengths do not fall along a row: its partner is the first with this one.
        partner_B = jnp.argmax(here_BU == length_B1, axis=1).astype(last_B.dtype)
        return (jnp.where(taken_B, partner_B - 1, last_B), above_BU), taken_B

    # Made from the inputs, so that under shard_map they vary over devices as the loops' results do.
    none_BU = (0 * (tokens_BT[:, :1] + others_BU)).astype(dtype)
    last_B = 0 * (tokens_BT[:, 0] + others_BU[:, 0]) + (U - 1)
    whole_BU, above_TBU = jax.lax.scan(add_token, none_BU, tokens_BT.T)
    _, taken_TB = jax.lax.scan(take_token, (last_B, whole_BU), above_TBU, reverse=True)
    return taken_TB.T
