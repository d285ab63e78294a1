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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Which part of a row each token belongs to.

    Token q sees token k iff k stands no later than q in the row, both are real, both belong to the
    same segment, and k is in the prefix or in q's own branch.

    Attributes:
      branch_BL: int32; 0 padding, 1 prefix, 2 and 3 the branches.
      segment_BL: int32; which of the pairs packed into the row, or None for one pair a row.
    """

    branch_BL: jax.Array
    segment_BL: jax.Array | None = None

    def visible(self, query_BQ: jax.Array, key_start: int, key_stop: int) -> jax.Array:
        """Mask (B, Q, key_stop - key_start) of the keys that the queries at given places see."""
        places = jnp.arange(key_start, key_stop)
        branch_q = jnp.take_along_axis(self.branch_BL, query_BQ, axis=1)[:, :, None]
        branch_k = self.branch_BL[:, None, key_start:key_stop]
        mask = (places[None, None, :] <= query_BQ[:, :, None]) & (branch_q > 0)
        mask &= (branch_k == 1) | ((branch_k == branch_q) & (branch_k > 0))
        if self.segment_BL is not None:
            segment_q = jnp.take_along_axis(self.segment_BL, query_BQ, axis=1)[:, :, None]
            mask &= segment_q == self.segment_BL[:, None, key_start:key_stop]
        return mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past:
    """Keys and values of tokens that stand before every row of the batch, for one layer or for all.

    Attributes:
      keys: ([layers,] P, K, H), rotated.
      values: ([layers,] P, K, H).
    """

    keys: jax.Array
    values: jax.Array


def attend(
    q_BLNH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    layout: RowLayout,
    *,
    past: Past | None = None,
    block: int = 256,
) -> jax.Array:
    """Attention outputs (B, L, N, H) under the row's visibility rule; scores scaled by H^-1/2.

    Queries are taken in blocks, each against the keys up to its own end only, so that scores are
    never held for more than `block` queries, and the half of them that causality hides is mostly
    not computed. Each block is rematerialised in the backward pass.
    """
    L = q_BLNH.shape[1]
    outputs = []
    for start in range(0, L, block):
        stop = min(start + block, L)
        step = functools.partial(_attend_block, start=start, layout=layout, past=past)
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
    past: Past | None = None,
) -> jax.Array:
    """Attention probabilities (B, N, Q, P + L), float32, of the queries that stand at `read_BQ`."""
    mask_BQL = layout.visible(read_BQ, 0, k_BLKH.shape[1])
    return _probabilities(q_BQNH, k_BLKH, mask_BQL, past)


def weighted_values(p_BNQL: jax.Array, v_BLKH: jax.Array, *, past: Past | None = None) -> jax.Array:
    """Values summed with attention probabilities: (B, Q, N, H)."""
    B, N, Q, _ = p_BNQL.shape
    L, K, H = v_BLKH.shape[1:]
    p_BKGQL = p_BNQL.astype(v_BLKH.dtype).reshape(B, K, N // K, Q, -1)
    out_BQKGH = jnp.einsum("bkgql,blkh->bqkgh", p_BKGQL[..., -L:], v_BLKH)
    if past is not None:
        out_BQKGH += jnp.einsum("bkgqp,pkh->bqkgh", p_BKGQL[..., :-L], past.values)
    return out_BQKGH.reshape(B, Q, N, H)


def _attend_block(q_BLNH, k_BLKH, v_BLKH, *, start: int, layout: RowLayout, past: Past | None):
    B, L = q_BLNH.shape[:2]
    query_BL = jnp.broadcast_to(jnp.arange(start, start + L), (B, L))
    mask_BLL = layout.visible(query_BL, 0, k_BLKH.shape[1])
    p_BNLL = _probabilities(q_BLNH, k_BLKH, mask_BLL, past)
    return weighted_values(p_BNLL, v_BLKH, past=past)


def _probabilities(q_BQNH, k_BLKH, mask_BQL, past: Past | None) -> jax.Array:
    B, Q, N, H = q_BQNH.shape
    K = k_BLKH.shape[2]
    q_BQKGH = (q_BQNH * H**-0.5).reshape(B, Q, K, N // K, H)
    scores = jnp.einsum("bqkgh,blkh->bkgql", q_BQKGH, k_BLKH, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BQL[:, None, None], scores, MASKED)
    if past is not None:
        scores_past = jnp.einsum(
            "bqkgh,pkh->bkgqp", q_BQKGH, past.keys, preferred_element_type=jnp.float32
        )
        scores = jnp.concatenate([scores_past, scores], axis=-1)
    return jax.nn.softmax(scores, axis=-1).reshape(B, N, Q, -1)
