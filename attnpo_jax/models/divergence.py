"""KL divergences of two models' distributions, without ever holding (B, L, V) logits.

As `lm_head` computes log-probs: few tokens and words at a time, of both models at once.

Shapes: B rows, M scored tokens a row, D and E the models' widths, V vocabulary; T tokens of a
chunk, W words of a tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from attnpo_jax.models import placement
from attnpo_jax.models.attention.core import MASKED
from attnpo_jax.models.lm_head import SUMS, in_chunks, of_inputs, tile, tiles


def token_divergence(
    hidden_BMD: jax.Array,
    unembedding_VD: jax.Array,
    reference_BME: jax.Array,
    reference_unembedding_VE: jax.Array,
    *,
    softcap: float | None = None,
    reference_softcap: float | None = None,
    chunk: int = 2048,
) -> jax.Array:
    """KL(rho || pi) = sum_v rho_v (log rho_v - log pi_v) of each token, in nats: float32 (B, M).

    pi is the distribution that `hidden_BMD` predicts, rho the reference's, which gets no gradient.
    With a and b the logits of rho and pi, it is the mean of a - b under rho, less what the two
    normalizers are apart; its gradient in b is pi - rho. Logits exist for at most about `chunk`
    tokens and a tile of the vocabulary, and are computed again in the backward pass.

    Args:
      hidden_BMD, unembedding_VD, softcap: of pi, as for `lm_head.token_logps`.
      reference_BME, reference_unembedding_VE, reference_softcap: likewise of rho, over the same
        vocabulary.
      chunk: tokens projected at a time, over all of a device's own rows together.

    Returns:
      The divergences; 0 up to rounding where the distributions agree, and 0 where the logits do.
    """
    reference_BME, reference_unembedding_VE = jax.lax.stop_gradient(
        (reference_BME, reference_unembedding_VE)
    )

    def run(hidden, unembedding, target_BM, vocabulary):
        score = functools.partial(_chunk_divergence, unembedding[1], reference_softcap)
        options = {"softcap": softcap, "chunk": chunk}
        return in_chunks(score, hidden, unembedding[0], target_BM, vocabulary, **options)

    hidden = hidden_BMD, reference_BME
    unembedding = (
        unembedding_VD.astype(hidden_BMD.dtype),
        reference_unembedding_VE.astype(reference_BME.dtype),
    )
    no_target_BM = jnp.zeros(hidden_BMD.shape[:2], jnp.int32)
    return placement.over_vocabulary(run)(hidden, unembedding, no_target_BM)


def _chunk_divergence(reference_VE, reference_softcap, unembedding_VD, softcap, vocabulary, chunk):
    (hidden_BMD, reference_BME), _ = jax.tree.map(vocabulary.rows_of_group, chunk)
    B, M, _ = hidden_BMD.shape
    sums = _log_sums_and_gap(
        hidden_BMD.reshape(B * M, -1),
        unembedding_VD,
        reference_BME.reshape(B * M, -1),
        reference_VE,
        vocabulary.length(unembedding_VD),
        (softcap, reference_softcap),
        vocabulary.constant,
    )
    log_sum, reference_log_sum, gap = (x.reshape(B, M) for x in sums)
    none = 0.0 * log_sum
    log_z = -vocabulary.log_probs(none, log_sum)
    reference_log_z = -vocabulary.log_probs(none, reference_log_sum)
    # Each part's mean gap times its share of rho's probability.
    mean_gap = vocabulary.total(jnp.exp(reference_log_sum - reference_log_z) * gap)
    return vocabulary.own_rows(mean_gap - (reference_log_z - log_z))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _log_sums_and_gap(
    hidden_TD, unembedding_VD, reference_TE, reference_VE, length, softcaps, constant
):
    """Over words below `length`: log of the sums of exp(b) and of exp(a), and the mean of a - b
    under exp(a) normalized.
    """
    inputs = hidden_TD, unembedding_VD, reference_TE, reference_VE
    return _forward(*inputs, length, softcaps, constant)[0]


def _forward(hidden_TD, unembedding_VD, reference_TE, reference_VE, length, softcaps, constant):
    def add_words(carry, start):
        highest, total, reference_highest, reference_total, gap = carry
        _, b_TW, _, valid = tile(hidden_TD, unembedding_VD, start, length, softcaps[0])
        _, a_TW, _, _ = tile(reference_TE, reference_VE, start, length, softcaps[1])
        higher = jnp.maximum(highest, jnp.max(b_TW, axis=-1))
        reference_higher = jnp.maximum(reference_highest, jnp.max(a_TW, axis=-1))
        shrunk = jnp.exp(reference_highest - reference_higher)
        p_TW = jnp.where(valid, jnp.exp(a_TW - reference_higher[:, None]), 0.0)
        gap_TW = jnp.where(valid, a_TW - b_TW, 0.0)
        return (
            higher,
            total * jnp.exp(highest - higher) + jnp.sum(jnp.exp(b_TW - higher[:, None]), axis=-1),
            reference_higher,
            reference_total * shrunk + jnp.sum(p_TW, axis=-1),
            gap * shrunk + jnp.sum(p_TW * gap_TW, axis=-1),
        ), None

    T = hidden_TD.shape[0]
    zeros = (MASKED, 0, MASKED, 0, 0)
    start = tuple(constant(jnp.full(T, value, jnp.float32)) for value in zeros)
    found, _ = jax.lax.scan(add_words, start, tiles(T, unembedding_VD.shape[0]))
    highest, total, reference_highest, reference_total, gap = found
    # A part of the vocabulary may be all padding: then it has no share, and no gap.
    some = reference_total > 0
    sums = (
        highest + jnp.log(total),
        jnp.where(some, reference_highest + jnp.log(jnp.where(some, reference_total, 1.0)), MASKED),
        jnp.where(some, gap / jnp.where(some, reference_total, 1.0), 0.0),
    )
    sums = tuple(checkpoint_name(x, SUMS) for x in sums)
    inputs = hidden_TD, unembedding_VD, reference_TE, reference_VE, length
    return sums, (*inputs, *sums[:2])


def _backward(softcaps, constant, residuals, cotangents):
    hidden_TD, unembedding_VD, reference_TE, reference_VE, length, *log_sums = residuals
    log_sum, reference_log_sum = (x[:, None] for x in log_sums)
    d_log_sum, _, d_gap = (x[:, None] for x in cotangents)

    def of_logits(start, b_TW, words):
        _, a_TW, _, _ = tile(reference_TE, reference_VE, start, length, softcaps[1])
        return jnp.exp(b_TW - log_sum) * d_log_sum - jnp.exp(a_TW - reference_log_sum) * d_gap

    found = of_inputs(of_logits, hidden_TD, unembedding_VD, length, softcaps[0], constant)
    return *found, None, None, None


_log_sums_and_gap.defvjp(_forward, _backward)
