"""Objectives against TRL's own loss code, on random pairs; where TRL and torch are installed."""

import types
from collections import defaultdict

import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax import losses

torch = pytest.importorskip("torch")
dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")

PAIRS, T = 6, 12

# TRL's loss type and settings; ours.
SAME = [
    ("sigmoid", {}, "sigmoid", {}),
    ("hinge", {}, "hinge", {}),
    ("ipo", {}, "ipo", {"length_normalize": True}),
    ("exo_pair", {"label_smoothing": 0.05}, "exo", {"label_smoothing": 0.05}),
    ("nca_pair", {}, "nca", {}),
    ("robust", {"label_smoothing": 0.2}, "robust", {"label_smoothing": 0.2}),
    ("bco_pair", {}, "bco", {}),
    ("sppo_hard", {}, "sppo", {}),
    ("apo_zero", {}, "apo_zero", {}),
    ("apo_down", {}, "apo_down", {}),
    ("discopop", {}, "discopop", {"tau": 0.05}),
    ("sft", {}, "nll", {}),
    ("sigmoid_norm", {}, "sigmoid_norm", {}),
    ("sigmoid", {"f_divergence_type": "forward_kl"}, "sigmoid", {"divergence": "forward_kl"}),
    ("sigmoid", {"f_divergence_type": "js_divergence"}, "sigmoid", {"divergence": "js"}),
    (
        "sigmoid",
        # The coefficient is 1 less the alpha of the f-DPO paper.
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        "sigmoid",
        {"divergence": "alpha", "alpha": 0.3},
    ),
    ("sigmoid", {"use_weighting": True}, "sigmoid", {"wpo": True}),
    ("nca_pair", {"use_weighting": True}, "nca", {"wpo": True}),
]


def random_pairs(beta):
    """Log-probs of policy and reference, collisions and masks: (PAIRS, 2, T), float32."""
    rng = np.random.default_rng(int(100 * beta))
    lengths = rng.integers(1, T + 1, (PAIRS, 2, 1))
    mask = np.arange(T) < lengths
    policy, reference, collision = (-3 * rng.random((PAIRS, 2, T), np.float32) for _ in range(3))
    return policy * mask, reference * mask, collision * mask, mask


def of_trl(pair, beta, loss_type, settings):
    """The loss of one pair, by TRL's trainer without a model."""
    policy, reference, collision, mask = (torch.from_numpy(np.asarray(x)) for x in pair)
    nothing = torch.zeros_like(policy)
    outputs = types.SimpleNamespace(
        log_probs=policy,
        log_sum_sq_probs=collision,
        entropy=nothing,
        mean_logits=nothing,
        is_top1=nothing.bool(),
    )
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=False),
        accelerator=types.SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        args=types.SimpleNamespace(discopop_tau=0.05),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    defaults = {"label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "use_weighting": False}
    vars(trainer).update(defaults | settings)
    first = torch.zeros(2, 1, dtype=torch.long)
    inputs = {
        "input_ids": torch.zeros(2, T + 1, dtype=torch.long),
        "attention_mask": torch.ones(2, T + 1, dtype=torch.long),
        "completion_mask": torch.cat([first, mask.long()], dim=1),
        "ref_chosen_logps": reference[:1].sum(dim=1),
        "ref_rejected_logps": reference[1:].sum(dim=1),
    }
    compute = dpo_trainer.DPOTrainer._compute_loss
    return float(compute(trainer, lambda **_: outputs, inputs, return_outputs=False))


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize(("loss_type", "settings", "name", "ours"), SAME)
def test_losses_are_those_of_trl(loss_type, settings, name, ours, beta):
    pairs = random_pairs(beta)
    want = [of_trl([x[i] for x in pairs], beta, loss_type, settings) for i in range(PAIRS)]
    policy, reference, collision, mask = pairs

    def scores(side):
        count = jnp.asarray(mask[:, side].sum(axis=-1), jnp.float32)
        return losses.ResponseScores(
            policy_B=jnp.asarray(policy[:, side].sum(axis=-1)),
            reference_B=jnp.asarray(reference[:, side].sum(axis=-1)),
            weight_B=count,
            length_B=count,
            collision_sum_B=jnp.asarray(collision[:, side].sum(axis=-1)),
        )

    if "beta" in losses.hyperparameters(name):
        ours = {"beta": beta, **ours}
    found = losses.bind(name, ours)(scores(0), scores(1))
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_losses_free_of_a_reference_are_those_of_trl_s_other_trainers(beta, smoothing):
    """Of CPO the preference term and SimPO, of ORPO the odds ratio; their likelihoods by hand."""
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    policy, reference, _, mask = random_pairs(beta)
    sums, counts = policy.sum(axis=-1), mask.sum(axis=-1)
    trainer = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(device="cpu"),
        alpha=0.0,
        beta=beta,
        label_smoothing=smoothing,
        simpo_gamma=0.7,
    )

    def of_trl(loss, values, **settings):
        vars(trainer).update(settings)
        both = (torch.from_numpy(np.ascontiguousarray(x, np.float32)) for x in values.T)
        return loss(trainer, *both)[0].numpy()

    def ours(name, **settings):
        pair = (
            losses.ResponseScores(
                policy_B=jnp.asarray(sums[:, side]),
                reference_B=jnp.asarray(reference[:, side].sum(axis=-1)),
                weight_B=jnp.asarray(counts[:, side], jnp.float32),
                length_B=jnp.asarray(counts[:, side], jnp.float32),
            )
            for side in (0, 1)
        )
        return losses.bind(name, {"beta": beta, **settings})(*pair)

    likelihood = -sums[:, 0] / counts[:, 0]
    close = {"rtol": 1e-5, "atol": 1e-5}
    want = of_trl(cpo.cpo_loss, sums, loss_type="sigmoid")
    found = ours("cpo", label_smoothing=smoothing, nll_weight=0.0)
    np.testing.assert_allclose(found, want, **close)
    found = ours("cpo", label_smoothing=smoothing, nll_weight=0.5)
    np.testing.assert_allclose(found, want + 0.5 * likelihood, **close)
    want = of_trl(cpo.cpo_loss, sums / counts, loss_type="simpo")
    found = ours("simpo", label_smoothing=smoothing, gamma=0.7)
    np.testing.assert_allclose(found, want, **close)
    # What TRL calls the loss there is what its trainer takes off the likelihood.
    want = likelihood - of_trl(orpo.odds_ratio_loss, sums / counts)
    np.testing.assert_allclose(ours("orpo"), want, **close)
