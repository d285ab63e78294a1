"""Chunked token log-probs against the plain computation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax.models import lm_head
from attnpo_jax.models.lm_head import STATISTICS, token_logps, token_statistics


def plain(hidden, unembedding, target):
    logp = jax.nn.log_softmax(hidden @ unembedding.T, axis=-1)
    return jnp.take_along_axis(logp, target[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("chunk", [1, 7, 30, 1024])
def test_values_and_gradients_equal_the_plain_computation(chunk):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(3, 10, 8)), jnp.float32)
    unembedding = jnp.asarray(rng.normal(size=(37, 8)), jnp.float32)
    target = jnp.asarray(rng.integers(0, 37, (3, 10)))
    weight = jnp.asarray(rng.normal(size=(3, 10)), jnp.float32)

    def total(f):
        return lambda h, u: jnp.sum(weight * f(h, u))

    got = jax.value_and_grad(
        total(lambda h, u: token_logps(h, u, target, chunk=chunk)), argnums=(0, 1)
    )(hidden, unembedding)
    want = jax.value_and_grad(total(lambda h, u: plain(h, u, target)), argnums=(0, 1))(
        hidden, unembedding
    )
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("chunk", "softcap"), [(7, None), (1024, 2.0)])
def test_statistics_equal_the_plain_computation(chunk, softcap, monkeypatch):
    monkeypatch.setattr(lm_head, "_TILE_LOGITS", 1)  # tiles of 512 words, so three of them
    rng = np.random.default_rng(3)
    # Some distributions are all but certain, some all but uniform.
    scale = np.geomspace(1e-3, 30, 10)[:, None]
    hidden = jnp.asarray(scale * rng.normal(size=(3, 10, 8)), jnp.float32)
    unembedding = jnp.asarray(rng.normal(size=(1037, 8)), jnp.float32)
    logits = hidden @ unembedding.T
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    logp = np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), np.float64)
    found = token_statistics(STATISTICS, hidden, unembedding, softcap=softcap, chunk=chunk)
    np.testing.assert_allclose(found["entropy"], -(np.exp(logp) * logp).sum(-1), atol=1e-4)
    np.testing.assert_allclose(found["collision"], np.log(np.exp(2 * logp).sum(-1)), atol=1e-4)
    least, most = found["entropy"].min(), found["entropy"].max()
    assert (least < 0.1 or softcap) and most > 6.9 and most - least > 0.5
    assert list(token_statistics(("collision",), hidden, unembedding)) == ["collision"]


def test_statistics_have_no_gradient_and_cost_one_product():
    hidden, unembedding = jnp.ones((1, 30, 8)), jnp.ones((37, 8))

    def total(h, u):
        found = token_statistics(STATISTICS, h, u)
        return jnp.sum(found["entropy"] + found["collision"])

    gradient = jax.grad(total, argnums=(0, 1))
    assert str(jax.make_jaxpr(gradient)(hidden, unembedding)).count("dot_general[") == 1
    assert not any(np.any(g) for g in gradient(hidden, unembedding))
    assert token_statistics((), hidden, unembedding) == {}


def test_full_logits_are_never_held():
    hidden = jax.ShapeDtypeStruct((2, 4096, 16), jnp.float32)
    unembedding = jax.ShapeDtypeStruct((5000, 16), jnp.float32)
    target = jax.ShapeDtypeStruct((2, 4096), jnp.int32)

    def loss(h, u, t):
        return jnp.sum(token_logps(h, u, t, chunk=256))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, unembedding, target).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4096 * 5000 * 4 / 8


def test_softmax_is_float32_for_bfloat16_inputs():
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(1, 4, 8)), jnp.bfloat16)
    unembedding = jnp.asarray(rng.normal(size=(11, 8)), jnp.bfloat16)
    target = jnp.zeros((1, 4), jnp.int32)
    got = token_logps(hidden, unembedding, target)
    want = plain(hidden.astype(jnp.float32), unembedding.astype(jnp.float32), target)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_gradients_are_summed_in_float32_over_chunks():
    rng = np.random.default_rng(2)
    hidden = jnp.asarray(rng.normal(size=(1, 2048, 8)), jnp.bfloat16)
    unembedding = jnp.asarray(rng.normal(size=(16, 8)), jnp.bfloat16)
    target = jnp.asarray(rng.integers(0, 16, (1, 2048)))

    def gradient(chunk, dtype):
        def total(u):
            return jnp.sum(token_logps(hidden.astype(dtype), u, target, chunk=chunk))

        return jax.jit(jax.grad(total))(unembedding.astype(jnp.float32))

    exact = gradient(2048, jnp.float32)
    for chunk in (2048, 8):
        error = jnp.linalg.norm(gradient(chunk, jnp.bfloat16) - exact) / jnp.linalg.norm(exact)
        assert error < 0.01, chunk


@pytest.mark.parametrize("chunk", [30, 7])
def test_logits_are_computed_twice_and_no_oftener(chunk):
    """Once forward, once backward; with two products for the gradients."""
    hidden, unembedding = jnp.ones((1, 30, 8)), jnp.ones((37, 8))
    target = jnp.zeros((1, 30), jnp.int32)

    def total(h, u):
        return jnp.sum(token_logps(h, u, target, chunk=chunk))

    jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(hidden, unembedding)
    assert str(jaxpr).count("dot_general[") == 4
