"""Objectives by hand, at the points that their docstrings name, and under JAX's transformations."""

import dataclasses
import doctest
import importlib
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnpo_jax import losses

MIXED = "sigmoid(label_smoothing=0.1) + 0.5 * nll + 0.1 * simpo(beta=1.0, wpo=True)"
SETTINGS = [
    ("sigmoid", {"beta": 0.5, "label_smoothing": 0.1}),
    ("sigmoid", {"divergence": "forward_kl"}),
    ("sigmoid", {"divergence": "js"}),
    ("sigmoid", {"divergence": "alpha"}),
    ("sigmoid", {"wpo": True}),
    ("hinge", {"wpo": "clamped"}),
    ("ipo", {"beta": 0.2, "length_normalize": True}),
    ("tdpo", {"version": 1}),
    ("mixture", {"terms": MIXED}),
]
# All that are registered here with their defaults, and some with others.
OBJECTIVES = [
    losses.bind(name, values)
    for name, values in [*((name, {}) for name in losses.names()), *SETTINGS]
    if losses.get(name).__module__.startswith("attnpo_jax.")
]


def named(objective):
    of = objective.keywords.get("objective")
    settings = {k: v for k, v in objective.keywords.items() if k != "objective"}
    inner = f"{named(of)} " if of else ""
    return f"{inner}{objective.func.__name__}{settings or ''}"


each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=named)


def scores(policy, reference, weight=None, length=None, **others):
    policy = jnp.asarray(policy, jnp.float32)
    ones = jnp.ones_like(policy)
    return losses.ResponseScores(
        policy_B=policy,
        reference_B=jnp.asarray(reference, jnp.float32),
        weight_B=ones if weight is None else jnp.asarray(weight, jnp.float32),
        length_B=ones if length is None else jnp.asarray(length, jnp.float32),
        **{name: jnp.asarray(value, jnp.float32) for name, value in others.items()},
    )


def random_pair(batch=8, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        scores(
            *(-20 * rng.random((2, batch))),
            *(1 + 9 * rng.random((2, batch))),
            policy_sum_B=-20 * rng.random(batch),
            collision_sum_B=-10 * rng.random(batch),
            kl_B=rng.random(batch),
        )
        for _ in "cr"
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


@each_objective
def test_empty_responses_zero_weights_and_far_log_ratios_give_finite_losses(objective):
    """An empty slot, a response whose tokens all weigh 0, and policies far from the reference."""
    policy, reference = [0.0, 0.0, -900.0, -1.0, 0.0], [0.0, 0.0, -1.0, -900.0, -900.0]
    pair = tuple(
        scores(
            policy[::sign],
            reference[::sign],
            weight=[0.0, 0.0, 30.0, 30.0, 30.0],
            length=[0.0, 9.0, 30.0, 30.0, 30.0],
            policy_sum_B=[0.0, -3.0, -900.0, -1.0, 0.0][::sign],
            collision_sum_B=[0.0, -3.0, -30.0, -30.0, 0.0],
            kl_B=[0.0, 0.0, 900.0, 900.0, 900.0],
        )
        for sign in (1, -1)
    )
    loss, gradient = jax.value_and_grad(lambda pair: objective(*pair).sum())(pair)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def losses_and_gradients(chosen, rejected):
    """By objective: losses and their slopes in the chosen response's log-probs, (B, 2)."""
    found = {}
    for objective in OBJECTIVES:
        loss, pullback = jax.vjp(lambda c, f=objective: f(c, rejected), chosen)
        (slopes,) = pullback(jnp.ones_like(loss))
        both = [loss, slopes.policy_B + slopes.policy_sum_B]
        found[named(objective)] = jnp.stack(both, axis=-1)
    return found


@pytest.fixture(scope="module")
def expected():
    return jax.device_get(losses_and_gradients(*random_pair()))


def test_every_objective_has_a_slope(expected):
    assert len(expected) == len(OBJECTIVES)
    for name, found in expected.items():
        assert found.shape == (8, 2) and np.abs(found).min(axis=1).max() > 0, name


def in_shards(function):
    mesh = jax.make_mesh((8,), ("data",))
    sharded = jax.shard_map(function, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    return lambda *pair: jax.jit(sharded)(*jax.device_put(pair, NamedSharding(mesh, P("data"))))


def by_row(transform):
    """A transformation that maps over rows, on rows of one pair."""

    def transformed(function):
        def call(*pair):
            found = transform(function)(*jax.tree.map(lambda x: x[:, None], pair))
            return jax.tree.map(lambda x: x[:, 0], found)

        return call

    return transformed


@pytest.mark.parametrize(
    "transform",
    [jax.jit, by_row(lambda f: jax.jit(jax.vmap(f))), by_row(jax.pmap), in_shards],
    ids=["jit", "vmap", "pmap", "shard_map"],
)
def test_transformations_leave_losses_and_gradients_unchanged(transform, expected):
    found = jax.device_get(transform(losses_and_gradients)(*random_pair()))
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


def test_wrong_shapes_fail_with_the_name_of_the_field():
    chosen, rejected = random_pair()
    with pytest.raises(AssertionError, match="rejected.reference_B"):
        losses.sigmoid(chosen, dataclasses.replace(rejected, reference_B=jnp.zeros(3)))
    with pytest.raises(AssertionError, match="chosen.policy_B"):
        losses.hinge(dataclasses.replace(chosen, policy_B=jnp.zeros(())), rejected)
    with pytest.raises(AssertionError, match="rejected.policy_B"):
        losses.ipo(chosen, dataclasses.replace(rejected, policy_B=jnp.zeros(8, jnp.int32)))


def two(**options):
    """Log-ratios 3 and 0.5 of the chosen responses, -1 and 2 of the rejected ones."""
    return (
        scores([-1.0, -2.5], [-4.0, -3.0], **options),
        scores([-3.0, -1.0], [-2.0, -3.0], **options),
    )


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize(
    ("name", "settings", "by_hand"),
    [
        ("nca", {}, lambda c, r: -ls(c) - ls(-c) / 2 - ls(-r) / 2),
        ("bco", {}, lambda c, r: -ls(c) - ls(-r)),
        ("sppo", {}, lambda c, r: (2 * c - 1) ** 2 + (2 * r + 1) ** 2),
        ("apo_zero", {}, lambda c, r: 1 - sig(c) + sig(r)),
        ("apo_down", {}, lambda c, r: sig(c) + 1 - sig(c - r)),
        (
            "robust",
            {"label_smoothing": 0.2},
            lambda c, r: (0.2 * ls(r - c) - 0.8 * ls(c - r)) / 0.6,
        ),
        (
            "exo",
            {"label_smoothing": 0.2},
            lambda c, r: (
                sig(c - r) * math.log(sig(c - r) / 0.8) + sig(r - c) * math.log(sig(r - c) / 0.2)
            ),
        ),
        (
            "discopop",
            {"tau": 0.5},
            lambda c, r: -sig(2 * (r - c)) * ls(c - r) + sig(2 * (c - r)) * math.exp(r - c),
        ),
        ("sigmoid", {"divergence": "forward_kl"}, lambda c, r: -ls(f(-1 / u(c), -1 / u(r)))),
        (
            "sigmoid",
            {"divergence": "js"},
            lambda c, r: -ls(f(math.log(2 * u(c) / (1 + u(c))), math.log(2 * u(r) / (1 + u(r))))),
        ),
        (
            "sigmoid",
            {"divergence": "alpha", "alpha": 0.25},
            lambda c, r: -ls(f((1 - u(c) ** -0.25) / 0.25, (1 - u(r) ** -0.25) / 0.25)),
        ),
    ],
)
def test_by_hand(name, settings, by_hand):
    """`by_hand` takes beta times the log-ratios, at beta 0.5."""
    chosen, rejected = two()
    want = [by_hand(0.5 * c, 0.5 * r) for c, r in ((3, -1), (0.5, 2))]
    found = losses.get(name)(chosen, rejected, beta=0.5, **settings)
    np.testing.assert_allclose(found, want, rtol=1e-5)


ls = log_sigmoid


def sig(x):
    return 1 / (1 + math.exp(-x))


def u(half):
    """Ratio of the likelihoods, from half the log-ratio."""
    return math.exp(2 * half)


def f(chosen, rejected):
    return 0.5 * (chosen - rejected)


def test_weights_count_in_means_and_lengths_do_not():
    """Chosen: weights of sum 4 on 8 tokens; rejected: of sum 2 on 3 tokens."""
    chosen = scores([-2.0], [-6.0], weight=[4.0], length=[8.0], policy_sum_B=[-10.0])
    rejected = scores([-3.0], [-2.0], weight=[2.0], length=[3.0], policy_sum_B=[-9.0])

    def loss(name, **settings):
        return float(losses.bind(name, settings)(chosen, rejected)[0])

    # Mean log-probs -0.5 and -1.5; likelihood per token of all tokens 10/8.
    assert loss("simpo", beta=2.0, gamma=0.5) == pytest.approx(-ls(2 * 1 - 0.5), rel=1e-6)
    assert loss("simpo", label_smoothing=0.1) == pytest.approx(
        -0.9 * ls(1) - 0.1 * ls(-1), rel=1e-6
    )
    odds = [math.exp(m) / (1 - math.exp(m)) for m in (-0.5, -1.5)]
    assert loss("orpo", beta=0.2) == pytest.approx(
        1.25 - 0.2 * ls(math.log(odds[0] / odds[1])), rel=1e-5
    )
    assert loss("cpo", beta=0.5, nll_weight=2.0) == pytest.approx(-ls(0.5) + 2.5, rel=1e-6)
    assert loss("nll") == 1.25
    # Log-ratios 4 and -1 over weights 4 and 2.
    assert loss("sigmoid_norm", beta=0.5) == pytest.approx(-ls(0.5 * 1.5), rel=1e-6)
    assert loss("rdpo", beta=0.5, alpha=0.1) == pytest.approx(-ls(0.5 * 5 - 0.1 * 5), rel=1e-6)
    assert loss("dpop", beta=0.5, penalty=2.0) == pytest.approx(-ls(0.5 * 5), rel=1e-6)
    fallen = scores([-6.0], [-4.0], weight=[4.0])  # log-ratio -2, so h = -1
    np.testing.assert_allclose(
        losses.dpop(fallen, rejected, beta=0.5, penalty=2.0), -ls(0.5 * (-1 - 2 * 2)), rtol=1e-6
    )


@pytest.mark.parametrize("name", [n for n in losses.names() if n != "mixture"])
def test_a_margin_is_taken_off_the_logits_of_those_that_read_it(name):
    """Its slope is that of the logits, with the other sign; the log-probs' is so to scale."""
    chosen, rejected = random_pair()
    objective = partial(losses.get(name), **({"penalty": 0.0} if name == "dpop" else {}))
    plain = objective(chosen, rejected)
    with_margin = dataclasses.replace(chosen, margin_B=jnp.zeros(8))
    np.testing.assert_array_equal(objective(with_margin, rejected), plain)
    slope = jax.grad(lambda c: objective(c, rejected).sum())(with_margin)
    if not losses.traits(objective).margin:
        assert not slope.margin_B.any()
        return
    assert (slope.margin_B > -1e-9).all() and slope.margin_B.any()
    # By how much a nat more of the chosen response raises the logits.
    beta = losses.hyperparameters(name)["beta"]
    per_nat = {"sigmoid_norm": beta / chosen.weight_B, "simpo": beta / chosen.weight_B}
    if name != "orpo":
        np.testing.assert_allclose(
            slope.policy_B, -per_nat.get(name, beta) * slope.margin_B, rtol=1e-4, atol=1e-9
        )


def test_offsets_by_hand():
    """ODPO: logits 0.5 (3 + 1) = 2 and 0.5 (0.5 - 2) = -0.75, margins 1.5 and -0.25."""
    chosen, rejected = two()
    chosen = dataclasses.replace(chosen, margin_B=jnp.array([1.5, -0.25]))
    found = losses.sigmoid(chosen, rejected, beta=0.5)
    np.testing.assert_allclose(found, [-ls(0.5), -ls(-0.5)], rtol=1e-6)


def test_wpo_counts_every_token_once_and_has_no_gradient():
    """Means of log p minus the collision: (-10 + 18) / 8 = 1 and (-9 + 3) / 3 = -2."""
    chosen = scores([-2.0], [-6.0], [4.0], [8.0], policy_sum_B=[-10.0], collision_sum_B=[-18.0])
    rejected = scores([-3.0], [-2.0], [2.0], [3.0], policy_sum_B=[-9.0], collision_sum_B=[-3.0])
    plain = partial(losses.sigmoid, beta=0.5)
    weighted = losses.bind("sigmoid", {"beta": 0.5, "wpo": True})
    clamped = losses.bind("sigmoid", {"beta": 0.5, "wpo": "clamped"})
    for pair, factor in (((chosen, rejected), math.exp(-1)), ((chosen, chosen), math.exp(2))):
        np.testing.assert_allclose(weighted(*pair), factor * plain(*pair), rtol=1e-6)
        np.testing.assert_allclose(clamped(*pair), min(1, factor) * plain(*pair), rtol=1e-6)
    slopes = jax.grad(lambda c: weighted(c, rejected).sum())(chosen)
    of_plain = jax.grad(lambda c: plain(c, rejected).sum())(chosen)
    np.testing.assert_allclose(slopes.policy_B, math.exp(-1) * of_plain.policy_B, rtol=1e-6)
    assert slopes.policy_sum_B == slopes.collision_sum_B == 0
    with pytest.raises(ValueError, match="chosen.collision_sum_B is None"):
        weighted(*two())


def test_tdpo2_holds_the_chosen_response_s_divergence_fixed():
    pair = scores([1.0], [0.0], kl_B=[2.0]), scores([0.0], [1.0], kl_B=[3.0])

    def slopes(version):
        loss = partial(losses.tdpo, beta=0.5, version=version, alpha=0.5)
        return [float(x.kl_B[0]) for x in jax.grad(lambda p: loss(*p).sum())(pair)]

    # Logits 0.5 (2 - 1) and 0.5 (2 - 0.5): slopes -sigmoid(-logits) times those of the logits.
    assert slopes(1) == pytest.approx([-0.5 * sig(-0.5), 0.5 * sig(-0.5)], rel=1e-6)
    assert slopes(2) == pytest.approx([0.0, 0.25 * sig(-0.75)], rel=1e-6)
    with pytest.raises(ValueError, match="chosen.kl_B is None; this objective needs it"):
        losses.tdpo(*two())


def test_sums_without_weights_are_those_of_weights_of_one_where_left_out():
    (chosen, _) = two()
    assert chosen.policy_sum_B is chosen.policy_B and chosen.reference_sum_B is chosen.reference_B


FAMILIES = ("anchored", "mixture", "pairwise", "reference_free", "registration", "token_level")


@pytest.mark.parametrize("family", FAMILIES)
def test_examples_in_the_docstrings_run(family):
    result = doctest.testmod(importlib.import_module(f"attnpo_jax.losses.{family}"))
    assert result.attempted and not result.failed
    examples = {name for name in losses.names() if ">>>" in losses.get(name).__doc__}
    assert examples >= {f.func.__name__ for f in OBJECTIVES} - {"policy_weighted"}
