"""Which checkpoint is kept as the best, and when training stops early."""

import math

import pytest

from attnpo_jax import config as config_lib
from attnpo_jax.config import ConfigError
from attnpo_jax.run import Run
from attnpo_jax.runtime import best
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.train import choosing, hooks
from tests import tiny
from tests.train import test_loop as loops

model, any_components = loops.model, loops.any_components
ACCURACY = "eval_rewards/accuracies"


@pytest.fixture
def evaluations(monkeypatch):
    """What evaluations are to find, one after the other; None interrupts the run."""
    values = []

    def found(*_, **__):
        if (value := values.pop(0)) is None:
            raise KeyboardInterrupt
        return {"eval_loss": 1 - value, ACCURACY: value, "eval_rewards/weighted_accuracies": value}

    monkeypatch.setattr(hooks, "evaluate", found)
    return values


def config_of(model, **changes):
    own = {"train__eval_every": 1, "train__keep_checkpoints": 1, "train__save_every": 0}
    return tiny.training_config(model, **(own | changes))


def test_the_best_checkpoint_stays_beside_the_newest_in_an_interrupted_run_too(
    tmp_path, model, evaluations
):
    # Step 0's is of the model that training starts from, which has no checkpoint.
    evaluations += [0.9, 0.5, 0.7, None]
    config = config_of(model, train__keep_best=f"max:{ACCURACY}")
    with pytest.raises(KeyboardInterrupt):
        loops.run(tmp_path, config)
    assert loops.saved_steps(tmp_path) == [2]
    evaluations += [0.3, 0.6, math.nan, 0.4]
    loops.run(tmp_path, config)
    assert not evaluations
    assert loops.saved_steps(tmp_path) == [2, 6]
    run = Run.resolve(config, tmp_path)
    asked = ("best", "6", 2, None, "newest")
    assert [run.checkpoint_step(one) for one in asked] == [2, 6, 2, 2, None]
    for asked, keep_best, message in (
        ("3", "", r"has those of 2, 6; accepted: a step, best, or newest"),
        ("best", "", "keep_best names no metric"),
        ("best", f"min:{ACCURACY}", "that of step 3, which has no checkpoint: .* of 2, 6"),
        ("best", "min:eval_x", "no `eval_x` after a training step"),
    ):
        other = Run.resolve(config_of(model, train__keep_best=keep_best), tmp_path)
        with pytest.raises(UserError, match=message):
            other.checkpoint_step(asked)
        # What nobody has asked for by name is no error: the newest is there.
        assert other.checkpoint_step(None) is None


def test_training_stops_early_where_an_interrupted_run_does(tmp_path, model, evaluations):
    early = {"train__early_stopping__metric": "min:eval_loss", "train__early_stopping__patience": 2}
    config = config_of(model, **early, train__save_every=1)
    evaluations += [0.5, 0.6, 0.55, None]
    with pytest.raises(KeyboardInterrupt):
        loops.run(tmp_path, config)
    evaluations += [0.6]
    lines = loops.run(tmp_path, config)
    assert loops.steps_of(lines, "train") == [1, 2, 3] == loops.steps_of(lines, "eval")[1:]
    assert loops.saved_steps(tmp_path) == [3]
    # Once stopped, it stays so, until more patience is asked for.
    assert loops.run(tmp_path, config) == lines
    evaluations += [0.5, 0.5, 0.5]
    lines = loops.run(tmp_path, tiny.changed(config, {"train__early_stopping__patience": 5}))
    assert loops.steps_of(lines, "train") == [1, 2, 3, 4, 5, 6] and not evaluations


class Last:
    """A hook that is due after the last step alone."""

    def __init__(self):
        self.calls = []

    def begin(self, loop):
        self.calls.append("begin")

    def is_due(self, loop):
        return hooks.is_due(loop, 0)

    def __call__(self, loop):
        self.calls.append(loop.step)


class Loop:
    step, total_steps, stops, evaluated = 4, 10, False, 4

    class metrics:
        workdir = None


def test_what_is_due_after_the_last_step_is_done_at_an_early_one(monkeypatch):
    lines = [{"step": step, "eval_loss": 1.0} for step in (0, 2, 4)]
    monkeypatch.setattr(choosing, "read_metrics", lambda _: lines)
    last = Last()
    section = config_lib.default_config().train
    section.early_stopping.metric = "min:eval_loss"
    section.early_stopping.patience = 2
    (stop,) = choosing.hooks_of(section, [last], None)
    loop = Loop()
    assert stop.is_due(loop)
    stop(loop)
    assert (loop.total_steps, last.calls) == (4, [4])
    loop = Loop()
    stop.begin(loop)  # as of a run that was stopped while doing this
    assert (loop.total_steps, last.calls) == (4, [4, "begin"])


def test_a_metric_that_no_evaluation_gives_is_told_at_the_first(tmp_path, model, evaluations):
    evaluations += [0.5]
    with pytest.raises(UserError, match=r"keep_best: no evaluation gives 'eval_acc'; .*eval_loss"):
        loops.run(tmp_path, config_of(model, train__keep_best="max:eval_acc"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train__keep_best": "eval_loss"}, "'max:' or 'min:' and a metric of evaluations"),
        ({"train__keep_best": "max:loss"}, "'max:' or 'min:' and a metric of evaluations"),
        ({"train__eval_every": 0, "train__keep_best": "min:eval_loss"}, "eval_every above 0"),
        ({"data__eval": "", "train__keep_best": "min:eval_loss"}, "there are no held-out pairs"),
        (
            {
                "train__evaluations__names": "checks",
                "train__early_stopping__metric": "max:eval_checks/x",
            },
            "train.evaluations.every above 0",
        ),
    ],
)
def test_metrics_that_come_too_late_or_never(changes, message):
    config = config_lib.default_config()
    config.train.eval_every = 1
    with pytest.raises(ConfigError, match=message):
        config_lib.validate(tiny.changed(config, changes))


def test_small_gains_add_up():
    scores = dict(enumerate([0.0, 0.04, 0.08, 0.12, 0.16]))
    # Never 0.1 above the best that counts, but at step 3, from which patience counts anew.
    assert not best.stalled(scores, patience=3, min_gain=0.1)
    assert best.stalled(scores, patience=2, min_gain=0.1)
