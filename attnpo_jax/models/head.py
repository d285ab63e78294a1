"""Log-probabilities of given tokens, without ever holding (B, L, V) logits.

Shapes: B rows, M scored tokens a row, D width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

from attnpo_jax.models.attention import soft_cap
from attnpo_jax.parallel import rules


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
      chunk: tokens projected at a time, over all rows of a device together.

    Returns:
      float32 log-probs (B, M).
    """
    in_chunks = functools.partial(_in_chunks, softcap=softcap, chunk=chunk)
    unembedding_VD = unembedding_VD.astype(hidden_BMD.dtype)
    return rules.over_vocabulary(in_chunks)(hidden_BMD, unembedding_VD, target_BM)


def _in_chunks(hidden_BMD, unembedding_VD, target_BM, vocabulary, *, softcap, chunk):
    B, M = target_BM.shape
    m = max(1, min(M, chunk // B))
    scores = jax.checkpoint(functools.partial(_chunk_logps, unembedding_VD, softcap, vocabulary))
    if m == M:
        return scores((hidden_BMD, target_BM))
    n = -(-M // m)
    pad = n * m - M
    hidden = jnp.pad(hidden_BMD, ((0, 0), (0, pad), (0, 0))).reshape(B, n, m, -1)
    target = jnp.pad(target_BM, ((0, 0), (0, pad))).reshape(B, n, m)
    chunks = (hidden.swapaxes(0, 1), target.swapaxes(0, 1))
    _, logps = jax.lax.scan(lambda carry, c: (carry, scores(c)), None, chunks)
    return logps.swapaxes(0, 1).reshape(B, n * m)[:, :M]


def _chunk_logps(unembedding_VD, softcap, vocabulary, chunk):
    hidden_BMD, target_BM = jax.tree.map(vocabulary.rows_of_group, chunk)
    logits_BMV = logits(hidden_BMD, unembedding_VD, softcap=softcap)
    picked_BM = vocabulary.pick(logits_BMV, target_BM)
    return vocabulary.own_rows(picked_BM - vocabulary.logsumexp(logits_BMV))
