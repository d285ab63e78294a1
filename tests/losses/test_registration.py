"""What objectives are registered with, and sums of several."""

from functools import partial

import numpy as np
import pytest

from attnpo_jax import losses
from attnpo_jax.registry import RegistryError
from tests.losses.test_objectives import MIXED, random_pair, scores


def test_registry_names_and_hyperparameters():
    assert {"hinge", "ipo", "sigmoid"} <= set(losses.names())
    assert losses.hyperparameters("robust") == {"beta": 0.1, "label_smoothing": 0.1, "wpo": False}
    assert losses.hyperparameters("ipo") == {"beta": 0.1, "length_normalize": False, "wpo": False}
    with pytest.raises(RegistryError, match="unknown objective 'dpo'; accepted: apo_down, "):
        losses.bind("dpo", {})
    with pytest.raises(RegistryError, match="no hyperparameter 'gamma'; accepted: beta"):
        losses.bind("hinge", {"beta": 1.0, "gamma": 2.0})
    pair = random_pair()
    np.testing.assert_array_equal(
        losses.bind("hinge", {"beta": 0.3})(*pair), losses.hinge(*pair, beta=0.3)
    )


def test_a_mixture_is_the_weighted_sum_of_its_terms():
    chosen, rejected = random_pair()
    found = losses.bind("mixture", {"terms": MIXED, "beta": 0.7})(chosen, rejected)
    want = (
        losses.sigmoid(chosen, rejected, beta=0.7, label_smoothing=0.1)
        + 0.5 * losses.nll(chosen, rejected)
        + 0.1 * losses.bind("simpo", {"beta": 1.0, "wpo": True})(chosen, rejected)
    )
    np.testing.assert_allclose(found, want, rtol=1e-6)
    alone = losses.bind("mixture", {"terms": "hinge", "beta": 0.7})(chosen, rejected)
    np.testing.assert_allclose(alone, losses.hinge(chosen, rejected, beta=0.7), rtol=1e-6)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ("sigmoid +", "terms is 'sigmoid \\+'; accepted: a sum of objectives, such as"),
        ("", "terms is ''"),
        ("sigmoid - nll", "with the term 'sigmoid - nll'"),
        ("sigmoid(0.1)", r"with the term 'sigmoid\(0.1\)'"),
        ("sigmoid(beta=open(x))", r"with the term 'sigmoid\(beta=open\(x\)\)'"),
        ("(sigmoid + nll) * 2", "with a number above 0 before a `\\*`"),
        ("-1 * nll", "with a number above 0"),
        ("True * nll", "with a number above 0"),
        ("2 * mixture", "with the term 'mixture'"),
        ("dpo + nll", "unknown objective 'dpo'; accepted: apo_down"),
        ("nll(beta=1)", "'nll' has no hyperparameter 'beta'; accepted: wpo"),
    ],
)
def test_a_mixture_of_another_form_is_refused(terms, message):
    with pytest.raises(RegistryError, match=message):
        losses.bind("mixture", {"terms": terms})


def test_what_objectives_declare():
    assert losses.traits(losses.ipo) == losses.traits(lambda c, r: 0) == losses.Traits()
    assert losses.traits(partial(losses.tdpo, beta=1.0)).needs == ("reference_kl",)
    assert losses.traits(losses.bind("cpo", {"wpo": True})) == losses.Traits(
        ("policy_collision",), reference_free=True, margin=True
    )
    mixed = losses.traits(losses.bind("mixture", {"terms": MIXED}))
    assert mixed == losses.Traits(("policy_collision",), margin=True)
    assert not losses.traits(losses.bind("mixture", {"terms": "nca + nll"})).margin
    assert losses.traits(losses.bind("mixture", {"terms": "nll + cpo"})).reference_free
    # A mean log-prob of -0.5, at the objective's own beta.
    of = scores([-2.0], [5.0], weight=[4.0])
    assert losses.traits(losses.simpo).rewards(of, beta=9.0).tolist() == [-1.0]
    assert losses.traits(partial(losses.orpo, beta=0.5)).rewards(of, beta=9.0).tolist() == [-0.25]
    assert losses.traits(losses.cpo).rewards(of, beta=0.5).tolist() == [-1.0]
    assert losses.traits(losses.sigmoid).rewards(of, beta=0.5).tolist() == [-3.5]


def test_an_objective_registers_with_what_it_declares(monkeypatch):
    monkeypatch.setattr(losses.registry, "_functions", dict(losses.registry._functions))

    @losses.register(needs=("policy_collision",), reward=lambda s, *, scale: scale * s.policy_B)
    def surplus(chosen, rejected, *, scale: float = 2.0):
        return scale * (chosen.collision_sum_B - rejected.collision_sum_B)

    bound = losses.bind("surplus", {"scale": 3.0})
    assert losses.traits(bound).needs == ("policy_collision",)
    assert losses.traits(bound).rewards(scores([2.0], [0.0]), beta=1.0).tolist() == [6.0]

    def other(chosen, rejected, *, beta: float = 1.0):
        return beta * chosen.policy_B

    with pytest.raises(RegistryError, match="'other' needs 'entropy'; accepted: policy_collision,"):
        losses.register(needs=("entropy",))(other)
    with pytest.raises(
        RegistryError, match="reward of objective 'other' has the hyperparameter 'x'"
    ):
        losses.register(reward=lambda s, *, x: s.policy_B)(other)

    def own_wpo(chosen, rejected, *, wpo: bool = False):
        return chosen.policy_B

    with pytest.raises(RegistryError, match="'own_wpo' has the hyperparameter 'wpo', which all"):
        losses.register(own_wpo)
