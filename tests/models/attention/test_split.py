"""Attention in parts, joined by their log-sum-exps, held against XLA's on whole rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax.models import decoder, reading, scoring
from attnpo_jax.models.attention import core, cudnn, implementations, split
from attnpo_jax.models.attention.core import Past, RowLayout, ScoreRule
from attnpo_jax.models.config import ModelConfig
from tests import tiny

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
    """Algorithm 4 of Dao et al. 2022. Queries that do not count get no mask here: their sums do."""
    G = q.shape[2] // k.shape[2]
    p, _ = probabilities(q, k, query_count, key_count, log_sums, causal, scale)
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
PLAIN = ScoreRule()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """As small beside rows of these tests as 128 is beside long ones."""
    monkeypatch.setattr(split, "_TILE", 8)


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


def parts(q, k, v, past, layout, rule):
    return split.attend(q, k, v, past, split.Pieces.of(layout), rule=rule, part=XLA)


def whole(q, k, v, past, layout, rule):
    return core.attend(q, k, v, layout, rule=rule, past=past)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(compute, rule, layout, d_out, *arrays):
    """Outputs, 0 where there is padding, and the gradients of all arrays."""
    real = (layout.branch_BL > 0)[..., None, None]
    out, pull = jax.vjp(lambda *arrays: compute(*arrays, layout, rule), *arrays)
    return jnp.where(real, out, 0), *pull(jnp.where(real, d_out, 0).astype(out.dtype))


def check(layout, *, rule=PLAIN, past_length=0, heads=(4, 2), dtype=jnp.float32, tolerance=1e-5):
    """Outputs and all gradients, the past's too, are those of `core.attend` in float32."""
    (B, L), (N, K) = layout.branch_BL.shape, heads
    q, k, v = (random(i, B, L, n, 16, dtype=dtype) for i, n in enumerate((N, K, K)))
    past = Past(*(random(i, past_length, K, 16, dtype=dtype) for i in (3, 4)))
    arrays = (q, k, v, past if past_length else None)
    assert split.serves(layout, rule, past_length)
    d_out = random(5, B, L, N, 16)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    want = jax.tree.leaves(run(whole, rule, layout, d_out, *exact))
    got = jax.tree.leaves(run(parts, rule, layout, d_out, *arrays))
    for a, b in zip(want, got, strict=True):
        assert b.dtype == dtype
        a, b = np.asarray(a), np.asarray(b, np.float32)
        assert np.abs(a).max() > 0.1
        np.testing.assert_allclose(b, a, atol=tolerance * np.abs(a).max(), rtol=0)


@pytest.mark.parametrize("past_length", [0, 7])
@pytest.mark.parametrize("name", [*LONE, *PACKED])
def test_parts_equal_the_whole(name, past_length):
    rows = {**LONE, **PACKED}[name]
    check(layout_of(rows, name in PACKED, past_length), past_length=past_length)


@pytest.mark.parametrize("packed", [False, True])
def test_parts_equal_the_whole_for_any_lengths(packed):
    """Three cuts of a row are three pieces of a pair; half of the cuts are at a few places."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = []
        for _ in range(2):
            pairs = int(rng.integers(1, 4)) if packed else 1
            cuts = np.sort(rng.choice([0, 1, 31, 32, L, *rng.integers(0, L + 1, 5)], 3 * pairs))
            lengths = np.diff(cuts, prepend=0).reshape(pairs, 3)
            rows.append([tuple(pair) for pair in lengths.tolist() if sum(pair)])
        if any(sum(map(sum, row)) > 20 for row in rows):
            check(layout_of(rows, packed))


@pytest.mark.parametrize(
    "rule, heads",
    [
        (ScoreRule(scale=0.1), (4, 2)),
        (ScoreRule(window=L + 7), (4, 2)),  # hides nothing
        (PLAIN, (3, 3)),
        (PLAIN, (4, 1)),
    ],
)
def test_parts_equal_the_whole_with_rules_and_heads(rule, heads):
    check(layout_of(PACKED["packed"], True, 7), rule=rule, heads=heads, past_length=7)


@pytest.mark.parametrize("past_length", [0, 7])
def test_parts_in_bfloat16_are_off_by_rounding(past_length):
    """Outputs are off by their rounding, 2^-9 and once more for parts; gradients read them."""
    layout = layout_of(PACKED["packed"], True, past_length)
    check(layout, past_length=past_length, dtype=jnp.bfloat16, tolerance=2**-7)


def test_long_pairs_of_a_row_have_arrays_of_their_own_length():
    """Three packed pairs of a row of 600: of 600, 304 (300 in tiles of 8) and 200 tokens."""
    branch = np.tile(np.repeat([1, 2, 3], [20, 30, 50]), 6)[None]
    segment = np.repeat([1, 2, 3], [100, 300, 200])[None]
    branch[0, 100:400] = np.repeat([1, 2, 3], [100, 150, 50])
    branch[0, 400:] = np.repeat([1, 3], [150, 50])
    layout = RowLayout(jnp.asarray(branch), jnp.asarray(segment), None, 3)
    pieces = split.Pieces.of(layout)
    assert [pair.length for pair in pieces.pairs(600)] == [600, 304, 200]
    assert pieces.start_BG.tolist() == [[100, 400, 0]]
    assert pieces.prefix_BG.tolist() == [[100, 150, 20]]
    assert pieces.first_BG.tolist() == [[250, 150, 50]]
    assert pieces.second_BG.tolist() == [[50, 50, 50]]
    check(layout)


def test_windows_and_unknown_pairs_take_a_mask():
    packed = layout_of(PACKED["packed"], True)
    assert split.serves(packed, PLAIN)
    assert split.serves(packed, ScoreRule(window=L + 7), past_length=7)
    assert not split.serves(packed, ScoreRule(window=L), past_length=7)
    assert not split.serves(packed, ScoreRule(window=jnp.asarray(L)))
    assert not split.serves(packed, ScoreRule(softcap=30.0))
    assert not split.serves(dataclasses.replace(packed, most_segments=None), PLAIN)


# --- Models that run through it -------------------------------------------------------------------

MODEL = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)


@pytest.fixture
def on_xla(monkeypatch):
    """The implementation `cudnn`, its parts by XLA; a mask is an error."""
    monkeypatch.setattr(implementations, "PART", XLA)
    monkeypatch.setitem(implementations._MASKS, "cudnn", None)


@pytest.mark.parametrize("remat", list(decoder.REMAT_POLICIES))
def test_decoder_in_parts_equals_decoder_with_xla(on_xla, remat):
    params = decoder.init_params(MODEL, jax.random.key(0))
    layout = layout_of(PACKED["packed"], True)
    tokens = jax.random.randint(jax.random.key(1), layout.branch_BL.shape, 0, 61)
    row = (tokens, layout.positions_BL, layout.branch_BL)
    real = (layout.branch_BL > 0)[..., None]

    def loss(params, attention):
        packed = {"segment_BL": layout.segment_BL, "most_segments": layout.most_segments}
        hidden = decoder.forward(MODEL, params, *row, remat=remat, attention=attention, **packed)
        return jnp.sum(jnp.where(real, jnp.sin(hidden), 0))

    want = jax.jit(jax.grad(functools.partial(loss, attention="xla")))(params)
    got = jax.jit(jax.grad(functools.partial(loss, attention="cudnn")))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-4), got, want)


def test_log_probs_of_packed_batches_are_the_same_in_parts(on_xla):
    """Rows as training has them: with two pairs each, the last with one."""
    batch = jax.tree.map(lambda x: x[0], tiny.batch(microbatches=1, rows=3, pairs=5))
    assert batch.valid_BG.tolist() == [[True, True], [True, True], [True, False]]
    of_model = tiny.MODEL, tiny.params(), batch
    want = jax.jit(functools.partial(scoring.response_logps, *of_model))()
    got = jax.jit(functools.partial(scoring.response_logps, *of_model, attention="cudnn"))()
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_judge_reads_the_same_in_parts(on_xla):
    params = decoder.init_params(MODEL, jax.random.key(0))
    layout = layout_of(LONE["plain"], False, past_length=6)
    tokens = jax.random.randint(jax.random.key(1), (2, 6 + L), 0, 61)
    reads = jnp.asarray([[50, 67], [13, 63]])

    def read(attention):
        past = decoder.make_past(MODEL, params, tokens[0, :6], attention=attention)
        row = (tokens[:, 6:], layout.positions_BL, layout.branch_BL, reads)
        common = {"sources": (0, 1), "past": past, "attention": attention}
        output = reading.read(MODEL, params, *row, **common)
        return output.rows_SBQL, output.hidden_BQD

    want, got = (jax.jit(read, static_argnums=0)(name) for name in ("xla", "cudnn"))
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], atol=1e-4)


# --- What cuDNN is given --------------------------------------------------------------------------


def gradients(layout, past_length=0):
    """Attention's gradients through cuDNN, as a function of queries, keys and values."""

    def of(q, k, v):
        masks = implementations.make_masks("cudnn", layout, PLAIN, past_length)
        past = Past(k[0, :past_length], v[0, :past_length]) if past_length else None
        common = {"rule": PLAIN, "implementation": "cudnn", "masks": masks, "past": past}
        attended = functools.partial(implementations.attend, layout=layout, **common)
        return jax.grad(lambda *qkv: attended(*qkv).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    return of


ARRAYS = [jax.ShapeDtypeStruct((2, L, heads, 16), jnp.bfloat16) for heads in (4, 2, 2)]


@pytest.mark.parametrize("name, calls", [("plain", 3), ("packed", 9)])
def test_parts_lower_for_cuda_without_a_mask(name, calls):
    """Three fused calls a pair, and one for the past, each way; nothing is as large as a mask."""
    layout = layout_of({**LONE, **PACKED}[name], name in PACKED)
    traced = jax.jit(gradients(layout, past_length=7)).trace(*ARRAYS)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__cudnn$fmhaSoftmax(") == calls + 1
    assert text.count("__cudnn$fmhaSoftmaxBackward(") == calls + 1
    assert "Bias" not in text and "dot_general" not in text
    assert f"{L}x{L}x" not in text and f"{L}x{L + 7}x" not in text


def test_another_jax_takes_a_mask(monkeypatch):
    """Where JAX's internals are not as expected, as with a name of theirs gone."""
    assert cudnn.lacking() is None
    gone = cudnn._internals()
    monkeypatch.delattr(gone, "_dot_product_attention_bwd_p_wrapper")
    monkeypatch.setattr(cudnn, "lacking", cudnn.lacking.__wrapped__)
    assert "not in jax" in cudnn.lacking()
    layout = layout_of(LONE["plain"], False)
    masks = implementations.make_masks("cudnn", layout, PLAIN)
    assert masks.shape == (2, 1, L, L)
