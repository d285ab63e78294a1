"""Weights from shares of attention: the judge's, or ready-made ones that came with the data.

Shape suffixes: as in `functions`.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from attnpo_jax.registry import RegistryError
from attnpo_jax.weighting.functions import (
    MIN_TOKENS_FOR_SINK_FIX,
    ResponseTokens,
    check_mask,
    fix_sink_shares,
    normalized,
    register,
    select_columns,
    uniform_shares,
)
from attnpo_jax.weighting.sources import Source, select_sources


@register(needs=("judge",))
def attention(
    response: ResponseTokens,
    *,
    layer: Source | tuple[Source, ...] = -1,
    fix_sink: bool = True,
    layers: Literal["mean", "sum"] = "mean",
    order: Literal["mean", "first", "second", "contrast"] = "mean",
    renormalize: bool = True,
) -> jax.Array:
    """Weight in proportion to the attention of the model as it judges the pair.

    AttentionPO (Huang et al. 2026), https://arxiv.org/abs/2605.21883. Per response and layer:
    each order's attention to the text tokens is divided by its sum (uniform where the sum is 0),
    the two orders are averaged, the first token's share is replaced by the mean share (`fix_sink`),
    and the shares are multiplied by the number n of text tokens. So the weights sum to n, as they
    do in DPO without closing tokens.

    Args:
      response: masks (B, T) and attention (B, 2, S, T).
      layer: of the model, -1 for the last; "23:4" for head 4 of layer 23, "rollout" for attention
        rollout (https://arxiv.org/abs/2005.00928); a tuple for the weights of several together.
      fix_sink: in texts of 5 tokens or more, give the first token the mean weight, whatever its
        attention, and scale the others so that the sum stays the number of text tokens. The first
        token soaks up attention for its place, not for what it says.
      layers: several layers' weights count by their `mean`, or by their `sum`, as in the public
        code of AttentionPO: the weights of k layers then sum to k n.
      order: which order of the answers counts: the `mean` of both, the `first` (chosen at A) or the
        `second` (chosen at B) alone, or the `contrast`: how far a token's two shares are apart,
        scaled to sum 1 (uniform where they agree).
      renormalize: make the weights of what is left of a truncated response sum to the number of
        its text tokens. False, as in the public code: shares and the sink fix are those of the
        response as the judge read it, n is the number of its tokens there, and what is cut off
        takes its weight along.

    Returns:
      Weights (B, T), float32, no gradient flows through them; 0 off `text_mask_BT`, and for a
      response without text.

    Raises:
      RegistryError: a layer that the judge's sources lack; or, without `renormalize`, whole
        responses that are not known, or the order `contrast`.

    >>> response = ResponseTokens.of(
    ...     [[True, True, True, False]],
    ...     judge_B2ST=[[[[0.1, 0.1, 0.2, 0.0]], [[0.3, 0.1, 0.0, 0.0]]]])
    >>> attention(response).round(4).tolist()  # shares (.25, .25, .5) and (.75, .25, 0), times 3
    [[1.5, 0.75, 0.75, 0.0]]
    """
    text_BT = response.text_mask_BT
    check_mask(text_BT, "text_mask_BT")
    B, T = text_BT.shape
    chex.assert_shape(response.judge_B2ST, (B, 2, None, T), custom_message="judge_B2ST")

    num_sources = response.judge_B2ST.shape[2]
    if response.source_layers is None:
        places = select_sources(layer, range(num_sources), num_sources)
    else:
        chex.assert_equal(len(response.source_layers), num_sources)
        places = select_sources(layer, response.source_layers, response.num_layers)

    # The judge's attention is data: where the model looked, never something to train.
    judge_B2ST = jax.lax.stop_gradient(response.judge_B2ST)[:, :, list(places)]
    together = jnp.mean if layers == "mean" else jnp.sum
    if not renormalize:
        judge_B2ST = jnp.where(text_BT[:, None, None], judge_B2ST.astype(jnp.float32), 0.0)
        whole_B2S4 = response.known("whole_B2S4")[:, :, list(places)]
        return together(_of_whole(judge_B2ST, whole_B2S4, text_BT, order, fix_sink), axis=1)
    share_BST = attention_shares(judge_B2ST, text_BT, fix_sink=fix_sink, order=order)
    return together(share_BST, axis=1) * jnp.sum(text_BT, axis=-1, keepdims=True)


def attention_shares(
    judge_B2ST: jax.Array, text_BT: jax.Array, *, fix_sink: bool = True, order: str = "mean"
) -> jax.Array:
    """Each layer's shares (B, S, T) of raw attention, those of a response sum to 1.

    Args:
      judge_B2ST: raw attention by order, layer and token; what is off `text_BT` is not read.
      text_BT: bool, the tokens of the responses' texts.
      fix_sink, order: see `attention`.
    """
    judge_B2ST = jnp.where(text_BT[:, None, None], judge_B2ST.astype(jnp.float32), 0.0)
    share_B2ST = normalized(judge_B2ST, uniform_shares(text_BT)[:, None, None])
    share_BST = _one_order(share_B2ST, order, uniform_shares(text_BT)[:, None])
    return fix_sink_shares(share_BST, text_BT) if fix_sink else share_BST


def _of_whole(judge_B2ST, whole_B2S4, text_BT, order: str, fix_sink: bool):
    """Weights (B, S, T) of tokens by their shares of the whole response that they are left of."""
    if order == "contrast":
        raise RegistryError(
            "order 'contrast' is scaled by all of a response, which renormalize=False does not "
            "have; accepted with it: 'mean', 'first', 'second'"
        )
    total_B2S1, first_B2S1, count_B2S1, place_B2S1 = jnp.split(whole_B2S4, 4, axis=-1)
    count_BS1 = jnp.maximum(count_B2S1[:, 0], 1.0)
    empty = total_B2S1 < jnp.finfo(jnp.float32).tiny
    of_whole = jnp.where(empty, 1.0, total_B2S1)
    uniform = 1.0 / count_BS1[:, None]
    share_B2ST = jnp.where(empty, uniform, judge_B2ST / of_whole)
    share_BST = _one_order(jnp.where(text_BT[:, None, None], share_B2ST, 0.0), order, None)
    if fix_sink:
        first_BS1 = _one_order(jnp.where(empty, uniform, first_B2S1 / of_whole), order, None)
        rest_BS1 = 1.0 - first_BS1
        alone = rest_BS1 < 1e-6  # nothing but the first token was looked at
        fixed_BST = share_BST * (1.0 - 1.0 / count_BS1) / jnp.where(alone, 1.0, rest_BS1)
        fixed_BST = jnp.where(alone, 1.0 / count_BS1, fixed_BST)
        is_first_BST = jnp.arange(text_BT.shape[1]) == place_B2S1[:, 0]
        fixed_BST = jnp.where(is_first_BST, 1.0 / count_BS1, fixed_BST)
        share_BST = jnp.where(count_BS1 >= MIN_TOKENS_FOR_SINK_FIX, fixed_BST, share_BST)
    return jnp.where(text_BT[:, None], share_BST * count_BS1, 0.0)


def _one_order(share_B2ST, order: str, uniform_B1T):
    """Of the shares in both orders, those of `order`: (B, S, T)."""
    if order == "mean":
        return jnp.mean(share_B2ST, axis=1)
    first_BST, second_BST = share_B2ST[:, 0], share_B2ST[:, 1]
    if order == "contrast":
        apart_BST = jnp.abs(first_BST - second_BST)
        # What rounding makes of equal shares is no difference.
        agree_BST = apart_BST <= 1e-6 * (first_BST + second_BST)
        return normalized(jnp.where(agree_BST, 0.0, apart_BST), uniform_B1T)
    return first_BST if order == "first" else second_BST


@register
def column(
    response: ResponseTokens,
    *,
    column: int | str | tuple[int | str, ...] = -1,
    fix_sink: bool = True,
    normalize: bool = True,
    columns: Literal["mean", "sum"] = "mean",
) -> jax.Array:
    """Precomputed weights, from the data's columns `chosen_weights_<name>` and `rejected_...`.

    With the columns that the authors of AttentionPO publish (each response's weights sum to 1, the
    first token's as it was found) the defaults give the weights that `attention` gives for the
    layer of that number.

    Args:
      response: masks (B, T) and precomputed weights (B, K, T).
      column: the column's name, as 31 or "attention_rollout"; -1 for the last one, which is the
        highest number; a tuple means several columns' weights together.
      fix_sink: as for `attention`; of a response with a negative weight, all stay.
      normalize: scale each response's weights so that their magnitudes sum to the number of its
        text tokens (uniform weights where all are 0). Otherwise they are taken as they are.
      columns: several columns' weights count by their `mean` or by their `sum`.

    Returns:
      Weights (B, T), float32, no gradient flows through them; 0 off `text_mask_BT`.

    Raises:
      RegistryError: a column that the data lack.

    >>> response = ResponseTokens.of(
    ...     [[True, True, True, False]], ready_BKT=[[[0.5, 0.25, 0.25, 0.0]]],
    ...     weight_columns=("31",))
    >>> column(response).tolist()
    [[1.5, 0.75, 0.75, 0.0]]
    """
    text_BT = response.text_mask_BT
    check_mask(text_BT, "text_mask_BT")
    places = select_columns(column, response.weight_columns)
    B, T = text_BT.shape
    chex.assert_shape(response.ready_BKT, (B, None, T), custom_message="ready_BKT")
    ready_BKT = jax.lax.stop_gradient(response.ready_BKT)[:, list(places)].astype(jnp.float32)
    ready_BKT = jnp.where(text_BT[:, None], ready_BKT, 0.0)
    together = jnp.mean if columns == "mean" else jnp.sum
    if not (normalize or fix_sink):
        return together(ready_BKT, axis=1)
    magnitude_BK1 = jnp.sum(jnp.abs(ready_BKT), axis=-1, keepdims=True)
    count_B11 = jnp.sum(text_BT, axis=-1, keepdims=True)[:, None]
    share_BKT = normalized(ready_BKT, uniform_shares(text_BT)[:, None])
    if fix_sink:
        signed_BK1 = jnp.any(ready_BKT < 0, axis=-1, keepdims=True)
        share_BKT = jnp.where(signed_BK1, share_BKT, fix_sink_shares(share_BKT, text_BT))
    return together(share_BKT * (count_B11 if normalize else magnitude_BK1), axis=1)
