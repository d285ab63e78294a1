"""Where some tokens look, by layer, by head or through all layers: the judge's pass.

Shapes: as in `models.decoder`; S sources of attention, Q read positions, X layers of which single
heads are wanted.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnpo_jax.models import decoder
from attnpo_jax.models.attention.core import Past, RowLayout, attention_rows, weighted_values
from attnpo_jax.models.attention.implementations import BLOCKS
from attnpo_jax.models.attention.rollout import passed_down
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.models.layer_kinds import LayerKind, layer_kinds, rope_tables
from attnpo_jax.models.layers import Layers

ROLLOUT = "rollout"
Source = int | tuple[int, int] | str
"""A layer (the mean over its heads), a layer and one of its heads, or `ROLLOUT`."""


@dataclasses.dataclass(frozen=True)
class ReadOutput:
    """What a reading pass returns."""

    # float32 attention of the sources asked for; the columns are the row's own tokens (a row sums
    # to 1 together with what went to the shared past).
    rows_SBQL: jax.Array
    # Final hidden states at the read positions, or None when not asked for.
    hidden_BQD: jax.Array | None


def last_layer(sources: Sequence[Source], num_layers: int) -> int:
    """The highest layer that any of the sources needs."""
    if ROLLOUT in sources:
        return num_layers - 1
    return max(source if isinstance(source, int) else source[0] for source in sources)


def read(
    config: ModelConfig,
    params: decoder.Params,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    branch_BL: jax.Array,
    read_BQ: jax.Array,
    *,
    sources: tuple[Source, ...],
    past: Past | None = None,
    with_hidden: bool = True,
    dtype=jnp.float32,
    attention: str = "xla",
) -> ReadOutput:
    """Where the tokens at `read_BQ` look, in each of some layers, or through all: the judge's pass.

    Layers above the last one needed do not run, and in that one only the read positions go past
    the attention row. For rollout, the queries and keys of all layers are kept until the last one
    has run. Not meant to be differentiated.

    Args:
      tokens_BL, positions_BL, branch_BL: as for `decoder.forward`, without the tokens of `past`;
        positions are counted from its start.
      read_BQ: int32 places in the row (B, Q) whose attention rows are wanted.
      past: keys and values of tokens that every row begins with (see `make_past`), or None.
      with_hidden: whether the final hidden states at the read positions are wanted too.
    """
    top = config.num_layers - 1
    last, L = top if with_hidden else last_layer(sources, config.num_layers), tokens_BL.shape[1]
    of_rows = _Rows.of(config, params, positions_BL, branch_BL, read_BQ, past, dtype)
    wanted = _Wanted.of(config, sources)
    run_attention = of_rows.model.attention(attention, of_rows.layout, past)
    rollout = ROLLOUT in sources

    def body(carry, i):
        x_BLD, heads = carry
        layer, kind, layer_past, normed, k_BLKH = entered = of_rows.enter(x_BLD, i)
        v_BLKH = layer.values(normed)
        row_BQL, heads = jax.lax.cond(
            wanted.layers[i],
            lambda: wanted.note(of_rows.look(*entered)[..., -L:], heads, i),
            lambda: (jnp.zeros((*read_BQ.shape, L)), heads),
        )
        q_BLNH = layer.queries(normed, kind.rope_of(of_rows.ropes))
        attended = run_attention(kind, q_BLNH, k_BLKH, v_BLKH, layer_past)
        x_BLD = layer.after_attention(x_BLD, attended)
        return (x_BLD, heads), (row_BQL, (q_BLNH, k_BLKH) if rollout else None)

    start = of_rows.model.embed(tokens_BL, dtype), wanted.no_heads(tokens_BL, read_BQ)
    (x_BLD, heads), (rows, kept) = jax.lax.scan(body, start, jnp.arange(last))
    layer, _, layer_past, normed, _ = entered = of_rows.enter(x_BLD, last)
    p_BNQL = of_rows.look(*entered)
    row_BQL, heads = wanted.note(p_BNQL[..., -L:], heads, last)
    rolled_out = of_rows.roll_out(row_BQL, kept, attention == BLOCKS) if rollout else None
    hidden_BQD = None
    if with_hidden:
        attended = weighted_values(p_BNQL, layer.values(normed), past=layer_past)
        residual = jnp.take_along_axis(x_BLD, read_BQ[:, :, None], axis=1)
        hidden_BQD = of_rows.model.final(layer.after_attention(residual, attended))
    rows = jnp.concatenate([rows, row_BQL[None]])
    return ReadOutput(wanted.in_order(rows, heads, rolled_out), hidden_BQD)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A batch of rows on its way through the layers."""

    model: decoder.Decoder
    layout: RowLayout
    read_BQ: jax.Array
    past: Past | None
    dtype: Any
    kinds: LayerKind
    graphdef: nnx.GraphDef
    stacked: nnx.State
    ropes: tuple[jax.Array, jax.Array]
    ropes_read: tuple[jax.Array, jax.Array]  # at the read positions

    @classmethod
    def of(cls, config, params, positions_BL, branch_BL, read_BQ, past, dtype) -> "_Rows":
        model = decoder.as_module(config, params)
        return cls(
            model,
            decoder.row_layout(config, branch_BL, positions_BL),
            read_BQ,
            past,
            dtype,
            layer_kinds(config),
            *nnx.split(model.layers),
            rope_tables(config, positions_BL),
            rope_tables(config, jnp.take_along_axis(positions_BL, read_BQ, axis=1)),
        )

    def enter(self, x_BLD, i):
        """A layer, its kind and past, and what it first makes of its input: norm and keys."""
        # Indexing (rather than scanning over the stack itself) leaves the stack whole in place
        # when only its first layers run.
        slice_, kind = jax.tree.map(lambda p: p[i], (self.stacked, self.kinds))
        layer = nnx.merge(self.graphdef, slice_)
        normed = layer.normed_for_attention(x_BLD)
        return layer, kind, self.past_of(i), normed, layer.keys(normed, kind.rope_of(self.ropes))

    def past_of(self, i) -> Past | None:
        """The shared past of a layer."""
        return jax.tree.map(lambda p: p[i].astype(self.dtype), self.past)

    def look(self, layer: Layers, kind: LayerKind, layer_past, normed, k_BLKH):
        """Attention probabilities (B, N, Q, P + L) of the read positions."""
        at_read = jnp.take_along_axis(normed, self.read_BQ[:, :, None], axis=1)
        q_BQNH = layer.queries(at_read, kind.rope_of(self.ropes_read))
        rule = kind.score_rule(self.model.config)
        return attention_rows(q_BQNH, k_BLKH, self.layout, self.read_BQ, rule=rule, past=layer_past)

    def roll_out(self, top_BQL, kept: tuple[jax.Array, jax.Array], one_at_a_time: bool):
        """Attention rollout (B, Q, L) of the read positions.

        Args:
          top_BQL: their attention in the top layer.
          kept: rotated queries and keys of the layers below, stacked.
        """
        itself_BQL = jax.nn.one_hot(self.read_BQ, top_BQL.shape[-1], dtype=jnp.float32)

        def down(v_BQL, of_layer):
            (q_BLNH, k_BLKH), kind, i = of_layer
            rule, past = kind.score_rule(self.model.config), self.past_of(i)
            moved = passed_down(
                v_BQL,
                q_BLNH,
                k_BLKH,
                self.layout,
                rule=rule,
                past=past,
                one_at_a_time=one_at_a_time,
            )
            return moved, None

        below = kept[0].shape[0]
        kinds = jax.tree.map(lambda x: x[:below], self.kinds)
        layers = kept, kinds, jnp.arange(below)
        return jax.lax.scan(down, 0.5 * (itself_BQL + top_BQL), layers, reverse=True)[0]


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which attention of a pass is kept."""

    sources: tuple[Source, ...]
    num_heads: int
    of_heads: tuple[int, ...]  # the layers of which heads are wanted, X of them
    layers: jax.Array  # bool by layer, whether anything of it is wanted
    slots: jax.Array  # int32 by layer, its place among `of_heads`; X for what is not there

    @classmethod
    def of(cls, config: ModelConfig, sources: tuple[Source, ...]) -> "_Wanted":
        of_heads = tuple(sorted({source[0] for source in sources if isinstance(source, tuple)}))
        layers = range(config.num_layers)
        slots = [of_heads.index(i) if i in of_heads else len(of_heads) for i in layers]
        wanted = [i in sources or i in of_heads for i in layers]
        return cls(sources, config.num_heads, of_heads, jnp.asarray(wanted), jnp.asarray(slots))

    def no_heads(self, tokens_BL, read_BQ):
        """Where the heads' rows will be, (X + 1, B, N, Q, L); None where none are wanted."""
        if not self.of_heads:
            return None
        (B, Q), L = read_BQ.shape, tokens_BL.shape[1]
        return jnp.zeros((len(self.of_heads) + 1, B, self.num_heads, Q, L))

    def note(self, p_BNQL, heads, i):
        """A layer's mean over heads (B, Q, L), and the heads' rows with those of the layer."""
        if heads is not None:
            heads = heads.at[self.slots[i]].set(p_BNQL)
        return jnp.mean(p_BNQL, axis=1), heads

    def in_order(self, rows, heads, rolled_out):
        """The sources (S, B, Q, L), of the layers' rows, the heads' and the rollout's."""
        layers = len(rows)
        places, stacks = [], [rows]
        if heads is not None:
            stacks.append(heads.swapaxes(1, 2).reshape(-1, *rows.shape[1:]))
        if rolled_out is not None:
            stacks.append(rolled_out[None])
        for source in self.sources:
            if source == ROLLOUT:
                places.append(-1)
            elif isinstance(source, tuple):
                layer, head = source
                places.append(layers + self.of_heads.index(layer) * self.num_heads + head)
            else:
                places.append(source)
        return jnp.concatenate(stacks)[jnp.asarray(places)]
