"""Decoding: prompts into a KV cache, more tokens of some, and one more token in every slot.

Shapes: B slots or rows, R rows, L row length, P length of a shared past, D width, N query heads, K
key-value heads, H head dim, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from attnpo_jax.models import kv_cache, lm_head, placement
from attnpo_jax.models.attention import cached
from attnpo_jax.models.attention.core import Past
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.models.decoder import Decoder, Params, as_module, keys_and_values, unembedding
from attnpo_jax.models.kv_cache import Cache, CacheShape
from attnpo_jax.models.layer_kinds import layer_kinds, rope_tables

__all__ = ["Cache", "CacheShape", "extend", "prefill", "step"]


def prefill(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    shape: CacheShape,
    tokens_BL: jax.Array,
    length_B: jax.Array,
    slot_BS: jax.Array,
    *,
    past: Past | None = None,
    dtype=jnp.float32,
    attention: str = "xla",
) -> Cache:
    """The cache with prompts in some slots.

    Args:
      tokens_BL: int32 rows of tokens, without those of the past; what follows them is padding.
      length_B: int32, tokens of each row that are real.
      slot_BS: int32, the slots that each row goes to, the first ones of S; any number from
        `shape.slots` on for none.
      past: keys and values of tokens that every row begins with (see `decoder.make_past`), or None.
      dtype: what activations are computed in.
      attention: one of `models.attention.implementations.IMPLEMENTATIONS`.
    """
    start = 0 if past is None else past.keys.shape[1]
    places = jnp.arange(tokens_BL.shape[1])
    branch_BL = (places < length_B[:, None]).astype(jnp.int32)
    positions_BL = jnp.broadcast_to(start + places, tokens_BL.shape)
    kept = keys_and_values(
        config,
        params,
        tokens_BL,
        positions_BL,
        branch_BL,
        past=past,
        dtype=dtype,
        attention=attention,
    )
    return kv_cache.insert(cache, shape, kept, past, start + length_B, slot_BS)


def extend(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    shape: CacheShape,
    tokens_RL: jax.Array,
    length_R: jax.Array,
    start_R: jax.Array,
    slot_R: jax.Array,
    *,
    dtype=jnp.float32,
) -> Cache:
    """The cache with more tokens in some slots, behind the first ones that they hold.

    Slots are whole on every device, and no more positions than the shortest ring has places are
    held before or after.

    Args:
      tokens_RL: int32 rows of tokens; what follows them is padding.
      length_R: int32, tokens of each row that are real.
      start_R: int32, tokens of each slot that stay: the new ones' first position.
      slot_R: int32, the slot of each row; any number from `shape.slots` on for none.
      dtype: what activations are computed in.
    """
    positions_RL = start_R[:, None] + jnp.arange(tokens_RL.shape[1])

    def attend(q_RLNH, k_RLKH, v_RLKH, first, blocks, rule):
        of_slots = start_R, slot_R
        return cached.attend_rows(q_RLNH, k_RLKH, v_RLKH, cache, first, blocks, *of_slots, rule)

    _, kept = _run(as_module(config, params), tokens_RL, positions_RL, shape, dtype, attend)
    return kv_cache.append_rows(cache, shape, *kept, start_R, length_R, slot_R)


def step(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    shape: CacheShape,
    token_B: jax.Array,
    length_B: jax.Array,
    active_B: jax.Array | None = None,
    *,
    dtype=jnp.float32,
) -> tuple[jax.Array, Cache]:
    """Reads one token in each slot: logits of the next one, float32 (B, V), and the cache with it.

    Args:
      token_B: int32, the tokens.
      length_B: int32, tokens that the slots hold before: the new ones' positions.
      active_B: bool, slots whose logits are wanted; those of the others take no time for what their
        slots hold, and mean nothing. None for all.
    """
    model = as_module(config, params)
    seen_B = length_B if active_B is None else jnp.where(active_B, length_B, 0)

    def attend(q_B1NH, k_B1KH, v_B1KH, first, blocks, rule):
        new = q_B1NH[:, 0], k_B1KH[:, 0], v_B1KH[:, 0]
        return cached.attend(*new, cache, first, blocks, seen_B, rule)[:, None]

    x_B1D, kept = _run(model, token_B[:, None], length_B[:, None], shape, dtype, attend)
    cache = kv_cache.append(cache, shape, *(x_LB1KH[:, :, 0] for x_LB1KH in kept), length_B)
    hidden_B1D, unembedding_VD = placement.split_logits(
        model.final(x_B1D), unembedding(params).astype(dtype)
    )
    logits_B1V = lm_head.logits(hidden_B1D, unembedding_VD, softcap=config.final_logit_softcapping)
    return placement.whole_logits(logits_B1V)[:, 0], cache


def _run(model: Decoder, tokens_BL, positions_BL, shape: CacheShape, dtype, attend):
    """All layers' output (B, L, D), and the new keys and values (layers, B, L, K, H).

    Args:
      attend: `(q, k, v, first block, blocks, rule) -> attended` of a layer.
    """
    ropes = rope_tables(model.config, positions_BL)
    graphdef, stacked = nnx.split(model.layers)
    # Scanned along only where layers differ in them.
    blocks = None if len(set(shape.blocks)) == 1 else jnp.asarray(shape.blocks)

    def body(x_BLD, scanned):
        slice_, kind, first, own_blocks = scanned
        layer, rope = nnx.merge(graphdef, slice_), kind.rope_of(ropes)
        normed = layer.normed_for_attention(x_BLD)
        q_BLNH, k_BLKH = layer.queries(normed, rope), layer.keys(normed, rope)
        v_BLKH = layer.values(normed)
        of_layer = first, shape.blocks[0] if own_blocks is None else own_blocks
        rule = kind.score_rule(model.config)
        attended = attend(q_BLNH, k_BLKH, v_BLKH, *of_layer, rule)
        return layer.after_attention(x_BLD, attended), (k_BLKH, v_BLKH)

    scanned = stacked, layer_kinds(model.config), jnp.asarray(shape.first_blocks), blocks
    return jax.lax.scan(body, model.embed(tokens_BL, dtype), scanned)
