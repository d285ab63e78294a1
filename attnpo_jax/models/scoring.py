"""Log-probs of every response token of a batch of rows: the policy's and the reference's pass.

Statistics of the tokens' distributions come with them where they are asked for.

Shapes: as in `data.batching`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from attnpo_jax.models import decoder
from attnpo_jax.models.divergence import token_divergence
from attnpo_jax.models.lm_head import token_logps, token_statistics

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
) -> jax.Array:
    """Log-prob of each response token: float32 (B, G, 2, T), 0 where there is no token.

    Both responses of a pair share one pass over the prompt, and only the hidden states that predict
    response tokens reach the LM head.

    Args:
      batch: rows without a microbatch axis.
      chunk: tokens whose logits exist at a time.
    """
    logps_BG2T, _ = response_scores(
        config, params, batch, dtype=dtype, remat=remat, attention=attention, chunk=chunk
    )
    return logps_BG2T


def response_scores(
    config: decoder.ModelConfig,
    params: decoder.Params,
    batch: PairBatch,
    *,
    statistics: Sequence[str] = (),
    reference: tuple[decoder.ModelConfig, decoder.Params] | None = None,
    dtype=jnp.float32,
    remat: str = "none",
    attention: str = "xla",
    chunk: int = 2048,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Log-prob of each response token, and statistics of the distribution that it is from.

    Args:
      statistics: of `lm_head.STATISTICS`. No gradient flows through them.
      reference: shape and parameters of another model of the same vocabulary, for one more
        statistic, `reference_kl`: KL(reference || model) of the two distributions, in nats. Its
        gradient flows to the model alone.
      config, params, batch, dtype, remat, attention, chunk: as for `response_logps`.

    Returns:
      The log-probs and the statistics by name, all float32 (B, G, 2, T), 0 where there is no token.
    """

    pairs = batch.valid_BG.shape[1]

    def hidden_of(config, params, remat):
        hidden_BLD = decoder.forward(
            config,
            params,
            batch.tokens_BL,
            batch.positions_BL,
            batch.branch_BL,
            segment_BL=batch.segment_BL if pairs > 1 else None,
            most_segments=pairs,
            dtype=dtype,
            remat=remat,
            attention=attention,
        )
        return jnp.take_along_axis(hidden_BLD, batch.read_BM[..., None], axis=1)

    hidden_BMD = hidden_of(config, params, remat)
    unembedding_VD, softcap = decoder.unembedding(params), config.final_logit_softcapping
    logps_BM = token_logps(
        hidden_BMD, unembedding_VD, batch.target_BM, softcap=softcap, chunk=chunk
    )
    statistics_BM = token_statistics(
        statistics, hidden_BMD, unembedding_VD, softcap=softcap, chunk=chunk
    )
    if reference is not None:
        of_reference, frozen = reference[0], jax.lax.stop_gradient(reference[1])
        statistics_BM["reference_kl"] = token_divergence(
            hidden_BMD,
            unembedding_VD,
            hidden_of(of_reference, frozen, "none"),
            decoder.unembedding(frozen),
            softcap=softcap,
            reference_softcap=of_reference.final_logit_softcapping,
            chunk=chunk,
        )

    def by_response(values_BM):
        flat = jnp.take_along_axis(values_BM, batch.index_BG2T.reshape(len(values_BM), -1), axis=1)
        return jnp.where(batch.mask_BG2T, flat.reshape(batch.mask_BG2T.shape), 0.0)

    return by_response(logps_BM), jax.tree.map(by_response, statistics_BM)
