"""Attention one row at a time, a strip of queries against all keys up to its end: for short rows.

On a CPU, attention costs what its scores cost to write and to read again. Those of a strip of one
row stay in the cache, and a strip takes a handful of operations: where rows are short, half the
time of `blocks`, which computes fewer scores with more operations. The backward pass
computes the scores again from what the forward pass leaves (Dao et al. 2022, arXiv 2205.14135,
algorithm 4).

Shapes: B rows, L row length, P length of a shared past, N query heads, K key-value heads, G = N / K
query heads to one of them, H head dim; Q queries of a strip, S keys up to its end.
"""

import functools
import math

import jax
import jax.numpy as jnp

from attnpo_jax.models.attention.blocks import RESIDUALS
from attnpo_jax.models.attention.core import MASKED, Past, ScoreRule, after, soft_cap
from attnpo_jax.models.placement import kept

# Rows with more keys leave the cache, and their strips are so many that compiling them takes long.
MOST_KEYS = 1536

# A row is cut into about so many strips, of so many queries: fewer are not worth the operations,
# more have too many scores that nobody needs.
_STRIPS = 6
_SHORTEST, _LONGEST = 96, 192


def attend(
    q_BLNH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    mask_BLS: jax.Array,
    *,
    rule: ScoreRule,
    past: Past | None = None,
) -> jax.Array:
    """As `core.attend`, with who sees whom, windows too, as a mask: bool (B, L, P + L)."""
    if past is not None:
        k_BLKH, v_BLKH = after(past, k_BLKH, v_BLKH)
    H = q_BLNH.shape[-1]
    scale = H**-0.5 if rule.scale is None else rule.scale
    return _attention(q_BLNH * scale, k_BLKH, v_BLKH, mask_BLS, rule.softcap)


def strips(L: int, S: int) -> list[tuple[int, int, int]]:
    """(first query, one after the last, keys up to there) of every strip."""
    wanted = min(max(L / _STRIPS, _SHORTEST), _LONGEST)
    length = 16 * math.ceil(L / max(1, round(L / wanted)) / 16)
    ends = [min(start + length, L) for start in range(0, L, length)]
    return [(i * length, end, S - L + end) for i, end in enumerate(ends)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_BLNH, k_BSKH, v_BSKH, mask_BLS, softcap):
    return _forward(q_BLNH, k_BSKH, v_BSKH, mask_BLS, softcap)[0]


def _forward(q_BLNH, k_BSKH, v_BSKH, mask_BLS, softcap):
    def row(inputs):
        q_LNH, k_SKH, v_SKH, mask_LS = inputs
        q_KGLH, k_KSH, v_KSH = _by_heads(q_LNH, k_SKH, v_SKH)
        outs, log_sums = [], []
        for start, stop, keys in strips(*mask_LS.shape):
            mask = mask_LS[start:stop, :keys]
            s = _scores(q_KGLH[:, :, start:stop], k_KSH[:, :keys], mask, softcap)
            highest = jnp.max(s, axis=-1, keepdims=True)
            p = jnp.exp(s - highest)
            sums = jnp.sum(p, axis=-1, keepdims=True)
            out = _product("kql,klh->kqh", _flat(p.astype(v_KSH.dtype)), v_KSH[:, :keys])
            outs.append(out.reshape(*p.shape[:3], -1) / sums)
            log_sums.append((highest + jnp.log(sums))[..., 0])
        out_KGLH = jnp.concatenate(outs, axis=2)
        return _back(out_KGLH).astype(v_SKH.dtype), jnp.concatenate(log_sums, axis=2)

    out_BLNH, log_sums = jax.lax.map(row, (q_BLNH, k_BSKH, v_BSKH, mask_BLS))
    out_BLNH, log_sums = map(kept, (out_BLNH, log_sums), RESIDUALS)
    return out_BLNH, (q_BLNH, k_BSKH, v_BSKH, mask_BLS, out_BLNH, log_sums)


def _backward(softcap, residuals, d_out_BLNH):
    def row(inputs):
        q_LNH, k_SKH, v_SKH, mask_LS, out_LNH, log_sums_KGL, d_out_LNH = inputs
        q_KGLH, k_KSH, v_KSH = _by_heads(q_LNH, k_SKH, v_SKH)
        product = out_LNH.astype(jnp.float32) * d_out_LNH.astype(jnp.float32)
        drop_KGL = _by_heads(jnp.sum(product, axis=-1)[..., None], k_SKH, v_SKH)[0][..., 0]
        d_out_KGLH = _by_heads(d_out_LNH, k_SKH, v_SKH)[0]
        d_q = []
        d_k, d_v = (jnp.zeros(x.shape, jnp.float32) for x in (k_KSH, v_KSH))
        for start, stop, keys in strips(*mask_LS.shape):
            mask, k, v = mask_LS[start:stop, :keys], k_KSH[:, :keys], v_KSH[:, :keys]
            q, d_out = q_KGLH[:, :, start:stop], _flat(d_out_KGLH[:, :, start:stop])
            s = _scores(q, k, mask, softcap)
            p = jnp.exp(s - log_sums_KGL[:, :, start:stop, None])
            d_p = _product("kqh,klh->kql", d_out, v).reshape(p.shape)
            d_s = p * (d_p - drop_KGL[:, :, start:stop, None])
            if softcap is not None:
                d_s *= jnp.where(s > MASKED / 2, 1 - jnp.square(s / softcap), 0.0)
            p, d_s = _flat(p.astype(v.dtype)), _flat(d_s.astype(q.dtype))
            d_q.append(_product("kql,klh->kqh", d_s, k).reshape(q.shape))
            d_k = d_k.at[:, :keys].add(_product("kql,kqh->klh", d_s, _flat(q)))
            d_v = d_v.at[:, :keys].add(_product("kql,kqh->klh", p, d_out))
        d_q_KGLH = jnp.concatenate(d_q, axis=2)
        return _back(d_q_KGLH), d_k.swapaxes(0, 1), d_v.swapaxes(0, 1)

    d_qkv = jax.lax.map(row, (*residuals, d_out_BLNH))
    return *(d.astype(x.dtype) for d, x in zip(d_qkv, residuals[:3], strict=True)), None


_attention.defvjp(_forward, _backward)


def _by_heads(q_LNH, k_SKH, v_SKH):
    """(K, G, L, H), (K, S, H) and (K, S, H)."""
    L, N, H = q_LNH.shape
    K = k_SKH.shape[1]
    q_KGLH = q_LNH.reshape(L, K, N // K, H).transpose(1, 2, 0, 3)
    return q_KGLH, k_SKH.swapaxes(0, 1), v_SKH.swapaxes(0, 1)


def _back(x_KGLH):
    K, G, L, H = x_KGLH.shape
    return x_KGLH.transpose(2, 0, 1, 3).reshape(L, K * G, H)


def _flat(x_KGQX):
    """(K, G * Q, X)."""
    return x_KGQX.reshape(x_KGQX.shape[0], -1, x_KGQX.shape[-1])


def _scores(q_KGQH, k_KSH, mask_QS, softcap):
    """Scores (K, G, Q, S), float32."""
    s = soft_cap(_product("kqh,klh->kql", _flat(q_KGQH), k_KSH), softcap)
    return jnp.where(mask_QS, s.reshape(*q_KGQH.shape[:3], -1), MASKED)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
