"""Attention block by block with a running softmax: the XLA implementation for processors.

On a CPU, attention costs what its scores cost to write and to read again. Here they exist for one
block of queries and one of keys at a time, which stay in the cache, and pairs of blocks where
nobody sees anybody (the other branch, another pair of the row, what comes later) are skipped. The
backward pass computes the scores again from what the forward pass leaves (Dao et al. 2022, arXiv
2205.14135, algorithms 2 and 4), so that memory is linear in the row's length.

Shapes: B rows, L row length, P length of a shared past, N query heads, K key-value heads, G = N / K
query heads to one of them, H head dim; n blocks of queries and m of keys, all of b tokens.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnpo_jax.models.attention.core import MASKED, Past, RowLayout, ScoreRule, after, soft_cap
from attnpo_jax.models.placement import kept

# What the backward pass needs of the forward pass. A rematerialisation policy that keeps these
# names saves running it twice.
RESIDUALS = ("attention_output", "attention_log_sums")

# Scores of a head in a pair of blocks, all rows together: fewer are not worth a turn of the loop,
# more leave the cache.
_SCORES = 1 << 16
_SHORTEST, _LONGEST = 64, 256

# Codes of tokens that no (segment, branch) has: 4 * segment + branch is at least 1.
_PAST, _PADDED_KEY, _PADDED_QUERY = 0, -1, -2

_NONE, _SOME, _ALL = range(3)


class _Tokens(NamedTuple):
    """What decides who sees whom, with blocks of tokens on the first axis.

    A query sees a key of its own code or of its prefix's code that stands no later.
    """

    places: jax.Array  # (n, 1, b)
    codes: jax.Array  # (n, B, b): 4 * segment + branch
    prefixes: jax.Array  # (n, B, b): the code of the prefix of the token's segment
    positions: jax.Array | None  # (n, B, b)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a batch of rows is cut, and which pairs of blocks have anything to do with each other."""

    queries: _Tokens
    keys: _Tokens
    # int32 (n * m, 3), a block of queries, one of keys, and what to do; first those pairs where
    # anybody sees anybody.
    pairs: jax.Array
    count: jax.Array  # int32 (), how many those are

    @classmethod
    def of(cls, layout: RowLayout, past_length: int = 0) -> "Blocks":
        """The blocks for rows of a layout; the same for all layers of a model."""
        B, L = layout.branch_BL.shape
        b = _block_length(B, L)
        real = layout.branch_BL > 0
        segment = 0 if layout.segment_BL is None else 4 * layout.segment_BL
        places = past_length + jnp.arange(L)[None]

        def in_blocks(x, fill):
            x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % b)), constant_values=fill)
            return x.reshape(x.shape[0], -1, b).swapaxes(0, 1)

        def tokens(padding, past):
            """Of the row, after `past` tokens of the past."""

            def whole(x, of_past, fill):
                return in_blocks(jnp.concatenate([of_past[:, :past], x], axis=1), fill)

            def constant(value):
                return jnp.full((B, past), value)

            codes = jnp.where(real, segment + layout.branch_BL, padding)
            prefixes = jnp.where(real, segment + 1, padding)
            positions = None
            if layout.positions_BL is not None:
                of_past = jnp.broadcast_to(jnp.arange(past), (B, past))
                positions = whole(layout.positions_BL, of_past, 0)
            return _Tokens(
                whole(places, jnp.arange(past)[None], 0),
                whole(codes, constant(_PAST), padding),
                whole(prefixes, constant(_PAST), padding),
                positions,
            )

        queries, keys = tokens(_PADDED_QUERY, 0), tokens(_PADDED_KEY, past_length)

        def kind(query, key):
            mask = _visible(query, key, window=None)
            every = jnp.all(mask | (query.codes == _PADDED_QUERY)[..., None])
            if layout.positions_BL is not None:
                every = False  # the layers' windows differ, and are not known here
            return jnp.where(every, _ALL, jnp.any(mask).astype(jnp.int32))

        kinds = jax.lax.map(lambda query: jax.lax.map(lambda key: kind(query, key), keys), queries)
        kinds = kinds.reshape(-1)
        order = jnp.argsort(kinds == _NONE, stable=True)
        m = keys.codes.shape[0]
        pairs = jnp.stack([order // m, order % m, kinds[order]], axis=1)
        return cls(queries, keys, pairs, jnp.sum(kinds != _NONE))


def attend(
    q_BLNH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    blocks: Blocks,
    *,
    rule: ScoreRule,
    past: Past | None = None,
) -> jax.Array:
    """As `core.attend`, with the blocks of the rows' layout and the past's length."""
    if past is not None:
        k_BLKH, v_BLKH = after(past, k_BLKH, v_BLKH)
    window = None if rule.window is None else jnp.asarray(rule.window, jnp.int32)
    H = q_BLNH.shape[-1]
    scale = H**-0.5 if rule.scale is None else rule.scale
    return _attention(q_BLNH * scale, k_BLKH, v_BLKH, blocks, window, rule.softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q_BLNH, k_BLKH, v_BLKH, blocks: Blocks, window, softcap):
    return _forward(q_BLNH, k_BLKH, v_BLKH, blocks, window, softcap)[0]


def _forward(q_BLNH, k_BLKH, v_BLKH, blocks: Blocks, window, softcap):
    b, K = blocks.queries.codes.shape[-1], k_BLKH.shape[2]
    q, k, v = (_split(x, b, K) for x in (q_BLNH, k_BLKH, v_BLKH))

    def add(t, carry):
        i, j, kind = blocks.pairs[t]
        query, key = _at(blocks.queries, i), _at(blocks.keys, j)
        highest, sums, out = (x[i] for x in carry)
        s = _scores(q[i], k[j], query, key, kind, window, softcap)
        higher = jnp.maximum(highest, jnp.max(s, axis=-1))
        shrink = jnp.exp(highest - higher)
        p = jnp.exp(s - higher[..., None])
        more = _product("bkql,bklh->bkqh", p.astype(v.dtype), v[j])
        new = higher, sums * shrink + jnp.sum(p, axis=-1), out * shrink[..., None] + more
        return tuple(x.at[i].set(y) for x, y in zip(carry, new, strict=True))

    start = jnp.full(q.shape[:-1], MASKED), jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape, jnp.float32)
    highest, sums, out = jax.lax.fori_loop(0, blocks.count, add, start)
    sums = jnp.where(sums > 0, sums, 1.0)  # a block of padding saw no keys at all
    log_sums = highest + jnp.log(sums)
    out_BLNH = _join(out / sums[..., None], q_BLNH.shape).astype(v_BLKH.dtype)
    out_BLNH, log_sums = map(kept, (out_BLNH, log_sums), RESIDUALS)
    return out_BLNH, (q_BLNH, k_BLKH, v_BLKH, blocks, window, out_BLNH, log_sums)


def _backward(softcap, residuals, d_out_BLNH):
    q_BLNH, k_BLKH, v_BLKH, blocks, window, out_BLNH, log_sums = residuals
    b, K = blocks.queries.codes.shape[-1], k_BLKH.shape[2]
    product = out_BLNH.astype(jnp.float32) * d_out_BLNH.astype(jnp.float32)
    drop = _split(jnp.sum(product, axis=-1, keepdims=True), b, K)
    q, k, v, d_out = (_split(x, b, K) for x in (q_BLNH, k_BLKH, v_BLKH, d_out_BLNH))

    def add(t, carry):
        i, j, kind = blocks.pairs[t]
        query, key = _at(blocks.queries, i), _at(blocks.keys, j)
        d_q, d_k, d_v = carry
        s = _scores(q[i], k[j], query, key, kind, window, softcap)
        p = jnp.exp(s - log_sums[i][..., None])
        d_p = _product("bkqh,bklh->bkql", d_out[i], v[j])
        d_s = p * (d_p - drop[i])
        if softcap is not None:
            d_s *= jnp.where(s > MASKED / 2, 1 - jnp.square(s / softcap), 0.0)
        p, d_s = p.astype(v.dtype), d_s.astype(q.dtype)
        return (
            d_q.at[i].add(_product("bkql,bklh->bkqh", d_s, k[j])),
            d_k.at[j].add(_product("bkql,bkqh->bklh", d_s, q[i])),
            d_v.at[j].add(_product("bkql,bkqh->bklh", p, d_out[i])),
        )

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    d_qkv = jax.lax.fori_loop(0, blocks.count, add, start)
    gradients = (
        _join(d, x.shape).astype(x.dtype)
        for d, x in zip(d_qkv, (q_BLNH, k_BLKH, v_BLKH), strict=True)
    )
    return *gradients, None, None


_attention.defvjp(_forward, _backward)


def _at(tokens: _Tokens, i) -> _Tokens:
    return jax.tree.map(lambda x: x[i], tokens)


def _scores(q_BKQH, k_BKbH, query: _Tokens, key: _Tokens, kind, window, softcap):
    """Scores (B, K, Q, b) of a block of keys for the G * b = Q queries of a block."""
    s = soft_cap(_product("bkqh,bklh->bkql", q_BKQH, k_BKbH), softcap)

    def mask(s):
        visible_Bbb = _visible(query, key, window)
        B, K, _, b = s.shape
        masked = jnp.where(visible_Bbb[:, None, None], s.reshape(B, K, -1, b, b), MASKED)
        return masked.reshape(s.shape)

    return jax.lax.cond(kind == _ALL, lambda s: s, mask, s)


def _visible(query: _Tokens, key: _Tokens, window) -> jax.Array:
    """Mask (B, b, b) of a block of keys for a block of queries."""
    code_k, code_q = key.codes[:, None, :], query.codes[:, :, None]
    mask = (code_k == code_q) | (code_k == query.prefixes[:, :, None])
    mask |= (code_k == _PAST) & (code_q != _PADDED_QUERY)
    mask &= key.places[:, None, :] <= query.places[:, :, None]
    if window is not None:
        mask &= query.positions[:, :, None] - key.positions[:, None, :] < window
    return mask


def _block_length(B: int, L: int) -> int:
    """The length of which blocks are of a good size, and fill the row."""
    ideal = math.sqrt(_SCORES / B)
    wanted = min(max(ideal, _SHORTEST), _LONGEST)
    return 16 * math.ceil(L / max(1, round(L / wanted)) / 16)


def _split(x_BLNH, b: int, K: int):
    """(B, L, K * G, H) to (n, B, K, G * b, H): blocks first, the heads of one key head together."""
    B, _, N, H = x_BLNH.shape
    x = jnp.pad(x_BLNH, ((0, 0), (0, -x_BLNH.shape[1] % b), (0, 0), (0, 0)))
    x = x.reshape(B, -1, b, K, N // K, H).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(-1, B, K, N // K * b, H)


def _join(x, shape: tuple[int, ...]):
    """The reverse of `_split`."""
    B, L, N, H = shape
    n, _, K = x.shape[:3]
    x = x.reshape(n, B, K, N // K, -1, H).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, -1, N, H)[:, :L]


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
