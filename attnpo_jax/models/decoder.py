"""One decoder for the Llama family: parameters with their logical axes, and the forward passes.

A row is `[prefix | branch 1 | branch 2]`: two continuations of one beginning that never see each
other (see `attention.RowLayout`). The same forward pass serves policy, reference and judge.

Parameters are a nested dict of arrays; those of the layers are stacked on axis 0 and scanned, so
that compile time does not grow with depth.

Shapes: B rows, L row length, P length of a shared past, D width, N query heads, K key-value heads,
H head dim, F feed-forward width, V vocabulary, S source layers, Q read positions.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnpo_jax.models.attention import (
    Past,
    RowLayout,
    attend,
    attention_rows,
    weighted_values,
)
from attnpo_jax.models.config import ModelConfig, RopeScaling

__all__ = [
    "Decoder",
    "ModelConfig",
    "Past",
    "Params",
    "ReadOutput",
    "RopeScaling",
    "abstract_params",
    "forward",
    "init_params",
    "logical_axes",
    "make_past",
    "read",
    "unembedding",
]

Params = dict[str, Any]

REMAT_POLICIES = {
    "none": None,  # every intermediate kept: fastest, most memory
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # matmul outputs kept
    "layer": jax.checkpoint_policies.nothing_saveable,  # only each layer's input kept
}


def _param(shape: tuple[int, ...], axes: tuple[str, ...], rngs: nnx.Rngs, dtype, scale: float):
    """A parameter with named axes: ones for scale 0 (norms), else normal with that deviation."""
    assert len(shape) == len(axes), (shape, axes)
    if scale == 0.0:
        return nnx.Param(jnp.ones(shape, dtype), axes=axes)
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape, dtype), axes=axes)


class Layers(nnx.Module):
    """The transformer layers: every parameter has a leading axis, which the passes scan over."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        c, n = config, config.num_layers
        D, N, K, H, F = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size
        self.config = config

        def p(shape, axes, scale=0.02):
            return _param((n, *shape), ("layer", *axes), rngs, dtype, scale)

        self.attention_norm = p((D,), ("norm",), 0.0)
        self.query = p((D, N, H), ("embed", "heads", "head_dim"))
        self.key = p((D, K, H), ("embed", "kv_heads", "head_dim"))
        self.value = p((D, K, H), ("embed", "kv_heads", "head_dim"))
        self.output = p((N, H, D), ("heads", "head_dim", "embed"))
        self.mlp_norm = p((D,), ("norm",), 0.0)
        self.gate = p((D, F), ("embed", "mlp"))
        self.up = p((D, F), ("embed", "mlp"))
        self.down = p((F, D), ("mlp", "embed"))
        if c.attention_bias:
            self.query_bias = p((N, H), ("heads", "head_dim"))
            self.key_bias = p((K, H), ("kv_heads", "head_dim"))
            self.value_bias = p((K, H), ("kv_heads", "head_dim"))
            self.output_bias = p((D,), ("norm",))
        if c.mlp_bias:
            self.gate_bias = p((F,), ("mlp",))
            self.up_bias = p((F,), ("mlp",))
            self.down_bias = p((D,), ("norm",))

    # The methods below run inside the scan, on a slice that has no layer axis.

    def _weight(self, name: str, dtype):
        return getattr(self, name)[...].astype(dtype)

    def _project(self, x, name: str, spec: str):
        y = jnp.einsum(spec, x, self._weight(name, x.dtype))
        if hasattr(self, f"{name}_bias"):
            y += self._weight(f"{name}_bias", x.dtype)
        return y

    def normed_for_attention(self, x_BLD):
        return rms_norm(x_BLD, self.attention_norm[...], self.config.rms_norm_eps)

    def queries(self, x_BLD, rope):
        return rotate(self._project(x_BLD, "query", "bld,dnh->blnh"), rope)

    def keys(self, x_BLD, rope):
        return rotate(self._project(x_BLD, "key", "bld,dkh->blkh"), rope)

    def values(self, x_BLD):
        return self._project(x_BLD, "value", "bld,dkh->blkh")

    def after_attention(self, residual_BLD, attended_BLNH):
        """Adds the attention's output to the residual stream, then the feed-forward block's."""
        x = residual_BLD + self._project(attended_BLNH, "output", "blnh,nhd->bld")
        normed = rms_norm(x, self.mlp_norm[...], self.config.rms_norm_eps)
        gate = jax.nn.silu(self._project(normed, "gate", "bld,df->blf"))
        up = self._project(normed, "up", "bld,df->blf")
        return x + self._project(gate * up, "down", "blf,fd->bld")


@dataclasses.dataclass(frozen=True)
class ReadOutput:
    """What a reading pass returns.

    Attributes:
      rows_SBQL: float32 attention rows of the source layers, mean over heads; the columns are the
        row's own tokens (a row sums to 1 together with what went to the shared past).
      hidden_BQD: final hidden states at the read positions, or None when not asked for.
    """

    rows_SBQL: jax.Array
    hidden_BQD: jax.Array | None


class Decoder(nnx.Module):
    """Token embedding, layers and final norm; the head's projection is left to `models.head`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        V, D = config.vocab_size, config.hidden_size
        self.config = config
        self.embedding = _param((V, D), ("vocab", "embed"), rngs, dtype, 0.02)
        self.layers = Layers(config, rngs=rngs, dtype=dtype)
        self.final_norm = _param((D,), ("norm",), rngs, dtype, 0.0)
        if not config.tie_word_embeddings:
            self.lm_head = _param((V, D), ("vocab", "embed"), rngs, dtype, 0.02)

    def __call__(self, tokens_BL, positions_BL, layout: RowLayout, *, dtype, remat: str):
        """Final hidden states (B, L, D)."""
        rope = rope_tables(self.config, positions_BL)
        graphdef, stacked = nnx.split(self.layers)

        def body(x_BLD, slice_):
            layer = nnx.merge(graphdef, slice_)
            normed = layer.normed_for_attention(x_BLD)
            attended = attend(
                layer.queries(normed, rope), layer.keys(normed, rope), layer.values(normed), layout
            )
            return layer.after_attention(x_BLD, attended), None

        if remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
        x_BLD, _ = jax.lax.scan(body, self._embed(tokens_BL, dtype), stacked)
        return self._final(x_BLD)

    def read(
        self,
        tokens_BL,
        positions_BL,
        layout: RowLayout,
        read_BQ,
        *,
        sources: tuple[int, ...],
        past: Past | None,
        with_hidden: bool,
        dtype,
    ) -> ReadOutput:
        """Attention rows of the source layers at the read positions; nothing else is kept.

        Layers above the last one needed do not run, and in that one only the read positions go
        past the attention row. Not meant to be differentiated.
        """
        last = self.config.num_layers - 1 if with_hidden else max(sources)
        rope = rope_tables(self.config, positions_BL)
        rope_read = tuple(jnp.take_along_axis(t, read_BQ[:, :, None], axis=1) for t in rope)
        graphdef, stacked = nnx.split(self.layers)

        def layer_at(i):
            # Indexing (rather than scanning over the stack itself) leaves the stack whole in place
            # when only its first layers run.
            slice_ = jax.tree.map(lambda p: p[i], stacked)
            layer_past = None if past is None else jax.tree.map(lambda p: p[i].astype(dtype), past)
            return nnx.merge(graphdef, slice_), layer_past

        def row_of(layer, normed, k_BLKH, layer_past):
            at_read = jnp.take_along_axis(normed, read_BQ[:, :, None], axis=1)
            q_BQNH = layer.queries(at_read, rope_read)
            return attention_rows(q_BQNH, k_BLKH, layout, read_BQ, past=layer_past)

        def mean_over_heads(p_BNQL):
            return jnp.mean(p_BNQL, axis=1)[..., -tokens_BL.shape[1] :]

        def body(x_BLD, i):
            layer, layer_past = layer_at(i)
            normed = layer.normed_for_attention(x_BLD)
            k_BLKH, v_BLKH = layer.keys(normed, rope), layer.values(normed)
            row = mean_over_heads(row_of(layer, normed, k_BLKH, layer_past))
            q_BLNH = layer.queries(normed, rope)
            attended = attend(q_BLNH, k_BLKH, v_BLKH, layout, past=layer_past)
            return layer.after_attention(x_BLD, attended), row

        x_BLD, rows = jax.lax.scan(body, self._embed(tokens_BL, dtype), jnp.arange(last))
        layer, layer_past = layer_at(last)
        normed = layer.normed_for_attention(x_BLD)
        p_BNQL = row_of(layer, normed, layer.keys(normed, rope), layer_past)
        rows = jnp.concatenate([rows, mean_over_heads(p_BNQL)[None]])
        hidden_BQD = None
        if with_hidden:
            attended = weighted_values(p_BNQL, layer.values(normed), past=layer_past)
            residual = jnp.take_along_axis(x_BLD, read_BQ[:, :, None], axis=1)
            hidden_BQD = self._final(layer.after_attention(residual, attended))
        return ReadOutput(rows_SBQL=rows[jnp.asarray(sources)], hidden_BQD=hidden_BQD)

    def make_past(self, tokens_P, *, dtype) -> Past:
        """Keys and values of every layer for tokens that all rows of later passes begin with."""
        tokens_BL = tokens_P[None]
        rope = rope_tables(self.config, jnp.arange(tokens_P.shape[0])[None])
        layout = RowLayout(jnp.ones_like(tokens_BL))
        graphdef, stacked = nnx.split(self.layers)

        def body(x_BLD, slice_):
            layer = nnx.merge(graphdef, slice_)
            normed = layer.normed_for_attention(x_BLD)
            k_BLKH, v_BLKH = layer.keys(normed, rope), layer.values(normed)
            attended = attend(layer.queries(normed, rope), k_BLKH, v_BLKH, layout)
            return layer.after_attention(x_BLD, attended), Past(k_BLKH[0], v_BLKH[0])

        return jax.lax.scan(body, self._embed(tokens_BL, dtype), stacked)[1]

    def _embed(self, tokens_BL, dtype):
        return self.embedding[...][tokens_BL].astype(dtype)

    def _final(self, x_BLD):
        return rms_norm(x_BLD, self.final_norm[...], self.config.rms_norm_eps)


def rms_norm(x, scale_D, eps: float):
    """x / rms(x) * scale over the last axis, computed in float32 (arXiv 1910.07467, eq. 4)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale_D.astype(x.dtype)


def rope_tables(config: ModelConfig, positions_BL) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines (B, L, H/2) of the rotary angles (arXiv 2104.09864), in float32."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling is not None:
        frequency = _llama3_frequencies(frequency, config.rope_scaling)
    angle_BLH = positions_BL[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle_BLH), jnp.sin(angle_BLH)


def _llama3_frequencies(frequency, scaling: RopeScaling):
    """Slows low frequencies by `factor`, keeps high ones, and blends in between (Llama 3.1)."""
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * frequency + (1.0 - keep) * frequency / scaling.factor


def rotate(x_BLNH, rope: tuple[jax.Array, jax.Array]):
    """Rotates the pairs (i, i + H/2) of each head, the layout of Hugging Face checkpoints."""
    cos, sin = (t[:, :, None, :] for t in rope)
    first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLNH.dtype)


# --- Pure functions of (config, params) --------------------------------------------------------


@functools.lru_cache(maxsize=32)
def _abstract(config: ModelConfig, dtype) -> tuple[nnx.GraphDef, nnx.State]:
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))
    return nnx.split(model)


def _decoder(config: ModelConfig, params: Params) -> Decoder:
    return nnx.merge(_abstract(config, jnp.dtype(jnp.float32))[0], nnx.State(params))


def abstract_params(config: ModelConfig, param_dtype=jnp.float32) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s: nothing is allocated."""
    return nnx.to_pure_dict(_abstract(config, jnp.dtype(param_dtype))[1])


def logical_axes(config: ModelConfig) -> Params:
    """The same tree with, for each parameter, the names of its axes."""
    flat = nnx.to_flat_state(_abstract(config, jnp.dtype(jnp.float32))[1])
    tree: Params = {}
    for path, variable in flat:
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = variable.get_metadata()["axes"]
    return tree


def init_params(config: ModelConfig, key: jax.Array, param_dtype=jnp.float32) -> Params:
    """Random parameters: normal with deviation 0.02, norms at 1."""
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
) -> jax.Array:
    """Final hidden states of rows `[prefix | branch 1 | branch 2]`.

    Args:
      config: the model's shape.
      params: the parameter tree, in any floating dtype.
      tokens_BL: int32 token ids (B, L).
      positions_BL: int32 rotary positions (B, L); those of a branch continue the prefix's.
      branch_BL: int32 (B, L); 0 padding, 1 prefix, 2 and 3 the branches.
      segment_BL: int32 (B, L), which packed pair a token belongs to; None for one pair a row.
      dtype: what activations are computed in; norms and softmax stay in float32.
      remat: what the backward pass recomputes, a key of `REMAT_POLICIES`.

    Returns:
      hidden_BLD, after the final norm, in `dtype`.
    """
    layout = RowLayout(branch_BL, segment_BL)
    return _decoder(config, params)(tokens_BL, positions_BL, layout, dtype=dtype, remat=remat)


def read(
    config: ModelConfig,
    params: Params,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    branch_BL: jax.Array,
    read_BQ: jax.Array,
    *,
    sources: tuple[int, ...],
    past: Past | None = None,
    with_hidden: bool = True,
    dtype=jnp.float32,
) -> ReadOutput:
    """Where the tokens at `read_BQ` look, in each source layer: the judge's pass.

    Args:
      config: the model's shape.
      params: the parameter tree.
      tokens_BL: int32 token ids (B, L), without those of `past`.
      positions_BL: int32 rotary positions (B, L), counted from the start of `past`.
      branch_BL: int32 (B, L); 0 padding, 1 prefix, 2 and 3 the branches.
      read_BQ: int32 places in the row (B, Q) whose attention rows are wanted.
      sources: the layers wanted, 0-based.
      past: keys and values of tokens that every row begins with (see `make_past`), or None.
      with_hidden: whether the final hidden states at the read positions are wanted too.
      dtype: what activations are computed in.
    """
    return _decoder(config, params).read(
        tokens_BL,
        positions_BL,
        RowLayout(branch_BL),
        read_BQ,
        sources=sources,
        past=past,
        with_hidden=with_hidden,
        dtype=dtype,
    )


def make_past(config: ModelConfig, params: Params, tokens_P: jax.Array, *, dtype=jnp.float32):
    """Runs tokens that many rows begin with once: their keys and values in every layer."""
    return _decoder(config, params).make_past(tokens_P, dtype=dtype)
