"""The step against its definition: separate rows, the whole softmax, weights in NumPy."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnpo_jax import losses, pair_loss, weighting
from attnpo_jax.data.batching import Example, RowShape, fill_rows
from attnpo_jax.models import decoder
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.pair_loss import StepSettings, batch_losses
from attnpo_jax.parallel.state import create
from attnpo_jax.train.step import make_eval_step, make_train_step

TINY = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=1000.0,
)
BETA = 0.3
# Prompt, chosen and rejected lengths; the last token of a response is a template token.
SIZES = ((5, 4, 7), (3, 8, 2), (8, 3, 4), (2, 6, 6))
SHAPE = RowShape(20, 14, 8)
SETTINGS = StepSettings(
    model=TINY,
    weighting=functools.partial(weighting.attention, layer=-1, fix_sink=True),
    objective=functools.partial(losses.sigmoid, beta=BETA),
    beta=BETA,
    source_layers=(0, 2),
)
# Gradient descent whose state is the gradient of the last step.
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
    lambda grads, state, params=None: (jax.tree.map(jnp.negative, grads), grads),
)


def examples():
    rng = np.random.default_rng(0)

    def make(index, sizes):
        prompt, *responses = (rng.integers(1, 61, n, np.int32) for n in sizes)
        texts = tuple(len(ids) - 1 for ids in responses)
        return Example(
            index=index + 10,
            prompt_ids=prompt,
            response_ids=tuple(responses),
            text_lengths=texts,
            judge=tuple(rng.random((2, 2, n), np.float32) for n in texts),
            verdict=rng.normal(size=2).astype(np.float32),
            reference_logps=tuple(-5 * rng.random(len(ids), np.float32) - 1 for ids in responses),
        )

    return [make(index, sizes) for index, sizes in enumerate(SIZES)]


def batch_of(rows, shape=SHAPE, microbatches=1):
    batch = fill_rows(rows, shape, num_sources=2)
    return jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)


def one_a_row():
    return [[e] for e in examples()]


@pytest.fixture(scope="module")
def params():
    params = decoder.init_params(TINY, jax.random.key(0))
    return jax.tree.map(lambda p: 3.0 * np.asarray(p) if np.std(p) > 0 else p, params)


def run_step(params, batch, settings=SETTINGS, optimizer=KEEP_GRADIENT):
    step = jax.jit(make_train_step(settings, optimizer, lambda step: 0.5 + step))
    return step(create(params, optimizer), batch)


@pytest.fixture(scope="module")
def one_batch(params):
    """State and metrics of a step over the four pairs as one microbatch."""
    return run_step(params, batch_of(one_a_row()))


def plain_weights(e, r):
    """DESIGN's four steps, for the last layer, with 0 for the closing template token."""
    n = e.text_lengths[r]
    raw = e.judge[r][:, 1].astype(np.float64)
    w = (raw / raw.sum(-1, keepdims=True)).mean(0)
    if n >= 5:
        w = np.concatenate([[1 / n], w[1:] * (1 - 1 / n) / w[1:].sum()])
    return np.concatenate([w * n, [0.0]])


def plain_loss(params):
    """Mean loss over the pairs, from rows that share nothing."""
    responses = [(e, r) for e in examples() for r in (0, 1)]
    tokens = np.zeros((len(responses), 16), np.int32)
    for row, (e, r) in zip(tokens, responses, strict=True):
        text = np.concatenate([e.prompt_ids, e.response_ids[r]])
        row[: len(text)] = text  # what follows is not seen by what is scored
    positions = jnp.broadcast_to(jnp.arange(16), tokens.shape)
    hidden = decoder.forward(TINY, params, tokens, positions, jnp.ones_like(tokens))
    logps = jax.nn.log_softmax(hidden @ decoder.unembedding(params).T, axis=-1)
    scores = []
    for row, (e, r) in enumerate(responses):
        ids, first = e.response_ids[r], len(e.prompt_ids) - 1
        picked = logps[row, first + np.arange(len(ids)), ids]
        scores.append(jnp.sum(plain_weights(e, r) * (picked - e.reference_logps[r])))
    chosen, rejected = jnp.stack(scores).reshape(-1, 2).T
    return jnp.mean(jnp.log1p(jnp.exp(-BETA * (chosen - rejected))))


def test_loss_and_gradients_equal_those_of_separate_rows(params, one_batch):
    want_loss, want = jax.jit(jax.value_and_grad(plain_loss))(params)
    state, metrics = one_batch
    np.testing.assert_allclose(metrics["loss"], want_loss, atol=1e-5)
    chex.assert_trees_all_close(state.opt_state, want, atol=1e-5)
    norm = math.sqrt(sum(float(np.sum(np.square(g))) for g in jax.tree.leaves(want)))
    assert norm > 0.5
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


def test_packed_rows_equal_rows_of_one_pair(params, one_batch):
    pairs = examples()
    shape = RowShape(32, 24, 8, pairs=2)
    packed_state, packed = run_step(params, batch_of([pairs[:2], pairs[2:]], shape))
    state, metrics = one_batch
    chex.assert_trees_all_close(packed_state.opt_state, state.opt_state, atol=1e-5)
    chex.assert_trees_all_close(packed, metrics, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_change_nothing(params, one_batch, microbatches):
    got_state, got = run_step(params, batch_of(one_a_row(), microbatches=microbatches))
    state, metrics = one_batch
    chex.assert_trees_all_close(got_state.opt_state, state.opt_state, atol=1e-5)
    chex.assert_trees_all_close(got, metrics, rtol=1e-5, atol=1e-5)


def per_length(chosen, rejected, *, beta):
    """Divides by the length and the weight, which an empty slot has none of."""
    c, r = (s.policy_B / s.length_B - s.reference_B / s.weight_B for s in (chosen, rejected))
    return -jax.nn.log_sigmoid(beta * (c - r))


@pytest.mark.parametrize("packed", [False, True])
def test_empty_slots_count_for_nothing(params, packed):
    settings = dataclasses.replace(SETTINGS, objective=functools.partial(per_length, beta=BETA))
    pairs = examples()
    whole_state, whole = run_step(params, batch_of([[e] for e in pairs[:3]]), settings)
    if packed:  # empty places in rows
        rows, shape, microbatches = [pairs[:2], [pairs[2]]], RowShape(32, 24, 8, pairs=2), 1
    else:  # empty rows, and a microbatch that is empty altogether
        rows, shape, microbatches = [[pairs[0]], [], [pairs[1]], [pairs[2]], [], []], SHAPE, 3
    state, metrics = run_step(params, batch_of(rows, shape, microbatches), settings)
    chex.assert_trees_all_close(state.opt_state, whole_state.opt_state, atol=1e-5)
    assert metrics["pairs"] == 3
    slots = metrics.pop("pair")
    assert len(slots) > 3 and slots[slots >= 0].tolist() == [10, 11, 12]
    assert not np.any(metrics.pop("pair_loss")[slots < 0])
    of_pairs = metrics.pop("log_ratio")[slots >= 0]
    np.testing.assert_allclose(of_pairs, whole["log_ratio"], rtol=1e-5, atol=1e-4)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_weights_get_no_gradient(params):
    """A weighting that reads the policy gives the gradient of the same weights held fixed."""

    def confidence(response):
        return jnp.exp(0.1 * response.policy_logps_BT) * response.mask_BT

    batch = batch_of(one_a_row())
    fixed = []

    def recorded(response):
        weights = confidence(response)
        jax.debug.callback(fixed.append, weights)
        return weights

    state, _ = run_step(params, batch, dataclasses.replace(SETTINGS, weighting=recorded))
    jax.effects_barrier()
    held = np.asarray(fixed[0])
    assert np.ptp(held[held > 0]) > 0.1
    want, _ = run_step(params, batch, dataclasses.replace(SETTINGS, weighting=lambda _: held))
    chex.assert_trees_all_close(state.opt_state, want.opt_state, atol=1e-6)


def test_a_weighting_sees_each_response_with_its_own(params):
    seen = []

    def record(response):
        seen.append(response)
        return response.mask_BT.astype(jnp.float32)

    settings = dataclasses.replace(SETTINGS, weighting=record)

    @jax.jit
    def look(params, batch):
        batch_losses(settings, params, batch)
        return seen.pop()

    batch = jax.tree.map(lambda x: x[0], batch_of(one_a_row()))
    response = look(params, batch)
    assert response.is_chosen.tolist() == [True, False] * 4
    assert (response.source_layers, response.num_layers) == ((0, 2), 3)
    for i, e in enumerate(examples()):
        for r, ids in enumerate(e.response_ids):
            b, n, text = 2 * i + r, len(ids), e.text_lengths[r]
            assert response.mask_BT[b].sum() == n and response.text_mask_BT[b].sum() == text
            np.testing.assert_array_equal(response.judge_B2ST[b, ..., :text], e.judge[r])
            np.testing.assert_array_equal(response.verdict_B2[b], e.verdict)
            np.testing.assert_array_equal(response.reference_logps_BT[b, :n], e.reference_logps[r])


def test_metrics_by_hand(monkeypatch):
    """Two pairs of two tokens a response, the second one of each a template token."""

    def pair(index, chosen_reference, rejected_reference):
        ids = np.array([1, 2], np.int32)
        return Example(
            index=index,
            prompt_ids=ids,
            response_ids=(ids, ids),
            text_lengths=(1, 1),
            judge=(np.ones((2, 2, 1), np.float32),) * 2,
            verdict=np.zeros(2, np.float32),
            reference_logps=(
                np.array(chosen_reference, np.float32),
                np.array(rejected_reference, np.float32),
            ),
        )

    rows = [[pair(5, [-2, -1], [-1, -3])], [pair(6, [-1, -1], [-4, -4])]]
    policy = jnp.array([[[[-1.0, -1], [-3, -2]]], [[[-2, -4], [-1, -4]]]])
    monkeypatch.setattr(pair_loss, "response_scores", lambda *_, **__: (policy, {}))
    step = make_train_step(SETTINGS, KEEP_GRADIENT, lambda step: 0.5 + step)
    state = create({"layer": jnp.zeros(2)}, KEEP_GRADIENT)
    batch = batch_of(rows, RowShape(6, 4, 2))
    state, metrics = step(dataclasses.replace(state, step=jnp.int32(3)), batch)
    # Log-ratios: pair 5 has 1 + 0 and -2 + 1, pair 6 -1 - 3 and 3 + 0; text tokens come first.
    losses_by_hand = [math.log1p(math.exp(-BETA * h)) for h in (1 - -2, -1 - 3)]
    want = {
        "loss": sum(losses_by_hand) / 2,
        "unweighted_loss": sum(math.log1p(math.exp(-BETA * h)) for h in (1 - -1, -4 - 3)) / 2,
        "rewards/chosen": BETA * (1 - 4) / 2,
        "rewards/rejected": BETA * (-1 + 3) / 2,
        "rewards/accuracies": 0.5,
        "rewards/ties": 0.0,
        "rewards/margins": BETA * (2 - 7) / 2,
        "logps/chosen": (-2 - 6) / 2,
        "logps/rejected": (-5 - 5) / 2,
        "rewards/weighted_chosen": BETA * (1 - 1) / 2,
        "rewards/weighted_rejected": BETA * (-2 + 3) / 2,
        "rewards/weighted_accuracies": 0.5,
        "rewards/weighted_ties": 0.0,
        "rewards/weighted_margins": BETA * (3 - 4) / 2,
        "logps/weighted_chosen": (-1 - 2) / 2,
        "logps/weighted_rejected": (-3 - 1) / 2,
        "grad_norm": 0.0,
        "learning_rate": 3.5,
        "pairs": 2,
        "tokens": 12,
        "pair": [5, 6],
        "pair_loss": losses_by_hand,
        "log_ratio": [[1, -1], [-4, 3]],
    }
    assert metrics.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
    assert state.step == 4
    sums = make_eval_step(SETTINGS)(state.params, batch)
    assert sums.pop("pairs") == 2
    assert sums.keys() == {name for name in want if "/" in name or "loss" in name} - {"pair_loss"}
    for name, value in sums.items():
        np.testing.assert_allclose(value, 2 * want[name], rtol=1e-6, atol=1e-7, err_msg=name)


def test_evaluation_sums_over_the_pairs_that_are_there(params, one_batch):
    _, metrics = one_batch
    rows = [*one_a_row(), [], []]
    for microbatches in (1, 3):
        sums = jax.jit(make_eval_step(SETTINGS))(params, batch_of(rows, SHAPE, microbatches))
        assert sums["pairs"] == 4
        for name in sums.keys() - {"pairs"}:
            np.testing.assert_allclose(
                sums[name] / 4, metrics[name], rtol=1e-5, atol=1e-5, err_msg=name
            )


@pytest.mark.parametrize("microbatches", [1, 2])
def test_bfloat16(params, one_batch, microbatches):
    settings = dataclasses.replace(SETTINGS, dtype=jnp.bfloat16, remat="layer")
    half = jax.tree.map(lambda p: jnp.asarray(np.asarray(p).astype(jnp.bfloat16)), params)
    batch = batch_of(one_a_row(), microbatches=microbatches)
    state, metrics = run_step(half, batch, settings)
    # bfloat16 has a precision of 0.4%; sums over the batch and norms are taken in float32.
    assert {g.dtype for g in jax.tree.leaves(state.opt_state)} == {jnp.dtype(jnp.float32)}
    assert metrics["loss"].dtype == metrics["grad_norm"].dtype == jnp.float32
    _, want = one_batch
    np.testing.assert_allclose(metrics["loss"], want["loss"], rtol=0.05)
    np.testing.assert_allclose(metrics["grad_norm"], want["grad_norm"], rtol=0.05)
    norm = math.sqrt(sum(float(np.sum(np.square(g))) for g in jax.tree.leaves(state.opt_state)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert {p.dtype for p in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    want_params = jax.tree.map(
        lambda p, g: (np.asarray(p) - np.asarray(g)).astype(p.dtype), half, state.opt_state
    )
    chex.assert_trees_all_equal(state.params, want_params)
