"""Chunked token log-probs against the plain computation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax.models.lm_head import token_logps


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


@pytest.mark.parametrize("chunk", [7, 30])
def test_the_collision_is_that_of_the_whole_softmax(chunk):
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.normal(size=(3, 10, 8)), jnp.float32)
    unembedding = jnp.asarray(4 * rng.normal(size=(1100, 8)), jnp.float32)  # three tiles
    target = jnp.asarray(rng.integers(0, 1100, (3, 10)))

    def loss(h, u, collision):
        found = token_logps(h, u, target, softcap=30.0, chunk=chunk, collision=collision)
        logps, squares = found if collision else (found, 0.0)
        return jnp.sum(logps + squares), found

    slope = jax.grad(loss, argnums=(0, 1), has_aux=True)
    slopes, (logps, squares) = slope(hidden, unembedding, True)
    plain_slopes, plain_logps = slope(hidden, unembedding, False)
    logits = 30.0 * jnp.tanh(hidden @ unembedding.T / 30.0)
    want = jax.nn.logsumexp(2 * jax.nn.log_softmax(logits), axis=-1)
    np.testing.assert_allclose(squares, want, rtol=1e-5, atol=1e-5)
    # It has no gradient, and changes nothing else.
    chex.assert_trees_all_equal((slopes, logps), (plain_slopes, plain_logps))


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


@pytest.mark.parametrize("collision", [False, True])
@pytest.mark.parametrize("chunk", [30, 7])
def test_logits_are_computed_twice_and_no_oftener(chunk, collision):
    """Once forward, once backward; with two products for the gradients."""
    hidden, unembedding = jnp.ones((1, 30, 8)), jnp.ones((37, 8))
    target = jnp.zeros((1, 30), jnp.int32)

    def total(h, u):
        found = token_logps(h, u, target, chunk=chunk, collision=collision)
        return jnp.sum(found[0] * found[1] if collision else found)

    jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(hidden, unembedding)
    assert str(jaxpr).count("dot_general[") == 4
