"""Steps that run the reference beside the policy: on meshes of eight devices, and with pmap."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax import config as config_lib
from attnpo_jax import losses
from attnpo_jax.models import decoder
from attnpo_jax.models.divergence import token_divergence
from attnpo_jax.models.io import hf_config
from attnpo_jax.parallel import backend as backends
from attnpo_jax.train.stage import compile_step
from attnpo_jax.train.step import make_eval_step
from tests import tiny

# Of another shape than the policy, as another model may be; with as many tokens.
OTHER = hf_config.read(
    tiny.HF_CONFIG | {"num_hidden_layers": 1, "hidden_size": 32, "tie_word_embeddings": True}
)
BACKENDS = {
    "fsdp=2,tensor=4": lambda: sharded(1, 2, 4),
    "pmap": lambda: backends.Replicated(tiny.MODEL, jax.devices()),
}


def sharded(data, fsdp, tensor):
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    return backends.Sharded(tiny.MODEL, sizes, jax.devices())


def one_step(backend):
    """Metrics of a step, the parameters after it and the evaluation's sums, on the host."""
    config = config_lib.default_config()
    config.optim.learning_rate, config.optim.warmup_ratio = 1e-2, 0.0
    settings = dataclasses.replace(
        tiny.settings(), objective=losses.bind("tdpo", {}), reference=OTHER
    )
    compiled = compile_step(config, settings, backend, total_steps=10)
    params = jax.device_put(tiny.larger(tiny.params(), 3.0), backend.parameter_shardings())
    state = backend.create_state(compiled.first_state, params)
    held = tiny.larger(decoder.init_params(OTHER, jax.random.key(5)), 4.0)
    held = jax.device_put(held, backend.of(OTHER).parameter_shardings())
    state = dataclasses.replace(state, reference=held)
    batch = backend.put_batch(tiny.batch(1, 16, 29))
    evaluate = backend.eval_step(make_eval_step(settings, backend.axis_name), OTHER)
    sums = jax.device_get(evaluate(state.policy, batch, state.reference))
    state, metrics = compiled.run(state, batch)
    if isinstance(backend, backends.Sharded):
        wanted = jax.tree.map(lambda x: x.sharding, compiled.abstract_state)
        assert jax.tree.map(lambda x: x.sharding, state) == wanted
    return jax.device_get((metrics, state.params, sums)), state


@pytest.fixture(scope="module")
def alone():
    return one_step(backends.one_device(tiny.MODEL))[0]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_step_is_as_on_one_device(alone, name):
    (metrics, params, sums), state = one_step(BACKENDS[name]())
    wanted, wanted_params, wanted_sums = alone
    for key in ("loss", "grad_norm", "rewards/weighted_margins"):
        np.testing.assert_allclose(metrics[key], wanted[key], rtol=1e-4, atol=1e-5)
    assert metrics["grad_norm"] > 1e-3
    np.testing.assert_allclose(sums["loss"], wanted_sums["loss"], rtol=1e-5)
    chex.assert_trees_all_close(params, wanted_params, rtol=1e-3, atol=2e-4)
    if name == "fsdp=2,tensor=4":  # the reference is split as its own shape asks
        held = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(state.reference))
        assert held < 0.2 * sum(x.size for x in jax.tree.leaves(state.reference))


def test_divergences_of_an_odd_vocabulary_are_the_same():
    # 163 tokens over 2 x 4 devices: 21 each, the last 5 of them padding.
    rng = np.random.default_rng(0)
    hidden, reference = rng.normal(size=(2, 8, 10, 64)).astype(np.float32)
    unembedding, of_reference = rng.normal(size=(2, 163, 64)).astype(np.float32)

    def loss_and_slopes(hidden, unembedding):
        def loss(hidden, unembedding):
            found = token_divergence(hidden, unembedding, reference, of_reference, chunk=12)
            return jnp.sum(found * jnp.arange(10)), found

        return jax.grad(loss, (0, 1), has_aux=True)(hidden, unembedding)

    expected = jax.jit(loss_and_slopes)(hidden, unembedding)
    with jax.set_mesh(sharded(1, 2, 4).mesh):
        found = jax.jit(loss_and_slopes)(hidden, unembedding)
    found, expected = jax.device_get((found, expected))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-4)
