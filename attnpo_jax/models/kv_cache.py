"""The KV cache: keys and values of what slots have read so far, by layer, in blocks.

The rings of all layers lie one behind the other on one axis, so that a layer with a sliding window
needs no more blocks than its window. Position p of a ring of R places is at place p mod R; the
formula of `ring_positions` then serves layers with and without a window alike.

Shapes: B slots, C blocks of all layers, b places of a block, N query heads, K key-value heads, G
query heads of a key-value head, H head dim, L row length, P length of a shared past.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from attnpo_jax.models import placement
from attnpo_jax.models.attention.core import MASKED, Past, ScoreRule, soft_cap
from attnpo_jax.models.config import ModelConfig

# Tuned on an AMD EPYC with SmolLM2-135M and 1, 8 and 64 slots: half and twice as many took as long
# or up to a fifth longer. TPUs have 128 lanes.
BLOCK = 128

# How a cache is split: slots by rows, heads by `tensor`.
SPLIT = PartitionSpec(None, placement.ROWS, "tensor")


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """What a cache is allocated by.

    Attributes:
      length: positions that a slot has room for.
      blocks: by layer, blocks of its ring.
      quantized: whether keys and values are held as int8, with a float32 scale for each head and
        position.
      block: places of a block.
    """

    slots: int
    length: int
    blocks: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    quantized: bool = False
    block: int = BLOCK

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        slots: int,
        length: int,
        dtype,
        *,
        quantized: bool = False,
        block: int = BLOCK,
    ) -> "CacheShape":
        """The cache of a model: rings of `length` positions, or of a window less the query's."""
        windows = config.layer_windows or (None,) * config.num_layers
        held = [length if w is None else min(length, max(w - 1, 1)) for w in windows]
        blocks = tuple(-(-n // block) for n in held)
        heads = config.num_kv_heads, config.head_dim
        return cls(slots, length, blocks, *heads, jnp.dtype(dtype), quantized, block)

    @property
    def first_blocks(self) -> np.ndarray:
        """Where each layer's ring begins: int32 (layers,)."""
        return np.concatenate([[0], np.cumsum(self.blocks)[:-1]]).astype(np.int32)

    def abstract(self) -> "Cache":
        """The cache as `jax.ShapeDtypeStruct`s."""
        C, B, b = sum(self.blocks), self.slots, self.block
        K, H = self.num_kv_heads, self.head_dim
        dtype = jnp.dtype(jnp.int8) if self.quantized else self.dtype
        scales = jax.ShapeDtypeStruct((C, B, K, b), jnp.float32) if self.quantized else None
        return Cache(
            jax.ShapeDtypeStruct((C, B, K, H, b), dtype),
            jax.ShapeDtypeStruct((C, B, K, b, H), dtype),
            scales,
            scales,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the cache, on all devices together."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.abstract()))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values; keys lie with their positions innermost, as scores read them."""

    keys_CBKHb: jax.Array
    values_CBKbH: jax.Array
    key_scales_CBKb: jax.Array | None = None
    value_scales_CBKb: jax.Array | None = None


def empty(shape: CacheShape) -> Cache:
    """A cache of zeros."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape.abstract())


def ring_positions(place, ring, length):
    """Which of positions 0 ... length - 1 is at a place of a ring: the last one; negative: none."""
    return length - 1 - (length - 1 - place) % ring


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
    run = functools.partial(_attend, rule=dataclasses.replace(rule, window=None))
    window = jnp.asarray(-1 if rule.window is None else rule.window)
    heads = PartitionSpec(placement.ROWS, "tensor")
    split = (heads, heads, heads, SPLIT, *[placement.WHOLE] * 2, placement.BY_ROWS, placement.WHOLE)
    everywhere = placement.per_device(run, split, heads, rows=q_BNH.shape[0])
    return everywhere(
        q_BNH, k_BKH, v_BKH, cache, jnp.asarray(first), jnp.asarray(blocks), length_B, window
    )


def _attend(q_BNH, k_BKH, v_BKH, cache: Cache, first, blocks, length_B, window, *, rule):
    B, N, H = q_BNH.shape
    K = k_BKH.shape[1]
    scale = H**-0.5 if rule.scale is None else rule.scale
    q_BKGH = (q_BNH * scale).reshape(B, K, N // K, H).astype(jnp.float32)
    block = cache.keys_CBKHb.shape[-1]
    ring = blocks * block

    def add_block(j, carry):
        highest, total, sums_BKGH = carry
        at = first + j
        k_BKHb, v_BKbH = (
            jax.lax.dynamic_index_in_dim(x, at, keepdims=False).astype(jnp.float32)
            for x in (cache.keys_CBKHb, cache.values_CBKbH)
        )
        s_BKGb = _over_head(q_BKGH, k_BKHb)
        if cache.key_scales_CBKb is not None:
            s_BKGb *= cache.key_scales_CBKb[at][:, :, None]
        s_BKGb = soft_cap(s_BKGb, rule.softcap)
        positions_Bb = ring_positions(j * block + jnp.arange(block), ring, length_B[:, None])
        seen_Bb = (positions_Bb >= 0) & ((window < 0) | (length_B[:, None] - positions_Bb < window))
        s_BKGb = jnp.where(seen_Bb[:, None, None], s_BKGb, MASKED)
        higher = jnp.maximum(highest, jnp.max(s_BKGb, axis=-1))
        p_BKGb, kept = jnp.exp(s_BKGb - higher[..., None]), jnp.exp(highest - higher)
        total = total * kept + jnp.sum(p_BKGb, axis=-1)
        if cache.value_scales_CBKb is not None:
            p_BKGb *= cache.value_scales_CBKb[at][:, :, None]
        return higher, total, sums_BKGH * kept[..., None] + _over_block(p_BKGb, v_BKbH)

    own_BKG = soft_cap(jnp.sum(q_BKGH * k_BKH[:, :, None].astype(jnp.float32), -1), rule.softcap)
    v_BKGH = jnp.broadcast_to(v_BKH[:, :, None].astype(jnp.float32), q_BKGH.shape)
    stop = jnp.minimum(-(-jnp.max(length_B) // block), blocks)
    start = own_BKG, jnp.ones_like(own_BKG), v_BKGH
    _, total, sums_BKGH = jax.lax.fori_loop(0, stop, add_block, start)
    return (sums_BKGH / total[..., None]).reshape(B, N, H).astype(q_BNH.dtype)


def _over_head(q_BKGH, k_BKHb):
    """Scores (B, K, G, b)."""

    # On CPUs, products of so few queries are sooner had by loops that XLA fuses with what follows.
    def fused(q, k):
        return jnp.sum(q[..., None] * k[:, :, None], axis=-2)

    def product(q, k):
        return jnp.einsum("bkgh,bkhc->bkgc", q, k)

    return jax.lax.platform_dependent(q_BKGH, k_BKHb, cpu=fused, default=product)


def _over_block(p_BKGb, v_BKbH):
    """Values summed with what each is weighed by: (B, K, G, H)."""

    def fused(p, v):
        return jnp.sum(p[..., None] * v[:, :, None], axis=-2)

    def product(p, v):
        return jnp.einsum("bkgc,bkch->bkgh", p, v)

    return jax.lax.platform_dependent(p_BKGb, v_BKbH, cpu=fused, default=product)


def append(
    cache: Cache, shape: CacheShape, k_LBKH: jax.Array, v_LBKH: jax.Array, length_B: jax.Array
) -> Cache:
    """The cache with one more position in each slot: keys and values (layers, B, K, H)."""
    first_L1 = shape.first_blocks[:, None]
    ring_L1 = np.asarray(shape.blocks, np.int32)[:, None] * shape.block

    def write(cache, k_LBKH, v_LBKH, length_B):
        place_LB = length_B[None] % ring_L1
        at = first_L1 + place_LB // shape.block, jnp.arange(length_B.shape[0])[None]
        place = place_LB % shape.block

        def in_place(cache, k_LBKH, v_LBKH):
            return _map(
                shape,
                (k_LBKH, v_LBKH),
                cache,
                lambda x, new: x.at[*at, :, place].set(new.astype(x.dtype)),
                lambda x, new: x.at[*at, :, :, place].set(new.astype(x.dtype)),
            )

        def by_blocks(cache, k_LBKH, v_LBKH):
            here_LBb = jnp.arange(shape.block) == place[..., None]

            def by_position(x, new):
                here = jnp.expand_dims(here_LBb, (2, *range(4, x.ndim)))
                return x.at[at].set(jnp.where(here, new[:, :, :, None].astype(x.dtype), x[at]))

            def by_head(x, new):
                here = here_LBb[:, :, None, None]
                return x.at[at].set(jnp.where(here, new[..., None].astype(x.dtype), x[at]))

            return _map(shape, (k_LBKH, v_LBKH), cache, by_position, by_head)

        # TPUs scatter whole blocks in place; for one position of a block, XLA turns the axes of all
        # of the cache around, and back.
        return jax.lax.platform_dependent(cache, k_LBKH, v_LBKH, tpu=by_blocks, default=in_place)

    rows = PartitionSpec(None, placement.ROWS, "tensor")
    split = (SPLIT, rows, rows, placement.BY_ROWS)
    return placement.per_device(write, split, SPLIT, rows=shape.slots)(
        cache, k_LBKH, v_LBKH, length_B
    )


def insert(
    cache: Cache,
    shape: CacheShape,
    kept: Past,
    past: Past | None,
    length_B: jax.Array,
    slot_BS: jax.Array,
) -> Cache:
    """The cache with some slots filled anew.

    Args:
      kept: keys and values (layers, B, L, K, H) of rows that were read.
      past: those (layers, P, K, H) of what all rows begin with, or None.
      length_B: int32, tokens that a slot is to hold, P of them those of the past.
      slot_BS: int32, the slots that each row goes to, the first ones of S; any number from `slots`
        on for none.
    """
    whole = PartitionSpec(None, None, None, "tensor")
    of_past = PartitionSpec(None, None, "tensor")
    write = functools.partial(_insert, shape=shape)
    split = (SPLIT, whole, None if past is None else of_past, placement.WHOLE, placement.WHOLE)
    return placement.per_device(write, split, SPLIT, rows=shape.slots)(
        cache, kept, past, length_B, slot_BS
    )


def for_each_slot(write: Callable[..., Any], held: Any, slot_BS: jax.Array, slots: int) -> Any:
    """`held = write(held, slot_B)`, once for each of the slots that rows go to, see `insert`.

    One after the other, so that there is no copy of the rows for each of them, and one program
    whatever the number.
    """
    most = jnp.max(jnp.sum(slot_BS < slots, axis=1))
    return jax.lax.fori_loop(0, most, lambda s, held: write(held, slot_BS[:, s]), held)


def _insert(cache: Cache, kept: Past, past: Past | None, length_B, slot_BS, *, shape: CacheShape):
    if past is not None:
        kept = jax.tree.map(
            lambda p, x: jnp.concatenate(
                [jnp.broadcast_to(p[:, None], (*x.shape[:2], *p.shape[1:])).astype(x.dtype), x], 2
            ),
            past,
            kept,
        )
    needed = -(-kept.keys.shape[2] // shape.block)
    counts = [min(needed, blocks) for blocks in shape.blocks]
    layer_n = np.repeat(np.arange(len(counts)), counts)
    place_n = np.concatenate([np.arange(count) for count in counts]) * shape.block
    block_n = shape.first_blocks[layer_n] + place_n // shape.block
    ring_n = np.asarray(shape.blocks)[layer_n] * shape.block
    place_nb = place_n[:, None] + np.arange(shape.block)
    # (n, B, b): which position each place of the blocks holds.
    position = ring_positions(place_nb[:, None], ring_n[:, None, None], length_B[None, :, None])
    position = jnp.clip(position, 0, kept.keys.shape[2] - 1)
    rows = jnp.arange(length_B.shape[0])[None, :, None]
    k_nBbKH, v_nBbKH = (x[layer_n[:, None, None], rows, position] for x in (kept.keys, kept.values))
    local = cache.keys_CBKHb.shape[1]

    def write(cache, slot_B):
        # Slots of other devices, and rows that go nowhere, are outside: their writes are dropped.
        slot_B = slot_B - placement.first_row(local)
        slot_B = jnp.where(slot_B < 0, local, slot_B)
        at = block_n[:, None], slot_B[None]

        def by_position(x, new):  # (n, B, b, K, ...) to (n, B, K, b, ...)
            return x.at[at].set(jnp.moveaxis(new, 2, 3).astype(x.dtype), mode="drop")

        def by_head(x, new):  # (n, B, b, K, H) to (n, B, K, H, b)
            return x.at[at].set(jnp.moveaxis(new, 2, 4).astype(x.dtype), mode="drop")

        return _map(shape, (k_nBbKH, v_nBbKH), cache, by_position, by_head)

    return for_each_slot(write, cache, slot_BS, shape.slots)


def _map(shape: CacheShape, new, cache: Cache, by_position, by_head) -> Cache:
    """Writes new keys and values (..., H) into the arrays of a cache, as int8 where it has that."""
    (keys, key_scales), (values, value_scales) = (
        _quantize(x) if shape.quantized else (x, None) for x in new
    )
    return Cache(
        by_head(cache.keys_CBKHb, keys),
        by_position(cache.values_CBKbH, values),
        by_position(cache.key_scales_CBKb, key_scales) if shape.quantized else None,
        by_position(cache.value_scales_CBKb, value_scales) if shape.quantized else None,
    )


def _quantize(x):
    """Whole numbers within ±127, and the scale of each vector on the last axis."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    return jnp.round(x / scale[..., None]), scale
