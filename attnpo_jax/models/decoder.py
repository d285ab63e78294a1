"""One decoder for many model types: parameters with their logical axes, and the forward passes.

A row is `[prefix | branch 1 | branch 2]`: two continuations of one beginning that never see each
other (see `RowLayout`). The same forward pass serves policy, reference and judge.

Parameters are a nested dict of arrays; those of the layers are stacked on axis 0 and scanned, so
that compile time does not grow with depth. What else differs from layer to layer, its window or its
kind of rotary positions, is scanned along with them (see `layer_kinds`).

Shapes: B rows, L row length, P length of a shared past, D width, N query heads, K key-value heads,
H head dim, F feed-forward width, V vocabulary, S judge layers, Q read positions.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict

from attnpo_jax.models import placement
from attnpo_jax.models.attention.core import Past, RowLayout, attention_rows, weighted_values
from attnpo_jax.models.attention.implementations import RESIDUALS, attend, make_masks
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.models.layer_kinds import layer_kinds, rope_tables
from attnpo_jax.models.layers import Layers, norm_param, param, rms_norm

__all__ = [
    "Decoder",
    "ModelConfig",
    "Past",
    "Params",
    "ReadOutput",
    "abstract_params",
    "as_module",
    "forward",
    "init_params",
    "keys_and_values",
    "logical_axes",
    "make_past",
    "read",
    "unembedding",
]

Params = dict[str, Any]

REMAT_POLICIES = {
    "none": None,  # every intermediate kept: fastest, most memory
    # Outputs of matmuls kept, and what an attention kernel gives: running it again costs the most.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(*RESIDUALS),
    ),
    "layer": jax.checkpoint_policies.nothing_saveable,  # only each layer's input kept
}


@dataclasses.dataclass(frozen=True)
class ReadOutput:
    """What a reading pass returns."""

    # float32 attention rows of the layers read, mean over heads; the columns are the row's own
    # tokens (a row sums to 1 together with what went to the shared past).
    rows_SBQL: jax.Array
    # Final hidden states at the read positions, or None when not asked for.
    hidden_BQD: jax.Array | None


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


def row_layout(config: ModelConfig, branch_BL, positions_BL, segment_BL=None) -> RowLayout:
    """The rows' layout, with positions where the model has windows to count in them."""
    positions = None if config.layer_windows is None else positions_BL
    return RowLayout(branch_BL, segment_BL, positions)


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
      dtype: what activations are computed in; norms and softmax stay in float32.
      remat: what the backward pass recomputes, a key of `REMAT_POLICIES`.
    """
    model = as_module(config, params)
    layout = row_layout(config, branch_BL, positions_BL, segment_BL)
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


def read(
    config: ModelConfig,
    params: Params,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    branch_BL: jax.Array,
    read_BQ: jax.Array,
    *,
    layers: tuple[int, ...],
    past: Past | None = None,
    with_hidden: bool = True,
    dtype=jnp.float32,
    attention: str = "xla",
) -> ReadOutput:
    """Where the tokens at `read_BQ` look, in each of some layers: the judge's pass.

    Layers above the last one needed do not run, and in that one only the read positions go past
    the attention row. Not meant to be differentiated.

    Args:
      tokens_BL, positions_BL, branch_BL: as for `forward`, without the tokens of `past`; positions
        are counted from its start.
      read_BQ: int32 places in the row (B, Q) whose attention rows are wanted.
      past: keys and values of tokens that every row begins with (see `make_past`), or None.
      with_hidden: whether the final hidden states at the read positions are wanted too.
    """
    model, layout = as_module(config, params), row_layout(config, branch_BL, positions_BL)
    last = config.num_layers - 1 if with_hidden else max(layers)
    ropes = rope_tables(config, positions_BL)
    ropes_read = rope_tables(config, jnp.take_along_axis(positions_BL, read_BQ, axis=1))
    graphdef, stacked = nnx.split(model.layers)
    kinds = layer_kinds(config)
    run_attention = model.attention(attention, layout, past)
    wanted = jnp.asarray([i in layers for i in range(config.num_layers)])

    def enter(x_BLD, i):
        """A layer, its kind and past, and what it first makes of its input: norm and keys."""
        # Indexing (rather than scanning over the stack itself) leaves the stack whole in place
        # when only its first layers run.
        slice_, kind = jax.tree.map(lambda p: p[i], (stacked, kinds))
        layer = nnx.merge(graphdef, slice_)
        layer_past = None if past is None else jax.tree.map(lambda p: p[i].astype(dtype), past)
        normed = layer.normed_for_attention(x_BLD)
        return layer, kind, layer_past, normed, layer.keys(normed, kind.rope_of(ropes))

    def row_of(layer, kind, layer_past, normed, k_BLKH):
        """Attention probabilities (B, N, Q, P + L) of the read positions."""
        at_read = jnp.take_along_axis(normed, read_BQ[:, :, None], axis=1)
        q_BQNH = layer.queries(at_read, kind.rope_of(ropes_read))
        rule = kind.score_rule(config)
        return attention_rows(q_BQNH, k_BLKH, layout, read_BQ, rule=rule, past=layer_past)

    def mean_over_heads(p_BNQL):
        return jnp.mean(p_BNQL, axis=1)[..., -tokens_BL.shape[1] :]

    def body(x_BLD, i):
        layer, kind, layer_past, normed, k_BLKH = entered = enter(x_BLD, i)
        v_BLKH = layer.values(normed)
        row = jax.lax.cond(
            wanted[i],
            lambda: mean_over_heads(row_of(*entered)),
            lambda: jnp.zeros((*read_BQ.shape, tokens_BL.shape[1])),
        )
        q_BLNH = layer.queries(normed, kind.rope_of(ropes))
        attended = run_attention(kind, q_BLNH, k_BLKH, v_BLKH, layer_past)
        return layer.after_attention(x_BLD, attended), row

    x_BLD, rows = jax.lax.scan(body, model.embed(tokens_BL, dtype), jnp.arange(last))
    layer, _, layer_past, normed, _ = entered = enter(x_BLD, last)
    p_BNQL = row_of(*entered)
    rows = jnp.concatenate([rows, mean_over_heads(p_BNQL)[None]])
    hidden_BQD = None
    if with_hidden:
        attended = weighted_values(p_BNQL, layer.values(normed), past=layer_past)
        residual = jnp.take_along_axis(x_BLD, read_BQ[:, :, None], axis=1)
        hidden_BQD = model.final(layer.after_attention(residual, attended))
    return ReadOutput(rows_SBQL=rows[jnp.asarray(layers)], hidden_BQD=hidden_BQD)
