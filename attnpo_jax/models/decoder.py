"""One decoder for many model types: parameters with their logical axes, and the forward passes.

A row is `[prefix | branch 1 | branch 2]`: two continuations of one beginning that never see each
other (see `RowLayout`). The same forward pass serves policy and reference, and `models.reading` the
judge.

Parameters are a nested dict of arrays; those of the layers are stacked on axis 0 and scanned, so
that compile time does not grow with depth. What else differs from layer to layer, its window or its
kind of rotary positions, is scanned along with them (see `layer_kinds`).

Shapes: B rows, L row length, P length of a shared past, D width, N query heads, K key-value heads,
H head dim, F feed-forward width, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict

from attnpo_jax.models import placement
from attnpo_jax.models.attention.core import Past, RowLayout
from attnpo_jax.models.attention.implementations import RESIDUALS, attend, make_masks
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.models.layer_kinds import layer_kinds, rope_tables
from attnpo_jax.models.layers import PRODUCT, Layers, norm_param, param, rms_norm

__all__ = [
    "Decoder",
    "ModelConfig",
    "Past",
    "Params",
    "abstract_params",
    "as_module",
    "forward",
    "init_params",
    "keys_and_values",
    "logical_axes",
    "make_past",
    "unembedding",
]

Params = dict[str, Any]

REMAT_POLICIES = {
    "none": None,  # every intermediate kept: fastest, most memory
    # Outputs of matmuls kept, and what an attention kernel gives: running it again costs the most.
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT, *RESIDUALS),
    "layer": jax.checkpoint_policies.nothing_saveable,  # only each layer's input kept
}


class Decoder(nnx.Module):
    """Token embedding, layers and final norm; the head's projection is left to `models.lm_head`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        V, D = config.vocab_size, config.hidden_size
        self.config = config
        self.embedding = param((V, D), ("vocab", "embed"), rngs, dtype)
        self.layers = Layers(config, rngs=rngs, dtype=dtype)
        self.final_norm = norm_param((D,), ("norm",), config, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = param((V, D), ("vocab", "embed"), rngs, dtype)

    def attention(self, implementation: str, layout: RowLayout, past: Past | None = None):
        """`(kind, q, k, v, past of the layer) -> attended` on rows of one layout."""
        rule = layer_kinds(self.config).score_rule(self.config)
        past_length = 0 if past is None else past.keys.shape[1]
        masks = make_masks(implementation, layout, rule, past_length)

        def run(kind, q_BLNH, k_BLKH, v_BLKH, past: Past | None = None):
            return attend(
                q_BLNH,
                k_BLKH,
                v_BLKH,
                layout,
                rule=kind.score_rule(self.config),
                past=past,
                implementation=implementation,
                masks=masks,
            )

        return run

    def embed(self, tokens_BL, dtype):
        x_BLD = placement.lookup(self.embedding[...], tokens_BL, dtype)
        scale = self.config.embedding_scale
        # Rounded to the activations' dtype first, as the models were trained.
        return x_BLD if scale is None else x_BLD * jnp.asarray(scale, dtype)

    def final(self, x_BLD):
        c = self.config
        return rms_norm(x_BLD, self.final_norm[...], c.rms_norm_eps, c.norm_style)


def row_layout(
    config: ModelConfig, branch_BL, positions_BL, segment_BL=None, most_segments: int | None = None
) -> RowLayout:
    """The rows' layout, with positions where the model has windows to count in them."""
    positions = None if config.layer_windows is None else positions_BL
    return RowLayout(branch_BL, segment_BL, positions, most_segments)


@functools.lru_cache(maxsize=32)
def _abstract(config: ModelConfig, dtype) -> tuple[nnx.GraphDef, nnx.State]:
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))
    return nnx.split(model)


def as_module(config: ModelConfig, params: Params) -> Decoder:
    """The parameters as a module, to be used while a function is traced."""
    return nnx.merge(_abstract(config, jnp.dtype(jnp.float32))[0], nnx.State(params))


def abstract_params(config: ModelConfig, param_dtype=jnp.float32) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s: nothing is allocated."""
    return nnx.to_pure_dict(_abstract(config, jnp.dtype(param_dtype))[1])


def logical_axes(config: ModelConfig) -> Params:
    """The same tree with, for each parameter, the names of its axes."""
    flat = nnx.to_flat_state(_abstract(config, jnp.dtype(jnp.float32))[1])
    return unflatten_dict({path: variable.get_metadata()["axes"] for path, variable in flat})


def init_params(config: ModelConfig, key: jax.Array, param_dtype=jnp.float32) -> Params:
    """Random parameters: normal with deviation 0.02; norms scale by 1."""
    model = Decoder(config, rngs=nnx.Rngs(params=key), dtype=jnp.dtype(param_dtype))
    return nnx.to_pure_dict(nnx.split(model)[1])


def unembedding(params: Params) -> jax.Array:
    """The (V, D) matrix that turns hidden states into logits."""
    return params.get("lm_head", params["embedding"])


def forward(
    config: ModelConfig,
    params: Params,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    branch_BL: jax.Array,
    *,
    segment_BL: jax.Array | None = None,
    most_segments: int | None = None,
    dtype=jnp.float32,
    remat: str = "none",
    attention: str = "xla",
) -> jax.Array:
    """Hidden states (B, L, D), after the final norm, of rows `[prefix | branch 1 | branch 2]`.

    Args:
      tokens_BL: int32 token ids (B, L).
      positions_BL: int32 positions (B, L); those of a branch continue the prefix's.
      branch_BL: int32 (B, L); 0 padding, 1 prefix, 2 and 3 the branches.
      segment_BL: int32 (B, L), which packed pair a token belongs to; None for one pair a row.
      most_segments: how many packed pairs a row has at most, where that is known.
      dtype: what activations are computed in; norms and softmax stay in float32.
      remat: what the backward pass recomputes, a key of `REMAT_POLICIES`.
    """
    model = as_module(config, params)
    layout = row_layout(config, branch_BL, positions_BL, segment_BL, most_segments)
    x_BLD, _ = _run(model, tokens_BL, positions_BL, layout, dtype, remat, attention)
    return model.final(x_BLD)


def make_past(
    config: ModelConfig,
    params: Params,
    tokens_P: jax.Array,
    *,
    dtype=jnp.float32,
    attention: str = "xla",
) -> Past:
    """Runs tokens that many rows begin with once: their keys and values in every layer."""
    tokens_BL, positions_BL = tokens_P[None], jnp.arange(tokens_P.shape[0])[None]
    layout = row_layout(config, jnp.ones_like(tokens_BL), positions_BL)
    model = as_module(config, params)
    _, kept = _run(model, tokens_BL, positions_BL, layout, dtype, "none", attention, keep=True)
    return jax.tree.map(lambda x: x[:, 0], kept)


def keys_and_values(
    config: ModelConfig,
    params: Params,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    branch_BL: jax.Array,
    *,
    past: Past | None = None,
    dtype=jnp.float32,
    attention: str = "xla",
) -> Past:
    """Keys and values of all rows in every layer: (layers, B, L, K, H).

    Args:
      tokens_BL, positions_BL, branch_BL: as for `forward`, without the tokens of `past`; positions
        are counted from its start.
      past: keys and values of tokens that every row begins with, or None.
    """
    model, layout = as_module(config, params), row_layout(config, branch_BL, positions_BL)
    options = {"past": past, "keep": True}
    return _run(model, tokens_BL, positions_BL, layout, dtype, "none", attention, **options)[1]


def _run(
    model: Decoder,
    tokens_BL,
    positions_BL,
    layout,
    dtype,
    remat: str,
    attention: str,
    past: Past | None = None,
    keep: bool = False,
):
    """All layers' output (B, L, D) and, where asked to `keep` them, the rows' keys and values."""
    ropes = rope_tables(model.config, positions_BL)
    graphdef, stacked = nnx.split(model.layers)
    run_attention = model.attention(attention, layout, past)

    def body(x_BLD, of_layer):
        slice_, kind, layer_past = of_layer
        layer, rope = nnx.merge(graphdef, slice_), kind.rope_of(ropes)
        normed = layer.normed_for_attention(x_BLD)
        q_BLNH, k_BLKH = layer.queries(normed, rope), layer.keys(normed, rope)
        v_BLKH = layer.values(normed)
        if layer_past is not None:
            layer_past = jax.tree.map(lambda p: p.astype(dtype), layer_past)
        attended = run_attention(kind, q_BLNH, k_BLKH, v_BLKH, layer_past)
        kept = Past(k_BLKH, v_BLKH) if keep else None
        return layer.after_attention(x_BLD, attended), kept

    policy = placement.checkpoint_policy(REMAT_POLICIES[remat])
    if policy is not None:
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    scanned = stacked, layer_kinds(model.config), past
    return jax.lax.scan(body, model.embed(tokens_BL, dtype), scanned)
