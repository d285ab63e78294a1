"""The grid of a sweep: axes, variants, names, and what is refused before anything runs."""

import pytest

from attnpo_jax import config as config_lib
from attnpo_jax.config import ConfigError
from attnpo_jax.runtime.errors import UsageError
from attnpo_jax.sweep.grid import grid, parse_axis


def base(**changes):
    config = config_lib.default_config()
    config.optim.learning_rate = 1e-2
    config.weighting.layer = 3
    for name, value in changes.items():
        section, field = name.split("__")
        config[section][field] = value
    return config


def test_every_combination_keeps_what_is_not_swept(caplog):
    caplog.set_level("INFO", "attnpo_jax")
    points = grid(base(train__epochs=3), ["weighting.name=attention,uniform", "seed=1,2"])
    # What a changed function leaves behind is said once, and not for each seed.
    assert len([one for one in caplog.messages if "'uniform' in place of" in one]) == 1
    assert [(p.config.weighting.name, p.config.seed) for p in points] == [
        ("attention", 1), ("attention", 2), ("uniform", 1), ("uniform", 2),
    ]  # fmt: skip
    assert {(p.config.train.epochs, p.config.optim.learning_rate) for p in points} == {(3, 1e-2)}
    # The base's own function keeps its hyperparameters, another one has its defaults.
    assert points[0].config.weighting.layer == 3 and "layer" not in points[2].config.weighting
    assert points[0].name == "weighting.name=attention,seed=1"
    assert [p.group for p in points] == ["attention", "attention", "uniform", "uniform"]


def test_variants_set_several_fields_each_and_are_crossed_with_axes():
    points = grid(
        base(),
        ["objective.beta=0.1,0.5"],
        ["dpo=weighting.name=uniform", "two=weighting.layer='(0, -1)' lora.rank=4", "as-it-is="],
    )
    assert [p.name for p in points] == [
        f"{v},objective.beta={b}" for v in ("dpo", "two", "as-it-is") for b in (0.1, 0.5)
    ]
    assert [p.group for p in points[:2]] == ["dpo, beta=0.1", "dpo, beta=0.5"]
    two = points[2].config
    assert (two.weighting.layer, two.lora.rank, two.objective.beta) == ((0, -1), 4, 0.1)
    assert points[4].config.weighting.layer == 3 and points[4].config.lora.rank == 0


def test_a_name_that_no_folder_can_have_is_told_apart_by_a_digest():
    names = [p.name for p in grid(base(), ["seed=1"], ["a=", "b="])]
    assert names == ["a,seed=1", "b,seed=1"]
    spaced = [p.name for p in grid(base(), ["weighting.layer=(0,1),(0, 1)"])]
    assert len(set(spaced)) == 2 and not any(" " in name for name in spaced)
    many = ",".join(map(str, range(60)))
    (long,) = grid(base(), [f"weighting.layer=({many})"])
    assert len(long.name.encode()) < 200


@pytest.mark.parametrize(
    ("axes", "variants", "message"),
    [
        ([], [], "needs --set"),
        (["data.max_length=64,128"], [], "share one prepared dataset"),
        (["train.checkpoint_dir=a,b"], [], "share one prepared dataset"),
        (["objective.beta"], [], "FIELD=VALUE,VALUE"),
        (["objective.beta="], [], "FIELD=VALUE,VALUE"),
        (["objective.beta=0.1,0.1"], [], "a value is there twice"),
        (["objective.beta=0.1", "objective.beta=0.2"], [], "--set objective.beta is there twice"),
        (["objective.gamma=1,2"], [], "config.objective.gamma: unknown field"),
        ([], ["a"], "NAME="),
        ([], ["a b=seed=1"], "NAME="),
        ([], ["a=seed"], "NAME="),
        ([], ["a=seed='1"], "No closing quotation"),
        ([], ["a=seed=1 seed=2"], "a field is there twice"),
        ([], ["a=seed=1", "a=seed=2"], "--variant a is there twice"),
        ([], ["a=judge.verdict=False"], "--variant a: judge.verdict: all runs"),
        (["seed=1,2"], ["a=seed=1"], "--variant a sets seed, which is an axis too"),
    ],
)
def test_what_cannot_be_swept(axes, variants, message):
    with pytest.raises(UsageError, match=message):
        grid(base(), axes, variants)


@pytest.mark.parametrize(
    ("changes", "axis", "message"),
    [
        ({}, "objective.beta=0.1,-1.0", r"objective.beta = -1.0"),
        ({"data__eval": ""}, "seed=1,2", r"data.eval"),
        ({"train__checkpoint_dir": "/x"}, "seed=1,2", r"train.checkpoint_dir = '/x'"),
    ],
)
def test_every_point_is_checked(changes, axis, message):
    with pytest.raises(ConfigError, match=message):
        grid(base(**changes), [axis])


def test_values_with_commas_of_their_own():
    assert parse_axis("weighting.layer=-1,(0,1),[2, 3]") == (
        "weighting.layer", ["-1", "(0,1)", "[2, 3]"],
    )  # fmt: skip
