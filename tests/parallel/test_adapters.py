"""Adapters on meshes of eight devices, and with pmap, against one device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from attnpo_jax.models.config import LoraConfig
from attnpo_jax.parallel import backend as backends
from attnpo_jax.parallel.state import create_adapted
from attnpo_jax.train.step import make_eval_step, make_train_step
from tests import tiny

EVERY = ("query", "key", "value", "output", "gate", "up", "down")
POLICY = dataclasses.replace(tiny.MODEL, lora=LoraConfig(3, 6.0, EVERY))
BACKENDS = {
    "fsdp=8": lambda: sharded(1, 8, 1),
    "data=2,fsdp=2,tensor=2": lambda: sharded(2, 2, 2),
    "pmap": lambda: backends.Replicated(POLICY, jax.devices()),
}


def sharded(data, fsdp, tensor):
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    return backends.Sharded(POLICY, sizes, jax.devices())


def two_steps(backend):
    """Metrics of the second step, the adapters after it, and the evaluation's sums, on the host."""
    adam, schedule = tiny.optimizer()
    of = tiny.settings(model=POLICY)
    first = functools.partial(create_adapted, optimizer=adam, model=POLICY, seed=0)
    base = jax.device_put(tiny.params(), base_shardings(backend))
    state = backend.create_state(first, base)
    abstract = backend.abstract_state(jax.eval_shape(first, tiny.params()))
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    step = make_train_step(of, adam, schedule, backend.axis_name)
    train = backend.train_step(step, abstract)
    evaluate = backend.eval_step(make_eval_step(of, backend.axis_name))
    batch = backend.put_batch(tiny.batch())
    for _ in range(2):
        state, metrics = train(state, batch)
    sums = evaluate(state.policy, batch)
    return jax.device_get((metrics, state.params, sums)), state


def base_shardings(backend):
    shardings = backend.parameter_shardings()
    layers = {k: v for k, v in shardings["layers"].items() if "_lora_" not in k}
    return {**shardings, "layers": layers}


@pytest.fixture(scope="module")
def alone():
    return two_steps(backends.one_device(POLICY))[0]


@pytest.mark.parametrize("name", BACKENDS)
def test_training_adapters_is_as_on_one_device(alone, name):
    (metrics, adapters, sums), state = two_steps(BACKENDS[name]())
    for key in ("loss", "grad_norm", "rewards/weighted_margins"):
        np.testing.assert_allclose(metrics[key], alone[0][key], rtol=1e-4, atol=1e-5)
    assert metrics["grad_norm"] > 1e-3
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), adapters, alone[1]
    )
    assert sums["loss"] == pytest.approx(alone[2]["loss"], rel=1e-4)
    # The base is as it was, and where it was.
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.base), tiny.params())
    if name == "fsdp=8":
        held = [x.addressable_shards[0].data.size for x in jax.tree.leaves(state.base["layers"])]
        whole = [x.size for x in jax.tree.leaves(state.base["layers"])]
        assert sum(held) < 0.2 * sum(whole)
