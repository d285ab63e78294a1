"""One prepared dataset for runs that read other columns of it."""

import dataclasses
import io

import pytest
from rich.console import Console

from attnpo_jax.config import ConfigError
from attnpo_jax.judge.judge import Judge
from attnpo_jax.prepare.reference import Reference
from attnpo_jax.prepare.stage import prepare
from attnpo_jax.run import Run
from attnpo_jax.runtime.errors import UsageError
from attnpo_jax.sweep.grid import grid
from attnpo_jax.sweep.shared import to_prepare
from tests import tiny


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_small_inputs(folder)
    return folder


VARIANTS = (
    "first=judge.layers=(0,) weighting.layer=0",
    "last=judge.layers=(2,)",
    "kind=weighting.name=tis_dpo weighting.column=kind prepare.scorers.kind.prefix='Be kind.'",
    "new=weighting.name=column weighting.column=new prepare.scorers.new.function=diff "
    "judge.layers=none",
)


def test_the_union_is_prepared_once_and_serves_every_run(inputs, tmp_path, monkeypatch):
    passed = {"judge": 0, "reference": 0}
    for kind, of in (("judge", Judge), ("reference", Reference)):

        def spy(self, *given, of=of.run, kind=kind):
            passed[kind] += len(given[-1])
            return of(self, *given)

        monkeypatch.setattr(of, "run", spy)
    config = tiny.small_config(inputs, judge__layers=(2,), judge__verdict=False)
    run = Run.resolve(config, tmp_path)
    points = grid(config, [], VARIANTS)
    runs = to_prepare(run, points)
    for one in runs:
        assert one.source_layers == (0, 2)
        assert set(one.scorers) == {"kind", "new"}
        prepare(one, console=Console(file=io.StringIO()))
    # Judge and reference once, and a pass of the scorer that is a model: 6 pairs and 2 held out.
    assert passed == {"judge": 8, "reference": 16}
    read = {}
    for point in points:
        of_point = Run.resolve(point.config, tmp_path)
        prepare(of_point, console=Console(file=io.StringIO()))
        dataset = dataclasses.replace(of_point).open_prepared("train")
        read[point.name] = dataset.source_layers, dataset.scorers
    assert passed == {"judge": 8, "reference": 16}
    assert read == {
        "first": ((0,), ()),
        "last": ((2,), ()),
        "kind": ((), ("kind",)),
        "new": ((), ("new",)),
    }


def test_one_name_has_one_meaning_and_the_rest_of_the_judge_is_not_swept(inputs, tmp_path):
    config = tiny.small_config(inputs)
    run = Run.resolve(config, tmp_path)
    twice = [f"{x}=prepare.scorers.s.prefix={x}" for x in "ab"]
    with pytest.raises(ConfigError, match="prepare.scorers.s = .*'b'.* one meaning of a name"):
        to_prepare(run, grid(config, [], twice))
    with pytest.raises(UsageError, match="judge.max_length: .*accepted: .*judge.layers, .*scorers"):
        grid(config, ["judge.max_length=100,200"])
