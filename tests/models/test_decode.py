"""Decoding with a KV cache, held against the whole forward pass over the same tokens."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax.models import decode, decoder, int8, kv_cache, lm_head, lora
from attnpo_jax.models.config import LinearRopeScaling, LoraConfig, ModelConfig
from attnpo_jax.models.kv_cache import CacheShape
from attnpo_jax.parallel import mesh as meshes
from attnpo_jax.parallel import sharding

TINY = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    rope_theta=1000.0,
)
GEMMA = dataclasses.replace(
    TINY,
    norm_style="gemma",
    post_norms=True,
    qk_norm="head",
    layer_windows=(6, None, 6),
    local_rope_theta=100.0,
    rope_scaling=LinearRopeScaling(2.0),
    attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
    embedding_scale=3.0,
)
VARIANTS = {
    "plain": TINY,
    "windows": dataclasses.replace(TINY, layer_windows=(6, 6, 6)),
    "gemma": GEMMA,
    "no positions": dataclasses.replace(TINY, nope_layers=(1,)),
    "adapters": dataclasses.replace(TINY, lora=LoraConfig(2, 4.0, ("query", "down"))),
}
LENGTHS = (1, 9, 5, 14)  # of the prompts
STEPS = 12
BLOCK = 4


@functools.cache
def random_params(config):
    """Weights far from zero, so that attention is far from uniform."""
    params = decoder.init_params(config, jax.random.key(0))
    return jax.tree.map(lambda p: p * 8 if p.std() > 0 else p, params)


@functools.partial(jax.jit, static_argnums=0)
def whole_pass(config, params, tokens_BL):
    """Logits (B, L, V) at every position, by the forward pass; later tokens change nothing."""
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    hidden = decoder.forward(config, params, tokens_BL, positions_BL, jnp.ones_like(tokens_BL))
    unembedding = decoder.unembedding(params)
    return lm_head.logits(hidden, unembedding, softcap=config.final_logit_softcapping)


def _decode(config, params, cache, shape, tokens_BL, length_B, slot_BS, past, next_BT):
    if tokens_BL.shape[1]:
        cache = decode.prefill(
            config, params, cache, shape, tokens_BL, length_B, slot_BS, past=past
        )
    start = 0 if past is None else past.keys.shape[1]
    by_slot = jnp.zeros(shape.slots, jnp.int32)
    by_slot = by_slot.at[slot_BS].set(start + length_B[:, None], mode="drop")

    def one(carry, token_B):
        cache, length_B = carry
        logits, cache = decode.step(config, params, cache, shape, token_B, length_B)
        return (cache, length_B + 1), logits

    (cache, _), logits = jax.lax.scan(one, (cache, by_slot), next_BT.T)
    return logits, cache


STATIC = ("config", "shape")
_compiled = jax.jit(_decode, static_argnames=STATIC)
_past = jax.jit(decoder.make_past, static_argnums=0)


def decoded(config, params, sequences, lengths, shape, past_tokens=(), cache=None, run=_compiled):
    """Logits (STEPS, B, V) when what follows the prompts is read token by token.

    Rows go to the slots in another order than theirs, and one row goes nowhere.
    """
    B, P = len(sequences), len(past_tokens)
    slots = np.arange(B)[::-1]
    longest = max(lengths)
    tokens = np.zeros((B + 1, longest), np.int32)
    for b, (sequence, n) in enumerate(zip(sequences, lengths, strict=True)):
        tokens[b, :n] = sequence[P : P + n]
    tokens[B] = 7
    following = np.zeros((shape.slots, STEPS), np.int32)
    for slot, sequence, n in zip(slots, sequences, lengths, strict=True):
        following[slot] = sequence[P + n : P + n + STEPS]
    past = _past(config, params, jnp.asarray(past_tokens)) if P else None
    cache = kv_cache.empty(shape) if cache is None else cache
    length_B = np.array([*lengths, 3], np.int32)
    slot_B1 = np.array([*slots, shape.slots], np.int32)[:, None]
    logits, cache = run(config, params, cache, shape, tokens, length_B, slot_B1, past, following)
    return np.asarray(logits)[:, slots], cache


def sequences_of(config, lengths, past=0):
    rng = np.random.default_rng(0)
    common = rng.integers(0, config.vocab_size, past)
    return [
        np.concatenate([common, rng.integers(0, config.vocab_size, n + STEPS)]).astype(np.int32)
        for n in lengths
    ]


def expected(config, params, sequences, lengths, past=0):
    tokens_BL = np.zeros((len(sequences), max(map(len, sequences))), np.int32)
    for row, sequence in zip(tokens_BL, sequences, strict=True):
        row[: len(sequence)] = sequence
    logits_BLV = np.asarray(whole_pass(config, params, tokens_BL))
    of_steps = [x[past + n :][:STEPS] for x, n in zip(logits_BLV, lengths, strict=True)]
    return np.stack(of_steps, 1)


@pytest.mark.parametrize("past", [0, 10])
@pytest.mark.parametrize("name", VARIANTS)
def test_steps_give_the_forward_passes_logits(name, past):
    config = VARIANTS[name]
    params = random_params(config)
    sequences = sequences_of(config, LENGTHS, past)
    shape = CacheShape.of(config, 4, 64, jnp.float32, block=BLOCK)
    common = sequences[0][:past]
    wanted = expected(config, params, sequences, LENGTHS, past)
    # A second time over what the first has left in the slots.
    cache = None
    for _ in range(2):
        logits, cache = decoded(config, params, sequences, LENGTHS, shape, common, cache)
        np.testing.assert_allclose(logits, wanted, atol=2e-5)


def test_a_row_goes_to_all_of_its_slots():
    params, (sequence,) = random_params(GEMMA), sequences_of(GEMMA, LENGTHS[-1:])
    n = LENGTHS[-1]
    shape = CacheShape.of(GEMMA, 5, 64, jnp.float32, block=BLOCK)
    tokens = np.stack([sequence[:n], np.full(n, 7)])
    slot_BS = np.array([[3, 0, 4], [2, 5, 5]], np.int32)
    following = np.tile(sequence[n:], (5, 1))
    both = np.full(2, n, np.int32)
    logits, _ = _compiled(
        GEMMA, params, kv_cache.empty(shape), shape, tokens, both, slot_BS, None, following
    )
    wanted = expected(GEMMA, params, [sequence], [n])
    np.testing.assert_allclose(logits[:, [0, 3, 4]], wanted.repeat(3, 1), atol=2e-5)
    # Of the other row.
    assert abs(logits[0, 2] - wanted[0, 0]).max() > 0.1


def _extended(config, params, cache, *, sequences, shape):
    """Prompts whose beginnings other slots have read: logits of the steps that follow them."""
    held, n = (7, 10), LENGTHS[-1]
    first = np.zeros((2, max(held)), np.int32)
    for row, sequence, k in zip(first, sequences, held, strict=True):
        row[:k] = sequence[:k]
    to = jnp.array([[1], [2]])
    cache = decode.prefill(config, params, cache, shape, first, np.array(held, np.int32), to)
    # Slot 2 reads on where it is, slot 3 less of what it has, slot 0 the same as slot 3; the last
    # target is none.
    source, target = jnp.array([1, 3, 1, 1]), jnp.array([3, 0, 4, 2])
    cache = kv_cache.copy_slots(cache, source, target)
    for start, stop in (((10, 5, 5), (12, 8, 8)), ((12, 8, 8), (n, n, n))):
        rows = np.full((4, 7), 3, np.int32)
        for row, k, a, b in zip(rows, (1, 0, 0, 0), (*start, 0), (*stop, 0), strict=True):
            row[: b - a] = sequences[k][a:b]
        start_R = np.array([*start, 9], np.int32)
        length_R = np.array([*stop, 12], np.int32) - start_R
        slot_R = np.array([2, 3, 0, 4], np.int32)
        of_rows = map(jnp.asarray, (rows, length_R, start_R, slot_R))
        cache = decode.extend(config, params, cache, shape, *of_rows)
    following = jnp.stack([sequences[k][n:] for k in (0, 0, 1, 0)])
    length_B = jnp.array([n, held[0], n, n])

    def one(carry, token_B):
        cache, length_B = carry
        # Slot 1 keeps what it holds, and puts what it reads behind that.
        active_B = jnp.arange(4) != 1
        logits, cache = decode.step(config, params, cache, shape, token_B, length_B, active_B)
        return (cache, length_B + active_B), logits

    (after, _), logits = jax.lax.scan(one, (cache, length_B), following.T)
    return logits, cache, after


@pytest.mark.parametrize("axis", [None, "tensor"])
@pytest.mark.parametrize("name", ["plain", "windows", "gemma", "int8"])
def test_tokens_behind_what_slots_hold_are_read_as_in_one_pass(name, axis):
    config = VARIANTS.get(name, TINY)
    params, lengths = random_params(config), LENGTHS[-1:] * 2
    sequences = sequences_of(config, lengths)
    wanted = expected(config, params, sequences, lengths)
    # Rings have room for the prompts, and come round in the steps.
    shape = CacheShape.of(config, 4, 64, jnp.float32, quantized=name == "int8", block=16)
    cache = kv_cache.empty(shape)
    with contextlib.ExitStack() as stack:
        if axis is not None:
            mesh = meshes.make_mesh({"data": 1, "fsdp": 1, axis: 4}, jax.devices()[:4])
            params = jax.device_put(params, sharding.parameter_shardings(config, mesh))
            cache = jax.device_put(cache, jax.sharding.NamedSharding(mesh, kv_cache.SPLIT))
            stack.enter_context(jax.set_mesh(mesh))
        run = jax.jit(functools.partial(_extended, config, sequences=sequences, shape=shape))
        logits, *caches = run(params, cache=cache)
    atol = 0.1 if name == "int8" else 2e-5
    np.testing.assert_allclose(np.asarray(logits)[:, [0, 3, 2]], wanted[:, [0, 0, 1]], atol=atol)
    before, after = (np.asarray(cache.keys_CBKHb)[:, 1, ..., :7] for cache in caches)
    assert np.any(before[0, ..., 0])
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("quantized", [False, True])
def test_what_other_devices_run_gives_the_same(monkeypatch, quantized):
    params, sequences = random_params(GEMMA), sequences_of(GEMMA, LENGTHS, past=10)
    options = {"quantized": quantized, "block": BLOCK}
    shape = CacheShape.of(GEMMA, 4, 64, jnp.float32, **options)
    wanted, held = decoded(GEMMA, params, sequences, LENGTHS, shape, sequences[0][:10])

    choices = []

    def chosen(*operands, tpu=None, default=None, cpu=None):
        choices.append(cpu)
        return (tpu or default)(*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
    # Not the function that was traced before.
    anew = jax.jit(functools.partial(_decode), static_argnames=STATIC)
    found, also_held = decoded(
        GEMMA, params, sequences, LENGTHS, shape, sequences[0][:10], run=anew
    )
    assert len(choices) >= 2
    # Of int8, a number may be rounded the other way.
    np.testing.assert_allclose(found, wanted, atol=5e-3 if quantized else 2e-5)
    for one, other in zip(jax.tree.leaves(held), jax.tree.leaves(also_held), strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, atol=1 if quantized else 1e-5)


def test_layers_with_a_window_hold_no_more_than_it():
    shape = CacheShape.of(GEMMA, 4, 64, jnp.float32, block=BLOCK)
    assert shape.blocks == (2, 16, 2)  # 5 positions beside the query's, and 64
    assert shape.first_blocks.tolist() == [0, 2, 18]
    # Keys and values, 4 heads of 8, float32.
    assert shape.nbytes == 20 * BLOCK * 4 * (2 * 4 * 8 * 4)


def test_an_int8_cache_is_near_and_smaller():
    params = random_params(TINY)
    sequences = sequences_of(TINY, LENGTHS)
    exact = expected(TINY, params, sequences, LENGTHS)
    shape = CacheShape.of(TINY, 4, 64, jnp.float32, quantized=True, block=BLOCK)
    logits, _ = decoded(TINY, params, sequences, LENGTHS, shape)
    error = np.sqrt(np.mean((logits - exact) ** 2)) / np.std(exact)
    assert 1e-5 < error < 0.02  # rounding to a 254th of a head's range
    plain = CacheShape.of(TINY, 4, 64, jnp.float32, block=BLOCK)
    assert shape.nbytes == plain.nbytes * (8 + 4) / (8 * 4)


def test_int8_weights_decode_as_they_score():
    exact = random_params(TINY)
    config = int8.quantized(TINY)
    layers = {}
    for name, weight in exact["layers"].items():
        if int8.is_quantized(f"layers/{name}"):
            layers[name], layers[name + int8.SCALE] = int8.quantize(f"layers/{name}", weight)
        else:
            layers[name] = weight
    params = {**exact, "layers": layers}
    sequences = sequences_of(TINY, LENGTHS)
    shape = CacheShape.of(config, 4, 64, jnp.float32, block=BLOCK)
    logits, _ = decoded(config, params, sequences, LENGTHS, shape)
    np.testing.assert_allclose(logits, expected(config, params, sequences, LENGTHS), atol=2e-5)


def test_merged_adapters_decode_as_unmerged_ones():
    config = VARIANTS["adapters"]
    params = random_params(config)
    base = {**params, "layers": {k: v for k, v in params["layers"].items() if "lora" not in k}}
    merged = lora.merge(config, base, params)
    sequences = sequences_of(TINY, LENGTHS)
    shape = CacheShape.of(TINY, 4, 64, jnp.float32, block=BLOCK)
    logits, _ = decoded(TINY, merged, sequences, LENGTHS, shape)
    np.testing.assert_allclose(logits, expected(config, params, sequences, LENGTHS), atol=2e-5)


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
@pytest.mark.parametrize("quantized", [False, True])
def test_on_a_mesh_as_on_one_device(axis, quantized):
    params = random_params(GEMMA)
    sequences = sequences_of(GEMMA, LENGTHS, past=10)
    shape = CacheShape.of(GEMMA, 4, 64, jnp.float32, quantized=quantized, block=BLOCK)
    common = sequences[0][:10]
    wanted, _ = decoded(GEMMA, params, sequences, LENGTHS, shape, common)
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | {axis: 4}
    mesh = meshes.make_mesh(sizes, jax.devices()[:4])
    placed = jax.device_put(params, sharding.parameter_shardings(GEMMA, mesh))
    split = jax.sharding.NamedSharding(mesh, kv_cache.SPLIT)
    cache = jax.device_put(kv_cache.empty(shape), split)
    with jax.set_mesh(mesh):
        logits, cache = decoded(GEMMA, placed, sequences, LENGTHS, shape, common, cache)
    # Of int8, a number may be rounded the other way.
    np.testing.assert_allclose(logits, wanted, atol=5e-3 if quantized else 2e-5)
    assert all(x.sharding.is_equivalent_to(split, x.ndim) for x in jax.tree.leaves(cache))
