"""Attention of new tokens to what slots of a KV cache hold.

Shapes: B slots, C blocks of all layers, b places of a block, N query heads, K key-value heads, G
query heads of a key-value head, H head dim, R rows, L row length.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from attnpo_jax.models import placement
from attnpo_jax.models.attention.core import MASKED, ScoreRule, soft_cap
from attnpo_jax.models.kv_cache import SPLIT, Cache, ring_positions

# Of a key-value head: with no more of them, CPUs are sooner done by loops than by products.
_FEW_QUERIES = 16


def attend(
    q_BNH: jax.Array,
    k_BKH: jax.Array,
    v_BKH: jax.Array,
    cache: Cache,
    first: jax.Array,
    blocks: jax.Array | int,
    length_B: jax.Array,
    rule: ScoreRule,
) -> jax.Array:
    """Attention outputs (B, N, H) of one new token in each slot, in one layer.

    Blocks are read one after the other, up to the longest slot's end, and what they add is scaled
    as the highest score rises (arXiv 1805.02867).

    Args:
      q_BNH, k_BKH, v_BKH: of the new tokens, rotated; they see themselves.
      first, blocks: where the layer's ring begins, and its blocks.
      length_B: int32, positions that slots hold already; the new tokens' own.
    """
    heads = PartitionSpec(placement.ROWS, "tensor")
    args = (q_BNH, k_BKH, v_BKH), cache, (first, blocks), (length_B,), rule
    return _on_each_device(_attend, heads, placement.BY_ROWS, *args)


def attend_rows(
    q_RLNH: jax.Array,
    k_RLKH: jax.Array,
    v_RLKH: jax.Array,
    cache: Cache,
    first: jax.Array,
    blocks: jax.Array | int,
    start_R: jax.Array,
    slot_R: jax.Array,
    rule: ScoreRule,
) -> jax.Array:
    """Attention outputs (R, L, N, H) of new tokens that follow what some slots hold, in one layer.

    As `attend`, of many tokens in few slots; slots are whole on every device.

    Args:
      q_RLNH, k_RLKH, v_RLKH: of the new tokens, rotated; they see themselves and those before.
      start_R: int32, positions that are seen of each slot: 0 to `start_R - 1`; the new tokens' are
        the next ones. No position of the ring may have been taken by a later one.
      slot_R: int32; of a number from B on, whatever is attended to means nothing.
    """
    heads = PartitionSpec(None, None, "tensor")
    args = (q_RLNH, k_RLKH, v_RLKH), cache, (first, blocks), (start_R, slot_R), rule
    return _on_each_device(_attend_rows, heads, placement.WHOLE, *args)


def _on_each_device(run, heads, by_slot, new, cache: Cache, ring, of_slots, rule: ScoreRule):
    run = functools.partial(run, rule=dataclasses.replace(rule, window=None))
    window = jnp.asarray(-1 if rule.window is None else rule.window)
    ring = [jnp.asarray(x) for x in ring]
    split = *[heads] * 3, SPLIT, *[placement.WHOLE] * 3, *[by_slot] * len(of_slots)
    everywhere = placement.per_device(run, split, heads, rows=cache.keys_CBKHb.shape[1])
    return everywhere(*new, cache, *ring, window, *of_slots)


def _attend(q_BNH, k_BKH, v_BKH, cache: Cache, first, blocks, window, length_B, *, rule):
    B, N, H = q_BNH.shape
    K = k_BKH.shape[1]
    q_BKGH = _scaled(q_BNH, rule).reshape(B, K, N // K, H)
    own_BKG = soft_cap(jnp.sum(q_BKGH * k_BKH[:, :, None].astype(jnp.float32), -1), rule.softcap)
    v_BKGH = jnp.broadcast_to(v_BKH[:, :, None].astype(jnp.float32), q_BKGH.shape)
    own = own_BKG, jnp.ones_like(own_BKG), v_BKGH
    ring = first, blocks, window
    out_BKGH = _over_blocks(q_BKGH, own, cache, ring, length_B, length_B[:, None], None, rule)
    return out_BKGH.reshape(B, N, H).astype(q_BNH.dtype)


def _attend_rows(
    q_RLNH, k_RLKH, v_RLKH, cache: Cache, first, blocks, window, start_R, slot_R, *, rule
):
    R, L, N, H = q_RLNH.shape
    K = k_RLKH.shape[2]
    G = N // K
    q_RKLGH = jnp.moveaxis(_scaled(q_RLNH, rule).reshape(R, L, K, G, H), 2, 1)
    s_RKLGM = jnp.einsum("rklgh,rmkh->rklgm", q_RKLGH, k_RLKH.astype(jnp.float32))
    back_LM = jnp.arange(L)[:, None] - jnp.arange(L)
    seen_LM = (back_LM >= 0) & ((window < 0) | (back_LM < window))
    s_RKLGM = jnp.where(seen_LM[:, None], soft_cap(s_RKLGM, rule.softcap), MASKED)
    highest = jnp.max(s_RKLGM, axis=-1)
    p_RKLGM = jnp.exp(s_RKLGM - highest[..., None])
    sums = jnp.einsum("rklgm,rmkh->rklgh", p_RKLGM, v_RLKH.astype(jnp.float32))
    # From here on, queries of all tokens are queries of one key-value head.
    own = highest, jnp.sum(p_RKLGM, axis=-1), sums
    q, *own = (x.reshape(R, K, L * G, *x.shape[4:]) for x in (q_RKLGH, *own))
    position_RQ = start_R[:, None] + jnp.repeat(jnp.arange(L), G)
    ring = first, blocks, window
    out = _over_blocks(q, tuple(own), cache, ring, start_R, position_RQ, slot_R, rule)
    return jnp.moveaxis(out.reshape(R, K, L, G, H), 1, 2).reshape(q_RLNH.shape).astype(q_RLNH.dtype)


def _scaled(q, rule):
    """Queries times the scale of scores, float32."""
    scale = q.shape[-1] ** -0.5 if rule.scale is None else rule.scale
    return (q * scale).astype(jnp.float32)


def _over_blocks(q_BKGH, own, cache: Cache, ring, length_B, position_BQ, slot_B, rule):
    """What queries attend to of their own tokens, and of the blocks of their slots.

    Args:
      own: the highest score, the sum of exponentials less it, and values weighed by these.
      ring: where the layer's begins, its blocks, and the window, -1 for none.
      length_B: int32, positions that are held.
      position_BQ: int32, of the queries; Q is G, or 1 for all of them.
      slot_B: int32, whose blocks; None for all slots in their order.
    """
    first, blocks, window = ring
    block = cache.keys_CBKHb.shape[-1]

    def add_block(j, carry):
        highest, total, sums_BKGH = carry
        of_block = jax.tree.map(
            lambda x_CB: jax.lax.dynamic_index_in_dim(x_CB, first + j, keepdims=False), cache
        )
        if slot_B is not None:
            of_block = jax.tree.map(lambda x_B: x_B[slot_B], of_block)
        k_BKHb, v_BKbH = (
            x.astype(jnp.float32) for x in (of_block.keys_CBKHb, of_block.values_CBKbH)
        )
        places = j * block + jnp.arange(block)
        positions_Bb = ring_positions(places, blocks * block, length_B[:, None])
        s_BKGb = _over_head(q_BKGH, k_BKHb)
        if of_block.key_scales_CBKb is not None:
            s_BKGb *= of_block.key_scales_CBKb[:, :, None]
        s_BKGb = soft_cap(s_BKGb, rule.softcap)
        back_BQb = position_BQ[..., None] - positions_Bb[:, None]
        seen_BQb = (positions_Bb >= 0)[:, None] & ((window < 0) | (back_BQb < window))
        s_BKGb = jnp.where(seen_BQb[:, None], s_BKGb, MASKED)
        higher = jnp.maximum(highest, jnp.max(s_BKGb, axis=-1))
        p_BKGb, kept = jnp.exp(s_BKGb - higher[..., None]), jnp.exp(highest - higher)
        total = total * kept + jnp.sum(p_BKGb, axis=-1)
        if of_block.value_scales_CBKb is not None:
            p_BKGb *= of_block.value_scales_CBKb[:, :, None]
        return higher, total, sums_BKGH * kept[..., None] + _over_block(p_BKGb, v_BKbH)

    stop = jnp.minimum(-(-jnp.max(length_B) // block), blocks)
    _, total, sums_BKGH = jax.lax.fori_loop(0, stop, add_block, own)
    return sums_BKGH / total[..., None]


def _over_head(q_BKGH, k_BKHb):
    """Scores (B, K, G, b)."""

    # On CPUs, products of so few queries are sooner had by loops that XLA fuses with what follows.
    def fused(q, k):
        return jnp.sum(q[..., None] * k[:, :, None], axis=-2)

    def product(q, k):
        return jnp.einsum("bkgh,bkhc->bkgc", q, k)

    return _by_number_of_queries(fused, product, q_BKGH, k_BKHb)


def _over_block(p_BKGb, v_BKbH):
    """Values summed with what each is weighed by: (B, K, G, H)."""

    def fused(p, v):
        return jnp.sum(p[..., None] * v[:, :, None], axis=-2)

    def product(p, v):
        return jnp.einsum("bkgc,bkch->bkgh", p, v)

    return _by_number_of_queries(fused, product, p_BKGb, v_BKbH)


def _by_number_of_queries(few, many, x_BKG, other):
    if x_BKG.shape[2] > _FEW_QUERIES:
        return many(x_BKG, other)
    return jax.lax.platform_dependent(x_BKG, other, cpu=few, default=many)
