"""The decoder held against transformers in torch, and its rows against separate sequences."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax.models import decoder, reading
from attnpo_jax.models.attention.implementations import BLOCKS
from attnpo_jax.models.config import ModelConfig, RopeScaling
from attnpo_jax.models.io import hf_config

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
VARIANTS = {
    "plain": TINY,
    "tied": dataclasses.replace(TINY, tie_word_embeddings=True),
    "biases": dataclasses.replace(TINY, attention_bias=True, mlp_bias=True),
    "llama3-rope": dataclasses.replace(TINY, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16)),
}


def random_params(config, seed=0, scale=8.0):
    """Weights far from zero, so that attention is far from uniform."""
    params = decoder.init_params(config, jax.random.key(seed))
    return jax.tree.map(lambda p: p * scale if p.std() > 0 else p, params)


def plain_row(tokens):
    tokens = jnp.asarray(tokens)[None]
    return tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens)


def shared_row(prefix, first, second, pad=0):
    p, a, b = len(prefix), len(first), len(second)
    tokens = np.concatenate([prefix, first, second, np.zeros(pad, int)])
    positions = np.concatenate(
        [np.arange(p), p + np.arange(a), p + np.arange(b), np.zeros(pad, int)]
    )
    branch = np.repeat([1, 2, 3, 0], [p, a, b, pad])
    return jnp.asarray(tokens)[None], jnp.asarray(positions)[None], jnp.asarray(branch)[None]


def torch_model(config, params):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope = {
            "rope_type": "llama3",
            "rope_theta": config.rope_theta,
            **dataclasses.asdict(config.rope_scaling),
        }
    hf_config = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=config.tie_word_embeddings,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(hf_config).eval()
    layers = params["layers"]

    def put(parameter, value):
        with torch.no_grad():
            parameter.copy_(torch.tensor(np.asarray(value)).reshape(parameter.shape))

    put(model.model.embed_tokens.weight, params["embedding"])
    put(model.model.norm.weight, params["final_norm"])
    put(model.lm_head.weight, decoder.unembedding(params))
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    mlp = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    D = config.hidden_size
    for i, layer in enumerate(model.model.layers):
        put(layer.input_layernorm.weight, layers["attention_norm"][i])
        put(layer.post_attention_layernorm.weight, layers["mlp_norm"][i])
        for ours, theirs in names.items():
            module = getattr(layer.self_attn, theirs)
            weight = np.asarray(layers[ours][i])
            weight = weight.reshape(-1, D) if ours == "output" else weight.reshape(D, -1)
            put(module.weight, weight.T)
            if config.attention_bias:
                put(module.bias, np.asarray(layers[f"{ours}_bias"][i]).reshape(-1))
        for ours, theirs in mlp.items():
            module = getattr(layer.mlp, theirs)
            put(module.weight, np.asarray(layers[ours][i]).T)
            if config.mlp_bias:
                put(module.bias, layers[f"{ours}_bias"][i])
    return torch, model


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_attention_rows_equal_transformers(name):
    config = VARIANTS[name]
    params = random_params(config)
    torch, model = torch_model(config, params)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 40)
    with torch.no_grad():
        want = model(torch.tensor(tokens[None]), output_attentions=True)
    hidden = decoder.forward(config, params, *plain_row(tokens))
    logits = hidden @ decoder.unembedding(params).T
    np.testing.assert_allclose(logits, want.logits.numpy(), atol=1e-4)
    reads = jnp.array([[39, 7]])
    got = reading.read(config, params, *plain_row(tokens), reads, sources=(0, 1, 2))
    rows = np.stack([a.mean(1).numpy()[:, [39, 7]] for a in want.attentions])
    np.testing.assert_allclose(got.rows_SBQL, rows, atol=1e-5)
    np.testing.assert_allclose(got.hidden_BQD, hidden[:, [39, 7]], atol=1e-4)


def test_a_branch_sees_the_prefix_and_itself_alone():
    params = random_params(TINY)
    rng = np.random.default_rng(1)
    prefix, first, second = (rng.integers(0, 61, n) for n in (5, 4, 6))
    shared = decoder.forward(TINY, params, *shared_row(prefix, first, second, pad=3))[0]
    alone_1 = decoder.forward(TINY, params, *plain_row(np.concatenate([prefix, first])))[0]
    alone_2 = decoder.forward(TINY, params, *plain_row(np.concatenate([prefix, second])))[0]
    np.testing.assert_allclose(shared[:9], alone_1, atol=1e-5)
    np.testing.assert_allclose(shared[9:15], alone_2[5:], atol=1e-5)
    assert np.isfinite(np.asarray(shared)).all()


def test_packed_pairs_do_not_see_each_other():
    params = random_params(TINY)
    rng = np.random.default_rng(2)
    rows = [
        shared_row(*(rng.integers(0, 61, n) for n in sizes)) for sizes in ((4, 3, 2), (3, 5, 4))
    ]
    tokens, positions, branch = (
        jnp.concatenate(parts, axis=1) for parts in zip(*rows, strict=True)
    )
    segment = jnp.asarray(np.repeat([1, 2], [9, 12]))[None]
    packed = decoder.forward(TINY, params, tokens, positions, branch, segment_BL=segment)[0]
    np.testing.assert_allclose(packed[:9], decoder.forward(TINY, params, *rows[0])[0], atol=1e-5)
    np.testing.assert_allclose(packed[9:], decoder.forward(TINY, params, *rows[1])[0], atol=1e-5)


def test_query_blocks_change_nothing():
    from attnpo_jax.models.attention.core import RowLayout, attend

    rng = np.random.default_rng(3)
    q = jnp.asarray(rng.normal(size=(2, 50, 6, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, 50, 2, 8)), jnp.float32) for _ in range(2))
    layout = RowLayout(jnp.asarray(rng.integers(1, 4, (2, 50))))

    def total(block):
        def f(q, k, v):
            return jnp.sum(jnp.sin(attend(q, k, v, layout, block=block)))

        return jax.value_and_grad(f, argnums=(0, 1, 2))(q, k, v)

    chex.assert_trees_all_close(total(16), total(64), atol=1e-5)


def test_past_replaces_a_common_beginning():
    params = random_params(TINY)
    rng = np.random.default_rng(4)
    prefix, first, second = (rng.integers(0, 61, n) for n in (9, 4, 6))
    whole = shared_row(prefix, first, second, pad=2)
    reads = jnp.array([[12, 18]])
    sources = (0, 2, (1, 3), "rollout")
    want = reading.read(TINY, params, *whole, reads, sources=sources)
    past = decoder.make_past(TINY, params, jnp.asarray(prefix[:6]))
    rest = tuple(a[:, 6:] for a in whole)
    # As one CPU reads, row by row.
    options = {"past": past, "attention": BLOCKS}
    got = reading.read(TINY, params, *rest, reads - 6, sources=sources, **options)
    np.testing.assert_allclose(got.rows_SBQL, want.rows_SBQL[..., 6:], atol=1e-5)
    np.testing.assert_allclose(got.hidden_BQD, want.hidden_BQD, atol=1e-4)
    shallow = reading.read(TINY, params, *whole, reads, sources=(1, 0), with_hidden=False)
    full = reading.read(TINY, params, *whole, reads, sources=(1, 0))
    assert shallow.hidden_BQD is None
    np.testing.assert_allclose(shallow.rows_SBQL, full.rows_SBQL, atol=1e-6)


def test_dots_are_kept_and_attention_runs_once():
    params = random_params(TINY)
    row = shared_row([1, 2, 3], [4, 5], [6, 7, 8])

    def products(remat):
        def loss(params):
            hidden = decoder.forward(TINY, params, *row, remat=remat, attention=BLOCKS)
            return jnp.sum(jnp.sin(hidden))

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general[")

    assert products("dots") == products("none") < products("layer")


@pytest.mark.parametrize("remat", ["dots", "layer"])
def test_remat_changes_no_gradient(remat):
    params = random_params(TINY, scale=3.0)
    row = plain_row(np.arange(20))

    def loss(params, remat):
        return jnp.sum(jnp.sin(decoder.forward(TINY, params, *row, remat=remat)))

    want = jax.grad(loss)(params, "none")
    chex.assert_trees_all_close(jax.grad(loss)(params, remat), want, rtol=1e-4, atol=1e-5)


def test_every_parameter_has_logical_axes():
    config = VARIANTS["biases"]
    abstract, axes = decoder.abstract_params(config), decoder.logical_axes(config)
    ranks = jax.tree.map(lambda p: len(p.shape), abstract)
    assert jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple)) == ranks
    assert "lm_head" not in decoder.abstract_params(VARIANTS["tied"])


def test_unsupported_features_are_refused_by_name():
    good = {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    assert hf_config.read(good).head_dim == 4
    with pytest.raises(ValueError, match="model_type 'gpt2'"):
        hf_config.read({**good, "model_type": "gpt2"})
    with pytest.raises(ValueError, match="hidden_act 'gelu'"):
        hf_config.read({**good, "hidden_act": "gelu"})
    with pytest.raises(ValueError, match="rope type 'yarn'"):
        hf_config.read({**good, "rope_scaling": {"rope_type": "yarn"}})
    with pytest.raises(ValueError, match="lacks vocab_size"):
        hf_config.read({k: v for k, v in good.items() if k != "vocab_size"})
