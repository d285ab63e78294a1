"""From logits to the next token, as a pure function, slot by slot with settings of its own.

What is changed comes in the order of transformers' logits processors: repetition and presence
penalties, bias, the ban of stop tokens in what is still too short; then, where the temperature is
above 0, temperature, top-k, top-p and min-p, each on what the one before has left.

Shapes: B slots, V vocabulary, E entries of a list, padded with -1.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnpo_jax.models.attention.core import MASKED

# Words that are looked at together: first what all such groups come to, then the words of one.
_GROUP = 256

PROMPT, SAMPLED = 1, 2
"""Bits of `seen_BV`: where a token has stood."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotSettings:
    """What is asked of each slot; see `settings.SamplingSettings`."""

    key_B2: jax.Array  # uint32, of (seed, prompt, sample)
    temperature_B: jax.Array  # float32; 0 is greedy
    top_k_B: jax.Array  # int32; 0 for all
    top_p_B: jax.Array  # float32
    min_p_B: jax.Array  # float32
    repetition_penalty_B: jax.Array  # float32
    presence_penalty_B: jax.Array  # float32
    min_new_tokens_B: jax.Array  # int32
    max_new_tokens_B: jax.Array  # int32
    stop_BE: jax.Array  # int32 tokens that end a response
    bias_tokens_BE: jax.Array  # int32
    bias_BE: jax.Array  # float32, added to the logits of those


@dataclasses.dataclass(frozen=True)
class Features:
    """What any slot asks for: a program has no more than that.

    Whatever one slot asks for leaves the others as they are.
    """

    draws: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    penalties: bool = False
    bias: bool = False
    min_new_tokens: bool = False
    top_logprobs: int = 0  # how many of the likeliest tokens are told of

    def __or__(self, other: "Features") -> "Features":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Features(*(max(a, b) for a, b in pairs))


def next_tokens(
    logits_BV: jax.Array,
    settings: SlotSettings,
    count_B: jax.Array,
    seen_BV: jax.Array | None,
    features: Features,
) -> tuple[jax.Array, jax.Array]:
    """Tokens int32 (B,), and their log-probs float32 (B,) under the model's own distribution.

    Args:
      logits_BV: float32.
      count_B: int32, tokens that the response has already. The draw depends on it and on the slot's
        key alone, so that a response is the same whatever else is in the batch.
      seen_BV: uint8, where tokens have stood (see `PROMPT`); only with `penalties`.
    """
    changed_BV = changed_logits(logits_BV, settings, count_B, seen_BV, features)
    token_B = _highest(changed_BV)
    if features.draws:
        drawn_B = draw(kept_logits(changed_BV, settings, features), settings.key_B2, count_B)
        token_B = jnp.where(settings.temperature_B > 0, drawn_B, token_B)
    picked_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B, picked_B - jax.nn.logsumexp(logits_BV, axis=-1)


def _highest(logits_BV: jax.Array) -> jax.Array:
    """`argmax` of each row, int32 (B,): first of groups of words, then of the words of one.

    Any word of a row that holds NaN. CPUs look for places one by one, on one core: 13 ms for 64
    rows of 49,152 words, against 2.
    """
    B, V = logits_BV.shape
    padding = (0, 0), (0, -V % _GROUP)
    logits_BGg = jnp.pad(logits_BV, padding, constant_values=-jnp.inf).reshape(B, -1, _GROUP)
    group_B = jnp.argmax(jnp.max(logits_BGg, axis=-1), axis=-1)
    logits_Bg = jnp.take_along_axis(logits_BGg, group_B[:, None, None], axis=1)[:, 0]
    return (group_B * _GROUP + jnp.argmax(logits_Bg, axis=-1)).astype(jnp.int32)


def likeliest(logits_BV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k likeliest tokens int32 (B, k), the first one first, and their log-probs float32 (B, k).

    Under the model's own distribution, as the log-probs of `next_tokens`; fewer, where the
    vocabulary has fewer.
    """
    highest_Bk, token_Bk = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[1]))
    return token_Bk, highest_Bk - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)


def changed_logits(
    logits_BV, settings: SlotSettings, count_B, seen_BV: jax.Array | None, features: Features
) -> jax.Array:
    """Logits (B, V) with penalties, bias and bans."""
    if features.penalties:
        repetition_B1 = settings.repetition_penalty_B[:, None]
        repeated = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
        logits_BV = jnp.where(seen_BV > 0, repeated, logits_BV)
        sampled = (seen_BV & SAMPLED) > 0
        logits_BV -= jnp.where(sampled, settings.presence_penalty_B[:, None], 0.0)
    if features.bias:
        bias_BE = jnp.where(settings.bias_tokens_BE < 0, 0.0, settings.bias_BE)
        logits_BV = _rows(logits_BV, settings.bias_tokens_BE).add(bias_BE, mode="drop")
    if features.min_new_tokens:
        early_B1 = (count_B < settings.min_new_tokens_B)[:, None]
        banned = _rows(logits_BV, settings.stop_BE).set(MASKED, mode="drop")
        logits_BV = jnp.where(early_B1, banned, logits_BV)
    return logits_BV


def _rows(x_BV, tokens_BE):
    """`x.at` the listed tokens of each row; those of -1 are dropped."""
    tokens_BE = jnp.where(tokens_BE < 0, x_BV.shape[1], tokens_BE)
    return x_BV.at[jnp.arange(x_BV.shape[0])[:, None], tokens_BE]


def kept_logits(logits_BV, settings: SlotSettings, features: Features) -> jax.Array:
    """Logits over the temperature, far below all others where no draw may fall."""
    temperature_B1 = settings.temperature_B[:, None]
    logits_BV = logits_BV / jnp.where(temperature_B1 > 0, temperature_B1, 1.0)
    if features.top_k:
        k_B = jnp.where(settings.top_k_B > 0, settings.top_k_B, logits_BV.shape[1])
        least_B1 = _least_kept(logits_BV, jnp.ones_like(logits_BV), k_B.astype(jnp.float32))
        logits_BV = jnp.where(logits_BV < least_B1, MASKED, logits_BV)
    if features.top_p:
        p_BV = jax.nn.softmax(logits_BV, axis=-1)
        # The sum of all may round to less than 1.
        enough_B = jnp.where(settings.top_p_B < 1, settings.top_p_B, 0.0)
        least_B1 = _least_kept(logits_BV, p_BV, enough_B)
        cut = (logits_BV < least_B1) & (settings.top_p_B < 1)[:, None]
        logits_BV = jnp.where(cut, MASKED, logits_BV)
    if features.min_p:
        highest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
        few = jnp.exp(logits_BV - highest_B1) < settings.min_p_B[:, None]
        logits_BV = jnp.where(few, MASKED, logits_BV)
    return logits_BV


def _least_kept(logits_BV, weights_BV, enough_B):
    """The highest logit (B, 1) such that all logits from it on weigh enough together.

    By bisection over the bits of floats, which for 50,000 words costs less than sorting them.
    """
    bits = jax.lax.bitcast_convert_type(logits_BV, jnp.int32)
    # Integers in the order of the floats.
    order_BV = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)

    def halve(_, bounds):
        # Weighs enough at `low`, and not any more at `high`.
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # no overflow
        weight = jnp.sum(jnp.where(order_BV >= middle[:, None], weights_BV, 0.0), axis=-1)
        is_enough = weight >= enough_B
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

    lowest, highest = jnp.min(order_BV, axis=-1), jnp.max(order_BV, axis=-1)
    low, _ = jax.lax.fori_loop(0, 32, halve, (lowest, highest + 1))
    low = jnp.where(low < 0, low ^ jnp.int32(0x7FFFFFFF), low)
    return jax.lax.bitcast_convert_type(low, jnp.float32)[:, None]


def draw(logits_BV: jax.Array, key_B2: jax.Array, count_B: jax.Array) -> jax.Array:
    """A token for each row, int32 (B,), with the probabilities of the logits' softmax.

    One uniform number a row, from its key and count, against the sum of probabilities.
    """
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(key_B2), count_B)
    uniform_B = jax.vmap(jax.random.uniform)(keys)
    B, V = logits_BV.shape
    p_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    p_BGg = jnp.pad(p_BV, ((0, 0), (0, -V % _GROUP))).reshape(B, -1, _GROUP)
    up_to_BG = jnp.cumsum(jnp.sum(p_BGg, axis=-1), axis=-1)
    target_B = uniform_B * up_to_BG[:, -1]
    group_B, before_B = _first_above(up_to_BG, target_B)
    p_Bg = jnp.take_along_axis(p_BGg, group_B[:, None, None], axis=1)[:, 0]
    word_B, _ = _first_above(jnp.cumsum(p_Bg, axis=-1), target_B - before_B)
    return (group_B * _GROUP + word_B).astype(jnp.int32)


def _first_above(up_to, target_B):
    """The first place of rising sums that is above a target, and the sum before it.

    Where rounding has put the target above all sums: the last place at which they rise.
    """
    before = jnp.pad(up_to, ((0, 0), (1, 0)))[:, :-1]
    last = up_to.shape[1] - 1 - jnp.argmax((up_to > before)[:, ::-1], axis=-1)
    place_B = jnp.minimum(jnp.sum(up_to <= target_B[:, None], axis=-1), last)
    return place_B, jnp.take_along_axis(before, place_B[:, None], axis=-1)[:, 0]
