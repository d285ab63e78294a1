"""Log-probs of every response token of a batch of rows: the policy's and the reference's pass.

Shapes: as in `data.batching`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from attnpo_jax.models import decoder
from attnpo_jax.models.lm_head import token_logps

if TYPE_CHECKING:
    from attnpo_jax.data.batching import PairBatch


def response_logps(
    config: decoder.ModelConfig,
    params: decoder.Params,
    batch: PairBatch,
    *,
    dtype=jnp.float32,
    remat: str = "none",
    attention: str = "xla",
    chunk: int = 2048,
    collision: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Log-prob of each response token: float32 (B, G, 2, T), 0 where there is no token.

    Both responses of a pair share one pass over the prompt, and only the hidden states that predict
    response tokens reach the LM head.

    Args:
      batch: rows without a microbatch axis.
      chunk: tokens whose logits exist at a time.
      collision: whether to give log sum_v p_v^2 of the distribution that each token is of too, of
        the same shape; no gradient flows through it.

    Returns:
      The log-probs; with `collision`, both.
    """
    hidden_BLD = decoder.forward(
        config,
        params,
        batch.tokens_BL,
        batch.positions_BL,
        batch.branch_BL,
        segment_BL=batch.segment_BL if batch.valid_BG.shape[1] > 1 else None,
        dtype=dtype,
        remat=remat,
        attention=attention,
    )
    hidden_BMD = jnp.take_along_axis(hidden_BLD, batch.read_BM[..., None], axis=1)
    scored = token_logps(
        hidden_BMD,
        decoder.unembedding(params),
        batch.target_BM,
        softcap=config.final_logit_softcapping,
        chunk=chunk,
        collision=collision,
    )

    def by_response(x_BM):
        flat = jnp.take_along_axis(x_BM, batch.index_BG2T.reshape(len(x_BM), -1), axis=1)
        return jnp.where(batch.mask_BG2T, flat.reshape(batch.mask_BG2T.shape), 0.0)

    return jax.tree.map(by_response, scored)
