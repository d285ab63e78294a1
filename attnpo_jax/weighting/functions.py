"""Token weightings: how much each response token counts in the objective.

A weighting is a pure function `(response: ResponseTokens, **hyperparameters) -> weights_BT`. It
sees one response a row and works under jit, grad, vmap, pmap and shard_map. Add one with a
decorator, here or in a file named in `config.plugins`; its keyword-only arguments are its fields
in `config.weighting`:

    @weighting.register
    def first_tokens(response, *, count: int = 8):
        place_BT = jnp.cumsum(response.mask_BT, axis=-1)
        return (response.mask_BT & (place_BT <= count)).astype(jnp.float32)

Shape suffixes: B responses, T response tokens, S judged layers, 2 judge orders.
"""

import dataclasses
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from attnpo_jax.registry import Registry, RegistryError

registry = Registry("weighting", inputs=("response",))
register = registry.register
get = registry.get
names = registry.names
hyperparameters = registry.hyperparameters
annotations = registry.annotations
bind = registry.bind

# A response with fewer tokens than this keeps the weight of its first token.
MIN_TOKENS_FOR_SINK_FIX = 5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ResponseTokens:
    """What a weighting may use of B responses of at most T tokens.

    Attributes:
      mask_BT: bool, true on every token of the response, closing template tokens included.
      text_mask_BT: bool, true on the tokens of the response's text; implies `mask_BT`.
      judge_B2ST: float32, raw attention from the judge's verdict position to the tokens, by order
        of the answers (0: chosen at A, 1: chosen at B) and judged layer. Values off `text_mask_BT`
        carry no meaning.
      verdict_B2: float32, by order, log-probability of the letter of the chosen response minus
        that of the other letter; NaN where `judge.verdict` is False.
      reference_logps_BT: float32, log-probability of each token under the reference.
      policy_logps_BT: float32, the same under the policy, gradient stopped.
      is_chosen: bool (B,), whether the row is its pair's chosen response.
      source_layers: which layers the S axis holds, counted from 0; None: layers are then named by
        their place on the S axis.
      num_layers: how many layers the model has; negative layers count from it.
      ready_BKT: float32, weights that came with the data, by column; 0 off `text_mask_BT`. None
        where none did.
      weight_columns: the names of the columns on the K axis.
    """

    mask_BT: jax.Array
    text_mask_BT: jax.Array
    judge_B2ST: jax.Array
    verdict_B2: jax.Array
    reference_logps_BT: jax.Array
    policy_logps_BT: jax.Array
    is_chosen: jax.Array
    source_layers: tuple[int, ...] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    num_layers: int | None = dataclasses.field(default=None, metadata={"static": True})
    ready_BKT: jax.Array | None = None
    weight_columns: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})


def select_sources(
    layer: int | Sequence[int],
    source_layers: Sequence[int],
    num_layers: int | None,
) -> tuple[int, ...]:
    """Places on the source axis of the layers asked for.

    Args:
      layer: one layer or several, counted from 0; negative ones count from `num_layers`.
      source_layers: the layers on the source axis, in its order.
      num_layers: how many layers the model has; needed for negative layers only.

    Raises:
      RegistryError: no layer, one that is not a whole number, or one that is not on the axis; the
        message lists the layers that are.
    """
    available = ", ".join(map(str, source_layers))
    layers = tuple(layer) if isinstance(layer, (tuple, list)) else (layer,)
    if not layers or any(isinstance(x, bool) or not isinstance(x, int) for x in layers):
        raise RegistryError(
            f"layer is {layer!r}; accepted: a layer number or a tuple of them, of {available}"
        )
    places = []
    for wanted in layers:
        if wanted < 0 and num_layers is None:
            raise RegistryError(
                f"layer {wanted} counts from the last one, but the number of layers is not known; "
                f"accepted: {available}"
            )
        resolved = wanted + num_layers if wanted < 0 else wanted
        if resolved not in source_layers:
            of = "" if num_layers is None else f" (the model has {num_layers} layers)"
            raise RegistryError(
                f"layer {wanted} is not among the judge's layers; accepted: {available}{of}"
            )
        places.append(list(source_layers).index(resolved))
    return tuple(places)


def select_columns(
    column: int | str | Sequence[int | str], weight_columns: Sequence[str]
) -> tuple[int, ...]:
    """Places on the K axis of the columns of precomputed weights asked for.

    Args:
      column: one name or several; a negative number counts from the last column.
      weight_columns: the names on the axis, in its order.

    Raises:
      RegistryError: no column, or one that the data lack; the message lists those there are.
    """
    wanted = tuple(column) if isinstance(column, (tuple, list)) else (column,)
    available = ", ".join(weight_columns) or "none, for config.data.weight_columns names none"
    places = []
    for name in wanted:
        if isinstance(name, int) and -len(weight_columns) <= name < 0:
            places.append(len(weight_columns) + name)
        elif str(name) in weight_columns:
            places.append(list(weight_columns).index(str(name)))
        else:
            raise RegistryError(
                f"column {name!r} is not among the data's precomputed weights; "
                f"accepted: {available}"
            )
    if not places:
        raise RegistryError(f"column is {column!r}; accepted: a column or a tuple of: {available}")
    return tuple(places)


@register
def uniform(response: ResponseTokens) -> jax.Array:
    """Weight 1 on every token of the response, closing template tokens included: DPO.

    TwDPO with these weights is DPO (https://arxiv.org/abs/2305.18290).

    Args:
      response: masks (B, T); nothing else is read.

    Returns:
      Weights (B, T), float32: 1 on `mask_BT`, 0 elsewhere.

    >>> import jax.numpy as jnp
    >>> mask = jnp.array([[True, True, False]])
    >>> zeros = jnp.zeros((1, 3))
    >>> response = ResponseTokens(
    ...     mask_BT=mask, text_mask_BT=mask, judge_B2ST=jnp.zeros((1, 2, 1, 3)),
    ...     verdict_B2=jnp.zeros((1, 2)), reference_logps_BT=zeros, policy_logps_BT=zeros,
    ...     is_chosen=jnp.array([True]))
    >>> uniform(response).tolist()
    [[1.0, 1.0, 0.0]]
    """
    chex.assert_rank(response.mask_BT, 2, custom_message="mask_BT")
    chex.assert_type(response.mask_BT, bool, custom_message="mask_BT")
    return response.mask_BT.astype(jnp.float32)


@register
def attention(
    response: ResponseTokens, *, layer: int | tuple[int, ...] = -1, fix_sink: bool = True
) -> jax.Array:
    """Weight in proportion to the attention of the model as it judges the pair.

    AttentionPO (Huang et al. 2026), https://arxiv.org/abs/2605.21883. Per response and layer:
    each order's attention to the text tokens is divided by its sum (uniform where the sum is 0),
    the two orders are averaged, the first token's share is replaced by the mean share (`fix_sink`),
    and the shares are multiplied by the number n of text tokens. So the weights sum to n, as they
    do in DPO without closing tokens.

    Args:
      response: masks (B, T) and attention (B, 2, S, T).
      layer: of the model, -1 for the last; a tuple means the mean of these layers' weights.
      fix_sink: in texts of 5 tokens or more, give the first token the mean weight, whatever its
        attention, and scale the others so that the sum stays the number of text tokens. The first
        token soaks up attention for its place, not for what it says.

    Returns:
      Weights (B, T), float32, no gradient flows through them; 0 off `text_mask_BT`, and for a
      response without text.

    Raises:
      RegistryError: a layer that the judge's sources lack.

    >>> import jax.numpy as jnp
    >>> mask = jnp.array([[True, True, True, False]])
    >>> zeros = jnp.zeros((1, 4))
    >>> orders = jnp.array([[0.1, 0.1, 0.2, 0.0], [0.3, 0.1, 0.0, 0.0]])
    >>> response = ResponseTokens(
    ...     mask_BT=mask, text_mask_BT=mask, judge_B2ST=orders.reshape(1, 2, 1, 4),
    ...     verdict_B2=jnp.zeros((1, 2)), reference_logps_BT=zeros, policy_logps_BT=zeros,
    ...     is_chosen=jnp.array([True]), num_layers=1)
    >>> attention(response).round(4).tolist()  # shares (.25, .25, .5) and (.75, .25, 0), times 3
    [[1.5, 0.75, 0.75, 0.0]]
    """
    text_BT = response.text_mask_BT
    chex.assert_rank(text_BT, 2, custom_message="text_mask_BT")
    chex.assert_type(text_BT, bool, custom_message="text_mask_BT")
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
    judge_B2ST = jnp.where(text_BT[:, None, None], judge_B2ST.astype(jnp.float32), 0.0)

    share_B2ST = _normalize(judge_B2ST, _uniform(text_BT)[:, None, None])
    share_BST = jnp.mean(share_B2ST, axis=1)
    if fix_sink:
        share_BST = _fix_sink(share_BST, text_BT)
    return jnp.mean(share_BST, axis=1) * jnp.sum(text_BT, axis=-1, keepdims=True)


@register
def column(
    response: ResponseTokens,
    *,
    column: int | str | tuple[int | str, ...] = -1,
    fix_sink: bool = True,
    normalize: bool = True,
) -> jax.Array:
    """Precomputed weights, from the data's columns `chosen_weights_<name>` and `rejected_...`.

    With the columns that the authors of AttentionPO publish (each response's weights sum to 1, the
    first token's as it was found) the defaults give the weights that `attention` gives for the
    layer of that number.

    Args:
      response: masks (B, T) and precomputed weights (B, K, T).
      column: the column's name, as 31 or "attention_rollout"; -1 for the last one, which is the
        highest number; a tuple means the mean of these columns' weights.
      fix_sink: as for `attention`.
      normalize: scale each response's weights so that they sum to the number of its text tokens
        (uniform weights where the sum is 0). Otherwise they are taken as they are.

    Returns:
      Weights (B, T), float32, no gradient flows through them; 0 off `text_mask_BT`.

    Raises:
      RegistryError: a column that the data lack.

    >>> import jax.numpy as jnp
    >>> mask = jnp.array([[True, True, True, False]])
    >>> zeros = jnp.zeros((1, 4))
    >>> response = ResponseTokens(
    ...     mask_BT=mask, text_mask_BT=mask, judge_B2ST=jnp.zeros((1, 2, 0, 4)),
    ...     verdict_B2=jnp.zeros((1, 2)), reference_logps_BT=zeros, policy_logps_BT=zeros,
    ...     is_chosen=jnp.array([True]), ready_BKT=jnp.array([[[0.5, 0.25, 0.25, 0.0]]]),
    ...     weight_columns=("31",))
    >>> column(response).tolist()
    [[1.5, 0.75, 0.75, 0.0]]
    """
    text_BT = response.text_mask_BT
    chex.assert_rank(text_BT, 2, custom_message="text_mask_BT")
    chex.assert_type(text_BT, bool, custom_message="text_mask_BT")
    places = select_columns(column, response.weight_columns)
    B, T = text_BT.shape
    chex.assert_shape(response.ready_BKT, (B, None, T), custom_message="ready_BKT")
    ready_BKT = jax.lax.stop_gradient(response.ready_BKT)[:, list(places)].astype(jnp.float32)
    ready_BKT = jnp.where(text_BT[:, None], ready_BKT, 0.0)
    total_BK1 = jnp.sum(text_BT if normalize else ready_BKT, axis=-1, keepdims=True)
    total_BK1 = total_BK1[:, None] if normalize else total_BK1
    share_BKT = _normalize(ready_BKT, _uniform(text_BT)[:, None])
    if fix_sink:
        share_BKT = _fix_sink(share_BKT, text_BT)
    return jnp.mean(share_BKT * total_BK1, axis=1)


def _uniform(text_BT):
    """Equal shares (B, T) of the text tokens, which sum to 1 (to 0 without any)."""
    return text_BT / jnp.maximum(jnp.sum(text_BT, axis=-1, keepdims=True).astype(jnp.float32), 1.0)


def _fix_sink(share_BST, text_BT):
    """The shares with the first text token's set to the mean, where there are tokens enough."""
    n_B1 = jnp.sum(text_BT, axis=-1, keepdims=True).astype(jnp.float32)
    uniform_BT = _uniform(text_BT)
    first_BT = text_BT & (jnp.cumsum(text_BT, axis=-1) == 1)
    rest_BT = jnp.where(first_BT, 0.0, uniform_BT)
    rest_total_B1 = jnp.sum(rest_BT, axis=-1, keepdims=True)
    rest_uniform_BT = rest_BT / jnp.where(rest_total_B1 > 0, rest_total_B1, 1.0)
    rest_BST = _normalize(jnp.where(first_BT[:, None], 0.0, share_BST), rest_uniform_BT[:, None])
    fixed_BST = jnp.where(first_BT[:, None], uniform_BT[:, None], rest_BST * rest_total_B1[:, None])
    return jnp.where(n_B1[:, None] >= MIN_TOKENS_FOR_SINK_FIX, fixed_BST, share_BST)


def _normalize(values, fallback):
    """Divides by the sum over the last axis; `fallback` where that sum is 0."""
    total = jnp.sum(values, axis=-1, keepdims=True)
    # Sums below the smallest normal float would overflow as reciprocals. The comparison is the way
    # round that lets a NaN through, so that damaged rows show instead of turning uniform.
    empty = total < jnp.finfo(values.dtype).tiny
    return jnp.where(empty, fallback, values / jnp.where(empty, 1.0, total))
