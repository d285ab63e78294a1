"""Decoding: prompts into a KV cache, and one more token in every slot.

Shapes: B slots or rows, L row length, P length of a shared past, D width, N query heads, K
key-value heads, H head dim, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from attnpo_jax.models import kv_cache, lm_head, placement
from attnpo_jax.models.attention.core import Past
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.models.decoder import Params, as_module, keys_and_values, unembedding
from attnpo_jax.models.kv_cache import Cache, CacheShape
from attnpo_jax.models.layer_kinds import layer_kinds, rope_tables

__all__ = ["Cache", "CacheShape", "prefill", "step"]


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


def step(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    shape: CacheShape,
    token_B: jax.Array,
    length_B: jax.Array,
    *,
    dtype=jnp.float32,
) -> tuple[jax.Array, Cache]:
    """Reads one token in each slot: logits of the next one, float32 (B, V), and the cache with it.

    Args:
      token_B: int32, the tokens.
      length_B: int32, tokens that the slots hold before: the new ones' positions.
    """
    model = as_module(config, params)
    ropes = rope_tables(config, length_B[:, None])
    graphdef, stacked = nnx.split(model.layers)
    # Scanned along only where layers differ in them.
    blocks = None if len(set(shape.blocks)) == 1 else jnp.asarray(shape.blocks)

    def body(x_B1D, scanned):
        slice_, kind, first, own_blocks = scanned
        layer, rope = nnx.merge(graphdef, slice_), kind.rope_of(ropes)
        normed = layer.normed_for_attention(x_B1D)
        q_BNH, k_BKH = layer.queries(normed, rope)[:, 0], layer.keys(normed, rope)[:, 0]
        v_BKH = layer.values(normed)[:, 0]
        of_layer = first, shape.blocks[0] if own_blocks is None else own_blocks
        rule = kind.score_rule(config)
        attended = kv_cache.attend(q_BNH, k_BKH, v_BKH, cache, *of_layer, length_B, rule)
        return layer.after_attention(x_B1D, attended[:, None]), (k_BKH, v_BKH)

    scanned = stacked, layer_kinds(config), jnp.asarray(shape.first_blocks), blocks
    x_B1D, (k_LBKH, v_LBKH) = jax.lax.scan(body, model.embed(token_B[:, None], dtype), scanned)
    cache = kv_cache.append(cache, shape, k_LBKH, v_LBKH, length_B)
    hidden_B1D, unembedding_VD = placement.split_logits(
        model.final(x_B1D), unembedding(params).astype(dtype)
    )
    logits_B1V = lm_head.logits(hidden_B1D, unembedding_VD, softcap=config.final_logit_softcapping)
    return placement.whole_logits(logits_B1V)[:, 0], cache
