"""Wins, losses and ties: margins below what the dtype resolves count as neither."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax import losses, pair_loss
from attnpo_jax.data.batching import Example, RowShape, fill_rows
from attnpo_jax.models import decoder, scoring
from attnpo_jax.registry import RegistryError
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


def responses_of(policy, reference, mask, collision=None):
    return ResponseTokens(
        mask_BT=jnp.asarray(mask),
        text_mask_BT=jnp.asarray(mask),
        judge_B2ST=jnp.zeros((len(mask), 2, 0, mask.shape[1])),
        verdict_B2=jnp.zeros((len(mask), 2)),
        reference_logps_BT=jnp.asarray(reference, jnp.float32),
        policy_logps_BT=jnp.asarray(policy, jnp.float32),
        is_chosen=jnp.tile(jnp.array([True, False]), len(mask) // 2),
        policy_collision_BT=collision,
    )


# A pair, and an empty slot; the second token weighs 3, the others 1.
POLICY = np.array([[-1.0, -2.0, -0.5], [-4.0, -1.0, 0.0], [0.0] * 3, [0.0] * 3])
REFERENCE = np.array([[-1.5, -1.0, -0.5], [-3.0, -2.0, 0.0], [0.0] * 3, [0.0] * 3])
COLLISION = np.array([[-0.5, -1.0, -0.25], [-2.0, -0.5, 0.0], [0.0] * 3, [0.0] * 3])
MASK = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 0], [0, 0, 0]], bool)


def with_weights(weights, objective, policy=POLICY, collision=None, kl=None):
    return pair_loss.pair_losses(
        lambda tokens: tokens.mask_BT * jnp.array(weights),
        objective,
        jnp.asarray(policy, jnp.float32),
        responses_of(POLICY, REFERENCE, MASK, collision),
        jnp.array([True, False]),
        beta=BETA,
        resolution=0.1,
        kl_BT=kl,
    )


def losses_of(objective, collision=None):
    """Loss of the pair, its metrics, and the slopes in the policy's log-probs."""

    def total(policy_BT):
        loss_P, found = with_weights([1.0, 3.0, 1.0], objective, policy_BT, collision)
        return jnp.sum(loss_P), (loss_P, found)

    slopes, (loss_P, found) = jax.grad(total, has_aux=True)(jnp.asarray(POLICY, jnp.float32))
    assert loss_P[1] == 0 and not slopes[2:].any() and np.isfinite(slopes).all()
    assert all(values.shape == (2,) and values[1] == 0 for values in found.values())
    return float(loss_P[0]), {name: float(values[0]) for name, values in found.items()}, slopes[:2]


def test_an_objective_gets_weighted_and_unweighted_sums():
    seen = []

    def objective(chosen, rejected):
        seen.append((chosen, rejected))
        return chosen.policy_B

    with_weights([1.0, 3.0, 1.0], objective)
    fields = ("policy_B", "reference_B", "weight_B", "length_B", "policy_sum_B", "reference_sum_B")
    sums = [[float(getattr(scores, name)[0]) for name in fields] for scores in seen[0]]
    assert sums == [[-7.5, -5, 5, 3, -3.5, -3], [-7, -9, 4, 2, -5, -5]]
    # Then with all weights 1, for the unweighted loss.
    sums = [[float(getattr(scores, name)[0]) for name in fields] for scores in seen[1]]
    assert sums == [[-3.5, -3, 3, 3, -3.5, -3], [-5, -5, 2, 2, -5, -5]]
    assert seen[0][0].collision_sum_B is None


def test_a_pair_s_weight_multiplies_its_loss_and_its_margin_shifts_its_logits():
    def found(objective, **options):
        loss_P, metrics = pair_loss.pair_losses(
            lambda tokens: tokens.mask_BT * jnp.array([1.0, 3.0, 1.0]),
            objective,
            jnp.asarray(POLICY, jnp.float32),
            responses_of(POLICY, REFERENCE, MASK, None),
            jnp.array([True, False]),
            beta=BETA,
            **options,
        )
        return float(loss_P[0]), float(metrics.pop("unweighted_loss")[0]), metrics

    sigmoid = losses.bind("sigmoid", {"beta": BETA})
    weights = {"weight_P": jnp.array([3.0, 9.0]), "margin_P": jnp.array([0.25, 9.0])}
    loss, unweighted, metrics = found(sigmoid, **weights)
    # Weighted log-ratios -2.5 and 2, plain ones -0.5 and 0.
    assert loss == pytest.approx(3 * math.log1p(math.exp(0.25 + BETA * 4.5)), rel=1e-6)
    assert unweighted == pytest.approx(3 * math.log1p(math.exp(0.25 + BETA * 0.5)), rel=1e-6)
    assert jax.tree.map(float, jax.tree.map(jnp.sum, metrics)) == jax.tree.map(
        float, jax.tree.map(jnp.sum, found(sigmoid)[2])
    )


def test_a_batch_s_weights_and_margins_reach_the_losses():
    params, batch = tiny.params(), jax.tree.map(lambda x: x[0], tiny.batch(1, 2, 3))
    settings = dataclasses.replace(tiny.settings(), objective=losses.bind("sigmoid", {"beta": 1.0}))
    rows = batch.valid_BG.shape
    moved = dataclasses.replace(
        batch,
        weight_BG=np.full(rows, 2, np.float32),
        margin_BG=np.full(rows, 0.5, np.float32),
    )
    plain_P, metrics = jax.jit(pair_loss.batch_losses, static_argnums=0)(settings, params, batch)
    loss_P, _ = jax.jit(pair_loss.batch_losses, static_argnums=0)(settings, params, moved)
    # tiny's rewards are at a beta of 0.1.
    logits_P = 10 * metrics["rewards/weighted_margins"]
    want = np.where(batch.valid_BG.reshape(-1), 2 * np.logaddexp(0, 0.5 - logits_P), 0)
    np.testing.assert_allclose(loss_P, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        plain_P, np.where(want > 0, np.logaddexp(0, -logits_P), 0), rtol=1e-4, atol=1e-5
    )


def test_rewards_of_a_reference_free_objective_are_its_own():
    loss, found, _ = losses_of(losses.bind("simpo", {"beta": 2.0, "gamma": 1.0}))
    # Weighted means -7.5 / 5 and -7 / 4; plain ones -3.5 / 3 and -5 / 2.
    assert loss == pytest.approx(math.log1p(math.exp(1 - 2 * (1.75 - 1.5))), rel=1e-6)
    assert found["rewards/weighted_chosen"] == pytest.approx(-3.0)
    assert found["rewards/weighted_rejected"] == pytest.approx(-3.5)
    assert found["rewards/rejected"] == pytest.approx(-5.0)
    assert found["rewards/margins"] == pytest.approx(2 * (2.5 - 3.5 / 3), rel=1e-6)
    assert found["rewards/weighted_accuracies"] == 1 and found["rewards/weighted_ties"] == 0
    _, found, _ = losses_of(losses.bind("cpo", {}))
    assert found["rewards/weighted_margins"] == pytest.approx(BETA * (7 - 7.5))


def test_wpo_weighs_a_pair_by_its_collisions():
    collision = jnp.asarray(COLLISION, jnp.float32)
    plain, of_plain, slopes = losses_of(losses.bind("sigmoid", {"beta": BETA}), collision)
    loss, found, weighted_slopes = losses_of(
        losses.bind("sigmoid", {"beta": BETA, "wpo": True}), collision
    )
    # Sums of log p and of the collision: -3.5 and -1.75 over 3 tokens, -5 and -2.5 over 2.
    factor = math.exp(-1.75 / 3 - 2.5 / 2)
    assert loss == pytest.approx(factor * plain, rel=1e-6)
    np.testing.assert_allclose(weighted_slopes, factor * slopes, rtol=1e-5)
    unweighted = of_plain.pop("unweighted_loss")
    assert found.pop("unweighted_loss") == pytest.approx(factor * unweighted, rel=1e-6)
    assert found == of_plain


@pytest.mark.parametrize("name", losses.names())
def test_zero_weights_and_empty_slots_are_finite_through_the_sums(name):
    objective = losses.bind(name, {"wpo": True})

    def total(policy_BT, kl_BT):
        collision = jnp.asarray(COLLISION, jnp.float32)
        loss_P, found = with_weights([0.0] * 3, objective, policy_BT, collision, kl_BT)
        return jnp.sum(loss_P), found

    of_tokens = jnp.asarray(POLICY, jnp.float32), jnp.asarray(MASK, jnp.float32)
    (loss, found), slopes = jax.value_and_grad(total, (0, 1), has_aux=True)(*of_tokens)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, found, slopes)))


def test_a_step_computes_collisions_where_the_objective_declares_them():
    params, batch = tiny.params(), jax.tree.map(lambda x: x[0], tiny.batch(1, 2, 3))
    settings = tiny.settings()
    of_wpo = dataclasses.replace(settings, objective=losses.bind("sigmoid", {"wpo": True}))
    of_plain = dataclasses.replace(settings, objective=losses.bind("sigmoid", {}))
    loss_P, _ = jax.jit(pair_loss.batch_losses, static_argnums=0)(of_wpo, params, batch)
    plain_P, _ = jax.jit(pair_loss.batch_losses, static_argnums=0)(of_plain, params, batch)
    hidden = decoder.forward(
        tiny.MODEL,
        params,
        batch.tokens_BL,
        batch.positions_BL,
        batch.branch_BL,
        segment_BL=batch.segment_BL,
    )
    logps_BLV = jax.nn.log_softmax(hidden @ decoder.unembedding(params).T, axis=-1)
    by_token = jnp.take_along_axis(logps_BLV, batch.read_BM[..., None], axis=1)
    picked = jnp.take_along_axis(by_token, batch.target_BM[..., None], axis=-1)[..., 0]
    surplus_BM = np.asarray(picked - jax.nn.logsumexp(2 * by_token, axis=-1))
    mask, index, want = np.asarray(batch.mask_BG2T), np.asarray(batch.index_BG2T), []
    for b, g in np.ndindex(batch.valid_BG.shape):
        places = [index[b, g, r][mask[b, g, r]] for r in (0, 1)] if batch.valid_BG[b, g] else []
        want.append(np.exp(sum(surplus_BM[b, place].mean() for place in places)))
    np.testing.assert_allclose(loss_P, np.array(want) * plain_P, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("version", [1, 2])
def test_divergences_count_every_token_once(version):
    kl = jnp.array([[1.0, 2.0, 4.0], [3.0, 0.5, 0.0], [0.0] * 3, [0.0] * 3])
    objective = losses.bind("tdpo", {"beta": BETA, "version": version, "alpha": 0.5})
    loss, slopes = jax.value_and_grad(
        lambda kl_BT: jnp.sum(with_weights([1.0, 3.0, 1.0], objective, kl=kl_BT)[0])
    )(kl)
    # Weighted log-ratios -2.5 and 2, divergences 7 and 3.5.
    logits = BETA * (-4.5 - (3.5 - 7) * (1 if version == 1 else 0.5))
    assert loss == pytest.approx(math.log1p(math.exp(-logits)), rel=1e-6)
    slope = BETA / (1 + math.exp(logits))
    wanted = {1: [-slope, slope], 2: [0.0, slope / 2]}[version]
    np.testing.assert_allclose(slopes, [[wanted[0]] * 3, [wanted[1]] * 3, [0] * 3, [0] * 3])


def test_a_step_without_the_reference_s_distribution_is_refused():
    settings = dataclasses.replace(tiny.settings(), objective=losses.bind("tdpo", {}))
    with pytest.raises(ValueError, match="needs reference_kl, the reference's distribution"):
        pair_loss.batch_losses(settings, {}, None)


def without_reference(batch):
    return dataclasses.replace(batch, reference_logps_BG2T=None)


@pytest.mark.parametrize("name", ["simpo", "orpo", "cpo", "nll"])
def test_without_a_reference_a_free_objective_is_what_it_is_with_one(name):
    params, batch = tiny.params(), jax.tree.map(lambda x: x[0], tiny.batch(1, 2, 3))
    settings = dataclasses.replace(tiny.settings(), objective=losses.bind(name, {}))
    run = jax.jit(pair_loss.batch_losses, static_argnums=0)
    loss_P, found = run(settings, params, without_reference(batch))
    wanted_P, wanted = run(settings, params, batch)
    np.testing.assert_array_equal(loss_P, wanted_P)
    assert found.keys() == wanted.keys()
    for metric, values in found.items():
        np.testing.assert_array_equal(values, wanted[metric], err_msg=metric)


@pytest.mark.parametrize(
    ("field", "need"),
    [
        ("reference_logps_BT", "reference_logps"),
        ("reference_entropy_BT", "reference_entropy"),
        ("judge_B2ST", "judge"),
        ("verdict_B2", "judge"),
    ],
)
@pytest.mark.parametrize("read", [lambda x: -x, lambda x: jnp.exp(x), lambda x: x.sum(axis=-1)])
def test_who_reads_what_nobody_declared_is_told(field, need, read):
    batch = without_reference(jax.tree.map(lambda x: x[0], tiny.batch(1, 2, 3)))
    settings = dataclasses.replace(
        tiny.settings(),
        weighting=lambda response: read(getattr(response, field)),
        objective=losses.bind("simpo", {}),
        source_layers=(),
    )
    message = (
        f'{field} is not computed here: nothing .* by @weighting.register\\(needs=\\("{need}",'
    )
    with pytest.raises(RegistryError, match=message):
        jax.eval_shape(lambda p: pair_loss.batch_losses(settings, p, batch), tiny.params())
    settings = dataclasses.replace(
        settings,
        weighting=lambda response: response.mask_BT.astype(jnp.float32),
        objective=losses.bind("sigmoid", {}),
    )
    with pytest.raises(RegistryError, match="reference_logps_BT is not computed here"):
        jax.eval_shape(lambda p: pair_loss.batch_losses(settings, p, batch), tiny.params())


def test_an_objective_that_calls_itself_free_of_the_reference_gets_none():
    def greedy(chosen, rejected):
        return chosen.log_ratio_B - rejected.log_ratio_B

    greedy.objective_traits = lambda: losses.Traits(reference_free=True)
    with pytest.raises(RegistryError, match="reference_B is not computed here: .*reference_free"):
        with_weights([1.0] * 3, greedy)


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
    # In bfloat16 it depends on the code generator whether roundings are left out anywhere.
    assert dtype == jnp.bfloat16 or np.any(found["rewards/margins"]), "nothing was rounded"
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
