import json
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnpo_jax.models import decoder
from attnpo_jax.parallel import state
from attnpo_jax.train import optim

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "train_trajectory.json"


def settings(**changes):
    values = dict(
        learning_rate=1e-5,
        schedule="cosine",
        warmup_ratio=0.0,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    return types.SimpleNamespace(**values | changes)


@pytest.mark.golden
def test_cosine_gives_the_golden_learning_rates():
    golden = [line["learning_rate"] for line in json.loads(GOLDEN.read_text())]
    schedule = optim.make_schedule(settings(warmup_ratio=1 / 6), len(golden))
    np.testing.assert_allclose([schedule(i) for i in range(6)], golden, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "warmup_ratio", "expected"),
    [
        # Eight steps, peak 1; ceil(0.2 * 8) = 2 of them rise: 0, 1/2; six fall.
        ("linear", 0.2, [0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("constant", 0.2, [0, 1 / 2, 1, 1, 1, 1, 1, 1]),
        (
            "cosine",
            0.2,
            [0, 0.5, 1, (2 + math.sqrt(3)) / 4, 0.75, 0.5, 0.25, (2 - math.sqrt(3)) / 4],
        ),
        ("linear", 0.0, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
    ],
)
def test_schedule_by_hand(name, warmup_ratio, expected):
    schedule = optim.make_schedule(
        settings(learning_rate=1.0, schedule=name, warmup_ratio=warmup_ratio), 8
    )
    np.testing.assert_allclose([schedule(i) for i in range(8)], expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(jnp.arange(8)), expected, atol=1e-6)
    if name != "constant":
        assert schedule(8) == pytest.approx(0.0, abs=1e-7)


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="optim.schedule is 'step'; accepted: 'cosine'"):
        optim.make_schedule(settings(schedule="step"), 3)


def test_first_update_uses_the_rate_of_step_0():
    params = {"down": jnp.ones(3)}
    optimizer = optim.make_optimizer(settings(), lambda step: jnp.where(step == 0, 0.0, 0.5))
    opt_state = optimizer.init(params)
    gradients = {"down": jnp.array([1e-2, -1e-3, 1e-2])}
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    np.testing.assert_array_equal(updates["down"], 0.0)
    updates, _ = optimizer.update(gradients, opt_state, params)
    # With constant gradients Adam's corrected ratio is their sign, so the step is the rate.
    np.testing.assert_allclose(updates["down"], [-0.5, 0.5, -0.5], rtol=1e-4)


def test_three_steps_equal_torch_adamw_with_clip():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = {"down": rng.normal(size=(4, 3)), "final_norm": rng.normal(size=3)}
    gradients = [
        {k: rng.normal(size=v.shape) * scale for k, v in start.items()}
        for scale in (3.0, 0.01, 1.0)
    ]

    theirs = {k: torch.nn.Parameter(torch.tensor(v, dtype=torch.float32)) for k, v in start.items()}
    reference = torch.optim.AdamW(
        [
            {"params": [theirs["down"]], "weight_decay": 0.1},
            {"params": [theirs["final_norm"]], "weight_decay": 0.0},
        ],
        lr=0.02,
        betas=(0.8, 0.95),
        eps=1e-6,
    )
    for step in gradients:
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(step[name], dtype=torch.float32)
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 0.7)
        reference.step()

    optimizer = optim.make_optimizer(
        settings(b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1, max_grad_norm=0.7),
        lambda step: jnp.float32(0.02),
    )
    ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    opt_state = optimizer.init(ours)
    for step in gradients:
        updates, opt_state = optimizer.update(
            jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), step), opt_state, ours
        )
        ours = optax.apply_updates(ours, updates)
    for name, parameter in theirs.items():
        np.testing.assert_allclose(ours[name], parameter.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_clip_by_hand():
    gradients = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    clipped, _ = optim.clip_by_global_norm(1.0).update(gradients, optax.EmptyState())
    np.testing.assert_allclose([clipped["a"][0], clipped["b"][0]], [0.6, 0.8], rtol=1e-6)
    untouched, _ = optim.clip_by_global_norm(5.1).update(gradients, optax.EmptyState())
    np.testing.assert_array_equal(untouched["b"], gradients["b"])


def test_clip_of_0_is_off():
    params = {"down": jnp.zeros(2)}
    optimizer = optim.make_optimizer(settings(max_grad_norm=0.0), lambda step: jnp.float32(1.0))
    _, opt_state = optimizer.update(
        {"down": jnp.array([300.0, 0.0])}, optimizer.init(params), params
    )
    mean = optax.tree.get(opt_state, "mu")["down"]
    np.testing.assert_allclose(mean, [30.0, 0.0], rtol=1e-6)


def test_everything_but_norms_and_biases_decays():
    config = decoder.ModelConfig(
        vocab_size=8,
        hidden_size=4,
        intermediate_size=4,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        attention_bias=True,
        mlp_bias=True,
    )
    decays = optim.decays(decoder.abstract_params(config))
    assert decays["embedding"] and decays["lm_head"] and not decays["final_norm"]
    assert {name for name, decay in decays["layers"].items() if decay} == {
        "query",
        "key",
        "value",
        "output",
        "gate",
        "up",
        "down",
    }


def test_bfloat16_parameters_keep_their_dtype_and_get_float32_moments():
    params = {"down": jnp.ones(2, jnp.bfloat16)}
    optimizer = optim.make_optimizer(settings(max_grad_norm=0.0), lambda step: jnp.float32(0.25))
    start = state.create(params, optimizer)
    assert start.params["down"].dtype == jnp.bfloat16
    gradients = {"down": jnp.array([1.0, -1.0], jnp.bfloat16)}
    updates, opt_state = optimizer.update(gradients, start.opt_state, params)
    moved = optax.apply_updates(params, updates)
    assert moved["down"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(moved["down"].astype(jnp.float32), [0.75, 1.25])
    assert jax.tree.map(lambda x: x.dtype, opt_state) == jax.tree.map(
        lambda x: x.dtype, start.opt_state
    )
    assert optax.tree.get(opt_state, "nu")["down"].dtype == jnp.float32


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="XLA for CPUs kept a copy of one tensor"
)
def test_update_needs_no_second_copy_of_the_gradients():
    params = {"down": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    optimizer = optim.make_optimizer(settings(), lambda step: jnp.float32(1e-3))

    def step(params, opt_state, gradients):
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = jax.eval_shape(optimizer.init, params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 512 * 4 / 10
