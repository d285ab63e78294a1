"""Attention rollout: where what a token holds came from, through all layers (arXiv 2005.00928).

A layer passes half of what a token holds on as it was, by the residual connection, and half by the
attention's mean over heads, A: v becomes v/2 + v A/2. For a few tokens that is a few products of a
vector with A, from the top layer down, and A need never be there as a whole: its rows exist for one
block of queries at a time.

Shapes: as in `core`; R rows of mass, S keys that a block sees.
"""

import functools

import jax
import jax.numpy as jnp

from attnpo_jax.models.attention.core import Past, RowLayout, ScoreRule, attention_scores
from attnpo_jax.models.attention.strips import strips


def passed_down(
    v_BRL: jax.Array,
    q_BLNH: jax.Array,
    k_BLKH: jax.Array,
    layout: RowLayout,
    *,
    rule: ScoreRule,
    past: Past | None = None,
    one_at_a_time: bool = False,
) -> jax.Array:
    """v/2 + v A/2, float32 (B, R, L), of one layer; what goes to the shared past is left out.

    Args:
      v_BRL: mass on the tokens of each row, R times; none on padding.
      q_BLNH, k_BLKH: rotated queries and keys.
      one_at_a_time: a row after the other, whose scores then stay in a CPU's cache.
    """
    run = functools.partial(_times_attention, rule=rule)
    if one_at_a_time:
        each = (v_BRL, q_BLNH, k_BLKH, layout)

        def row(one):
            v, q, k, of_row = jax.tree.map(lambda x: x[None], one)
            return run(v, q, k, of_row, past)[0]

        moved_BRL = jax.lax.map(row, each)
    else:
        moved_BRL = run(v_BRL, q_BLNH, k_BLKH, layout, past)
    return 0.5 * (v_BRL + moved_BRL)


def _times_attention(v_BRL, q_BLNH, k_BLKH, layout: RowLayout, past: Past | None, rule: ScoreRule):
    B, L, N = q_BLNH.shape[:3]
    P = 0 if past is None else past.keys.shape[0]
    moved_BRL = jnp.zeros_like(v_BRL)
    for start, stop, _ in strips(L, L):
        query_BQ = jnp.broadcast_to(jnp.arange(start, stop), (B, stop - start))
        s_BNQS = attention_scores(
            q_BLNH[:, start:stop], k_BLKH[:, :stop], query_BQ, layout, rule, past
        )
        p_BNQS = jnp.exp(s_BNQS - jnp.max(s_BNQS, axis=-1, keepdims=True))
        # Divided by their sums here, where there are few numbers.
        of_query_BRNQ = v_BRL[:, :, None, start:stop] / (N * jnp.sum(p_BNQS, axis=-1)[:, None])
        part_BRS = jnp.einsum(
            "brnq,bnqs->brs", of_query_BRNQ, p_BNQS, precision=jax.lax.Precision.HIGHEST
        )
        moved_BRL = moved_BRL.at[:, :, :stop].add(part_BRS[..., P:])
    return moved_BRL
