"""The KV cache: keys and values of what slots have read so far, by layer, in blocks.

The rings of all layers lie one behind the other on one axis, so that a layer with a sliding window
needs no more blocks than its window. Position p of a ring of R places is at place p mod R; the
formula of `ring_positions` then serves layers with and without a window alike.

Shapes: B slots, C blocks of all layers, b places of a block, K key-value heads, H head dim, R
rows, L row length, P length of a shared past.
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
from attnpo_jax.models.attention.core import Past
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


def append_rows(
    cache: Cache,
    shape: CacheShape,
    k_LRLKH: jax.Array,
    v_LRLKH: jax.Array,
    start_R: jax.Array,
    length_R: jax.Array,
    slot_R: jax.Array,
) -> Cache:
    """The cache with more positions in some slots, which are whole on every device.

    Args:
      k_LRLKH, v_LRLKH: keys and values (layers, R, L, K, H) of rows that were read.
      start_R, length_R: int32, positions of a slot that stay, and tokens of the row that are real;
        together no more than the shortest ring has places.
      slot_R: int32, where each row goes; any number from `slots` on for nowhere.
    """
    count = k_LRLKH.shape[2] // shape.block + 2  # blocks that a row may touch
    first_L11, blocks_L11 = (
        np.asarray(x, np.int32)[:, None, None] for x in (shape.first_blocks, shape.blocks)
    )

    def write(cache, k_LRLKH, v_LRLKH, start_R, length_R, slot_R):
        block_Rn = start_R[:, None] // shape.block + jnp.arange(count)
        at_LRn = jnp.where(block_Rn < blocks_L11, first_L11 + block_Rn, sum(shape.blocks))
        at = at_LRn, slot_R[:, None]
        of_row_Rnb = block_Rn[..., None] * shape.block + jnp.arange(shape.block)
        of_row_Rnb -= start_R[:, None, None]
        new_Rnb = (of_row_Rnb >= 0) & (of_row_Rnb < length_R[:, None, None])
        index_Rnb = jnp.clip(of_row_Rnb, 0, k_LRLKH.shape[2] - 1)
        rows = jnp.arange(len(start_R))[:, None, None]
        new = tuple(x[:, rows, index_Rnb] for x in (k_LRLKH, v_LRLKH))  # (layers, R, n, b, K, H)

        def put(x, new, axis):
            here = jnp.moveaxis(jnp.expand_dims(new_Rnb, (0, *range(4, new.ndim))), 3, axis)
            mixed = jnp.where(here, jnp.moveaxis(new, 3, axis).astype(x.dtype), x[at])
            return x.at[at].set(mixed, mode="drop")

        def by_position(x, new):  # (..., b, K, ...) to (..., K, b, ...)
            return put(x, new, 4)

        def by_head(x, new):  # (..., b, K, H) to (..., K, H, b)
            return put(x, new, 5)

        return _map(shape, new, cache, by_position, by_head)

    rows = PartitionSpec(None, None, None, "tensor")
    split = (SPLIT, rows, rows, *[placement.WHOLE] * 3)
    return placement.per_device(write, split, SPLIT, rows=shape.slots)(
        cache, k_LRLKH, v_LRLKH, start_R, length_R, slot_R
    )


def copy_slots(cache: Cache, source_S: jax.Array, target_S: jax.Array) -> Cache:
    """The cache with some slots as others are, int32 both, one after the other.

    The first target that is no slot ends the list; slots are whole on every device.
    """

    def copy(s, cache):
        def one(x_CB):
            of_slot = jax.lax.dynamic_index_in_dim(x_CB, source_S[s], 1)
            return jax.lax.dynamic_update_slice_in_dim(x_CB, of_slot, target_S[s], 1)

        return jax.tree.map(one, cache)

    slots = cache.keys_CBKHb.shape[1]
    return jax.lax.fori_loop(0, jnp.sum(target_S < slots), copy, cache)


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
    """Whole numbers within ±127, and the scale of each vector on the last axis.

    Of what is no number, neither is the scale.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1)
    scale = jnp.where(largest == 0, 1.0, largest / 127)
    return jnp.round(x / scale[..., None]), scale
