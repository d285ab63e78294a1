"""The kinds of weights of a hand-made pair."""

import numpy as np

from attnpo_jax.probe.weights import DECAY, Kind, families, layer_kind, weigh

SOURCES = (2, "2:0", "2:1", 3, "3:0", "3:1")
# By order and source, chosen 5 tokens, rejected 3.
_NONE, _EVEN = [0.0] * 5, [0.2] * 5
CHOSEN = [
    [[0.5, 0.1, 0.1, 0.2, 0.1], [0.4, 0.2, 0.2, 0.1, 0.1], _EVEN, _EVEN, _EVEN, _EVEN],
    [[0.1, 0.1, 0.1, 0.1, 0.6], [0.0, 0.0, 0.0, 0.1, 0.1], _NONE, _NONE, _EVEN, _EVEN],
]
ROW = {
    "id": "a",
    # A closing token behind each text, which no weight is for.
    "chosen_ids": np.array([7, 8, 9, 5, 6, 2]),
    "rejected_ids": np.array([7, 4, 6, 2]),
    "chosen_text_length": 5,
    "rejected_text_length": 3,
    "judge_chosen": np.array(CHOSEN, np.float32),
    "judge_rejected": np.full((2, 6, 3), 0.1, np.float32),
    "ref_chosen_logps": np.array([-1.0, -2.0, -3.0, -4.0, 0.0, -9.0], np.float32),
    "ref_rejected_logps": np.array([-1.0, -1.0, -4.0, -9.0], np.float32),
}


def of_kinds(groups=()):
    """By kind, the weights of both responses."""
    found = {}
    for family in families((2, 3), groups):
        chosen, rejected = weigh([ROW], family, SOURCES)
        assert chosen.shape == (len(family), 5) and rejected.shape == (len(family), 3)
        found |= {kind: (chosen[k], rejected[k]) for k, kind in enumerate(family)}
    return found


def test_all_kinds_by_hand():
    found = of_kinds()

    def close(kind, chosen, rejected=None):
        np.testing.assert_allclose(found[kind][0], chosen, rtol=1e-5)
        if rejected is not None:
            np.testing.assert_allclose(found[kind][1], rejected, rtol=1e-5)

    close(Kind("uniform"), np.ones(5), np.ones(3))
    decay = DECAY ** np.arange(5)
    close(Kind("decay"), 5 * decay / decay.sum())
    close(Kind("surprisal"), [0.5, 1.0, 1.5, 2.0, 0.0], [0.5, 0.5, 2.0])
    # Both have 7 and then 6.
    close(Kind("diff"), [0.0, 5 / 3, 5 / 3, 5 / 3, 0.0], [0.0, 3.0, 0.0])
    raw = np.array([0.3, 0.1, 0.1, 0.15, 0.35]) * 5
    close(layer_kind(2, fix_sink=False), raw, np.ones(3))
    # The first token has the mean, the others of 0.7 share 0.8.
    fixed = np.array([1, *(raw[1:] * (4 / 5) / 0.7)])
    close(layer_kind(2), fixed)
    close(layer_kind(3), np.ones(5))
    first = np.array([1, *(np.array([0.1, 0.1, 0.2, 0.1]) / 0.5 * 4)])
    close(layer_kind(2, "first"), first)
    close(layer_kind(2, "second"), np.array([1, *(np.array([1, 1, 1, 6]) / 9 * 4)]))
    # Apart by 0.4, 0, 0, 0.1 and 0.5, of which the first token's does not count.
    close(layer_kind(2, "contrast"), [1.0, 0.0, 0.0, 4 / 6, 20 / 6])
    kept = fixed * [0, 1, 1, 1, 0]
    close(layer_kind(2, times_diff=True), 5 * kept / kept.sum(), [0.0, 3.0, 0.0])
    assert len(found) == 4 + 2 * 6


def test_heads_are_the_mean_of_each_one_s_weights():
    found = of_kinds(groups=((0,), (1,))) | of_kinds(groups=((0, 1),))
    # Head 0 has .2, .1, .1, .3 and .3 of both orders, head 1 no more than uniform weights.
    head = np.array([1, *(np.array([0.1, 0.1, 0.3, 0.3]) / 0.8 * 4)])
    one, both = layer_kind(2, heads=(0,)), layer_kind(2, heads=(0, 1))
    assert (one.name, both.name) == ("layer 2, head 0", "layer 2, heads 0-1")
    assert both.sources == ("2:0", "2:1")
    np.testing.assert_allclose(found[one][0], head, rtol=1e-5)
    np.testing.assert_allclose(found[both][0], (head + 1) / 2, rtol=1e-5)
    assert layer_kind(3, "contrast", heads=(0, 1)) in found


def test_a_batch_s_padding_and_other_pairs_change_nothing():
    other = {
        **ROW,
        "judge_chosen": ROW["judge_chosen"][..., ::-1],
        "ref_chosen_logps": ROW["ref_chosen_logps"][::-1],
    }
    for family in families((2, 3)):
        alone = weigh([ROW], family, SOURCES)
        among = weigh([other] * 70 + [ROW], family, SOURCES)
        assert len(among) == 142
        for a, b in zip(alone, among[-2:], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
