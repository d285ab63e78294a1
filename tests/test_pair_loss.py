"""Wins, losses and ties: margins below what the dtype resolves count as neither."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax import pair_loss
from attnpo_jax.data.batching import Example, RowShape, fill_rows
from attnpo_jax.models import scoring
from attnpo_jax.weighting import ResponseTokens
from tests import tiny

BETA = 0.5


def metrics(margins, *, resolution, weight=1.0):
    """Metrics of pairs whose log-ratios are `margins` on the chosen side's first token and 0 else.

    Responses of two tokens, one of log-prob -3 and one of -0.5 under the reference; the last pair
    is an empty slot.
    """
    P = len(margins)
    reference = np.tile(np.array([-3.0, -0.5], np.float64), (2 * P, 1))
    policy = reference.copy()
    policy[::2, 0] += margins
    mask = np.ones((2 * P, 2), bool)
    responses = ResponseTokens(
        mask_BT=jnp.asarray(mask),
        text_mask_BT=jnp.asarray(mask),
        judge_B2ST=jnp.zeros((2 * P, 2, 0, 2)),
        verdict_B2=jnp.zeros((2 * P, 2)),
        reference_logps_BT=jnp.asarray(reference),
        policy_logps_BT=jnp.asarray(policy),
        is_chosen=jnp.tile(jnp.array([True, False]), P),
    )
    _, found = pair_loss.pair_losses(
        lambda tokens: weight * tokens.mask_BT,
        lambda chosen, rejected: chosen.policy_B,
        jnp.asarray(policy, jnp.float32),
        responses,
        jnp.arange(P) < P - 1,
        beta=BETA,
        resolution=resolution,
    )
    return found


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_margins_below_the_resolution_are_ties(weight):
    # Policy and reference, both responses: four times 3 squared and, for -0.5, 1 squared.
    least = 0.01 * np.sqrt(4 * (9 + 1))
    margins = np.array([1.05, 0.95, 0.0, -0.95, -1.05, 0.0]) * least
    found = metrics(margins, resolution=0.01, weight=weight)
    for prefix in ("", "weighted_"):
        assert found[f"rewards/{prefix}accuracies"].tolist() == [1, 0, 0, 0, 0, 0]
        assert found[f"rewards/{prefix}ties"].tolist() == [0, 1, 1, 1, 0, 0]
    np.testing.assert_allclose(found["rewards/margins"][:-1], BETA * margins[:-1], rtol=1e-4)
    np.testing.assert_allclose(
        found["rewards/weighted_margins"][:-1], weight * BETA * margins[:-1], rtol=1e-4
    )


def test_without_a_resolution_only_equal_rewards_are_ties():
    found = metrics([1e-3, 0.0, -1e-3, 0.0], resolution=0.0)
    assert found["rewards/accuracies"].tolist() == [1, 0, 0, 0]
    assert found["rewards/ties"].tolist() == [0, 1, 0, 0]


def test_the_coarser_dtype_resolves_less():
    assert 1e-7 < pair_loss.resolution(jnp.float32) < 1e-5
    assert 2**-8 < pair_loss.resolution("bfloat16") < 2**-4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_before_the_first_update_every_pair_is_a_tie(dtype):
    """The policy, in rows of three pairs, is the reference, which was scored in rows of one."""
    T = 50
    rng = np.random.default_rng(4)
    params = tiny.larger(tiny.params(), 2.0)

    def example(index, reference_logps=None):
        texts = np.random.default_rng(index).integers(0, tiny.MODEL.vocab_size, (3, T))
        prompt, *responses = texts.astype(np.int32)
        judge = (np.ones((2, len(tiny.SOURCES), T), np.float32),) * 2
        return Example(
            index,
            prompt,
            tuple(responses),
            (T, T),
            judge=judge,
            verdict=rng.normal(size=2).astype(np.float32),
            reference_logps=reference_logps or (np.zeros(T, np.float32),) * 2,
        )

    def rows(examples, pairs):
        groups = [examples[i : i + pairs] for i in range(0, len(examples), pairs)]
        shape = RowShape(3 * T * pairs + 4, 2 * T * pairs, T, pairs)
        return fill_rows(groups, shape, len(tiny.SOURCES))

    alone = rows([example(i) for i in range(24)], 1)
    logps = np.asarray(scoring.response_logps(tiny.MODEL, params, alone, dtype=dtype))
    packed = rows([example(i, tuple(logps[i, 0])) for i in range(24)], 3)
    _, found = pair_loss.batch_losses(tiny.settings(dtype=dtype), params, packed)
    assert np.any(found["rewards/margins"]), "nothing was rounded"
    for prefix in ("", "weighted_"):
        assert found[f"rewards/{prefix}ties"].tolist() == [1] * 24
        assert found[f"rewards/{prefix}accuracies"].tolist() == [0] * 24


def seen_by_a_weighting(**changes):
    """What a weighting gets of the first microbatch of the tiny batch, one jitted step."""
    batch = jax.tree.map(lambda x: x[0], tiny.batch())

    def step(params, batch):
        found = {}

        def weigh(responses):
            fields = dataclasses.fields(responses)
            found.update({f.name: getattr(responses, f.name) for f in fields if "_B" in f.name})
            return responses.mask_BT.astype(jnp.float32)

        settings = dataclasses.replace(tiny.settings(), weighting=weigh, **changes)
        pair_loss.batch_losses(settings, params, batch)
        return found

    return batch, step


def test_a_weighting_sees_both_responses_tokens_and_what_it_needs():
    batch, step = seen_by_a_weighting(needs=("policy_entropy",))
    found = jax.device_get(jax.jit(step)(tiny.params(), batch))
    assert found["policy_collision_BT"] is None
    for p, (b, g) in enumerate(np.ndindex(*batch.valid_BG.shape)):
        ids = [
            batch.target_BM[b, batch.index_BG2T[b, g, r]][batch.mask_BG2T[b, g, r]] for r in (0, 1)
        ]
        for r in (0, 1):
            row, n, other = 2 * p + r, len(ids[r]), len(ids[1 - r])
            assert found["tokens_BT"][row, :n].tolist() == ids[r].tolist()
            assert found["partner_tokens_BT"][row, :other].tolist() == ids[1 - r].tolist()
            assert (found["tokens_BT"][row, n:] == -1).all()
            assert (found["partner_tokens_BT"][row, other:] == -1).all()
            assert found["partner_length_B"][row] == other
            entropy = found["policy_entropy_BT"][row]
            # A model of small random weights is all but uniform over its words.
            assert not entropy[n:].any()
            np.testing.assert_allclose(entropy[:n], np.log(tiny.MODEL.vocab_size), atol=0.1)
            assert (entropy[:n] < np.log(tiny.MODEL.vocab_size)).all()


def test_what_no_weighting_needs_is_not_computed():
    def products(**changes):
        batch, step = seen_by_a_weighting(**changes)
        return str(jax.make_jaxpr(step)(tiny.params(), batch)).count("dot_general[")

    batch = jax.tree.map(lambda x: x[0], tiny.batch())
    settings = tiny.settings()
    logps = jax.make_jaxpr(
        lambda params, batch: scoring.response_logps(
            settings.model,
            params,
            batch,
            remat=settings.remat,
            attention=settings.attention,
            chunk=settings.logps_chunk,
        )
    )
    alone = str(logps(tiny.params(), batch)).count("dot_general[")
    assert products() == alone
    assert products(needs=("policy_entropy", "policy_collision")) == alone + 1
