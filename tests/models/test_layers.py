"""Products of the layers: what they are computed in, and what of them is kept."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax.models import decoder, layers
from tests import tiny

SPEC = "bld,dnh->blnh"


def operands(dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    x, weight = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((2, 5, 8), (8, 3, 4)), strict=True)
    )
    return x.astype(dtype), weight.astype(dtype)


def rounded_once(x, y, spec):
    wide = np.einsum(spec, *(np.asarray(a, np.float64) for a in (x, y)))
    return wide.astype(np.float32).astype(x.dtype)


def test_bfloat16_products_and_their_gradients_are_rounded_once():
    x, weight = operands(jnp.bfloat16)
    out, pull = jax.vjp(lambda x, weight: layers.linear(x, weight, SPEC), x, weight)
    d_x, d_weight = pull(jnp.cos(out))
    d_out = np.asarray(jnp.cos(out))
    expected = (
        (out, rounded_once(x, weight, SPEC)),
        (d_x, rounded_once(jnp.cos(out), weight, "blnh,dnh->bld")),
        (d_weight, rounded_once(x, d_out, "bld,blnh->dnh")),
    )
    for found, wanted in expected:
        assert found.dtype == jnp.bfloat16
        difference = np.asarray(found, np.float32) - np.asarray(wanted, np.float32)
        # Where a sum lies between two numbers, the order that it is summed in may tell.
        assert np.abs(difference).max() <= 2**-8 * np.abs(np.asarray(wanted, np.float32)).max()
        assert (difference == 0).mean() > 0.95


@pytest.mark.parametrize(
    ("platform", "result"), [("cpu", "f32"), ("cuda", "bf16"), ("tpu", "bf16")]
)
def test_bfloat16_is_multiplied_as_such(platform, result):
    """On a CPU with a result in float32, without which XLA widens both operands."""
    traced = jax.jit(layers.linear, static_argnums=2).trace(*operands(jnp.bfloat16), SPEC)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    (types,) = re.findall(r"dot_general.* : \((.*)\) -> tensor<(?:\d+x)*(\w+)>", text)
    assert types[0].count("bf16") == 2 and types[1] == result


def gradient_text(dtype, remat):
    model = tiny.MODEL
    params = decoder.init_params(model, jax.random.key(0))
    tokens = jnp.ones((2, 32), jnp.int32)

    def loss(params):
        positions = jnp.broadcast_to(jnp.arange(32), tokens.shape)
        settings = {"dtype": dtype, "remat": remat}
        hidden = decoder.forward(model, params, tokens, positions, tokens, **settings)
        return jnp.sum(jnp.square(hidden.astype(jnp.float32)))

    return model, jax.jit(jax.grad(loss)).lower(params).compile().as_text()


def test_what_is_kept_of_bfloat16_products_is_neither_computed_again_nor_widened():
    (model, kept), (_, wide) = (
        gradient_text(dtype, "dots") for dtype in (jnp.bfloat16, jnp.float32)
    )
    _, again = gradient_text(jnp.bfloat16, "layer")
    # Without attention's, which have a batch.
    products = [len(re.findall(r" dot\((?!.*batch_dims)", text)) for text in (kept, wide, again)]
    assert products[0] == products[1] < products[2]
    stack = rf"\[{model.num_layers},2,32,{model.intermediate_size}\]"
    assert re.search(rf"= u16{stack}", kept) and re.search(rf"= f32{stack}", wide)
    assert not re.search(rf"= (bf16|f32){stack}", kept)
