import dataclasses
import doctest
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax import weighting
from attnpo_jax.registry import PluginError, RegistryError, load_plugins
from attnpo_jax.weighting import (
    contrasts,
    functions,
    likelihoods,
    positions,
    shaping,
    shares,
    sources,
)

# Op-by-op execution compiles every operation for every shape; the tests of values need not wait.
attention = jax.jit(weighting.attention, static_argnames=("layer", "fix_sink"))
ready_column = jax.jit(weighting.column, static_argnames=("column", "fix_sink", "normalize"))

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "judge_weights.jsonl"


def response(judge_B2ST, text_lengths, *, extra=1, **static):
    """Responses with `text_lengths` text tokens and `extra` closing template tokens each."""
    judge = np.asarray(judge_B2ST, np.float32)
    B, _, _, T = judge.shape
    place = np.arange(T)[None]
    lengths = np.asarray(text_lengths)[:, None]
    zeros = jnp.zeros((B, T), jnp.float32)
    return weighting.ResponseTokens(
        mask_BT=jnp.asarray((place < lengths + extra) & (lengths > 0)),
        text_mask_BT=jnp.asarray(place < lengths),
        judge_B2ST=jnp.asarray(judge),
        verdict_B2=jnp.zeros((B, 2)),
        reference_logps_BT=zeros,
        policy_logps_BT=zeros,
        is_chosen=jnp.ones(B, bool),
        **static,
    )


def random_response(batch=8, layers=3, length=9, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, length, batch)
    return response(
        rng.random((batch, 2, layers, length)), lengths, source_layers=(0, 5, 11), num_layers=12
    )


def six_tokens():
    """One response of 6 text tokens, two layers; shares are easy to tell by hand."""
    layer_0 = [[2, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0]]  # sums 10 and 0
    layer_1 = [[6, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 1]]  # sums 10 and 2
    judge = np.zeros((1, 2, 2, 8), np.float32)
    judge[0, :, 0, :6], judge[0, :, 1, :6] = layer_0, layer_1
    judge[..., 6:] = 99.0  # off the text: must not count
    return judge


def test_uniform_is_one_on_every_response_token_and_zero_on_padding():
    r = response(np.ones((3, 2, 1, 4)), [2, 3, 0])
    expected = [[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    np.testing.assert_array_equal(weighting.uniform(r), expected)


def test_attention_without_sink_fix_is_the_order_mean_of_shares_times_n():
    r = response(six_tokens(), [6], num_layers=2)
    # Order 0: (.6 .1 .1 .1 .1 0), order 1: (.5 0 0 0 0 .5); mean times 6.
    expected = np.array([0.55, 0.05, 0.05, 0.05, 0.05, 0.25]) * 6
    weights = attention(r, layer=1, fix_sink=False)
    np.testing.assert_allclose(weights[0, :6], expected, rtol=1e-6)
    np.testing.assert_array_equal(weights[0, 6:], 0)


def test_attention_is_uniform_in_an_order_that_sums_to_zero():
    r = response(six_tokens(), [6], num_layers=2)
    # Order 0: tenths of (2 1 1 2 2 2); order 1: 1/6 each.
    expected = (np.array([2, 1, 1, 2, 2, 2]) / 10 + 1 / 6) / 2 * 6
    weights = attention(r, layer=0, fix_sink=False)
    np.testing.assert_allclose(weights[0, :6], expected, rtol=1e-6)


def test_sink_fix_gives_the_first_token_the_mean_and_keeps_the_sum():
    r = response(six_tokens(), [6], num_layers=2)
    # Others sum to .45; they now share 5/6: factor (5/6)/.45; times 6.
    expected = np.array([1 / 6, *(np.array([0.05, 0.05, 0.05, 0.05, 0.25]) / 0.45 * 5 / 6)]) * 6
    weights = attention(r, layer=1)
    np.testing.assert_allclose(weights[0, :6], expected, rtol=1e-6)
    np.testing.assert_allclose(weights.sum(), 6, rtol=1e-6)


def test_sink_fix_leaves_fewer_than_five_tokens_alone():
    judge = np.broadcast_to(np.array([4.0, 2, 1, 1, 2], np.float32), (1, 2, 1, 5))
    np.testing.assert_allclose(attention(response(judge, [4]))[0], [2, 1, 0.5, 0.5, 0], rtol=1e-6)
    # With a fifth token: the others' 6 tenths become 4/5.
    np.testing.assert_allclose(
        attention(response(judge, [5]))[0],
        np.array([1 / 5, 2 / 6 * 4 / 5, 1 / 6 * 4 / 5, 1 / 6 * 4 / 5, 2 / 6 * 4 / 5]) * 5,
        rtol=1e-6,
    )


def test_sink_fix_spreads_evenly_when_only_the_first_token_was_looked_at():
    judge = np.zeros((1, 2, 1, 7), np.float32)
    judge[..., 0] = 0.3
    weights = attention(response(judge, [6]))
    np.testing.assert_allclose(weights[0], [1, 1, 1, 1, 1, 1, 0], rtol=1e-6)


def test_several_layers_give_the_mean_of_their_weights():
    r = response(six_tokens(), [6], source_layers=(3, 29), num_layers=30)
    both = attention(r, layer=(3, -1))
    one, other = attention(r, layer=3), attention(r, layer=29)
    np.testing.assert_allclose(both, (one + other) / 2, rtol=1e-6)
    assert np.abs(one - other).max() > 0.5


def test_layer_names_are_resolved_against_the_source_layers():
    r = response(six_tokens(), [6], source_layers=(3, 29), num_layers=30)
    np.testing.assert_array_equal(
        weighting.attention(r, layer=-1), weighting.attention(r, layer=29)
    )
    with pytest.raises(ValueError, match=r"layer 14 .*accepted: 3, 29 .*30 layers"):
        weighting.attention(r, layer=14)
    with pytest.raises(ValueError, match=r"layer -2 .*accepted: 3, 29"):
        weighting.attention(r, layer=(29, -2))
    with pytest.raises(ValueError, match="number of layers is not known"):
        weighting.attention(dataclasses.replace(r, num_layers=None), layer=-1)
    for bad in ((), True, 1.0, "last", "3:", (3, "3.0")):
        with pytest.raises(ValueError, match="accepted: a layer's number, a head as '23:4'"):
            weighting.attention(r, layer=bad)


def whole_of(judge_B2ST, lengths):
    """What is known of whole responses with these numbers of tokens."""
    judge = np.asarray(judge_B2ST, np.float64)
    B, _, S, T = judge.shape
    judge = judge * (np.arange(T) < np.asarray(lengths)[:, None])[:, None, None]
    counts = np.broadcast_to(np.asarray(lengths)[:, None, None], (B, 2, S))
    figures = [judge.sum(-1), judge[..., 0], counts, np.zeros_like(counts)]
    return jnp.asarray(np.stack(figures, axis=-1), jnp.float32)


@pytest.mark.parametrize("order", ["mean", "first", "second"])
@pytest.mark.parametrize("fix_sink", [True, False])
def test_what_truncation_cuts_off_takes_its_weight_along(fix_sink, order):
    rng = np.random.default_rng(0)
    judge, lengths = rng.random((4, 2, 2, 12)), [12, 9, 4, 6]
    judge[1, 1], judge[3, :, :, 1:] = 0.0, 0.0  # nothing looked at, or the first token alone
    options = {"layer": (0, 1), "layers": "sum", "fix_sink": fix_sink, "order": order}
    full = weighting.attention(response(judge, lengths, extra=0), **options)
    whole = whole_of(judge, lengths)
    for start, stop in ((0, 12), (0, 6), (3, 12)):
        left = np.clip(np.array(lengths), start, stop) - start
        of = response(judge[..., start:stop], left, whole_B2S4=whole.at[..., 3].set(-start))
        got = weighting.attention(of, renormalize=False, **options)
        np.testing.assert_allclose(got, full[:, start:stop], rtol=1e-5, atol=1e-6)


def test_weights_are_left_as_they_are_only_where_whole_responses_are_known():
    r = response(six_tokens(), [6])
    with pytest.raises(ValueError, match="whole_B2S4 is not known here"):
        weighting.attention(r, renormalize=False)
    r = dataclasses.replace(r, whole_B2S4=whole_of(six_tokens(), [6]))
    with pytest.raises(ValueError, match="'contrast' is scaled by all of a response"):
        weighting.attention(r, renormalize=False, order="contrast")


def test_heads_and_rollout_are_sources_as_layers_are():
    by_place = response(six_tokens(), [6])
    r = response(six_tokens(), [6], source_layers=("29:4", "rollout"), num_layers=30)
    for layer, place in (("-1:4", 0), ("29:4", 0), ("rollout", 1)):
        np.testing.assert_array_equal(attention(r, layer=layer), attention(by_place, layer=place))
    both = attention(r, layer=("rollout", "29:4"))
    np.testing.assert_allclose(both, attention(by_place, layer=(0, 1)), rtol=1e-6)
    for absent in (29, "29:5", "28:4"):
        with pytest.raises(ValueError, match=f"layer {absent} .*accepted: 29:4, rollout"):
            weighting.attention(r, layer=absent)


def test_weights_sum_to_the_number_of_text_tokens():
    r = random_response(batch=32)
    n = np.asarray(r.text_mask_BT.sum(-1))
    for layer in (0, (0, 5, 11)):
        weights = attention(r, layer=layer)
        np.testing.assert_allclose(weights.sum(-1), n, rtol=1e-5)
        assert not np.asarray(weights)[~np.asarray(r.text_mask_BT)].any()
    assert 0 in n


def test_tiny_attention_is_normalized_without_overflow_and_nan_shows():
    judge = np.full((1, 2, 1, 5), 1e-44, np.float32)
    np.testing.assert_allclose(attention(response(judge, [5])), np.ones((1, 5)))
    judge = np.ones((1, 2, 1, 5), np.float32)
    judge[0, 0, 0, 2] = np.nan
    assert np.isnan(attention(response(judge, [5]))).any()


@pytest.mark.golden
def test_goldens_order_means_are_reproduced_from_rows():
    # Attention rows of any scale whose two orders have the golden order-mean as their shares.
    layers = (0, 6, 14, 21, 29)
    goldens = [json.loads(line) for line in GOLDENS.read_text().splitlines()]
    means = [
        np.array([golden[f"{side}_weights_{layer}"] for layer in layers], np.float32)
        for golden in goldens
        for side in ("chosen", "rejected")
    ]
    lengths = [mean.shape[-1] for mean in means]
    judge = np.zeros((len(means), 2, len(layers), max(lengths)), np.float32)
    for row, (mean, n) in enumerate(zip(means, lengths, strict=True)):
        tilt = np.linspace(-1, 1, n) * mean.min() * 0.9
        judge[row, :, :, :n] = (mean + tilt) * 0.03, (mean - tilt) * 0.4
    r = response(judge, lengths, source_layers=layers, num_layers=30)
    for place, layer in enumerate(layers):
        weights = np.asarray(attention(r, layer=layer, fix_sink=False))
        for row, (mean, n) in enumerate(zip(means, lengths, strict=True)):
            np.testing.assert_allclose(weights[row, :n] / n, mean[place], atol=2e-6)


def test_wrong_shapes_fail_with_the_name_of_the_field():
    r = random_response()
    with pytest.raises(AssertionError, match="judge_B2ST"):
        weighting.attention(dataclasses.replace(r, judge_B2ST=r.judge_B2ST[:, :1]))
    with pytest.raises(AssertionError, match="text_mask_BT"):
        weighting.attention(dataclasses.replace(r, text_mask_BT=r.text_mask_BT[0]))
    with pytest.raises(AssertionError, match="mask_BT"):
        weighting.uniform(dataclasses.replace(r, mask_BT=r.mask_BT.astype(jnp.float32)))


def test_registry_names_and_hyperparameters():
    assert {"attention", "uniform"} <= set(weighting.names())
    assert weighting.hyperparameters("attention") == {
        "layer": -1,
        "fix_sink": True,
        "layers": "mean",
        "order": "mean",
        "renormalize": True,
    }
    assert weighting.hyperparameters("uniform") == {}
    with pytest.raises(RegistryError, match="unknown weighting 'atention'; accepted: attention, "):
        weighting.get("atention")
    with pytest.raises(RegistryError, match="no hyperparameter 'tau'; accepted: layer, fix_sink"):
        weighting.bind("attention", {"tau": 1.0})
    r = random_response()
    bound = weighting.bind("attention", {"layer": 5})
    np.testing.assert_array_equal(bound(r), weighting.attention(r, layer=5))


def test_plugin_files_register_and_bad_ones_are_named(tmp_path):
    good = tmp_path / "decay.py"
    good.write_text(
        "from attnpo_jax import weighting\n"
        "@weighting.register\n"
        "def decay_for_test(response, *, gamma: float):\n"
        "    return response.mask_BT * gamma\n"
    )
    (module,) = load_plugins([good])
    assert load_plugins([str(good)]) == [module]
    r = random_response()
    np.testing.assert_array_equal(
        weighting.bind("decay_for_test", {"gamma": 0.5})(r), weighting.uniform(r) / 2
    )
    with pytest.raises(RegistryError, match="needs a value for 'gamma'"):
        weighting.bind("decay_for_test", {})

    other = tmp_path / "other.py"
    other.write_text(good.read_text())
    with pytest.raises(PluginError, match="other.py: .*already registered"):
        load_plugins([other])
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    with pytest.raises(PluginError, match="broken.py: ZeroDivisionError"):
        load_plugins([broken])
    with pytest.raises(PluginError, match="absent.py: no such file"):
        load_plugins([tmp_path / "absent.py"])
    with pytest.raises(RegistryError, match=r"signature .*accepted: \(response, \*, "):
        weighting.register(lambda a, b: None)
    with pytest.raises(RegistryError, match=r"signature .*no \*args"):
        weighting.register(lambda response, **anything: None)


def test_examples_in_the_docstrings_run():
    rooms = (contrasts, functions, likelihoods, positions, shaping, shares, sources)
    results = [doctest.testmod(room) for room in rooms]
    assert all(result.attempted and not result.failed for result in results)


def ready(weights, lengths, columns, **fields):
    """Responses with precomputed weights (B, K, T) and no judge."""
    weights = jnp.asarray(weights, jnp.float32)
    batch, _, length = weights.shape
    no_judge = response(jnp.zeros((batch, 2, 1, length)), lengths)
    return dataclasses.replace(no_judge, ready_BKT=weights, weight_columns=columns, **fields)


def test_column_by_hand():
    # Six tokens, of which the last is no text; the first soaks up half of the weight.
    r = ready([[[0.5, 0.1, 0.1, 0.1, 0.2, 9.0], [1, 0, 0, 0, 1, 9.0]]], [5], ("rollout", "31"))
    plain = [2.5, 0.5, 0.5, 0.5, 1.0, 0]
    # The first gets the mean, 1; the others share 4 as 1 : 1 : 1 : 2.
    fixed = [1, 0.8, 0.8, 0.8, 1.6, 0]
    last = [1, 0, 0, 0, 4, 0]
    for column, fix_sink, wanted in (
        ("rollout", False, plain),
        ("rollout", True, fixed),
        (-2, True, fixed),
        (31, True, last),
        (-1, True, last),
        (("rollout", "31"), True, [1, 0.4, 0.4, 0.4, 2.8, 0]),
    ):
        found = ready_column(r, column=column, fix_sink=fix_sink)
        np.testing.assert_allclose(found, [wanted], rtol=1e-6)
    # As they are: the sums 1 and 2 stay.
    found = ready_column(r, column="rollout", fix_sink=False, normalize=False)
    np.testing.assert_allclose(found, [[0.5, 0.1, 0.1, 0.1, 0.2, 0]], rtol=1e-6)
    found = ready_column(r, column=31, normalize=False)
    np.testing.assert_allclose(found, [[0.4, 0, 0, 0, 1.6, 0]], rtol=1e-6)
    # Without any weight: all the same, or none.
    empty = ready(np.zeros((1, 1, 3)), [2], ("0",))
    np.testing.assert_allclose(ready_column(empty), [[1, 1, 0]])
    np.testing.assert_allclose(ready_column(empty, normalize=False), [[0, 0, 0]])


def test_column_is_attention_where_the_weights_are_the_judge_s_shares():
    judge = np.random.default_rng(3).random((4, 2, 2, 9)).astype(np.float32)
    lengths = [9, 6, 4, 1]
    attended = response(judge, lengths, source_layers=(3, 29), num_layers=30)
    text = np.asarray(attended.text_mask_BT)[:, None, None]
    shares = np.where(text, judge, 0)
    shares = (shares / shares.sum(axis=-1, keepdims=True)).mean(axis=1)
    r = ready(shares, lengths, ("3", "29"))
    for layer in (3, 29, (3, 29)):
        np.testing.assert_allclose(
            ready_column(r, column=layer), weighting.attention(attended, layer=layer), rtol=2e-6
        )


@pytest.mark.parametrize("column", [30, "rollout", -3, (), (31, 0)])
def test_columns_that_are_not_there(column):
    with pytest.raises(ValueError, match="accepted.*: .*7, 31"):
        weighting.select_columns(column, ("7", "31"))
    with pytest.raises(ValueError, match="accepted: none, for config.data.weight_columns"):
        weighting.select_columns(-1, ())
