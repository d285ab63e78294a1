"""Divergences of two models' distributions against the plain computation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax.models import lm_head
from attnpo_jax.models.divergence import token_divergence


def plain(hidden, unembedding, reference, reference_unembedding, softcaps=(None, None)):
    """sum_v rho_v (log rho_v - log pi_v) of the whole logits."""

    def log_softmax(h, u, softcap):
        logits = h @ u.T
        return jax.nn.log_softmax(
            logits if softcap is None else softcap * jnp.tanh(logits / softcap), axis=-1
        )

    pi = log_softmax(hidden, unembedding, softcaps[0])
    rho = jax.lax.stop_gradient(log_softmax(reference, reference_unembedding, softcaps[1]))
    return jnp.sum(jnp.exp(rho) * (rho - pi), axis=-1)


def inputs(words, rows=3, length=10, widths=(8, 5), seed=0):
    rng = np.random.default_rng(seed)
    # Some distributions are all but certain, some all but uniform.
    scale = np.geomspace(0.01, 4, length)[:, None]
    return [
        jnp.asarray(x, jnp.float32)
        for D in widths
        for x in (scale * rng.normal(size=(rows, length, D)), rng.normal(size=(words, D)))
    ]


@pytest.mark.parametrize(
    ("chunk", "softcaps"), [(7, (None, None)), (1024, (3.0, None)), (30, (None, 2.0))]
)
def test_values_and_gradients_equal_the_plain_computation(chunk, softcaps, monkeypatch):
    monkeypatch.setattr(lm_head, "_TILE_LOGITS", 1)  # tiles of 512 words, so three of them
    given = inputs(1037)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(3, 10)), jnp.float32)

    def ours(*given):
        return token_divergence(
            *given, softcap=softcaps[0], reference_softcap=softcaps[1], chunk=chunk
        )

    def value_and_slopes(divergence):
        def total(*given):
            found = divergence(*given)
            return jnp.sum(weight * found), found

        return jax.jit(jax.grad(total, (0, 1, 2, 3), has_aux=True))(*given)

    slopes, found = value_and_slopes(ours)
    wanted_slopes, wanted = value_and_slopes(lambda *given: plain(*given, softcaps))
    assert 0.1 < float(wanted.max()) < 100
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(slopes, wanted_slopes, rtol=1e-4, atol=1e-5)
    assert not np.any(slopes[2]) and not np.any(slopes[3])
    assert np.any(slopes[0]) and np.any(slopes[1])


def test_a_model_has_no_divergence_from_itself():
    hidden, unembedding, _, _ = inputs(700)

    def total(h, u):
        return jnp.sum(token_divergence(h, u, hidden, unembedding, chunk=11))

    value, slopes = jax.jit(jax.value_and_grad(total, (0, 1)))(hidden, unembedding)
    assert abs(value) < 1e-5
    assert max(float(jnp.abs(x).max()) for x in slopes) < 1e-6


def test_full_logits_are_never_held():
    hidden = jax.ShapeDtypeStruct((2, 4096, 16), jnp.float32)
    unembedding = jax.ShapeDtypeStruct((5000, 16), jnp.float32)

    def total(h, u, reference_h, reference_u):
        return jnp.sum(token_divergence(h, u, reference_h, reference_u, chunk=256))

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    compiled = gradient.lower(hidden, unembedding, hidden, unembedding).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4096 * 5000 * 4 / 4


@pytest.mark.parametrize("chunk", [30, 7])
def test_logits_are_computed_twice_and_no_oftener(chunk):
    """Of both models, once forward and once backward; with two products for the gradients."""
    hidden, unembedding = jnp.ones((1, 30, 8)), jnp.ones((37, 8))

    def total(h, u):
        return jnp.sum(token_divergence(h, u, 2 * hidden, unembedding, chunk=chunk))

    jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(hidden, unembedding)
    assert str(jaxpr).count("dot_general[") == 6
