"""Log-probabilities of given tokens, and statistics of their distributions, without ever holding
(B, L, V) logits.

Shapes: B rows, M scored tokens a row, D width, V vocabulary.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from attnpo_jax.models import placement
from attnpo_jax.models.attention.core import MASKED, soft_cap


def logits(
    hidden_BMD: jax.Array, unembedding_VD: jax.Array, *, softcap: float | None = None
) -> jax.Array:
    """Logits over the whole vocabulary, for few tokens: float32 (B, M, V)."""
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
    chunk: int = 2048,
) -> jax.Array:
    """log softmax(hidden · unembeddingᵀ)[target], float32 (B, M), few tokens and words at a time.

    Logits exist for at most about `chunk` tokens and a tile of the vocabulary (16 MiB in all where
    tiles can be so small), and are computed again in the backward pass: as FlashAttention does
    with its scores (Dao et al. 2022, arXiv 2205.14135, algorithms 2 and 4). The softmax is float32
    whatever the inputs' dtype.

    Args:
      hidden_BMD: hidden states (B, M, D) that predict the targets.
      target_BM: int32 token ids (B, M), each in [0, V).
      chunk: tokens projected at a time, over all of a device's own rows together.
    """
    run = functools.partial(in_chunks, _chunk_logps, softcap=softcap, chunk=chunk)
    unembedding_VD = unembedding_VD.astype(hidden_BMD.dtype)
    return placement.over_vocabulary(run)(hidden_BMD, unembedding_VD, target_BM)


STATISTICS = ("entropy", "collision")
"""What `token_statistics` computes of a distribution p over the vocabulary: its entropy in nats,
-sum_v p_v log p_v, and log sum_v p_v^2."""


def token_statistics(
    names: Sequence[str],
    hidden_BMD: jax.Array,
    unembedding_VD: jax.Array,
    *,
    softcap: float | None = None,
    chunk: int = 2048,
) -> dict[str, jax.Array]:
    """Statistics of the distributions that hidden states predict: name -> float32 (B, M).

    A pass over the vocabulary of its own, in the chunks of `token_logps`. No gradient flows through
    it, so none of it is kept for the backward pass.

    Args:
      names: of `STATISTICS`; without any, nothing is computed.
      hidden_BMD, unembedding_VD, softcap, chunk: as for `token_logps`.
    """
    if not names:
        return {}
    hidden_BMD, unembedding_VD = jax.lax.stop_gradient((hidden_BMD, unembedding_VD))
    run = functools.partial(in_chunks, _chunk_statistics, softcap=softcap, chunk=chunk)
    unembedding_VD = unembedding_VD.astype(hidden_BMD.dtype)
    no_target_BM = jnp.zeros(hidden_BMD.shape[:2], jnp.int32)
    found = placement.over_vocabulary(run)(hidden_BMD, unembedding_VD, no_target_BM)
    return {name: found[name] for name in names}


def in_chunks(score, hidden_BMD, unembedding_VD, target_BM, vocabulary, *, softcap, chunk):
    """Scores (B, M) of tokens, `chunk` at a time; hidden states may be those of several models."""
    B, M = target_BM.shape
    m = max(1, min(M, chunk // B))
    # In float32, so that the gradient is summed up in it over all chunks; tiles are cast down.
    unembedding_VD = unembedding_VD.astype(jnp.float32)
    # A chunk's rows may come from other devices: not to be kept until the backward pass.
    policy = jax.checkpoint_policies.save_only_these_names(SUMS)
    scores = functools.partial(score, unembedding_VD, softcap, vocabulary)
    scores = jax.checkpoint(scores, policy=policy)
    if m == M:
        return scores((hidden_BMD, target_BM))
    n = -(-M // m)
    pad = n * m - M

    def cut(x):
        padded = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)))
        return padded.reshape(B, n, m, *x.shape[2:]).swapaxes(0, 1)

    chunks = jax.tree.map(cut, (hidden_BMD, target_BM))
    _, scored = jax.lax.scan(lambda carry, c: (carry, scores(c)), None, chunks)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, n * m)[:, :M], scored)


def _chunk_logps(unembedding_VD, softcap, vocabulary, chunk):
    hidden_BMD, target_BM = jax.tree.map(vocabulary.rows_of_group, chunk)
    B, M, D = hidden_BMD.shape
    place = vocabulary.place(target_BM).reshape(-1)
    length = vocabulary.length(unembedding_VD)
    inputs = hidden_BMD.reshape(-1, D), unembedding_VD, place, length
    sums = _log_sum_and_picked(*inputs, softcap, vocabulary.constant)
    log_sum, picked = (x.reshape(B, M) for x in sums)
    return vocabulary.own_rows(vocabulary.log_probs(picked, log_sum))


def _chunk_statistics(unembedding_VD, softcap, vocabulary, chunk):
    """All of `STATISTICS` for a chunk of tokens."""
    hidden_BMD, _ = jax.tree.map(vocabulary.rows_of_group, chunk)
    B, M, D = hidden_BMD.shape
    hidden_TD, length = hidden_BMD.reshape(-1, D), vocabulary.length(unembedding_VD)

    def add_words(carry, start):
        highest, total, below, squares = carry
        _, logits_TW, _, valid = tile(hidden_TD, unembedding_VD, start, length, softcap)
        higher = jnp.maximum(highest, jnp.max(logits_TW, axis=-1))
        # Of the words so far: p is a word's exp(logit - highest), `below` sums p (logit - highest).
        shrunk, lower = jnp.exp(highest - higher), highest - higher
        d_TW = jnp.where(valid, logits_TW - higher[:, None], 0.0)
        p_TW = jnp.where(valid, jnp.exp(d_TW), 0.0)
        return (
            higher,
            shrunk * total + jnp.sum(p_TW, axis=-1),
            shrunk * (below + lower * total) + jnp.sum(p_TW * d_TW, axis=-1),
            jnp.square(shrunk) * squares + jnp.sum(jnp.square(p_TW), axis=-1),
        ), None

    T = B * M
    start = tuple(vocabulary.constant(jnp.full(T, x, jnp.float32)) for x in (MASKED, 0, 0, 0))
    steps = tiles(T, unembedding_VD.shape[0])
    sums, _ = jax.lax.scan(add_words, start, steps)
    highest, total, below, squares = (x.reshape(B, M) for x in sums)
    # A part of the vocabulary may be all padding: then it has no share.
    some = total > 0
    log_sum = jnp.where(some, highest + jnp.log(jnp.where(some, total, 1.0)), MASKED)
    mean = jnp.where(some, highest + below / jnp.where(some, total, 1.0), 0.0)
    log_squares = jnp.where(some, 2 * highest + jnp.log(jnp.where(some, squares, 1.0)), MASKED)
    none = 0.0 * log_sum
    log_z = -vocabulary.log_probs(none, log_sum)
    found = {
        # The mean log-prob: each part's mean logit times its share of the probability.
        "entropy": -vocabulary.log_probs(jnp.exp(log_sum - log_z) * mean, log_sum),
        "collision": -vocabulary.log_probs(none, log_squares) - 2 * log_z,
    }
    return jax.tree.map(vocabulary.own_rows, found)


# Below, T tokens of a chunk; W words of a tile.
_TILE_LOGITS = 1 << 22
_FEWEST_WORDS = 512
# What the backward pass needs of the forward pass, two numbers a token.
SUMS = "head_sums"


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _log_sum_and_picked(hidden_TD, unembedding_VD, place_T, length, softcap, constant):
    """log of the sum of exp(logits) over words below `length`, and the logit at `place_T` or 0."""
    return _forward(hidden_TD, unembedding_VD, place_T, length, softcap, constant)[0]


def _forward(hidden_TD, unembedding_VD, place_T, length, softcap, constant):
    def add_words(carry, start):
        highest, total, picked = carry
        _, logits_TW, words, valid = tile(hidden_TD, unembedding_VD, start, length, softcap)
        higher = jnp.maximum(highest, jnp.max(logits_TW, axis=-1))
        shrunk = total * jnp.exp(highest - higher)
        hit = (words == place_T[:, None]) & valid
        return (
            higher,
            shrunk + jnp.sum(jnp.exp(logits_TW - higher[:, None]), axis=-1),
            picked + jnp.sum(jnp.where(hit, logits_TW, 0.0), axis=-1),
        ), None

    T = place_T.shape[0]
    start = tuple(constant(jnp.full(T, value, jnp.float32)) for value in (MASKED, 0, 0))
    steps = tiles(T, unembedding_VD.shape[0])
    (highest, total, picked), _ = jax.lax.scan(add_words, start, steps)
    log_sum = checkpoint_name(highest + jnp.log(total), SUMS)
    picked = checkpoint_name(picked, SUMS)
    return (log_sum, picked), (hidden_TD, unembedding_VD, place_T, length, log_sum)


def _backward(softcap, constant, residuals, cotangents):
    hidden_TD, unembedding_VD, place_T, length, log_sum_T = residuals
    d_log_sum_T, d_picked_T = cotangents

    def of_logits(start, logits_TW, words):
        d_TW = jnp.exp(logits_TW - log_sum_T[:, None]) * d_log_sum_T[:, None]
        return d_TW + jnp.where(words == place_T[:, None], d_picked_T[:, None], 0.0)

    inputs = hidden_TD, unembedding_VD, length, softcap
    return *of_inputs(of_logits, *inputs, constant), None, None


_log_sum_and_picked.defvjp(_forward, _backward)


def of_inputs(of_logits, hidden_TD, unembedding_VD, length, softcap, constant):
    """Gradients of hidden states and unembedding from those of the logits, tile by tile.

    Args:
      of_logits: `(start, logits_TW, words)`, a tile's start, logits and words, to the gradient
        (T, W) of these logits.
    """

    def add_words(carry, start):
        d_hidden_TD, d_unembedding_VD = carry
        words_WD, logits_TW, words, valid = tile(hidden_TD, unembedding_VD, start, length, softcap)
        d_TW = of_logits(start, logits_TW, words)
        if softcap is not None:
            d_TW *= 1 - jnp.square(jnp.where(valid, logits_TW, 0.0) / softcap)
        d_TW = jnp.where(valid, d_TW, 0.0).astype(hidden_TD.dtype)
        d_words_WD = product("tw,td->wd", d_TW, hidden_TD)
        so_far_WD = jax.lax.dynamic_slice_in_dim(d_unembedding_VD, start, d_words_WD.shape[0])
        return (
            d_hidden_TD + product("tw,wd->td", d_TW, words_WD),
            jax.lax.dynamic_update_slice_in_dim(
                d_unembedding_VD, so_far_WD + d_words_WD, start, axis=0
            ),
        ), None

    both = (hidden_TD, unembedding_VD)
    start = tuple(constant(jnp.zeros(x.shape, jnp.float32)) for x in both)
    steps = tiles(hidden_TD.shape[0], unembedding_VD.shape[0])
    (d_hidden_TD, d_unembedding_VD), _ = jax.lax.scan(add_words, start, steps)
    return d_hidden_TD.astype(hidden_TD.dtype), d_unembedding_VD


def tiles(tokens: int, size: int) -> jax.Array:
    """Where each tile of a vocabulary starts; all are of `_words` words."""
    words = _words(tokens, size)
    return jnp.arange(-(-size // words)) * words


def _words(tokens: int, size: int) -> int:
    return min(size, max(_FEWEST_WORDS, 128 * (_TILE_LOGITS // (128 * tokens))))


def tile(hidden_TD, unembedding_VD, start, length, softcap):
    """A tile's unembedding, its logits, its words' places, and which of those count.

    The last tile starts early enough to be whole; what it shares with the one before counts there.
    """
    size = unembedding_VD.shape[0]
    count = _words(hidden_TD.shape[0], size)
    words = jnp.minimum(start, size - count) + jnp.arange(count)
    words_WD = jax.lax.dynamic_slice_in_dim(unembedding_VD, start, count).astype(hidden_TD.dtype)
    logits_TW = soft_cap(product("td,wd->tw", hidden_TD, words_WD), softcap)
    valid = (words >= start) & (words < length)
    return words_WD, jnp.where(valid, logits_TW, MASKED), words, valid


product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
