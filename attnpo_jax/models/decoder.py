"""One decoder for many model types: parameters with their logical axes, and the forward passes.

A row is `[prefix | branch 1 | branch 2]`: two continuations of one beginning that never see each
other (see `RowLayout`). The same forward pass serves policy, reference and judge.

Parameters are a nested dict of arrays; those of the layers are stacked on axis 0 and scanned, so
that compile time does not grow with depth. What differs from layer to layer beside them (a sliding
window, the kind of rotary positions) is scanned along, where anything does (see `layer_kinds`).

Shapes: B rows, L row length, P length of a shared past, D width, N query heads, K key-value heads,
H head dim, F feed-forward width, V vocabulary, S source layers, Q read positions.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnpo_jax.models import placement
from attnpo_jax.models.attention.core import Past, RowLayout, attention_rows, weighted_values
from attnpo_jax.models.attention.implementations import RESIDUALS, attend, make_masks
from attnpo_jax.models.config import PROJECTIONS, LinearRopeScaling, ModelConfig, RopeScaling
from attnpo_jax.models.layer_kinds import layer_kinds, rope_tables, rotate

__all__ = [
    "Decoder",
    "LinearRopeScaling",
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
    # Outputs of matmuls kept, and what an attention kernel gives: running it again costs the most.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(*RESIDUALS),
    ),
    "layer": jax.checkpoint_policies.nothing_saveable,  # only each layer's input kept
}

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def _param(shape: tuple[int, ...], axes: tuple[str, ...], rngs: nnx.Rngs, dtype):
    """A parameter with named axes: normal with deviation 0.02."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype), axes=axes)


def _norm_param(shape: tuple[int, ...], axes: tuple[str, ...], config: ModelConfig, dtype):
    """A norm's weight with named axes, such that the norm scales by 1."""
    neutral = 0.0 if config.norm_style == "gemma" else 1.0
    return nnx.Param(jnp.full(shape, neutral, dtype), axes=axes)


class Layers(nnx.Module):
    """The transformer layers: every parameter has a leading axis, which the passes scan over."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        c, n = config, config.num_layers
        D, N, K, H, F = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size
        self.config = config

        def p(shape, axes):
            return _param((n, *shape), ("layer", *axes), rngs, dtype)

        def norm(shape=(D,), axes=("norm",)):
            return _norm_param((n, *shape), ("layer", *axes), c, dtype)

        if c.pre_norms:
            self.attention_norm = norm()
            self.mlp_norm = norm()
        if c.post_norms:
            self.attention_post_norm = norm()
            self.mlp_post_norm = norm()
        self.query = p((D, N, H), ("embed", "heads", "head_dim"))
        self.key = p((D, K, H), ("embed", "kv_heads", "head_dim"))
        self.value = p((D, K, H), ("embed", "kv_heads", "head_dim"))
        self.output = p((N, H, D), ("heads", "head_dim", "embed"))
        if c.qk_norm == "head":
            self.query_norm = norm((H,), ("norm",))
            self.key_norm = norm((H,), ("norm",))
        elif c.qk_norm == "projection":
            self.query_norm = norm((N, H), ("heads", "head_dim"))
            self.key_norm = norm((K, H), ("kv_heads", "head_dim"))
        self.gate = p((D, F), ("embed", "mlp"))
        self.up = p((D, F), ("embed", "mlp"))
        self.down = p((F, D), ("mlp", "embed"))
        if c.attention_bias or c.qkv_bias:
            self.query_bias = p((N, H), ("heads", "head_dim"))
            self.key_bias = p((K, H), ("kv_heads", "head_dim"))
            self.value_bias = p((K, H), ("kv_heads", "head_dim"))
        if c.attention_bias:
            self.output_bias = p((D,), ("norm",))
        if c.mlp_bias:
            self.gate_bias = p((F,), ("mlp",))
            self.up_bias = p((F,), ("mlp",))
            self.down_bias = p((D,), ("norm",))
        for name in PROJECTIONS.values() if c.int8 else ():
            self._make_int8(name)
        for name in () if c.lora is None else c.lora.targets:
            self._add_adapter(name, c.lora.rank, rngs)

    def _make_int8(self, name: str) -> None:
        """A projection's weight as whole numbers, to be loaded, and a scale for each channel."""
        weight = getattr(self, name)
        (n, *shape), (layer, *axes) = weight.shape, weight.get_metadata()["axes"]
        i = num_inputs(name)
        setattr(self, name, nnx.Param(jnp.zeros((n, *shape), jnp.int8), axes=(layer, *axes)))
        scale = nnx.Param(jnp.ones((n, *shape[i:]), jnp.float32), axes=(layer, *axes[i:]))
        setattr(self, f"{name}_scale", scale)

    def _add_adapter(self, name: str, rank: int, rngs: nnx.Rngs) -> None:
        """The two factors beside a projection's weight; float32, since they are what is trained."""
        weight = getattr(self, name)
        (n, *shape), (layer, *axes) = weight.shape, weight.get_metadata()["axes"]
        i = num_inputs(name)
        a = (n, *shape[:i], rank), (layer, *axes[:i], "rank")
        b = (n, rank, *shape[i:]), (layer, "rank", *axes[i:])
        setattr(self, f"{name}_lora_a", _param(*a, rngs, jnp.float32))
        setattr(self, f"{name}_lora_b", _param(*b, rngs, jnp.float32))

    # The methods below run inside the scan, on a slice that has no layer axis.

    def _weight(self, name: str, dtype):
        parameter = getattr(self, name)
        value, axes = parameter[...], parameter.get_metadata()["axes"][1:]
        if value.dtype == jnp.int8:
            return placement.gather(value, axes).astype(dtype)
        return placement.gather(value.astype(dtype), axes)

    def _project(self, x, name: str, spec: str):
        if self.config.int8:
            sums = jnp.einsum(
                spec, x, self._weight(name, x.dtype), preferred_element_type=jnp.float32
            )
            y = (sums * self._weight(f"{name}_scale", jnp.float32)).astype(x.dtype)
        else:
            y = linear(x, self._weight(name, x.dtype), spec)
        if hasattr(self, f"{name}_bias"):
            y += self._weight(f"{name}_bias", x.dtype)
        if hasattr(self, f"{name}_lora_a"):
            y += self._adapted(x, name, spec)
        return y

    def _adapted(self, x, name: str, spec: str):
        """What a projection's adapter adds: (alpha / rank) x A B."""
        operands, out = spec.split("->")
        of_x, of_weight = operands.split(",")
        inputs = "".join(axis for axis in of_weight if axis not in out)
        outputs = "".join(axis for axis in of_weight if axis in out)
        a, b = (self._weight(f"{name}_lora_{factor}", x.dtype) for factor in "ab")
        x_BLR = jnp.einsum(f"{of_x},{inputs}r->blr", x, a)
        lora = self.config.lora
        return (lora.alpha / lora.rank) * jnp.einsum(f"blr,r{outputs}->{out}", x_BLR, b)

    def _norm(self, x, name: str):
        """The named norm of x; x itself where the model has no such norm."""
        if not hasattr(self, name):
            return x
        c = self.config
        return rms_norm(x, getattr(self, name)[...], c.rms_norm_eps, c.norm_style)

    def normed_for_attention(self, x_BLD):
        return self._norm(x_BLD, "attention_norm")

    def queries(self, x_BLD, rope):
        q_BLNH = self._project(x_BLD, "query", "bld,dnh->blnh")
        return rotate(self._norm(q_BLNH, "query_norm"), rope)

    def keys(self, x_BLD, rope):
        k_BLKH = self._project(x_BLD, "key", "bld,dkh->blkh")
        return rotate(self._norm(k_BLKH, "key_norm"), rope)

    def values(self, x_BLD):
        return self._project(x_BLD, "value", "bld,dkh->blkh")

    def after_attention(self, residual_BLD, attended_BLNH):
        """Adds the attention's output to the residual stream, then the feed-forward block's."""
        attended = self._project(attended_BLNH, "output", "blnh,nhd->bld")
        x = residual_BLD + self._norm(attended, "attention_post_norm")
        normed = self._norm(x, "mlp_norm")
        gate = ACTIVATIONS[self.config.activation](self._project(normed, "gate", "bld,df->blf"))
        up = self._project(normed, "up", "bld,df->blf")
        down = self._project(gate * up, "down", "blf,fd->bld")
        return placement.by_rows(x + self._norm(down, "mlp_post_norm"))


def num_inputs(name: str) -> int:
    """How many of a projection's axes, its first ones, are those of its input."""
    return 2 if name == "output" else 1


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
        self.embedding = _param((V, D), ("vocab", "embed"), rngs, dtype)
        self.layers = Layers(config, rngs=rngs, dtype=dtype)
        self.final_norm = _norm_param((D,), ("norm",), config, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = _param((V, D), ("vocab", "embed"), rngs, dtype)

    def __call__(
        self, tokens_BL, positions_BL, layout: RowLayout, *, dtype, remat: str, attention: str
    ):
        """Final hidden states (B, L, D)."""
        ropes = rope_tables(self.config, positions_BL)
        graphdef, stacked = nnx.split(self.layers)
        run_attention = self._attention(attention, layout)

        def body(x_BLD, slice_and_kind):
            slice_, kind = slice_and_kind
            layer, rope = nnx.merge(graphdef, slice_), kind.rope_of(ropes)
            normed = layer.normed_for_attention(x_BLD)
            q_BLNH, k_BLKH = layer.queries(normed, rope), layer.keys(normed, rope)
            attended = run_attention(kind, q_BLNH, k_BLKH, layer.values(normed))
            return layer.after_attention(x_BLD, attended), None

        policy = placement.checkpoint_policy(REMAT_POLICIES[remat])
        if policy is not None:
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        layers = stacked, layer_kinds(self.config)
        x_BLD, _ = jax.lax.scan(body, self._embed(tokens_BL, dtype), layers)
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
        attention: str,
    ) -> ReadOutput:
        """Attention rows of the source layers at the read positions; nothing else is kept.

        Layers above the last one needed do not run, and in that one only the read positions go
        past the attention row. Not meant to be differentiated.
        """
        last = self.config.num_layers - 1 if with_hidden else max(sources)
        positions_BQ = jnp.take_along_axis(positions_BL, read_BQ, axis=1)
        ropes = rope_tables(self.config, positions_BL)
        ropes_read = rope_tables(self.config, positions_BQ)
        graphdef, stacked = nnx.split(self.layers)
        kinds = layer_kinds(self.config)
        run_attention = self._attention(attention, layout, past)
        wanted = jnp.asarray([i in sources for i in range(self.config.num_layers)])

        def layer_at(i):
            # Indexing (rather than scanning over the stack itself) leaves the stack whole in place
            # when only its first layers run.
            slice_, kind = jax.tree.map(lambda p: p[i], (stacked, kinds))
            layer_past = None if past is None else jax.tree.map(lambda p: p[i].astype(dtype), past)
            return nnx.merge(graphdef, slice_), kind, layer_past

        def row_of(layer, kind, normed, k_BLKH, layer_past):
            """Attention probabilities (B, N, Q, P + L) of the read positions."""
            at_read = jnp.take_along_axis(normed, read_BQ[:, :, None], axis=1)
            q_BQNH = layer.queries(at_read, kind.rope_of(ropes_read))
            rule = kind.score_rule(self.config)
            return attention_rows(q_BQNH, k_BLKH, layout, read_BQ, rule=rule, past=layer_past)

        def mean_over_heads(p_BNQL):
            return jnp.mean(p_BNQL, axis=1)[..., -tokens_BL.shape[1] :]

        def body(x_BLD, i):
            layer, kind, layer_past = layer_at(i)
            rope = kind.rope_of(ropes)
            normed = layer.normed_for_attention(x_BLD)
            k_BLKH, v_BLKH = layer.keys(normed, rope), layer.values(normed)
            row = jax.lax.cond(
                wanted[i],
                lambda: mean_over_heads(row_of(layer, kind, normed, k_BLKH, layer_past)),
                lambda: jnp.zeros((*read_BQ.shape, tokens_BL.shape[1])),
            )
            q_BLNH = layer.queries(normed, rope)
            attended = run_attention(kind, q_BLNH, k_BLKH, v_BLKH, layer_past)
            return layer.after_attention(x_BLD, attended), row

        x_BLD, rows = jax.lax.scan(body, self._embed(tokens_BL, dtype), jnp.arange(last))
        layer, kind, layer_past = layer_at(last)
        normed = layer.normed_for_attention(x_BLD)
        k_BLKH = layer.keys(normed, kind.rope_of(ropes))
        p_BNQL = row_of(layer, kind, normed, k_BLKH, layer_past)
        rows = jnp.concatenate([rows, mean_over_heads(p_BNQL)[None]])
        hidden_BQD = None
        if with_hidden:
            attended = weighted_values(p_BNQL, layer.values(normed), past=layer_past)
            residual = jnp.take_along_axis(x_BLD, read_BQ[:, :, None], axis=1)
            hidden_BQD = self._final(layer.after_attention(residual, attended))
        return ReadOutput(rows_SBQL=rows[jnp.asarray(sources)], hidden_BQD=hidden_BQD)

    def make_past(self, tokens_P, *, dtype, attention: str) -> Past:
        """Keys and values of every layer for tokens that all rows of later passes begin with."""
        tokens_BL = tokens_P[None]
        positions_BL = jnp.arange(tokens_P.shape[0])[None]
        ropes = rope_tables(self.config, positions_BL)
        layout = row_layout(self.config, jnp.ones_like(tokens_BL), positions_BL)
        graphdef, stacked = nnx.split(self.layers)
        run_attention = self._attention(attention, layout)

        def body(x_BLD, slice_and_kind):
            slice_, kind = slice_and_kind
            layer, rope = nnx.merge(graphdef, slice_), kind.rope_of(ropes)
            normed = layer.normed_for_attention(x_BLD)
            k_BLKH, v_BLKH = layer.keys(normed, rope), layer.values(normed)
            attended = run_attention(kind, layer.queries(normed, rope), k_BLKH, v_BLKH)
            return layer.after_attention(x_BLD, attended), Past(k_BLKH[0], v_BLKH[0])

        layers = stacked, layer_kinds(self.config)
        return jax.lax.scan(body, self._embed(tokens_BL, dtype), layers)[1]

    def _attention(self, implementation: str, layout: RowLayout, past: Past | None = None):
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

    def _embed(self, tokens_BL, dtype):
        x_BLD = placement.lookup(self.embedding[...], tokens_BL, dtype)
        scale = self.config.embedding_scale
        # Rounded to the activations' dtype first, as the models were trained.
        return x_BLD if scale is None else x_BLD * jnp.asarray(scale, dtype)

    def _final(self, x_BLD):
        c = self.config
        return rms_norm(x_BLD, self.final_norm[...], c.rms_norm_eps, c.norm_style)


def row_layout(config: ModelConfig, branch_BL, positions_BL, segment_BL=None) -> RowLayout:
    """The rows' layout, with positions where the model has windows to count in them."""
    positions = None if config.layer_windows is None else positions_BL
    return RowLayout(branch_BL, segment_BL, positions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, weight: jax.Array, spec: str) -> jax.Array:
    """`einsum(spec, x, weight)` with the weight's gradient computed as it lies in memory.

    A compiler has to transpose one of the operands that are summed over tokens, and takes the first
    for it: on a CPU a quarter of the feed-forward block's time, if that is the larger one.
    """
    return jnp.einsum(spec, x, weight)


def _linear_forward(x, weight, spec):
    # Not through `linear`: a rematerialisation policy sees the product itself only.
    return jnp.einsum(spec, x, weight), (x, weight)


def _linear_backward(spec, residuals, d_out):
    x, weight = residuals
    factors, out = spec.split("->")
    of_x, of_weight = factors.split(",")
    d_x = jnp.einsum(f"{out},{of_weight}->{of_x}", d_out, weight)

    def as_it_lies(x, d_out):
        return jnp.einsum(f"{of_x},{out}->{of_weight}", x, d_out)

    def turned(x, d_out):
        axes = "".join(sorted(of_weight, key=lambda axis: axis in of_x))
        product = jnp.einsum(f"{out},{of_x}->{axes}", d_out, x)
        # Without the barrier, XLA exchanges the factors to save turning the product.
        return jnp.einsum(f"{axes}->{of_weight}", jax.lax.optimization_barrier(product))

    on_cpu = turned if x.size > d_out.size else as_it_lies
    return d_x, jax.lax.platform_dependent(x, d_out, cpu=on_cpu, default=as_it_lies)


linear.defvjp(_linear_forward, _linear_backward)


def rms_norm(x, weight, eps: float, style: str = "llama"):
    """x / rms(x) * weight over the axes of `weight`, in float32 (arXiv 1910.07467, eq. 4).

    `style` is `ModelConfig.norm_style`.
    """
    x32 = x.astype(jnp.float32)
    axes = tuple(range(-weight.ndim, 0))
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=axes, keepdims=True) + eps)
    if style == "llama":
        return normed.astype(x.dtype) * weight.astype(x.dtype)
    weight = weight.astype(jnp.float32)
    return (normed * (1.0 + weight if style == "gemma" else weight)).astype(x.dtype)


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
    """Final hidden states of rows `[prefix | branch 1 | branch 2]`.

    Args:
      config: the model's shape.
      params: the parameter tree, in any floating dtype.
      tokens_BL: int32 token ids (B, L).
      positions_BL: int32 positions (B, L); those of a branch continue the prefix's.
      branch_BL: int32 (B, L); 0 padding, 1 prefix, 2 and 3 the branches.
      segment_BL: int32 (B, L), which packed pair a token belongs to; None for one pair a row.
      dtype: what activations are computed in; norms and softmax stay in float32.
      remat: what the backward pass recomputes, a key of `REMAT_POLICIES`.
      attention: what computes attention, one of `IMPLEMENTATIONS`.

    Returns:
      hidden_BLD, after the final norm, in `dtype`.
    """
    layout = row_layout(config, branch_BL, positions_BL, segment_BL)
    return _decoder(config, params)(
        tokens_BL, positions_BL, layout, dtype=dtype, remat=remat, attention=attention
    )


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
    attention: str = "xla",
) -> ReadOutput:
    """Where the tokens at `read_BQ` look, in each source layer: the judge's pass.

    Args:
      config: the model's shape.
      params: the parameter tree.
      tokens_BL: int32 token ids (B, L), without those of `past`.
      positions_BL: int32 positions (B, L), counted from the start of `past`.
      branch_BL: int32 (B, L); 0 padding, 1 prefix, 2 and 3 the branches.
      read_BQ: int32 places in the row (B, Q) whose attention rows are wanted.
      sources: the layers wanted, 0-based.
      past: keys and values of tokens that every row begins with (see `make_past`), or None.
      with_hidden: whether the final hidden states at the read positions are wanted too.
      dtype: what activations are computed in.
      attention: what computes attention but for the rows that are read, as for `forward`.
    """
    return _decoder(config, params).read(
        tokens_BL,
        positions_BL,
        row_layout(config, branch_BL, positions_BL),
        read_BQ,
        sources=sources,
        past=past,
        with_hidden=with_hidden,
        dtype=dtype,
        attention=attention,
    )


def make_past(
    config: ModelConfig,
    params: Params,
    tokens_P: jax.Array,
    *,
    dtype=jnp.float32,
    attention: str = "xla",
) -> Past:
    """Runs tokens that many rows begin with once: their keys and values in every layer."""
    return _decoder(config, params).make_past(tokens_P, dtype=dtype, attention=attention)
