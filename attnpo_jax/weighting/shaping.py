"""What may be made of any weighting's weights: `config.shaping`, so that none has to offer it.

Shape suffixes: as in `functions`; P pairs, whose responses take turns: chosen, rejected.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from attnpo_jax.weighting.functions import (
    ResponseTokens,
    normalized,
    to_length,
    top_tokens,
    uniform_shares,
)

Weighting = Callable[[ResponseTokens], jax.Array]


def shaped(
    weigh: Weighting,
    *,
    top_share: float = 1.0,
    smooth: int = 0,
    normalize: Literal["raw", "length", "pair"] = "raw",
    floor: float | None = None,
    mix: float = 1.0,
) -> Weighting:
    """A weighting whose weights are shaped, in the order of the arguments.

    Args:
      weigh: gives weights (B, T), hyperparameters bound.
      top_share: of a response's tokens, the share with the highest weights that keep theirs
        (rounded up); the others' are 0.
      smooth: each weight becomes the mean of those up to this many tokens before and behind it.
      normalize: `raw` leaves the sums; `length` scales a response's weights so that they sum to its
        number of tokens; `pair` scales those of both responses by one factor, so that their mean is
        1. Closing template tokens count, as they do in DPO. Of weights of both signs, magnitudes
        sum to it; where all are 0, they become uniform.
      floor: no weight is below it; None for no floor.
      mix: weights become (1 - mix) + mix times themselves: 0 is DPO, 1 the weighting alone.

    Returns:
      `weigh` itself where nothing is asked for; else a function of responses of which, with `pair`,
      rows 2p and 2p + 1 are of one pair, as in a training step. It gives weights (B, T), float32, 0
      off `mask_BT`; no gradient flows through them.

    >>> response = ResponseTokens.of([[True, True, True, True, False]])
    >>> def steps(response):
    ...     return jnp.array([[4.0, 0.0, 2.0, 2.0, 9.0]])
    >>> shaped(steps, mix=0.5)(response).tolist()
    [[2.5, 0.5, 1.5, 1.5, 0.0]]
    >>> shaped(steps, top_share=0.25, normalize="length")(response).tolist()
    [[4.0, 0.0, 0.0, 0.0, 0.0]]
    >>> shaped(steps) is steps
    True
    """
    steps = []
    if top_share < 1:
        steps.append(functools.partial(_top_share, share=top_share))
    if smooth:
        steps.append(functools.partial(_smooth, width=smooth))
    if normalize != "raw":
        steps.append(to_length if normalize == "length" else _to_pair)
    if floor is not None:
        steps.append(lambda weights_BT, mask_BT: jnp.maximum(weights_BT, floor))
    if mix != 1:
        steps.append(lambda weights_BT, mask_BT: (1 - mix) + mix * weights_BT)
    if not steps:
        return weigh

    def shape(response: ResponseTokens) -> jax.Array:
        mask_BT = response.mask_BT
        weights_BT = jax.lax.stop_gradient(weigh(response)).astype(jnp.float32)
        for step in steps:
            weights_BT = jnp.where(mask_BT, step(weights_BT, mask_BT), 0.0)
        return weights_BT

    return shape


def _top_share(weights_BT, mask_BT, share):
    return jnp.where(top_tokens(weights_BT, mask_BT, share), weights_BT, 0.0)


def _smooth(weights_BT, mask_BT, width):
    """The means over windows of the response's tokens; at its ends, of those that there are."""

    def in_window(x_BT):
        T = x_BT.shape[-1]
        padded = jnp.pad(x_BT, ((0, 0), (width, width)))
        # Places, not a difference of running sums: that would lose digits in long responses.
        return sum(padded[:, shift : shift + T] for shift in range(2 * width + 1))

    total_BT = in_window(jnp.where(mask_BT, weights_BT, 0.0))
    return total_BT / jnp.maximum(in_window(mask_BT.astype(jnp.float32)), 1.0)


def _to_pair(weights_BT, mask_BT):
    """Scaled by one factor a pair, so that the mean over both responses' tokens is 1."""
    T = mask_BT.shape[-1]
    both_P2T = mask_BT.reshape(-1, 2 * T)
    weights_P2T = jnp.where(both_P2T, weights_BT.reshape(-1, 2 * T), 0.0)
    count_P1 = jnp.sum(both_P2T, axis=-1, keepdims=True)
    return (normalized(weights_P2T, uniform_shares(both_P2T)) * count_P1).reshape(mask_BT.shape)
