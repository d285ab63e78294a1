"""Log-probs of shared, packed and padded rows against one plain sequence a response."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax.data.batching import Example, RowShape, fill_rows
from attnpo_jax.models import decoder
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.models.scoring import response_logps

TINY = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=1000.0,
)
# Prompt, chosen and rejected lengths.
SIZES = ((5, 4, 6), (3, 7, 1), (8, 2, 3), (1, 5, 5))
SHAPE = RowShape(32, 16, 8)


@pytest.fixture(scope="module")
def params():
    """Weights far from zero, so that log-probs are far from uniform."""
    params = decoder.init_params(TINY, jax.random.key(0))
    return jax.tree.map(lambda p: p * 8.0 if p.std() > 0 else p, params)


def examples():
    rng = np.random.default_rng(0)

    def make(index, sizes):
        prompt, *responses = (rng.integers(1, 61, n, np.int32) for n in sizes)
        return Example(index, prompt, tuple(responses), tuple(map(len, responses)))

    return [make(index, sizes) for index, sizes in enumerate(SIZES)]


def plain_logps(params):
    """The definition, (pair, response, T): a row a response, the whole softmax; 0 where padded."""
    pairs = examples()
    tokens, positions = np.zeros((len(pairs), 2, 16), np.int32), np.arange(16)
    for e in pairs:
        for r, ids in enumerate(e.response_ids):
            text = np.concatenate([e.prompt_ids, ids])
            tokens[e.index, r, : len(text)] = text  # what follows is not seen by what is scored
    rows = jnp.asarray(tokens.reshape(-1, 16))
    hidden = decoder.forward(
        TINY, params, rows, jnp.broadcast_to(positions, rows.shape), jnp.ones_like(rows)
    )
    logps = jax.nn.log_softmax(hidden @ decoder.unembedding(params).T, axis=-1)
    picked = jnp.take_along_axis(logps[:, :-1], rows[:, 1:, None], axis=-1)[..., 0]
    picked = picked.reshape(len(pairs), 2, 15)
    return jnp.stack(
        [
            jnp.stack(
                [
                    jnp.pad(picked[e.index, r, p - 1 : p - 1 + len(ids)], (0, 8 - len(ids)))
                    for r, ids in enumerate(e.response_ids)
                ]
            )
            for e in pairs
            for p in [len(e.prompt_ids)]
        ]
    )


@pytest.fixture(scope="module")
def plain(params):
    return np.asarray(jax.jit(plain_logps)(params))


def score(params, rows, shape, **options):
    return jax.jit(lambda p, batch: response_logps(TINY, p, batch, **options))(
        params, fill_rows(rows, shape, 0)
    )


def assert_equals_plain(logps_BG2T, rows, plain):
    for b, row in enumerate(rows):
        for g in range(logps_BG2T.shape[1]):
            want = plain[row[g].index] if g < len(row) else np.zeros((2, 8))
            pad = logps_BG2T.shape[-1] - 8
            want = np.pad(want, ((0, 0), (0, pad))) if pad > 0 else want[:, : 8 + pad]
            np.testing.assert_allclose(logps_BG2T[b, g], want, atol=1e-5)


def test_shared_rows_equal_separate_sequences(params, plain):
    rows = [[e] for e in examples()]
    got = score(params, rows, SHAPE)
    assert got.shape == (4, 1, 2, 8) and got.dtype == jnp.float32
    assert_equals_plain(got, rows, plain)


def test_packed_rows_equal_separate_sequences(params, plain):
    a, b, c, d = examples()
    rows = [[a, b], [d, c], [c]]
    got = score(params, rows, RowShape(40, 20, 8, pairs=2))
    assert_equals_plain(got, rows, plain)


@pytest.mark.parametrize(("shape", "chunk"), [(RowShape(13, 10, 7), 3), (RowShape(96, 64, 32), 7)])
def test_padding_and_chunks_change_nothing(params, plain, shape, chunk):
    _, b, c, _ = examples()
    rows = [[b], [c], []]
    assert_equals_plain(score(params, rows, shape, chunk=chunk), rows, plain)


def test_gradients_equal_those_of_separate_sequences(params):
    pairs = examples()
    weights = np.random.default_rng(1).normal(size=(len(pairs), 2, 8))
    rows = [pairs[:2], pairs[2:]]
    batch = fill_rows(rows, RowShape(40, 20, 8, pairs=2), 0)

    def separate(params):
        return jnp.sum(jnp.sin(plain_logps(params)) * weights)

    def shared(params):
        logps = response_logps(TINY, params, batch, remat="layer", chunk=8)
        return jnp.sum(jnp.sin(logps).reshape(weights.shape) * weights)

    small = jax.tree.map(lambda p: p / 4, params)
    want = jax.jit(jax.grad(separate))(small)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want)) > 0.1
    chex.assert_trees_all_close(jax.jit(jax.grad(shared))(small), want, rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_near(params):
    rows = [[e] for e in examples()]
    small = jax.tree.map(lambda p: p / 4, params)
    got = score(small, rows, SHAPE, dtype=jnp.bfloat16)
    assert got.dtype == jnp.float32
    assert 0 < np.abs(got - score(small, rows, SHAPE)).max() < 0.1
