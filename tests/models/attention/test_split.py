"""Attention in parts, joined by their log-sum-exps, held against XLA's on whole rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax.models import decoder, reading
from attnpo_jax.models.attention import core, cudnn, implementations, split
from attnpo_jax.models.attention.core import Past, RowLayout, ScoreRule
from attnpo_jax.models.config import ModelConfig

# --- A part as cuDNN computes it, by XLA ----------------------------------------------------------


def probabilities(q, k, query_count, key_count, log_sums, causal, scale):
    """exp(score - log-sum-exp), float32 (B, N, T, S), and what counts; or the log-sum-exps."""
    (T, N), (S, K) = q.shape[1:3], k.shape[1:3]
    k = jnp.repeat(k, N // K, axis=2).astype(jnp.float32)
    s = scale * jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), k)
    mask = jnp.arange(S) < key_count[:, None, None]
    if causal:
        mask &= jnp.arange(T)[:, None] >= jnp.arange(S)
    s = jnp.where(mask[:, None], s, -jnp.inf)
    if log_sums is None:
        log_sums = jax.nn.logsumexp(s, axis=-1)
    return jnp.exp(s - log_sums[..., None]), log_sums


def only(x, count):
    """NaN where tokens do not count: what cuDNN leaves there is not to be used."""
    inside = jnp.arange(x.shape[1]) < count[:, None]
    return jnp.where(inside[:, :, None, None], x, jnp.nan)


def forward(q, k, v, query_count, key_count, *, causal, scale):
    p, log_sums = probabilities(q, k, query_count, key_count, None, causal, scale)
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2).astype(jnp.float32)
    out = jnp.einsum("bnts,bsnh->btnh", p, v).astype(q.dtype)
    log_sums = only(log_sums.swapaxes(1, 2)[..., None], query_count)[..., 0].swapaxes(1, 2)
    return only(out, query_count), log_sums


def backward(q, k, v, query_count, key_count, out, log_sums, d_out, *, causal, scale):
    """Algorithm 4 of Dao et al. 2022, of the queries that count."""
    G = q.shape[2] // k.shape[2]
    p, _ = probabilities(q, k, query_count, key_count, log_sums, causal, scale)
    p = jnp.where((jnp.arange(q.shape[1]) < query_count[:, None])[:, None, :, None], p, 0.0)
    out, d_out, q32 = (x.astype(jnp.float32) for x in (out, d_out, q))
    k32, v32 = (jnp.repeat(x, G, axis=2).astype(jnp.float32) for x in (k, v))
    d_p = jnp.einsum("btnh,bsnh->bnts", d_out, v32)
    d_s = scale * p * (d_p - jnp.sum(out * d_out, axis=-1).swapaxes(1, 2)[..., None])
    d_q = jnp.einsum("bnts,bsnh->btnh", d_s, k32)
    d_k, d_v = jnp.einsum("bnts,btnh->bsnh", d_s, q32), jnp.einsum("bnts,btnh->bsnh", p, d_out)
    d_k, d_v = (x.reshape(*k.shape[:3], G, -1).sum(axis=3) for x in (d_k, d_v))
    counts = (query_count, key_count, key_count)
    return [only(x.astype(q.dtype), n) for x, n in zip((d_q, d_k, d_v), counts, strict=True)]


XLA = split.Part(forward, backward)

# --- Rows -----------------------------------------------------------------------------------------

# By row, (prefix, branch 1, branch 2) of each pair.
LONE = {
    "plain": [[(20, 31, 17)], [(5, 9, 50)]],  # branches longer than their prefix, padding
    "full": [[(30, 30, 36)], [(94, 1, 1)]],
    "one branch": [[(96, 0, 0)], [(0, 40, 0)]],  # whole rows, and half of one
    "empty pieces": [[(20, 0, 30)], [(20, 30, 0)]],
    "no prefix": [[(0, 40, 30)], [(0, 0, 25)]],  # prompts of their own
    "nothing": [[], [(3, 4, 5)]],
}
PACKED = {
    "packed": [[(20, 10, 7), (5, 9, 8), (3, 2, 1)], [(30, 30, 30)]],
    "shortest first": [[(3, 2, 1), (20, 10, 7), (5, 20, 28)], [(1, 1, 1), (2, 0, 2), (0, 5, 9)]],
    "two halves": [[(16, 16, 16), (16, 16, 16)], []],
}
L = 96


def layout_of(rows, packed, past_length=0):
    branch, segment, position = np.zeros((3, len(rows), L), np.int32)
    for b, pairs in enumerate(rows):
        start = 0
        for s, (prefix, first, second) in enumerate(pairs):
            n = prefix + first + second
            place = slice(start, start + n)
            branch[b, place] = np.repeat([1, 2, 3], [prefix, first, second])
            segment[b, place] = s + 1
            behind = np.arange(prefix, prefix + second)
            position[b, place] = np.concatenate([np.arange(prefix + first), behind])
            start += n
    segment = jnp.asarray(segment) if packed else None
    positions = jnp.asarray(position + past_length)
    return RowLayout(jnp.asarray(branch), segment, positions, 3 if packed else None)


def random(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def check(layout, *, rule=ScoreRule(), past_length=0, heads=(4, 2), dtype=jnp.float32, tolerance):
    """Outputs and all gradients, the past's too, are those of `core.attend` in float32."""
    (B, L), (N, K) = layout.branch_BL.shape, heads
    qkv = [random(i, B, L, n, 16, dtype=dtype) for i, n in enumerate((N, K, K))]
    past = Past(*(random(i, past_length, K, 16, dtype=dtype) for i in (3, 4)))
    past = past if past_length else None
    d_out = jnp.where((layout.branch_BL > 0)[..., None, None], random(5, B, L, N, 16), 0)
    assert split.serves(layout, rule, past_length)

    def run(compute, *arrays):
        out, pull = jax.vjp(compute, *arrays)
        return jnp.where(d_out == 0, 0, out), *pull(d_out.astype(out.dtype))

    def ours(q, k, v, past):
        pieces = split.Pieces.of(layout)
        return split.attend(q, k, v, past, pieces, rule=rule, part=XLA)

    def theirs(q, k, v, past):
        return core.attend(q, k, v, layout, rule=rule, past=past)

    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (*qkv, past))
    want = jax.jit(functools.partial(run, theirs))(*exact)
    got = jax.jit(functools.partial(run, ours))(*qkv, past)
    assert jax.tree.map(lambda x: x.dtype, got[1:]) == jax.tree.map(lambda _: dtype, want[1:])
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        a, b = np.asarray(a), np.asarray(b, np.float32)
        assert np.abs(a).max() > 0.1
        np.testing.assert_allclose(b, a, atol=tolerance * np.abs(a).max(), rtol=0)


@pytest.mark.parametrize("past_length", [0, 7])
@pytest.mark.parametrize("name", [*LONE, *PACKED])
def test_parts_equal_the_whole(name, past_length):
    rows = {**LONE, **PACKED}[name]
    check(layout_of(rows, name in PACKED, past_length), past_length=past_length, tolerance=1e-5)
