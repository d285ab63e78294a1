"""What is picked on one half, and what the other half says of it."""

import numpy as np
import pytest

from attnpo_jax.judge.figures import VerdictFigures
from attnpo_jax.probe.choice import LEAST, choose, split
from attnpo_jax.probe.figures import KindFigures
from attnpo_jax.probe.weights import families
from attnpo_jax.probe.words import sentences
from attnpo_jax.runtime.intervals import Estimate

GROUPS = [f"item {i}" for i in range(40)]
LAYERS = (0, 1, 2)


def planted(changes, spread=0.05, groups=()):
    """Kinds whose AUC is 0.6 in all groups but for `changes` by name, and as much noise for all."""
    noise = np.random.default_rng(0).normal(size=len(GROUPS)) * spread
    found = []
    for family in families(LAYERS, groups):
        for k, kind in enumerate(family):
            own = np.random.default_rng(k).normal(size=len(GROUPS)) * spread / 4
            auc = changes.get(kind.name, 0.6) + noise + own
            found.append(KindFigures(kind, {}, {}, auc, np.full(len(GROUPS), 0.7)))
    return found


def test_halves_are_even_and_hang_on_the_names_alone():
    first, second = split(GROUPS)
    assert sorted([*first, *second]) == list(range(40)) and len(first) == 20
    shuffled = GROUPS[::-1]
    assert {shuffled[i] for i in split(shuffled)[0]} == {GROUPS[i] for i in first}


def test_a_better_layer_is_recommended_and_confirmed():
    changes = {"layer 1": 0.8, "layer 1, no sink fix": 0.7, "diff": 0.9, "layer 1 x diff": 0.95}
    found = choose(planted(changes), GROUPS, 3)
    assert (found.layer, found.picked, found.also, found.fix_sink) == (1, 1, 1, True)
    assert found.over_last.better and found.over_last.difference.value == pytest.approx(
        0.2, abs=0.02
    )
    by_name = {one.other: one for one in found.over_baselines}
    assert by_name["decay"].better and by_name["surprisal"].better and by_name["diff"].worse
    assert (found.over_diff.name, found.over_diff.better) == ("layer 1 x diff", True)
    text = "\n".join(sentences(found, None, None, 40))
    assert "weighting.layer=1: layer 1 is the best one of 20 items; on 20 others" in text
    assert "layer 1 is better than decay and surprisal; nothing better than diff" in text
    assert "layer 1 x diff is better, +.0" in text


def test_a_better_group_of_heads_is_named_beside_the_layer():
    groups = ((0, 1), (2, 3))
    changes = {"layer 1": 0.8, "layer 2, heads 2-3": 0.9}
    found = choose(planted(changes, groups=groups), GROUPS, 3)
    assert (found.layer, found.group) == (1, ("2:2", "2:3"))
    assert found.over_layer.better and found.over_layer.other == "layer 1"
    text = "\n".join(sentences(found, None, None, 40))
    assert "judge.layers and weighting.layer=('2:2', '2:3')" in text
    even = choose(planted({"layer 1": 0.8}, groups=groups), GROUPS, 3)
    assert even.over_layer.worse and "weighting.layer=(" not in sentences(even, None, None, 40)[4]


def test_nothing_better_is_said_so_and_the_paper_s_layer_stays():
    found = choose(planted({"layer 2, no sink fix": 0.75}), GROUPS, 3)
    assert found.layer == -1 and not found.over_last.better
    assert not found.fix_sink and found.over_raw.worse
    text = "\n".join(sentences(found, None, None, 40))
    assert "weighting.layer=-1: " in text and "weighting.fix_sink=False" in text
    assert "nothing better than decay" in text and "is better than" not in text
    # Of a model whose last layer is not read, the last one that is has its own number.
    assert choose(planted({}), GROUPS, 9).layer == 2


def test_with_few_items_nothing_is_recommended():
    few = GROUPS[: 2 * LEAST - 1]
    assert choose(planted({}), few, 3) is None
    assert sentences(None, None, None, 3) == [
        "no recommendation: 3 marked items; 20 are needed, for two halves"
    ]


@pytest.mark.parametrize("low, carries", [(0.51, True), (0.49, False)])
def test_verdicts_carry_something_where_their_interval_is_above_a_coin_s(low, carries):
    even = Estimate(0.0, -0.1, 0.1)
    figures = VerdictFigures(even, even, even, Estimate(0.6, low, 0.7), even, Estimate(2, 1, 3))
    assert figures.carries == carries
    (text,) = sentences(None, figures, None, 3)[1:]
    assert ("carry something" if carries else "carry nothing") in text
    assert "right in 60%" in text and "+2.00 (+1.00 to +3.00) log-odds for A" in text
