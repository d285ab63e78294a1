"""A look at single pairs: what each token of a judged pair weighs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnpo_jax import weighting
from attnpo_jax.data.pair import Pair
from attnpo_jax.data.tokenize import TokenizedPair
from attnpo_jax.judge.judge import Judgement


def token_weights(
    pair: Pair,
    tokenized: TokenizedPair,
    judgement: Judgement,
    name: str = "attention",
    **hyperparameters: Any,
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """The weight of every text token of a judged pair.

    Args:
      tokenized, judgement: what `judge.judge_pairs` gives for it.
      name: a registered weighting.
      **hyperparameters: its hyperparameters. As in a config, layers are those of the model, counted
        from 0, negative ones from its end; of them, the judge must have kept those asked for.

    Returns:
      For the chosen and for the rejected response: (text, weight) by token, closing template
      tokens left out. Log-probs and entropies are not known here: the weights of a weighting that
      reads them are NaN.

    Raises:
      RegistryError: no such weighting or hyperparameter, or a layer that the judge did not keep;
        the message lists those that it kept.
    """
    weigh = weighting.bind(name, hyperparameters)
    ids = {side: getattr(tokenized, f"{side}_ids") for side in ("chosen", "rejected")}
    sides = []
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        attention, whole = getattr(judgement, side), getattr(judgement, f"{side}_whole")
        text_length = getattr(tokenized, f"{side}_text_length")
        T = len(ids[side])
        judge_2ST = np.zeros((*attention.shape[:2], T), np.float32)
        judge_2ST[..., :text_length] = attention
        unknown_BT = jnp.full((1, T), jnp.nan)
        weights_BT = weigh(
            weighting.ResponseTokens(
                mask_BT=jnp.ones((1, T), bool),
                text_mask_BT=jnp.arange(T)[None] < text_length,
                judge_B2ST=jnp.asarray(judge_2ST)[None],
                verdict_B2=jnp.asarray(judgement.verdict)[None],
                reference_logps_BT=unknown_BT,
                policy_logps_BT=unknown_BT,
                is_chosen=jnp.array([side == "chosen"]),
                source_layers=judgement.source_layers,
                num_layers=judgement.num_layers,
                whole_B2S4=None if whole is None else jnp.asarray(whole)[None],
                tokens_BT=jnp.asarray(ids[side])[None],
                partner_tokens_BT=jnp.asarray(ids[other])[None],
                partner_length_B=jnp.array([len(ids[other])]),
                **{
                    f"{need}_BT": unknown_BT
                    for need in weighting.needs(name, hyperparameters)
                    if need.endswith(("_entropy", "_collision"))
                },
            )
        )
        text, spans = tokenized.text(pair, side), getattr(tokenized, f"{side}_spans")
        weights = jax.device_get(weights_BT)[0, :text_length].tolist()
        pieces = [text[start:end] for start, end in spans]
        sides.append(list(zip(pieces, weights, strict=True)))
    return sides[0], sides[1]
