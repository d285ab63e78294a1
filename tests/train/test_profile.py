"""`log.profile`: which steps are in a trace, where it is, and that nothing else changes."""

import pathlib

import jax
import pytest

from attnpo_jax import config as config_lib
from attnpo_jax.config.profiling import profiled
from attnpo_jax.run import Run
from attnpo_jax.runtime import metrics
from attnpo_jax.runtime.errors import Preempted, UserError
from attnpo_jax.train import hooks, stage
from tests import tiny
from tests.train.test_loop import SHAPE, open_unchecked, run, without_clock


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"), SHAPE)


@pytest.fixture(autouse=True)
def any_components(monkeypatch):
    monkeypatch.setattr(Run, "open_prepared", open_unchecked)


def traced(workdir):
    """By folder of the profile, the numbers of the steps that its trace has."""
    found = {}
    for file in (workdir / "profile" / "plugins" / "profile").glob("*/*.xplane.pb"):
        assert file.name == "process-0.xplane.pb"
        steps = [
            dict(event.stats)["step_num"]
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes
            for line in plane.lines
            for event in line.events
            if event.name == "train"
        ]
        found[file.parent.name] = sorted(steps)
    return found


def files(workdir):
    return sorted(p.name for p in (workdir / "profile").rglob("*") if p.is_file())


def test_the_steps_are_in_it_and_the_metrics_are_as_without(tmp_path, model):
    """Evaluation and checkpoint come just before the first step, and just after the last one."""
    changes = {"train__eval_every": 2, "train__save_every": 2}
    without = run(tmp_path / "without", tiny.training_config(model, **changes))
    assert not (tmp_path / "without" / "profile").exists()
    config = tiny.training_config(model, **changes, log__profile="3:5")
    during = []
    with pytest.MonkeyPatch.context() as patch:
        for hook in (hooks.Evaluate, hooks.Save):
            called = hook.__call__

            def seen(self, loop, called=called):
                during.append(jax._src.profiler._profile_state.profile_session is not None)
                called(self, loop)

            patch.setattr(hook, "__call__", seen)
        found = run(tmp_path / "with", config)
    assert without_clock(found) == without_clock(without)
    assert traced(tmp_path / "with") == {"steps-3-4": [3, 4]}
    assert files(tmp_path / "with") == ["process-0.trace.json.gz", "process-0.xplane.pb"]
    assert during == [False] * 7


def test_the_first_step_and_the_end_of_the_run_bound_it(tmp_path, model):
    run(tmp_path, tiny.training_config(model, train__steps=3, log__profile="1:1000"))
    assert traced(tmp_path) == {"steps-1-3": [1, 2, 3]}


def stopped(monkeypatch, step, how):
    """Has the next run stop after a step: told to, or by an error."""
    write = metrics.MetricsWriter.write

    def write_and_fail(self, number, values):
        write(self, number, values)
        if number == step and "loss" in values:
            raise OSError("no")

    if how == "told":
        update = hooks.Save.is_due

        def is_due(self, loop):
            loop.stops = loop.stops or loop.step == step
            return update(self, loop)

        monkeypatch.setattr(hooks.Save, "is_due", is_due)
    else:
        monkeypatch.setattr(metrics.MetricsWriter, "write", write_and_fail)


@pytest.mark.parametrize(
    "how, kept, resumed", [("told", [2, 3], [4, 5]), ("failed", [2, 3, 4], [3, 4, 5])]
)
def test_a_run_that_ends_in_between_leaves_the_steps_that_it_did(
    tmp_path, model, monkeypatch, how, kept, resumed
):
    """An error of the third step comes when the fourth one has begun; step 2 is saved then."""
    config = tiny.training_config(model, train__save_every=2, log__profile="2:6")
    stopped(monkeypatch, 3, how)
    with pytest.raises(Preempted if how == "told" else OSError):
        run(tmp_path, config)
    assert traced(tmp_path) == {"steps-2-3": kept}
    monkeypatch.undo()
    monkeypatch.setattr(Run, "open_prepared", open_unchecked)
    run(tmp_path, config)
    assert traced(tmp_path) == {"steps-2-3": kept, f"steps-{resumed[0]}-5": resumed}


def test_a_resumed_run_may_profile_other_steps_and_none_that_are_done(tmp_path, model):
    run(tmp_path, tiny.training_config(model, train__steps=2))
    run(tmp_path, tiny.training_config(model, train__steps=2, log__profile="1:2"))
    assert traced(tmp_path) == {}


def test_what_ended_the_run_is_told_where_the_profile_can_not_be_written(
    tmp_path, model, monkeypatch, caplog
):
    stopped(monkeypatch, 2, "failed")
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: 1 / 0)
    config = tiny.training_config(model, log__profile="2:4")
    try:
        with pytest.raises(OSError, match="^no$"):
            run(tmp_path, config)
    finally:
        monkeypatch.undo()
        jax.profiler.stop_trace()
    assert "the profile was not written: division by zero" in caplog.text


def test_a_start_that_the_run_does_not_reach_is_refused(tmp_path, model, monkeypatch):
    """By the config's checks where it says how many steps, before anything is computed if not."""
    config = tiny.training_config(model, train__steps=2, log__profile="3:4")
    with pytest.raises(config_lib.ConfigError) as caught:
        config_lib.validate(config)
    (problem,) = caught.value.problems
    assert problem == (
        "config.log.profile = '3:4': accepted: a START of at most config.train.steps = 2"
    )
    monkeypatch.setattr(stage, "compile_step", None)
    config = tiny.training_config(model, log__profile="7:9")
    with pytest.raises(
        UserError, match="config.log.profile = '7:9': the run has 6 steps; accepted: a START of 6"
    ):
        run(tmp_path, config)


@pytest.mark.parametrize(
    "text", ["3", "3:", ":3", "0:2", "-1:2", "3:3", "4:3", "1:2:3", "1.0:2", " 1:2", "a:b", 3, None]
)
def test_what_names_no_steps_is_refused(text):
    config = config_lib.default_config()
    with config.ignore_type():
        config.log.profile = text
    with pytest.raises(config_lib.ConfigError) as caught:
        config_lib.validate(config)
    (problem,) = caught.value.problems
    assert problem == (
        f"config.log.profile = {text!r}: accepted: '', or START:STOP, steps from 1 on with START "
        "below STOP, as 10:13"
    )


def test_a_command_line_names_them():
    config = config_lib.load_config(
        str(pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py"),
        ["--config.log.profile=10:13"],
    )
    config_lib.validate(config)
    assert list(profiled(config.log.profile)) == [10, 11, 12]
