"""Attention on processors, in blocks and in strips, against a softmax over the whole row."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax.models.attention import blocks, implementations, strips
from attnpo_jax.models.attention.core import Past, RowLayout, ScoreRule
from attnpo_jax.models.attention.implementations import BLOCKS

H = 8
# [prefix | chosen | rejected] lengths of the pairs in each row, longer than several blocks.
ROWS = (((60, 250, 230),), ((20, 110, 70), (45, 130, 180)))
LENGTH = 570


def make_rows(packed: bool):
    """Layout, and by hand who sees whom: bool (B, L, L)."""
    branch, segment, positions = (np.zeros((2, LENGTH), np.int32) for _ in range(3))
    visible = np.zeros((2, LENGTH, LENGTH), bool)
    for b, pairs in enumerate(ROWS):
        start = 0
        for s, (prefix, first, second) in enumerate(pairs[: None if packed else 1]):
            parts = np.cumsum([start, prefix, first, second])
            for r in range(3):
                part = slice(parts[r], parts[r + 1])
                branch[b, part], segment[b, part] = r + 1, s + 1
                n = parts[r + 1] - parts[r]
                positions[b, part] = np.arange(n) + (prefix if r else 0)
                visible[b, part, part] = np.tril(np.ones((n, n), bool))
                if r:
                    visible[b, part, parts[0] : parts[1]] = True
            start = parts[3]
    layout = RowLayout(
        jnp.asarray(branch), jnp.asarray(segment) if packed else None, jnp.asarray(positions)
    )
    return layout, visible, positions, branch > 0


def whole_row(q, k, v, mask, softcap=None):
    """Softmax over all keys at once, in float32."""
    q = q.reshape(*q.shape[:2], k.shape[2], -1, H)
    s = jnp.einsum("bqkgh,blkh->bkgql", q, k) / H**0.5
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    p = jax.nn.softmax(jnp.where(mask[:, None, None], s, -1e30), axis=-1)
    out = jnp.einsum("bkgql,blkh->bqkgh", p, v)
    return out.reshape(*out.shape[:2], -1, H)


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(params=["blocks", "strips"])
def masks_of(request, monkeypatch):
    """`make_masks`, as for rows of more or of fewer keys."""
    in_strips = request.param == "strips"
    monkeypatch.setattr(strips, "MOST_KEYS", 10**6 if in_strips else 0)

    def make(*arguments):
        masks = implementations.make_masks(BLOCKS, *arguments)
        assert isinstance(masks, blocks.Blocks) != in_strips
        return masks

    return make


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("softcap", "window"), [(None, None), (2.0, None), (None, 30)], ids=["plain", "cap", "window"]
)
def test_outputs_and_gradients_equal_those_of_the_whole_row(packed, softcap, window, masks_of):
    layout, visible, positions, real = make_rows(packed)
    if window is not None:
        visible = visible & (positions[:, :, None] - positions[:, None, :] < window)
    q, k, v = random(0, 2, LENGTH, 6, H), random(1, 2, LENGTH, 2, H), random(2, 2, LENGTH, 2, H)
    # What padding gets is open, and nothing may come of it.
    weight = random(3, 2, LENGTH, 6, H) * real[..., None, None]

    def total(attend):
        return lambda *qkv: jnp.sum(weight * attend(*qkv))

    rule = ScoreRule(softcap=softcap, window=window)
    ours = functools.partial(
        implementations.attend,
        layout=layout,
        rule=rule,
        implementation=BLOCKS,
        masks=masks_of(layout, rule),
    )
    theirs = functools.partial(whole_row, mask=jnp.asarray(visible), softcap=softcap)
    got, want = (
        jax.jit(jax.value_and_grad(total(attend), argnums=(0, 1, 2)))(q, k, v)
        for attend in (ours, theirs)
    )
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)


def test_half_precision_stays_near(masks_of):
    layout, visible, _, real = make_rows(packed=True)
    rule = ScoreRule()
    shapes = ((2, LENGTH, heads, H) for heads in (6, 2, 2))
    q, k, v = (random(i, *shape).astype(jnp.bfloat16) for i, shape in enumerate(shapes))
    weight = random(3, 2, LENGTH, 6, H) * real[..., None, None]

    def total(q, k, v):
        masks = masks_of(layout, rule)
        out = implementations.attend(q, k, v, layout, rule=rule, implementation=BLOCKS, masks=masks)
        assert out.dtype == jnp.bfloat16
        return jnp.sum(weight * out.astype(jnp.float32))

    def exact(q, k, v):
        return jnp.sum(weight * whole_row(q, k, v, jnp.asarray(visible)))

    got = jax.grad(total, argnums=(0, 1, 2))(q, k, v)
    want = jax.grad(exact, argnums=(0, 1, 2))(*(x.astype(jnp.float32) for x in (q, k, v)))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("window", [None, 50])
def test_a_shared_past_is_seen_by_every_row(window, masks_of):
    layout, visible, positions, real = make_rows(packed=False)
    P = 70
    layout = RowLayout(layout.branch_BL, None, layout.positions_BL + P)
    q, k, v = random(0, 2, LENGTH, 6, H), random(1, 2, LENGTH, 2, H), random(2, 2, LENGTH, 2, H)
    past = Past(random(4, P, 2, H), random(5, P, 2, H))
    keys, values = (
        jnp.concatenate([jnp.broadcast_to(p, (2, *p.shape)), x], axis=1)
        for p, x in ((past.keys, k), (past.values, v))
    )
    mask = np.concatenate([np.ones((2, LENGTH, P), bool), visible], axis=2)
    if window is not None:
        places = np.concatenate([np.tile(np.arange(P), (2, 1)), positions + P], axis=1)
        mask &= (positions + P)[:, :, None] - places[:, None, :] < window
    rule = ScoreRule(window=window)
    masks = masks_of(layout, rule, P)
    got = implementations.attend(
        q, k, v, layout, rule=rule, past=past, implementation=BLOCKS, masks=masks
    )
    want = whole_row(q, keys, values, jnp.asarray(mask))
    np.testing.assert_allclose(got[real], want[real], atol=1e-5)


def test_layers_that_differ_in_their_window_make_masks_of_their_own():
    layout, visible, positions, real = make_rows(packed=True)
    q, k, v = random(0, 2, LENGTH, 6, H), random(1, 2, LENGTH, 2, H), random(2, 2, LENGTH, 2, H)
    rule = ScoreRule(window=jnp.asarray(30))
    masks = implementations.make_masks(BLOCKS, layout, rule)
    assert masks is None
    got = implementations.attend(q, k, v, layout, rule=rule, implementation=BLOCKS, masks=masks)
    mask = visible & (positions[:, :, None] - positions[:, None, :] < 30)
    np.testing.assert_allclose(got[real], whole_row(q, k, v, jnp.asarray(mask))[real], atol=1e-5)


def test_blocks_that_nobody_sees_are_skipped():
    branch = np.repeat(np.array([1, 2, 3], np.int32), 256)[None]
    cut = blocks.Blocks.of(RowLayout(jnp.asarray(branch)))
    # 1 is masked, 2 computed without a mask; the rest is skipped.
    assert cut.pairs[: cut.count].tolist() == [
        [0, 0, 1],
        [1, 0, 2],
        [1, 1, 1],
        [2, 0, 2],
        [2, 2, 1],
    ]


def test_memory_is_linear_in_the_row():
    def temporary(L):
        layout = RowLayout(jnp.ones((1, L), jnp.int32))

        def total(q, k, v):
            cut = blocks.Blocks.of(layout)
            return jnp.sum(blocks.attend(q, k, v, cut, rule=ScoreRule()))

        shapes = [jax.ShapeDtypeStruct((1, L, heads, H), jnp.float32) for heads in (4, 2, 2)]
        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 4.5 * temporary(2048)
