"""What the engine has compiled: prompts into slots, and a few steps in all slots at once.

Shapes: B slots, R rows of prompts, S slots that a row goes to, L row length, n steps a
call.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnpo_jax.models import decode, decoder, kv_cache
from attnpo_jax.models.kv_cache import Cache
from attnpo_jax.sampling import sample


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What stays on the devices between calls."""

    cache: Cache
    seen_BV: jax.Array | None  # see `sample.next_tokens`


SPLIT = State(kv_cache.SPLIT, None)


def shared_past(params, tokens_P, *, config, dtype, attention):
    return decoder.make_past(config, params, tokens_P, dtype=dtype, attention=attention)


def prefill(shared, state: State, arrays, *, config, shape, dtype, attention):
    params, past = shared
    options = {"past": past, "dtype": dtype, "attention": attention}
    cache = decode.prefill(config, params, state.cache, shape, *arrays, **options)
    return dataclasses.replace(state, cache=cache), ()


def extend(params, state: State, arrays, *, config, shape, dtype):
    cache = decode.extend(config, params, state.cache, shape, *arrays, dtype=dtype)
    return dataclasses.replace(state, cache=cache), ()


def copy(_, state: State, pairs, *, config, shape, dtype):
    del config, shape, dtype
    return dataclasses.replace(state, cache=kv_cache.copy_slots(state.cache, *pairs)), ()


def clear(_, state: State, slots_B, *, config, shape, dtype):
    """Has some slots hold zeros: a weight of 0 does not take away what is no number."""
    del config, shape, dtype

    def cleared(x_CB):
        return jnp.where(jnp.expand_dims(slots_B, (0, *range(2, x_CB.ndim))), 0, x_CB)

    return dataclasses.replace(state, cache=jax.tree.map(cleared, state.cache)), ()


def mark_prompts(_, state: State, arrays, *, config, shape, dtype):
    """Notes which tokens the prompts of some slots hold."""
    del config, dtype
    tokens_RL, slot_RS = arrays
    tokens_RL = jnp.where(tokens_RL < 0, state.seen_BV.shape[1], tokens_RL)

    def mark(seen_BV, slot_R):
        seen_BV = seen_BV.at[slot_R].set(0, mode="drop")
        return seen_BV.at[slot_R[:, None], tokens_RL].set(sample.PROMPT, mode="drop")

    seen_BV = kv_cache.for_each_slot(mark, state.seen_BV, slot_RS, shape.slots)
    return dataclasses.replace(state, seen_BV=seen_BV), ()


def move(old: State, state: State, source_B, *, config, shape, dtype, before):
    """The first slots as other slots were, of a state with more of them or fewer."""
    del config, shape, dtype, before
    n = source_B.shape[0]
    cache = jax.tree.map(
        lambda x, x_old: x.at[:, :n].set(x_old[:, source_B]), state.cache, old.cache
    )
    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[:n].set(old.seen_BV[source_B])
    return State(cache, seen_BV), ()


def decode_steps(params, state: State, arrays, *, config, shape, dtype, features, steps):
    """Up to `steps` tokens in every slot that is active.

    Returns:
      The state; tokens, -1 where a slot has none, and log-probs (n, B), the likeliest tokens and
      their log-probs (n, B, k), and which slots failed (B,).
    """
    token_B, length_B, count_B, active_B, settings = arrays
    rows = jnp.arange(token_B.shape[0])
    k = min(features.top_logprobs, config.vocab_size)

    def one(carry):
        i, state, token_B, length_B, count_B, active_B, failed_B, sampled = carry
        logits_BV, cache = decode.step(
            config, params, state.cache, shape, token_B, length_B, active_B, dtype=dtype
        )
        fine_B = jnp.all(jnp.isfinite(logits_BV), axis=-1)
        new_B, logprob_B = sample.next_tokens(logits_BV, settings, count_B, state.seen_BV, features)
        failed_B |= active_B & ~fine_B
        active_B &= fine_B
        new = jnp.where(active_B, new_B, -1), logprob_B, sample.likeliest(logits_BV, k)
        sampled = jax.tree.map(lambda so_far, x: so_far.at[i].set(x), sampled, new)
        seen_BV = state.seen_BV
        if features.penalties:
            seen_BV = seen_BV.at[rows, new_B].set(sample.PROMPT | sample.SAMPLED)
        length_B += active_B
        count_B += active_B
        ended_B = jnp.any(new_B[:, None] == settings.stop_BE, axis=-1)
        active_B &= ~ended_B & (count_B < settings.max_new_tokens_B)
        # Slots that have ended read what free ones do.
        token_B = jnp.where(active_B, new_B, 0)
        state = State(cache, seen_BV)
        return i + 1, state, token_B, length_B, count_B, active_B, failed_B, sampled

    def goes_on(carry):
        i, active_B = carry[0], carry[5]
        return (i < steps) & jnp.any(active_B)

    tokens_nB = jnp.full((steps, token_B.shape[0]), -1, jnp.int32)
    top = tuple(jnp.zeros((*tokens_nB.shape, k), kind) for kind in (jnp.int32, jnp.float32))
    sampled = tokens_nB, jnp.zeros(tokens_nB.shape, jnp.float32), top
    slots = token_B, length_B, count_B, active_B, jnp.zeros_like(active_B)
    carry = (jnp.int32(0), state, *slots, sampled)
    _, state, *_, failed_B, sampled = jax.lax.while_loop(goes_on, one, carry)
    return state, (*sampled, failed_B)
