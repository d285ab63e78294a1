"""Objectives against figures of TRL and of the methods' public code, on a toy batch."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax import losses

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
TRL = json.loads((GOLDENS / "objectives.json").read_text())
METHODS = json.loads((GOLDENS / "methods.json").read_text())
FORMULAS = METHODS["formulas_only"]

pytestmark = pytest.mark.golden

# By TRL's name: ours, with the settings that differ from the defaults.
OURS = {
    "sigmoid": ("sigmoid", {}),
    "hinge": ("hinge", {}),
    "ipo": ("ipo", {"length_normalize": True}),
    "nca_pair": ("nca", {}),
    "bco_pair": ("bco", {}),
    "sppo_hard": ("sppo", {}),
    "apo_zero": ("apo_zero", {}),
    "apo_down": ("apo_down", {}),
    "discopop": ("discopop", {}),
    "sigmoid_norm": ("sigmoid_norm", {}),
    # This release of TRL's reads no label smoothing there.
    "sigmoid label_smoothing=0.2": ("sigmoid", {}),
    "robust label_smoothing=0.1": ("robust", {"label_smoothing": 0.1}),
    "exo_pair label_smoothing=0.001": ("exo", {"label_smoothing": 0.001}),
    "sigmoid f=forward_kl": ("sigmoid", {"divergence": "forward_kl"}),
    "sigmoid f=js_divergence": ("sigmoid", {"divergence": "js"}),
    "sigmoid f=alpha_divergence": ("sigmoid", {"divergence": "alpha", "alpha": 0.5}),
    "sigmoid wpo": ("sigmoid", {"wpo": True}),
}
TRL_FIGURES = [(*ours, TRL["loss_per_pair"][name]) for name, ours in OURS.items()]
OTHER_FIGURES = [
    ("simpo", {"beta": 2.0, "gamma": 1.0}, METHODS["simpo"]["loss_per_pair"]),
    ("rdpo", {"alpha": 0.05}, FORMULAS["rdpo alpha=0.05"]),
    ("dpop", {"penalty": 5.0}, FORMULAS["dpop lambda=5"]),
    ("mixture", {}, FORMULAS["sigmoid + 1.0 x NLL of the chosen per token"]),
    ("orpo", {}, FORMULAS["orpo lambda=0.1 (NLL over the response alone)"]),
]


def toy_pair():
    mask = np.array(TRL["mask"])

    def total(name):
        return jnp.asarray((np.array(TRL[name]) * mask).sum(axis=-1), jnp.float32)

    sums = {
        "policy_B": total("policy_logps"),
        "reference_B": total("reference_logps"),
        "weight_B": jnp.asarray(mask.sum(axis=-1), jnp.float32),
        "length_B": jnp.asarray(mask.sum(axis=-1)),
        "collision_sum_B": total("log_sum_sq_probs"),
    }
    return tuple(
        losses.ResponseScores(**{name: x[half] for name, x in sums.items()})
        for half in (slice(0, 2), slice(2, 4))
    )


def test_every_figure_of_trl_is_held_against_but_those_of_weightings():
    left = set(TRL["loss_per_pair"]) - set(OURS)
    assert left == {"sigmoid ld_alpha=0", "sigmoid ld_alpha=0.5"}


@pytest.mark.parametrize(
    ("name", "settings", "figures"),
    [*TRL_FIGURES, *OTHER_FIGURES],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_losses_are_those_of_the_public_code(name, settings, figures):
    assert losses.hyperparameters(name).get("beta") in (0.1, 2.0)
    np.testing.assert_allclose(losses.bind(name, settings)(*toy_pair()), figures, rtol=0, atol=1e-5)


@pytest.mark.parametrize("version", [1, 2])
def test_tdpo_is_that_of_the_public_code(version):
    figures = METHODS["tdpo"]

    def scores(ratio, kl):
        ratio = jnp.asarray(figures[ratio], jnp.float32)
        ones = jnp.ones_like(ratio)
        return losses.ResponseScores(
            policy_B=ratio,
            reference_B=0 * ones,
            weight_B=ones,
            length_B=ones,
            kl_B=jnp.asarray(figures[kl], jnp.float32),
        )

    found = losses.tdpo(scores("lc", "kl_c"), scores("lr", "kl_r"), version=version)
    np.testing.assert_allclose(found, figures[f"tdpo{version}"], rtol=0, atol=1e-5)
