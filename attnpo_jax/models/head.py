"""Log-probabilities of given tokens, without ever holding (B, L, V) logits.

Shapes: B rows, M scored tokens a row, D width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

from attnpo_jax.models.attention import soft_cap


def logits(
    hidden_BMD: jax.Array, unembedding_VD: jax.Array, *, softcap: float | None = None
) -> jax.Array:
    """Logits over the whole vocabulary, for few tokens: float32 (B, M, V).

    Args:
      hidden_BMD: hidden states (B, M, D).
      unembedding_VD: output embedding (V, D), in any floating dtype.
      softcap: the model's `final_logit_softcapping`.
    """
    logits_BMV = jnp.einsum(
        "bmd,vd->bmv",
        hidden_BMD,
        unembedding_VD.astype(hidden_BMD.dtype),
        preferred_element_type=jnp.float32,
    )
    return soft_cap(logits_BMV, softcap)


def token_logps(
    hidden_BMD: jax.Array,
    unembedding_VD: jax.Array,
    target_BM: jax.Array,
    *,
    softcap: float | None = None,
    chunk: int = 1024,
) -> jax.Array:
    """log softmax(hidden · unembeddingᵀ)[target], chunk by chunk.

    Logits exist for at most about `chunk` tokens at a time, and are computed again in the backward
    pass. The softmax is float32 whatever the inputs' dtype.

    Args:
      hidden_BMD: hidden states (B, M, D) that predict the targets.
      unembedding_VD: output embedding (V, D).
      target_BM: int32 token ids (B, M), each in [0, V).
      softcap: the model's `final_logit_softcapping`, which bounds the logits.
      chunk: tokens projected at a time, over all rows together.

    Returns:
      float32 log-probs (B, M).
    """
    B, M = target_BM.shape
    unembedding_VD = unembedding_VD.astype(hidden_BMD.dtype)
    m = max(1, min(M, chunk // B))
    scores = jax.checkpoint(functools.partial(_chunk_logps, unembedding_VD, softcap))
    if m == M:
        return scores((hidden_BMD, target_BM))
    n = -(-M // m)
    pad = n * m - M
    hidden = jnp.pad(hidden_BMD, ((0, 0), (0, pad), (0, 0))).reshape(B, n, m, -1)
    target = jnp.pad(target_BM, ((0, 0), (0, pad))).reshape(B, n, m)
    chunks = (hidden.swapaxes(0, 1), target.swapaxes(0, 1))
    _, logps = jax.lax.scan(lambda carry, c: (carry, scores(c)), None, chunks)
    return logps.swapaxes(0, 1).reshape(B, n * m)[:, :M]


def _chunk_logps(unembedding_VD, softcap, chunk):
    hidden_BMD, target_BM = chunk
    logits_BMV = logits(hidden_BMD, unembedding_VD, softcap=softcap)
    picked_BM = jnp.take_along_axis(logits_BMV, target_BM[..., None], axis=-1)[..., 0]
    return picked_BM - jax.nn.logsumexp(logits_BMV, axis=-1)
