"""What holds for every weighting of the package, shaped or not."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnpo_jax import weighting
from attnpo_jax.registry import NotComputed
from tests.weighting.responses import LAYERS, bound, random_responses

OWN = [
    name
    for name in weighting.names()
    if weighting.get(name).__module__.startswith("attnpo_jax.weighting.")
]
VARIANTS = {name: bound(name) for name in OWN} | {
    "sum of layers, first order": bound("attention", layer=LAYERS, layers="sum", order="first"),
    "contrast of orders": bound("attention", order="contrast"),
    "signed column as it is": bound("column", normalize=False, fix_sink=False),
    "against the reference": bound("tgdpo", against=None),
    "shaped": weighting.shaped(
        bound("reference_surprisal"), top_share=0.5, smooth=1, normalize="length", mix=0.7
    ),
    "pair": weighting.shaped(bound("attention"), normalize="pair", floor=0.1),
}
FLOATS = (
    "judge_B2ST",
    "verdict_B2",
    "reference_logps_BT",
    "policy_logps_BT",
    "ready_BKT",
    "reference_entropy_BT",
    "policy_entropy_BT",
)


def test_the_zoo_is_whole():
    methods = {"confpo", "critical_tokens", "d2po", "diff", "ld_dpo", "sepo", "tgdpo", "tis_dpo"}
    surprises = {"policy_entropy", "reference_entropy", "reference_surprisal"}
    assert set(OWN) == methods | surprises | {"attention", "column", "uniform"}


@pytest.mark.parametrize("name", VARIANTS)
def test_transformations_leave_the_weights_unchanged(name):
    weigh, r = VARIANTS[name], random_responses(pairs=8)
    expected = np.asarray(jax.jit(weigh)(r))
    assert expected.dtype == np.float32 and np.isfinite(expected).all()
    assert not expected[~np.asarray(r.mask_BT)].any()
    assert np.abs(expected[:-2]).max() > 0
    close = partial(np.testing.assert_allclose, desired=expected, rtol=1e-5, atol=1e-6)

    # By pairs, since some weigh a pair's responses together.
    pairs = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), r)
    close(jax.jit(jax.vmap(weigh))(pairs).reshape(expected.shape))
    close(jax.pmap(weigh)(pairs).reshape(expected.shape))
    mesh = jax.make_mesh((8,), ("data",))
    spread = jax.device_put(r, NamedSharding(mesh, P("data")))
    sharded = jax.shard_map(weigh, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    close(jax.jit(sharded)(spread))


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_zero_and_rows_without_anything_finite(name):
    weigh, r = VARIANTS[name], random_responses()
    # Nothing that a token could be told apart by: no attention, certain tokens, columns of 0.
    blank = {field: jnp.zeros_like(getattr(r, field)) for field in FLOATS}
    one = jnp.arange(r.mask_BT.shape[1]) == 0
    r = dataclasses.replace(r, mask_BT=r.mask_BT.at[0].set(one), text_mask_BT=r.mask_BT & False)

    def total(floats):
        weights = weigh(dataclasses.replace(r, **floats))
        return jnp.sum(jnp.square(weights)), weights

    value_and_grad = jax.jit(jax.value_and_grad(total, has_aux=True))
    for floats in (blank, {field: getattr(r, field) for field in FLOATS}):
        (_, weights), gradients = value_and_grad(floats)
        assert np.isfinite(weights).all()
        for gradient in jax.tree.leaves(gradients):
            np.testing.assert_array_equal(gradient, 0)


def test_what_is_declared_is_accepted():
    needs = {name: weighting.needs(name) for name in OWN}
    contrasts = {"critical_tokens", "sepo", "tgdpo", "tis_dpo"}
    assert {name: of for name, of in needs.items() if of} == {
        "attention": ("judge",),
        "policy_entropy": ("policy_entropy",),
        "reference_entropy": ("reference_entropy",),
        "reference_surprisal": ("reference_logps",),
        **dict.fromkeys(contrasts, ("reference_logps",)),
    }
    assert all(weighting.needs(name, {"against": "3"}) == () for name in contrasts)
    with pytest.raises(ValueError, match="needs 'entropy'; accepted: judge, reference_logps, "):

        @weighting.register(needs=("entropy",))
        def unheard_of(response):
            return response.mask_BT

    assert "unheard_of" not in weighting.names()


@pytest.mark.parametrize("name", [name for name in VARIANTS if name in OWN])
def test_what_is_not_declared_is_not_read(name):
    """Else a run that does not compute it would fail."""
    weigh, r = VARIANTS[name], random_responses()
    fields = {
        "judge": ("judge_B2ST", "verdict_B2"),
        "reference_logps": ("reference_logps_BT",),
        "reference_entropy": ("reference_entropy_BT",),
        "policy_entropy": ("policy_entropy_BT",),
        "policy_collision": ("policy_collision_BT",),
    }
    declared = weighting.needs(name, weigh.keywords)
    absent = {
        field: NotComputed(field, "declare it")
        for need, names in fields.items()
        for field in names
        if need not in declared
    }
    np.testing.assert_array_equal(weigh(dataclasses.replace(r, **absent)), weigh(r))
    for need in declared:
        (field, *_) = fields[need]
        lacking = dataclasses.replace(r, **{field: NotComputed(field, "declare it")})
        with pytest.raises(ValueError, match=f"{field} is not computed here: declare it"):
            weigh(lacking)


def test_columns_by_name():
    r = random_responses()
    assert list(r.columns) == ["mine", "3", "7"]
    np.testing.assert_array_equal(r.columns["3"], r.ready_BKT[:, 1])
    np.testing.assert_array_equal(weighting.read_column(r, 7), r.ready_BKT[:, 2])
    with pytest.raises(ValueError, match="column 'yours' is neither a .*accepted: mine, 3, 7"):
        weighting.read_column(r, "yours")
