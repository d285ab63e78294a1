import dataclasses
import doctest
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnpo_jax import losses
from attnpo_jax.losses import objectives
from attnpo_jax.registry import RegistryError

OBJECTIVES = [
    losses.sigmoid,
    partial(losses.sigmoid, beta=0.5, label_smoothing=0.1),
    partial(losses.hinge, beta=0.3),
    partial(losses.ipo, beta=0.2),
    partial(losses.ipo, beta=0.2, length_normalize=True),
]


def scores(policy, reference, weight=None, length=None):
    policy = jnp.asarray(policy, jnp.float32)
    ones = jnp.ones_like(policy)
    return losses.ResponseScores(
        policy_B=policy,
        reference_B=jnp.asarray(reference, jnp.float32),
        weight_B=ones if weight is None else jnp.asarray(weight, jnp.float32),
        length_B=ones if length is None else jnp.asarray(length, jnp.float32),
    )


def random_pair(batch=8, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        scores(*(-20 * rng.random((2, batch))), *(1 + 9 * rng.random((2, batch)))) for _ in "cr"
    )


def test_losses_where_policy_and_reference_agree():
    chosen = scores([-3.0, -100.0], [-3.0, -100.0])
    rejected = scores([-5.0, 0.0], [-5.0, 0.0])
    log2 = math.log(2)
    np.testing.assert_allclose(losses.sigmoid(chosen, rejected), log2, rtol=1e-6)
    np.testing.assert_allclose(
        losses.sigmoid(chosen, rejected, beta=5.0, label_smoothing=0.3), log2, rtol=1e-6
    )
    np.testing.assert_array_equal(losses.hinge(chosen, rejected, beta=0.7), 1.0)
    np.testing.assert_allclose(losses.ipo(chosen, rejected, beta=0.1), 25.0, rtol=1e-6)


def test_sigmoid_by_hand():
    # Log-ratios 2 and -1: h = 3; the second pair is the first one swapped.
    chosen, rejected = scores([-1.0, -4.0], [-3.0, -3.0]), scores([-4.0, -1.0], [-3.0, -3.0])
    loss = losses.sigmoid(chosen, rejected, beta=0.5)
    expected = [math.log1p(math.exp(-1.5)), math.log1p(math.exp(1.5))]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    smoothed = losses.sigmoid(chosen, rejected, beta=0.5, label_smoothing=0.1)
    np.testing.assert_allclose(
        smoothed,
        [0.9 * expected[0] + 0.1 * expected[1], 0.1 * expected[0] + 0.9 * expected[1]],
        rtol=1e-6,
    )


def test_hinge_by_hand():
    # h = 3, 0.5 and -2 with beta 0.5: 1 - 1.5 < 0, 1 - 0.25, 1 + 1.
    chosen, rejected = scores([3.0, 0.5, -2.0], [0.0] * 3), scores([0.0] * 3, [0.0] * 3)
    np.testing.assert_allclose(losses.hinge(chosen, rejected, beta=0.5), [0, 0.75, 2], rtol=1e-6)


def test_ipo_by_hand_with_and_without_length_normalization():
    # Log-ratios 6 over weight 4 and -2 over weight 8; target 1 / (2 * 0.25) = 2.
    chosen, rejected = scores([6.0], [0.0], weight=[4.0]), scores([0.0], [2.0], weight=[8.0])
    np.testing.assert_allclose(losses.ipo(chosen, rejected, beta=0.25), [(8 - 2) ** 2])
    np.testing.assert_allclose(
        losses.ipo(chosen, rejected, beta=0.25, length_normalize=True), [(1.5 + 0.25 - 2) ** 2]
    )


def test_sigmoid_stays_finite_far_out():
    far = scores([1e6, -1e6], [0.0, 0.0])
    zero = scores([0.0, 0.0], [0.0, 0.0])
    np.testing.assert_allclose(losses.sigmoid(far, zero, beta=0.1), [0.0, 1e5], rtol=1e-6)
    gradient = jax.grad(lambda s: losses.sigmoid(s, zero, beta=0.1).sum())(far)
    np.testing.assert_allclose(gradient.policy_B, [0.0, -0.1], atol=1e-7)


def test_gradient_by_hand():
    chosen, rejected = scores([-1.0], [-3.0]), scores([-4.0], [-3.0])

    def gradient(objective):
        return jax.grad(lambda c, r: objective(c, r).sum(), argnums=(0, 1))(chosen, rejected)

    beta = 0.5
    for objective, slope in [
        (partial(losses.sigmoid, beta=beta), -beta / (1 + math.exp(beta * 3))),
        (partial(losses.hinge, beta=0.1), -0.1),
        (partial(losses.ipo, beta=beta), 2 * (3 - 1)),
    ]:
        g_chosen, g_rejected = gradient(objective)
        np.testing.assert_allclose(g_chosen.policy_B, [slope], rtol=1e-6)
        np.testing.assert_allclose(g_rejected.policy_B, [-slope], rtol=1e-6)
        np.testing.assert_array_equal(g_chosen.reference_B, [0.0])
        np.testing.assert_array_equal(g_rejected.reference_B, [0.0])


def test_responses_without_weight_give_finite_losses_and_gradients():
    empty = scores([0.0], [0.0], weight=[0.0], length=[0.0])
    for objective in OBJECTIVES:
        loss, gradient = jax.value_and_grad(lambda s, f=objective: f(s, empty).sum())(empty)
        assert np.isfinite(loss) and np.isfinite(gradient.policy_B).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_transformations_leave_losses_and_gradients_unchanged(objective):
    pair = random_pair()

    def loss_and_gradient(chosen, rejected):
        loss, pullback = jax.vjp(lambda c: objective(c, rejected), chosen)
        return jnp.stack([loss, pullback(jnp.ones_like(loss))[0].policy_B], axis=-1)

    expected = np.asarray(loss_and_gradient(*pair))
    assert expected.shape == (8, 2) and np.abs(expected).min(axis=1).max() > 0
    close = partial(np.testing.assert_allclose, desired=expected, rtol=1e-5, atol=1e-6)
    rows = jax.tree.map(lambda x: x[:, None], pair)
    close(jax.jit(loss_and_gradient)(*pair))
    close(jax.jit(jax.vmap(loss_and_gradient))(*rows)[:, 0])
    close(jax.pmap(loss_and_gradient)(*rows)[:, 0])
    mesh = jax.make_mesh((8,), ("data",))
    spread = jax.device_put(pair, NamedSharding(mesh, P("data")))
    sharded = jax.shard_map(loss_and_gradient, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    close(jax.jit(sharded)(*spread))


def test_wrong_shapes_fail_with_the_name_of_the_field():
    chosen, rejected = random_pair()
    with pytest.raises(AssertionError, match="rejected.reference_B"):
        losses.sigmoid(chosen, dataclasses.replace(rejected, reference_B=jnp.zeros(3)))
    with pytest.raises(AssertionError, match="chosen.policy_B"):
        losses.hinge(dataclasses.replace(chosen, policy_B=jnp.zeros(())), rejected)
    with pytest.raises(AssertionError, match="rejected.policy_B"):
        losses.ipo(chosen, dataclasses.replace(rejected, policy_B=jnp.zeros(8, jnp.int32)))


def test_registry_names_and_hyperparameters():
    assert {"hinge", "ipo", "sigmoid"} <= set(losses.names())
    assert losses.hyperparameters("sigmoid") == {"beta": 0.1, "label_smoothing": 0.0}
    assert losses.hyperparameters("ipo") == {"beta": 0.1, "length_normalize": False}
    with pytest.raises(RegistryError, match="unknown objective 'dpo'; accepted: hinge, ipo, "):
        losses.bind("dpo", {})
    with pytest.raises(RegistryError, match="no hyperparameter 'gamma'; accepted: beta"):
        losses.bind("hinge", {"beta": 1.0, "gamma": 2.0})
    pair = random_pair()
    np.testing.assert_array_equal(
        losses.bind("hinge", {"beta": 0.3})(*pair), losses.hinge(*pair, beta=0.3)
    )


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(objectives)
    assert result.attempted >= 8 and result.failed == 0
