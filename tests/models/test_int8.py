import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax.models import decoder, int8
from attnpo_jax.models.io import hf_folder
from attnpo_jax.parallel import backend as backends
from tests import tiny

PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("int8"))


@pytest.fixture(scope="module")
def model(folder):
    return hf_folder.load_config(folder)


def test_a_channel_s_largest_weight_becomes_127_by_hand():
    weight = jnp.array([[[1.0, -0.5], [-4.0, 0.25], [0.02, 0.0]]])  # one layer, (D, F) = (3, 2)
    values, scale = int8.quantize("layers/up", weight)
    assert values.dtype == jnp.int8 and scale.dtype == jnp.float32
    np.testing.assert_allclose(scale, [[4 / 127, 0.5 / 127]], rtol=1e-6)
    # 1 is 31.75 of the first channel's scales, 0.02 is 0.6; 0.25 is 63.5 of the second's.
    np.testing.assert_array_equal(values, [[[32, -127], [-127, 64], [1, 0]]])


def test_the_output_projection_has_a_scale_for_each_of_the_model_s_channels():
    weight = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))  # layers, N, H, D
    values, scale = int8.quantize("layers/output", weight)
    assert values.shape == weight.shape and scale.shape == (2, 5)
    np.testing.assert_array_equal(np.abs(values).max((1, 2)), 127)
    error = np.abs(values * scale[:, None, None] - weight).max((1, 2))
    assert (error <= scale * 0.5001).all()


def test_a_channel_of_zeros_stays_zero():
    values, scale = int8.quantize("layers/down", jnp.zeros((1, 2, 2), jnp.bfloat16))
    assert not values.any() and np.isfinite(scale).all()


def test_loaded_projections_are_int8_and_all_else_is_as_it_was(folder, model):
    whole = hf_folder.load_params(folder, model)
    params = hf_folder.load_params(folder, int8.quantized(model))
    abstract = decoder.abstract_params(int8.quantized(model))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )
    for name in PROJECTIONS:
        values, scale = int8.quantize(f"layers/{name}", whole["layers"].pop(name))
        np.testing.assert_array_equal(params["layers"].pop(name), values)
        np.testing.assert_array_equal(params["layers"].pop(f"{name}_scale"), scale)
    jax.tree.map(np.testing.assert_array_equal, params, whole)


def hidden(model, params, dtype=jnp.float32):
    tokens = np.arange(24)[None] % model.vocab_size
    forward = jax.jit(decoder.forward, static_argnums=0, static_argnames="dtype")
    row = np.arange(24)[None], np.ones((1, 24), np.int32)
    return np.asarray(forward(model, params, tokens, *row, dtype=dtype), np.float32)


def test_the_forward_pass_is_that_of_the_dequantized_weights(folder, model):
    params = hf_folder.load_params(folder, int8.quantized(model))
    whole = hf_folder.load_params(folder, model)
    layers = dict(whole["layers"])
    for name in PROJECTIONS:
        axes = (1, 2) if name == "output" else (1,)
        scale = np.expand_dims(params["layers"][f"{name}_scale"], axes)
        layers[name] = np.asarray(params["layers"][name], np.float32) * scale
    got = hidden(int8.quantized(model), params)
    np.testing.assert_allclose(got, hidden(model, {**whole, "layers": layers}), atol=1e-4)
    # It is another model than the one in full, but not by much.
    change = np.abs(got - hidden(model, whole))
    assert 1e-4 < change.mean() < 0.1


def test_biases_are_added_after_the_scales():
    model = dataclasses.replace(tiny.MODEL, attention_bias=True, mlp_bias=True)
    whole = decoder.init_params(model, jax.random.key(3))
    layers = dict(whole["layers"])
    for name in PROJECTIONS:
        layers[name], layers[f"{name}_scale"] = int8.quantize(f"layers/{name}", layers[name])
    got = hidden(int8.quantized(model), {**whole, "layers": layers})
    np.testing.assert_allclose(got, hidden(model, whole), atol=0.05)
    without = {k: np.zeros_like(v) if k.endswith("_bias") else v for k, v in layers.items()}
    changed = hidden(int8.quantized(model), {**whole, "layers": without})
    assert np.abs(changed - got).max() > 0.2


def test_a_mesh_holds_the_same_values(folder, model):
    one = hf_folder.load_params(folder, int8.quantized(model))
    sizes = {"data": 1, "fsdp": 4, "tensor": 2}
    backend = backends.Sharded(int8.quantized(model), sizes, jax.devices())
    shardings = backend.parameter_shardings()
    split = hf_folder.load_params(folder, int8.quantized(model), shardings=shardings)
    assert jax.tree.map(lambda x: x.sharding, split) == shardings
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(split), jax.device_get(one))
    with jax.set_mesh(backend.mesh):
        tokens = np.arange(192).reshape(8, 24) % model.vocab_size
        rows = np.tile(np.arange(24), (8, 1)), np.ones((8, 24), np.int32)
        forward = functools.partial(decoder.forward, int8.quantized(model))
        got = jax.jit(forward)(split, tokens, *rows)
    expected = jax.jit(forward)(one, tokens, *rows)
    np.testing.assert_allclose(jax.device_get(got), jax.device_get(expected), atol=1e-4)
