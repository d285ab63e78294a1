"""The weighting `shuffled`: the judge's attention, dealt out anew within each response.

A response keeps its weights, but they go to other tokens than those the judge looked at: as
concentrated as `attention`, and in no particular place. A response's tokens decide the order, so it
is the same at every visit and in every run.
"""

import jax.numpy as jnp

from attnpo_jax import weighting


@weighting.register
def shuffled(response, *, layer: int = -1, fix_sink: bool = True):
    """The weights of `attention`, permuted within each response's text.

    Args:
      response: masks (B, T), attention (B, 2, S, T), token ids (B, T).
      layer: see `attention`.
      fix_sink: see `attention`; it comes before the shuffling.

    Returns:
      Weights (B, T), float32.

    Raises:
      RegistryError: the layer was not judged, or the tokens are not known.
    """
    weights_BT = weighting.attention(response, layer=layer, fix_sink=fix_sink)
    text_BT = response.text_mask_BT
    place_T = jnp.arange(text_BT.shape[1], dtype=jnp.uint32)
    # Of the text alone, so that padding does not count.
    of_tokens_BT = _stirred(response.known("tokens_BT").astype(jnp.uint32) + (place_T << 17))
    seed_B1 = jnp.sum(jnp.where(text_BT, of_tokens_BT, 0), axis=-1, keepdims=True, dtype=jnp.uint32)
    draws_BT = _stirred(seed_B1 ^ _stirred(place_T + 1))
    # Both list the places of the text first: as drawn, and as they stand.
    drawn_BT = jnp.lexsort((draws_BT, ~text_BT), axis=-1)
    standing_BT = jnp.argsort(~text_BT, axis=-1, stable=True)
    dealt_BT = jnp.take_along_axis(weights_BT, drawn_BT, axis=-1)
    return jnp.take_along_axis(dealt_BT, jnp.argsort(standing_BT, axis=-1), axis=-1)


def _stirred(x):
    """uint32 numbers with their bits stirred, one to one: the finalizer of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
