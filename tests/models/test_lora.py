import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax import config as config_lib
from attnpo_jax.models import decoder, lora
from attnpo_jax.models.config import LoraConfig, ModelConfig
from attnpo_jax.runtime.errors import UserError

BASE = ModelConfig(
    vocab_size=23, hidden_size=10, intermediate_size=14, num_layers=3, num_heads=3,
    num_kv_heads=1, head_dim=4, attention_bias=True, mlp_bias=True, qk_norm="head",
)  # fmt: skip
EVERY = ("query", "key", "value", "output", "gate", "up", "down")
POLICY = dataclasses.replace(BASE, lora=LoraConfig(2, 6.0, EVERY))


def section(**changes):
    lora_section = config_lib.default_config().lora
    for name, value in changes.items():
        lora_section[name] = value
    return lora_section


def random_adapters(policy=POLICY, scale=0.3):
    """Adapters whose second halves are not 0."""
    abstract = lora.abstract_adapters(policy)
    leaves, tree = jax.tree.flatten(abstract)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        tree, [jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype) for leaf in leaves]
    )


def hidden(model, params):
    tokens = np.arange(12)[None] % 23
    positions, branch = np.arange(12)[None], np.ones((1, 12), np.int32)
    return jax.jit(decoder.forward, static_argnums=0)(model, params, tokens, positions, branch)


@pytest.fixture(scope="module")
def base():
    params = decoder.init_params(BASE, jax.random.key(1))
    # Biases and weights far from 0, so that a change of any of them shows.
    return jax.tree.map(lambda x: x if np.ptp(x) == 0 else 10 * x, params)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("all", EVERY),
        ("attention", ("query", "key", "value", "output")),
        ("mlp", ("gate", "up", "down")),
        ("v_proj", ("value",)),
        (("down_proj", "q_proj"), ("query", "down")),
        (["q_proj"], ("query",)),
    ],
)
def test_a_config_names_projections_as_hugging_face_does(targets, names):
    policy = lora.adapted(BASE, section(rank=4, alpha=8.0, targets=targets))
    assert policy.lora == LoraConfig(4, 8.0, names)
    factors = {f"{name}_lora_{f}" for name in names for f in "ab"}
    assert lora.abstract_adapters(policy)["layers"].keys() == factors


def test_rank_0_is_the_model_itself():
    assert lora.adapted(BASE, section(rank=0)) is BASE


def test_a_rank_above_the_width_is_refused():
    assert lora.adapted(BASE, section(rank=BASE.hidden_size)).lora.rank == BASE.hidden_size
    with pytest.raises(UserError, match=f"lora.rank = 1000000: accepted: 0 to {BASE.hidden_size},"):
        lora.adapted(BASE, section(rank=1000000))


def test_shapes_axes_and_dtype_of_the_factors():
    adapters = decoder.abstract_params(POLICY, jnp.bfloat16)["layers"]
    axes = decoder.logical_axes(POLICY)["layers"]
    expected = {
        "query_lora_a": ((3, 10, 2), ("layer", "embed", "rank")),
        "query_lora_b": ((3, 2, 3, 4), ("layer", "rank", "heads", "head_dim")),
        "value_lora_b": ((3, 2, 1, 4), ("layer", "rank", "kv_heads", "head_dim")),
        "output_lora_a": ((3, 3, 4, 2), ("layer", "heads", "head_dim", "rank")),
        "output_lora_b": ((3, 2, 10), ("layer", "rank", "embed")),
        "down_lora_a": ((3, 14, 2), ("layer", "mlp", "rank")),
    }
    for name, (shape, named) in expected.items():
        assert (adapters[name].shape, axes[name]) == (shape, named), name
        assert adapters[name].dtype == jnp.float32
    assert adapters["query"].dtype == jnp.bfloat16


def test_the_rest_of_the_tree_is_the_base_s():
    rest = decoder.abstract_params(POLICY)
    rest["layers"] = {k: v for k, v in rest["layers"].items() if "_lora_" not in k}
    assert rest == decoder.abstract_params(BASE)


def test_fresh_adapters_change_nothing(base):
    fresh = lora.init_adapters(POLICY, jax.random.key(0))
    got = hidden(POLICY, lora.join(base, fresh))
    np.testing.assert_array_equal(got, hidden(BASE, base))
    assert not any(np.any(v) for k, v in fresh["layers"].items() if k.endswith("_b"))
    # Uniform within 1/sqrt(inputs): 10 for the query, 3 heads of 4 for the output.
    for name, inputs in (("query_lora_a", 10), ("output_lora_a", 12), ("down_lora_a", 14)):
        largest = np.abs(fresh["layers"][name]).max()
        assert 0.8 * inputs**-0.5 < largest <= inputs**-0.5
    assert np.any(fresh["layers"]["gate_lora_a"] != fresh["layers"]["up_lora_a"])


def test_an_adapter_adds_its_product_to_the_weight_by_hand(base):
    adapters = random_adapters()
    merged = lora.merge(POLICY, base, adapters)
    a, b = (np.asarray(adapters["layers"][f"output_lora_{f}"]) for f in "ab")
    # alpha / rank is 3.
    expected = base["layers"]["output"] + 3 * np.einsum("lnhr,lrd->lnhd", a, b)
    np.testing.assert_allclose(merged["layers"]["output"], expected, rtol=1e-5, atol=1e-5)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    np.testing.assert_array_equal(merged["layers"]["query_bias"], base["layers"]["query_bias"])


@pytest.mark.parametrize("target", EVERY)
def test_the_merged_model_is_the_adapted_one(base, target):
    policy = dataclasses.replace(BASE, lora=LoraConfig(2, 6.0, (target,)))
    adapters = random_adapters(policy)
    adapted = hidden(policy, lora.join(base, adapters))
    merged = hidden(BASE, lora.merge(policy, base, adapters))
    assert np.abs(adapted - hidden(BASE, base)).max() > 1e-2
    np.testing.assert_allclose(adapted, merged, atol=2e-5)


def test_a_merged_weight_keeps_its_dtype():
    base = decoder.init_params(BASE, jax.random.key(1), jnp.bfloat16)
    merged = lora.merge(POLICY, base, random_adapters())
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
