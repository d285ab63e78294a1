"""What all token weightings stand on: the registry, what they may read, and how weights are scaled.

A weighting is a pure function `(response: ResponseTokens, **hyperparameters) -> weights_BT`. It
sees one response a row and works under jit, grad, vmap, pmap and shard_map. Add one with a
decorator, in a file beside this one or in one that is named in `config.plugins`; its keyword-only
arguments are its fields in `config.weighting`:

    @weighting.register
    def first_tokens(response, *, count: int = 8):
        place_BT = jnp.cumsum(response.mask_BT, axis=-1)
        return (response.mask_BT & (place_BT <= count)).astype(jnp.float32)

What costs a pass is computed where something declares that it reads it, a weighting as
`@weighting.register(needs=("policy_entropy",))`.

Shape suffixes: B responses, T response tokens, S judged layers, 2 judge orders, K columns.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from attnpo_jax.registry import Registry, RegistryError
from attnpo_jax.weighting.sources import Source

NEEDS = (
    "judge",
    "reference_logps",
    "reference_entropy",
    "policy_entropy",
    "policy_collision",
)
"""What a weighting may declare: `<name>_BT` of `ResponseTokens` is there for those that do, and for
`judge`, `judge_B2ST` and `verdict_B2`."""

registry = Registry("weighting", inputs=("response",), accepted_needs=NEEDS)
register = registry.register
needs = registry.needs
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
        carry no meaning. A `NotComputed` where nobody declared that it needs the judge.
      verdict_B2: float32, by order, log-probability of the letter of the chosen response minus
        that of the other letter; NaN where `judge.verdict` is False, and as `judge_B2ST`.
      reference_logps_BT: float32, log-probability of each token under the reference. A
        `NotComputed` where neither the weighting nor the objective needs it.
      policy_logps_BT: float32, the same under the policy, gradient stopped.
      is_chosen: bool (B,), whether the row is its pair's chosen response.
      source_layers: what the S axis holds, as `sources` names it: layers, counted from 0, single
        heads, rollout. None: layers are then named by their place on the S axis.
      num_layers: how many layers the model has; negative layers count from it.
      ready_BKT: float32, numbers of any sign by column: those of scorers, then those that came with
        the data. The latter are 0 off `text_mask_BT`; a scorer's are 0 where it has no number for a
        closing template token. None where there is no column.
      weight_columns: the names of the columns on the K axis.
      whole_B2S4: float32, of the response as the judge read it, whatever training cuts off, by
        order and source: the sum of its attention, that of its first token, how many tokens it has,
        and the place of its first one on the T axis, below 0 where it is cut off. None unless
        `judge.whole_responses`.
      tokens_BT: int32, the tokens' ids; -1 off `mask_BT`. None where they are not known.
      partner_tokens_BT: int32, the ids of the other response of the row's pair, -1 behind its end.
        None where they are not known.
      partner_length_B: int32, how many tokens the other response has, closing template tokens
        included. None where that is not known.
      reference_entropy_BT: float32, entropy in nats of the reference's distribution of each token.
        None, or a `NotComputed`, unless the weighting declared that it needs it.
      policy_entropy_BT: float32, entropy in nats of the policy's distribution of each token. None
        unless the weighting declared that it needs it.
      policy_collision_BT: float32, log of the sum of that distribution's squared probabilities.
        None unless the weighting declared that it needs it.
    """

    mask_BT: jax.Array
    text_mask_BT: jax.Array
    judge_B2ST: jax.Array
    verdict_B2: jax.Array
    reference_logps_BT: jax.Array
    policy_logps_BT: jax.Array
    is_chosen: jax.Array
    source_layers: tuple[Source, ...] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    num_layers: int | None = dataclasses.field(default=None, metadata={"static": True})
    ready_BKT: jax.Array | None = None
    weight_columns: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    whole_B2S4: jax.Array | None = None
    tokens_BT: jax.Array | None = None
    partner_tokens_BT: jax.Array | None = None
    partner_length_B: jax.Array | None = None
    reference_entropy_BT: jax.Array | None = None
    policy_entropy_BT: jax.Array | None = None
    policy_collision_BT: jax.Array | None = None

    @classmethod
    def of(cls, mask_BT: Any, **fields: Any) -> "ResponseTokens":
        """Responses of which little is known, to look at a weighting or to test it.

        Args:
          mask_BT: as the field, also as nested lists of True and False.
          **fields: other fields, also as nested lists. Those left out: all tokens are text and all
            responses chosen, numbers are 0, and there is neither a judged layer nor what is None
            by default.
        """
        mask_BT = jnp.asarray(mask_BT, bool)
        B, T = mask_BT.shape
        static = {f.name for f in dataclasses.fields(cls) if f.metadata.get("static")}
        known = {name: x if name in static else jnp.asarray(x) for name, x in fields.items()}
        zeros_BT = jnp.zeros((B, T))
        return cls(
            **{
                "mask_BT": mask_BT,
                "text_mask_BT": mask_BT,
                "judge_B2ST": jnp.zeros((B, 2, 0, T)),
                "verdict_B2": jnp.zeros((B, 2)),
                "reference_logps_BT": zeros_BT,
                "policy_logps_BT": zeros_BT,
                "is_chosen": jnp.ones(B, bool),
                **known,
            }
        )

    def known(self, field: str) -> jax.Array:
        """A field that may be None; no gradient flows through it.

        Raises:
          RegistryError: it is None: whoever made the responses does not know it.
        """
        value = getattr(self, field)
        if value is None:
            raise RegistryError(
                f"{field} is not known here; a training step knows the tokens of both responses, "
                f"and what the weighting declares when it registers ({', '.join(NEEDS)})"
            )
        return jax.lax.stop_gradient(value)

    @property
    def columns(self) -> dict[str, jax.Array]:
        """Scorers and the data's columns by name, (B, T) each, see `ready_BKT`."""
        return {name: self.ready_BKT[:, k] for k, name in enumerate(self.weight_columns)}


def select_columns(
    column: int | str | Sequence[int | str], weight_columns: Sequence[str]
) -> tuple[int, ...]:
    """Places on the K axis of the columns asked for, of scorers or precomputed weights.

    Args:
      column: one name or several; a negative number counts from the last column.
      weight_columns: the names on the axis, in its order.

    Raises:
      RegistryError: no column, or one that the data lack; the message lists those there are.
    """
    wanted = tuple(column) if isinstance(column, (tuple, list)) else (column,)
    available = ", ".join(weight_columns) or (
        "none, for config.data.weight_columns and config.prepare.scorers name none"
    )
    places = []
    for name in wanted:
        if isinstance(name, int) and -len(weight_columns) <= name < 0:
            places.append(len(weight_columns) + name)
        elif str(name) in weight_columns:
            places.append(list(weight_columns).index(str(name)))
        else:
            raise RegistryError(
                f"column {name!r} is neither a scorer nor among the data's precomputed weights; "
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

    >>> uniform(ResponseTokens.of([[True, True, False]])).tolist()
    [[1.0, 1.0, 0.0]]
    """
    check_mask(response.mask_BT, "mask_BT")
    return response.mask_BT.astype(jnp.float32)


def read_column(response: ResponseTokens, column: int | str) -> jax.Array:
    """A scorer's or one of the data's columns, float32 (B, T); no gradient flows through it.

    Raises:
      RegistryError: there is none of that name; the message lists those there are.
    """
    (place,) = select_columns(column, response.weight_columns)
    B, T = response.mask_BT.shape
    chex.assert_shape(response.ready_BKT, (B, None, T), custom_message="ready_BKT")
    return jax.lax.stop_gradient(response.ready_BKT)[:, place].astype(jnp.float32)


def check_mask(mask_BT: jax.Array, name: str) -> None:
    """Raises an AssertionError with the field's name unless it is a mask (B, T)."""
    chex.assert_rank(mask_BT, 2, custom_message=name)
    chex.assert_type(mask_BT, bool, custom_message=name)


def to_length(scores_BT: jax.Array, counted_BT: jax.Array) -> jax.Array:
    """Scores as weights (B, T) whose magnitudes sum to the number of the counted tokens.

    Scores off `counted_BT` are left out; where the others are all 0, the weights are 1.
    """
    scores_BT = jnp.where(counted_BT, scores_BT.astype(jnp.float32), 0.0)
    count_B1 = jnp.sum(counted_BT, axis=-1, keepdims=True)
    return normalized(scores_BT, uniform_shares(counted_BT)) * count_B1


def top_tokens(scores_BT: jax.Array, counted_BT: jax.Array, share: float) -> jax.Array:
    """The counted tokens with the highest scores: bool (B, T).

    Of n counted tokens there are ceil(share n), so at least one where n > 0; of equal scores,
    the earlier token goes first.
    """
    scores_BT = jnp.where(counted_BT, scores_BT, -jnp.inf)
    # A stable sort, twice: the place of each token among all, the highest score at 0.
    place_BT = jnp.argsort(jnp.argsort(-scores_BT, axis=-1, stable=True), axis=-1)
    count_B1 = jnp.sum(counted_BT, axis=-1, keepdims=True)
    # Less a little, since in float32 a share of 0.3 of 10 tokens is more than 3.
    kept_B1 = jnp.ceil(share * (1 - 1e-6) * count_B1)
    return counted_BT & (place_BT < kept_B1)


def uniform_shares(text_BT: jax.Array) -> jax.Array:
    """Equal shares (B, T) of the masked tokens, which sum to 1 (to 0 without any)."""
    return text_BT / jnp.maximum(jnp.sum(text_BT, axis=-1, keepdims=True).astype(jnp.float32), 1.0)


def fix_sink_shares(share_BST: jax.Array, text_BT: jax.Array) -> jax.Array:
    """The shares with the first text token's set to the mean, where there are tokens enough."""
    n_B1 = jnp.sum(text_BT, axis=-1, keepdims=True).astype(jnp.float32)
    uniform_BT = uniform_shares(text_BT)
    first_BT = text_BT & (jnp.cumsum(text_BT, axis=-1) == 1)
    rest_BT = jnp.where(first_BT, 0.0, uniform_BT)
    rest_total_B1 = jnp.sum(rest_BT, axis=-1, keepdims=True)
    rest_uniform_BT = rest_BT / jnp.where(rest_total_B1 > 0, rest_total_B1, 1.0)
    rest_BST = normalized(jnp.where(first_BT[:, None], 0.0, share_BST), rest_uniform_BT[:, None])
    fixed_BST = jnp.where(first_BT[:, None], uniform_BT[:, None], rest_BST * rest_total_B1[:, None])
    return jnp.where(n_B1[:, None] >= MIN_TOKENS_FOR_SINK_FIX, fixed_BST, share_BST)


def normalized(values: jax.Array, fallback: jax.Array) -> jax.Array:
    """Divides by the sum of magnitudes over the last axis; `fallback` where that sum is 0."""
    total = jnp.sum(jnp.abs(values), axis=-1, keepdims=True)
    # Sums below the smallest normal float would overflow as reciprocals. The comparison is the way
    # round that lets a NaN through, so that damaged rows show instead of turning uniform.
    empty = total < jnp.finfo(values.dtype).tiny
    return jnp.where(empty, fallback, values / jnp.where(empty, 1.0, total))
