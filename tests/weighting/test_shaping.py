"""What `config.shaping` makes of weights, and the options of attention and ready-made columns."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax import config as config_lib
from attnpo_jax import weighting
from attnpo_jax.weighting import ResponseTokens

MASK = [[True, True, True, True, False], [True, True, False, False, False]]
WEIGHTS = np.array([[4.0, 0, 2, 2, 9], [1, 3, 9, 9, 9]], np.float32)


def shaped(weights=WEIGHTS, mask=MASK, **options):
    return weighting.shaped(lambda _: jnp.asarray(weights), **options)(ResponseTokens.of(mask))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_share": 0.5}, [[4, 0, 2, 0, 0], [0, 3, 0, 0, 0]]),
        ({"smooth": 1}, [[2, 2, 4 / 3, 2, 0], [2, 2, 0, 0, 0]]),
        ({"smooth": 9}, [[2, 2, 2, 2, 0], [2, 2, 0, 0, 0]]),
        ({"normalize": "length"}, [[2, 0, 1, 1, 0], [0.5, 1.5, 0, 0, 0]]),
        # Both sum to 12 over six tokens.
        ({"normalize": "pair"}, [[2, 0, 1, 1, 0], [0.5, 1.5, 0, 0, 0]]),
        ({"floor": 1.5}, [[4, 1.5, 2, 2, 0], [1.5, 3, 0, 0, 0]]),
        ({"mix": 0.5}, [[2.5, 0.5, 1.5, 1.5, 0], [1, 2, 0, 0, 0]]),
        ({"mix": 0.0}, [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]),
        # In this order: the top, its scale, the mixture.
        (
            {"top_share": 0.25, "normalize": "length", "mix": 0.5},
            [[2.5, 0.5, 0.5, 0.5, 0], [0.5, 1.5, 0, 0, 0]],
        ),
    ],
)
def test_shapes_by_hand(options, expected):
    np.testing.assert_allclose(shaped(**options), expected, rtol=1e-6)


def test_pairs_keep_their_ratio_and_have_the_mean_one():
    weights = np.array([[6, 6, 6, 6, 0], [1, 1, 0, 0, 0]], np.float32)
    found = shaped(weights, normalize="pair")
    np.testing.assert_allclose(found[0, :4] / found[1, 0], 6, rtol=1e-6)
    np.testing.assert_allclose(found.sum(), 6, rtol=1e-6)


def test_weights_of_both_signs_and_none():
    signed = np.array([[-3, 1, 0, 0, 0], [0, 0, 0, 0, 0]], np.float32)
    expected = [[-3, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    np.testing.assert_allclose(shaped(signed, normalize="length"), expected)
    np.testing.assert_allclose(shaped(signed, normalize="pair")[0], [-4.5, 1.5, 0, 0, 0])
    nothing = np.zeros((2, 5), np.float32)
    np.testing.assert_allclose(shaped(nothing, normalize="pair"), np.array(MASK))


def test_a_config_shapes_any_weighting():
    config = config_lib.default_config()
    config.weighting.name = "uniform"
    config.shaping.mix = 0.25
    config.shaping.floor = 0.5
    config_lib.validate(config)
    weigh = weighting.shaped(
        config_lib.bind_section(weighting, config.weighting), **dict(config.shaping.items())
    )
    assert weigh(ResponseTokens.of(MASK)).tolist() == np.array(MASK, float).tolist()
    for field, value in (("normalize", "n"), ("top_share", 0), ("mix", 1.5), ("floor", "no")):
        config = config_lib.default_config()
        with config.unlocked(), config.shaping.ignore_type():
            config.shaping[field] = value
        with pytest.raises(ValueError, match=f"config.shaping.{field} = .*accepted"):
            config_lib.validate(config)


def test_methods_check_their_hyperparameters():
    config = config_lib.default_config()
    config.weighting.name = "tis_dpo"
    with pytest.raises(ValueError, match="config.weighting.column: 'tis_dpo' needs a value"):
        config_lib.validate(config)
    config.weighting.column = "mine"
    config_lib.validate(config)
    config_lib.check_columns(config, ("mine",))
    config.weighting.against = "yours"
    with pytest.raises(ValueError, match="config.weighting.against: column 'yours' .*: mine"):
        config_lib.check_columns(config, ("mine",))
    config.weighting.name = "sepo"
    config.weighting.column = "mine"
    config.weighting.share = 0.0
    with pytest.raises(ValueError, match="weighting.share = 0.0: accepted: a number above 0 and"):
        config_lib.validate(config)
    config = config_lib.default_config()
    config.weighting.order = "third"
    wanted = "weighting.order = 'third': accepted: 'mean', 'first', 'second', 'contrast'"
    with pytest.raises(ValueError, match=wanted):
        config_lib.validate(config)


def attended(orders):
    return ResponseTokens.of([[True] * 4], judge_B2ST=np.array(orders, np.float32)[None])


def test_orders_of_attention_by_hand():
    # Shares (.5 .5 0 0) and (.25 .25 .25 .25), times 4.
    r = attended([[[1, 1, 0, 0]], [[2, 2, 2, 2]]])
    for order, expected in (
        ("first", [2, 2, 0, 0]),
        ("second", [1, 1, 1, 1]),
        ("mean", [1.5, 1.5, 0.5, 0.5]),
        ("contrast", [1, 1, 1, 1]),  # each share is off by .25
    ):
        np.testing.assert_allclose(weighting.attention(r, order=order)[0], expected, rtol=1e-6)
    # Apart by .5, .5, 0 and 0.
    r = attended([[[1, 0, 1, 0]], [[0, 1, 1, 0]]])
    np.testing.assert_allclose(weighting.attention(r, order="contrast"), [[2, 2, 0, 0]], rtol=1e-6)
    r = attended([[[1, 2, 1, 0]], [[3, 6, 3, 0]]])
    np.testing.assert_allclose(weighting.attention(r, order="contrast"), [[1, 1, 1, 1]])


def test_several_layers_sum():
    r = attended(np.random.default_rng(0).random((2, 3, 4)))
    one, other = (weighting.attention(r, layer=layer) for layer in (0, 2))
    found = weighting.attention(r, layer=(0, 2), layers="sum")
    np.testing.assert_allclose(found, one + other, rtol=1e-6)
    np.testing.assert_allclose(found.sum(), 8, rtol=1e-6)


def test_columns_of_any_sign():
    mask = [[True] * 6]
    column = np.array([[[-4.0, 1, 1, 1, 1, 9], [2, 2, 2, 2, 2, 9]]], np.float32)
    r = ResponseTokens.of(
        mask,
        text_mask_BT=[[True] * 5 + [False]],
        ready_BKT=column,
        weight_columns=("signed", "plain"),
    )

    def read(**options):
        return weighting.column(r, **options)[0].tolist()

    as_it_is = [-4, 1, 1, 1, 1, 0]
    assert read(column="signed", normalize=False, fix_sink=False) == as_it_is
    assert read(column="signed", normalize=False) == as_it_is  # no sink to fix
    # Magnitudes of 8 become 5.
    assert read(column="signed") == pytest.approx([-2.5, 0.625, 0.625, 0.625, 0.625, 0])
    both = read(column=("signed", "plain"), normalize=False, columns="sum")
    assert both == pytest.approx([-2, 3, 3, 3, 3, 0])
