"""Attention over rows of a prefix and branches: who sees whom, and the XLA implementation.

Shapes: B rows, L row length, P length of a shared past, N query heads, K key-value heads, H head
dim, Q read positions.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

# Finite, unlike minus infinity: a padding query that sees nothing gets a uniform row, not NaN.
MASKED = -1e30

# Every block is compiled apart: most of what a training step takes to compile for a TPU.
_MOST_BLOCKS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Which part of a row each token belongs to.

    Token q sees token k iff k stands no later than q in the row, both are real, both belong to the
    same segment, and k is in the prefix or in q's own branch.

    In the rows that models run on, segments stand one after the other, in each its prefix, branch 2
    and branch 3, and padding stands behind all of them. `attention.split` relies on it.
    """

    branch_BL: jax.Array  # int32; 0 padding, 1 prefix, 2 and 3 the branches
    # int32; which of the pairs packed into the row, or None for one pair a row.
    segment_BL: jax.Array | None = None
    # int32 positions, which sliding windows are counted in: those of a branch continue the
    # prefix's. None where no layer has a window.
    positions_BL: jax.Array | None = None
    # How many segments a row has at most, where that is known.
    most_segments: int | None = dataclasses.field(default=None, metadata={"static": True})

    def visible(
        self,
        query_BQ: jax.Array,
        key_start: int,
        key_stop: int,
        window: int | jax.Array | None = None,
    ) -> jax.Array:
        """Mask (B, Q, key_stop - key_start) of the keys that the queries at given places see.

        With a `window`, a query sees as many positions at most, its own included.
        """
        places = jnp.arange(key_start, key_stop)
        branch_q = jnp.take_along_axis(self.branch_BL, query_BQ, axis=1)[:, :, None]
        branch_k = self.branch_BL[:, None, key_start:key_stop]
        mask = (places[None, None, :] <= query_BQ[:, :, None]) & (branch_q > 0)
        mask &= (branch_k == 1) | ((branch_k == branch_q) & (branch_k > 0))
        if self.segment_BL is not None:
            segment_q = jnp.take_along_axis(self.segment_BL, query_BQ, axis=1)[:, :, None]
            mask &= segment_q == self.segment_BL[:, None, key_start:key_stop]
        if window is not None:
            mask &= self._near(query_BQ, self.positions_BL[:, key_start:key_stop], window)
        return mask

    def past_visible(
        self, query_BQ: jax.Array, length: int, window: int | jax.Array | None
    ) -> jax.Array | None:
        """Mask (B, Q, P) of a shared past of `length` tokens; None where all of it is visible."""
        if window is None:
            return None
        return self._near(query_BQ, jnp.arange(length)[None], window)

    def _near(self, query_BQ, key_positions_BK, window) -> jax.Array:
        position_q = jnp.take_along_axis(self.positions_BL, query_BQ, axis=1)[:, :, None]
        return position_q - key_positions_BK[:, None, :] < window


@dataclasses.dataclass(frozen=True)
class ScoreRule:
    """How a layer's scores become probabilities; the defaults are a Llama's."""

    scale: float | None = None  # what query-key products are multiplied with; None for H^-1/2
    # Bound c on the scaled scores, as c * tanh(score / c); None for no bound.
    softcap: float | None = None
    # Positions a query sees at most, its own included, or None for all. An array where it differs
    # from layer to layer.
    window: int | jax.Array | None = None


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap): bounds x smoothly (arXiv 2408.00118, section 2); x itself for None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past:
    """Keys and values of tokens that stand before every row of a batch, for one layer or all."""

    keys: jax.Array  # ([layers,] P, K, H), rotated
    values: jax.Array  # ([layers,] P, K, H)


def after(past: Past, k_BLKH: jax.Array, v_BLKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values (B, P + L, K, H) of one layer's rows behind those of a shared past."""
    keys, values = (
        jnp.concatenate([jnp.broadcast_to(p, (x.shape[0], *p.shape)).astype(x.dtype), x], axis=1)
        for p, x in ((past.keys, k_BLKH), (past.values, v_BLKH))
    )
    return keys, values


def attend(
    q_BLNH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    layout: RowLayout,
    *,
    rule: ScoreRule = ScoreRule(),
    past: Past | None = None,
    block: int = 256,
) -> jax.Array:
    """Attention outputs (B, L, N, H) under the row's visibility rule.

    Queries are taken in blocks, each against the keys up to its own end only, so that scores are
    never held for more than `block` queries, and the half of them that causality hides is mostly
    not computed. Each block is rematerialised in the backward pass. Long rows have larger blocks.
    """
    L = q_BLNH.shape[1]
    block = max(block, -(-L // (_MOST_BLOCKS * 128)) * 128)
    outputs = []
    for start in range(0, L, block):
        stop = min(start + block, L)
        step = functools.partial(_attend_block, start=start, layout=layout, rule=rule, past=past)
        outputs.append(
            jax.checkpoint(step)(q_BLNH[:, start:stop], k_BLKH[:, :stop], v_BLKH[:, :stop])
        )
    return jnp.concatenate(outputs, axis=1)


def attention_rows(
    q_BQNH: jax.Array,
    k_BLKH: jax.Array,
    layout: RowLayout,
    read_BQ: jax.Array,
    *,
    rule: ScoreRule = ScoreRule(),
    past: Past | None = None,
) -> jax.Array:
    """Attention probabilities (B, N, Q, P + L), float32, of the queries that stand at `read_BQ`."""
    return jax.nn.softmax(attention_scores(q_BQNH, k_BLKH, read_BQ, layout, rule, past), axis=-1)


def weighted_values(p_BNQL: jax.Array, v_BLKH: jax.Array, *, past: Past | None = None) -> jax.Array:
    """Values summed with attention probabilities: (B, Q, N, H), in the values' dtype."""
    return _sums_of_values(p_BNQL, v_BLKH, past).astype(v_BLKH.dtype)


def _sums_of_values(p_BNQL, v_BLKH, past: Past | None) -> jax.Array:
    """Values summed with what queries weigh them by: float32 (B, Q, N, H)."""
    B, N, Q, _ = p_BNQL.shape
    L, K, H = v_BLKH.shape[1:]
    p_BKGQL = p_BNQL.astype(v_BLKH.dtype).reshape(B, K, N // K, Q, -1)
    out_BQKGH = _product("bkgql,blkh->bqkgh", p_BKGQL[..., -L:], v_BLKH)
    if past is not None:
        out_BQKGH += _product("bkgqp,pkh->bqkgh", p_BKGQL[..., :-L], past.values)
    return out_BQKGH.reshape(B, Q, N, H)


def _attend_block(q_BLNH, k_BLKH, v_BLKH, *, start: int, layout, rule, past: Past | None):
    B, L = q_BLNH.shape[:2]
    query_BL = jnp.broadcast_to(jnp.arange(start, start + L), (B, L))
    s_BNLL = attention_scores(q_BLNH, k_BLKH, query_BL, layout, rule, past)
    # Divided by their sum afterwards: in what they are rounded to for the product, they then do not
    # depend on the order in which a row's length has them summed.
    highest = jax.lax.stop_gradient(jnp.max(s_BNLL, axis=-1, keepdims=True))
    p_BNLL = jnp.exp(s_BNLL - highest)
    sums_BLN1 = jnp.sum(p_BNLL, axis=-1).swapaxes(1, 2)[..., None]
    return (_sums_of_values(p_BNLL, v_BLKH, past) / sums_BLN1).astype(v_BLKH.dtype)


def attention_scores(
    q_BQNH, k_BLKH, query_BQ, layout: RowLayout, rule: ScoreRule, past: Past | None
) -> jax.Array:
    """Scores (B, N, Q, P + L), float32, of the queries that stand at `query_BQ`; those of what a
    query does not see are far below all others.
    """
    B, Q, N, H = q_BQNH.shape
    K = k_BLKH.shape[2]
    scale = H**-0.5 if rule.scale is None else rule.scale
    q_BQKGH = (q_BQNH * scale).reshape(B, Q, K, N // K, H)

    def scores(spec, keys, mask_BQL):
        s = soft_cap(_product(spec, q_BQKGH, keys), rule.softcap)
        return s if mask_BQL is None else jnp.where(mask_BQL[:, None, None], s, MASKED)

    mask_BQL = layout.visible(query_BQ, 0, k_BLKH.shape[1], rule.window)
    scores_BKGQL = scores("bqkgh,blkh->bkgql", k_BLKH, mask_BQL)
    if past is not None:
        mask_BQP = layout.past_visible(query_BQ, past.keys.shape[0], rule.window)
        scores_past = scores("bqkgh,pkh->bkgqp", past.keys, mask_BQP)
        scores_BKGQL = jnp.concatenate([scores_past, scores_BKGQL], axis=-1)
    return scores_BKGQL.reshape(B, N, Q, -1)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
