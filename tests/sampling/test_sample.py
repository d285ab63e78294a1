"""Draws held against probabilities that NumPy computes, setting by setting."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from attnpo_jax.sampling import SamplingSettings, sample
from attnpo_jax.sampling.responses import Request
from attnpo_jax.sampling.slots import settings_of

DRAWS = 20_000
# More words than are drawn from together, and no multiple of that.
V = 700


def logits_of(size, seed=0):
    return np.random.default_rng(seed).normal(size=size).astype(np.float32) * 2.5


def softmax(x):
    p = np.exp(x.astype(np.float64) - x.max())
    return p / p.sum()


def top_k(logits, k):
    return np.where(logits >= np.sort(logits)[-k], logits, -np.inf)


def top_p(logits, p):
    """Nucleus sampling as its authors have it: the smallest set of at least this probability."""
    order = np.argsort(-logits)
    before = np.cumsum(softmax(logits)[order]) - softmax(logits)[order]
    kept = np.full(len(logits), -np.inf, np.float32)
    kept[order[before < p]] = logits[order[before < p]]
    return kept


def min_p(logits, share):
    p = softmax(logits)
    return np.where(p >= share * p.max(), logits, -np.inf)


def repeated(logits, seen, penalty):
    changed = np.where(logits > 0, logits / penalty, logits * penalty)
    return np.where(np.isin(np.arange(len(logits)), seen), changed, logits)


PROMPT = (3, 5, 11)
SAMPLED = (2, 5)
# name -> (settings, the logits that are to be drawn from)
CASES = {
    "temperature 1": ({}, lambda x: x),
    "temperature 0.5": ({"temperature": 0.5}, lambda x: x / 0.5),
    "temperature 3": ({"temperature": 3.0}, lambda x: x / 3),
    "top-k": ({"top_k": 7}, lambda x: top_k(x, 7)),
    "top-k beyond all": ({"top_k": 10**6}, lambda x: x),
    "top-p": ({"top_p": 0.8}, lambda x: top_p(x, 0.8)),
    "top-p of one": ({"top_p": 0.0001}, lambda x: top_k(x, 1)),
    "min-p": ({"min_p": 0.1}, lambda x: min_p(x, 0.1)),
    "all": (
        {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
        lambda x: min_p(top_p(top_k(x / 0.7, 40), 0.9), 0.02),
    ),
    "repetition": (
        {"repetition_penalty": 1.8},
        lambda x: repeated(x, {*PROMPT, *SAMPLED}, 1.8),
    ),
    "presence": (
        {"presence_penalty": 1.5},
        lambda x: x - 1.5 * np.isin(np.arange(len(x)), SAMPLED),
    ),
    "bias": (
        {"logit_bias": {0: 4.0, 9: -100.0}},
        lambda x: x + 4.0 * (np.arange(len(x)) == 0) - 100.0 * (np.arange(len(x)) == 9),
    ),
    "too short to stop": (
        {"min_new_tokens": 5, "stop_token_ids": (1, 4)},
        lambda x: np.where(np.isin(np.arange(len(x)), (1, 4)), -np.inf, x),
    ),
}


@functools.cache
def keys(seed, draws):
    settings = SamplingSettings(seed=seed)
    return np.stack([Request(f"{i}", np.array(PROMPT), settings).key for i in range(draws)])


_next_tokens = jax.jit(sample.next_tokens, static_argnames="features")


def drawn(logits, settings, draws=DRAWS, count=2, features=None):
    """Of as many prompts as there are draws."""
    one = settings_of([Request("0", np.array(PROMPT), settings)], 100)
    every = jax.tree.map(lambda x: np.broadcast_to(x, (draws, *x.shape[1:])), one)
    every = dataclasses.replace(every, key_B2=keys(settings.seed, draws))
    seen = np.zeros((draws, len(logits)), np.uint8)
    seen[:, list(PROMPT)] = sample.PROMPT
    seen[:, list(SAMPLED)] |= sample.SAMPLED
    tokens, logps = _next_tokens(
        np.broadcast_to(logits, (draws, len(logits))),
        every,
        np.full(draws, count, np.int32),
        seen,
        features or settings.features,
    )
    return np.asarray(tokens), np.asarray(logps)


@pytest.mark.parametrize("size", [50, V])
@pytest.mark.parametrize("case", CASES)
def test_draws_have_the_probabilities_of_their_settings(case, size):
    given, changed = CASES[case]
    logits = logits_of(size)
    tokens, logps = drawn(logits, SamplingSettings(**given))
    p = softmax(changed(logits))
    counts = np.bincount(tokens, minlength=size)
    assert counts[p == 0].sum() == 0
    # Rare words together, as the test needs some five of each expected.
    common = p * DRAWS >= 5
    expected = np.append(p[common], p[~common].sum()) * DRAWS
    observed = np.append(counts[common], counts[~common].sum())
    if expected[-1] < 5:
        expected[-2:], observed[-2:] = expected[-2:].sum() / 2, observed[-2:].sum() / 2
    if len(expected) > 2:
        assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3
    # Log-probs are the model's own, whatever was changed.
    np.testing.assert_allclose(logps, np.log(softmax(logits))[tokens], atol=1e-5)


def test_temperature_0_takes_the_likeliest():
    logits = logits_of(V)
    tokens, _ = drawn(logits, SamplingSettings(temperature=0), draws=3)
    assert tokens.tolist() == [logits.argmax()] * 3


@pytest.mark.parametrize("size", [5, 256, 700])
def test_the_first_of_the_highest_is_taken(size):
    logits = np.random.default_rng(size).integers(-9, 3, (40, size)).astype(np.float32)
    logits[0] = -np.inf
    tokens = sample._highest(jnp.asarray(logits))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_a_draw_depends_on_seed_prompt_sample_and_place_alone():
    logits = logits_of(V)
    first, _ = drawn(logits, SamplingSettings(seed=1), draws=40)
    again, _ = drawn(logits, SamplingSettings(seed=1), draws=20)
    np.testing.assert_array_equal(first[:20], again)
    for other in (
        drawn(logits, SamplingSettings(seed=2), draws=40)[0],
        drawn(logits, SamplingSettings(seed=1), draws=40, count=3)[0],
    ):
        assert (other != first).mean() > 0.5
    keys = {
        Request(id, np.array([1]), SamplingSettings(seed=seed), number).key.tobytes()
        for id in ("a", "b")
        for seed in (0, 1)
        for number in (0, 1)
    }
    assert len(keys) == 8


def test_what_a_neighbour_asks_for_changes_nothing():
    logits = logits_of(V)
    every = sample.Features(*[True] * 7)
    for given in ({}, {"temperature": 0}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}):
        settings = SamplingSettings(**given)
        alone, _ = drawn(logits, settings, draws=50)
        beside, _ = drawn(logits, settings, draws=50, features=every)
        np.testing.assert_array_equal(alone, beside)


def test_a_draw_at_the_upper_end_falls_on_a_word_that_can_be_drawn():
    # The words at the end have no probability, and the number is as near 1 as one can be.
    logits = np.full(V, -1e30, np.float32)
    logits[:3] = 0
    place, before = sample._first_above(jnp.array([[1.0, 2.0, 3.0, 3.0]]), jnp.array([3.0]))
    assert (place.item(), before.item()) == (2, 2.0)
    tokens, _ = drawn(logits, SamplingSettings(), draws=2000)
    assert set(tokens) == {0, 1, 2}
