"""Hooks that choose by what evaluations found: which checkpoint is the best, and when to stop.

Both go by the lines of `metrics.jsonl` alone, so that a run which was interrupted chooses as an
undisturbed one does. The first process reads them, and tells the others.
"""

import logging
from collections.abc import Mapping, Sequence

from ml_collections import config_dict

from attnpo_jax.config import as_tuple
from attnpo_jax.parallel import preemption, processes
from attnpo_jax.parallel.checkpoint import Checkpoints
from attnpo_jax.runtime import schema
from attnpo_jax.runtime.best import Choice, best, stalled
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.metrics import read as read_metrics
from attnpo_jax.train.hooks import Hook
from attnpo_jax.train.loop import TrainLoop

_LOG = logging.getLogger(__name__)


def hooks_of(
    section: config_dict.ConfigDict, before: Sequence[Hook], checkpoints: Checkpoints
) -> list["EarlyStop | KeepBest"]:
    """What `train.early_stopping` and `train.keep_best` ask for.

    Args:
      section: `config.train`.
      before: the hooks that evaluate.
      checkpoints: the run's.
    """
    found: list[EarlyStop | KeepBest] = []
    others = as_tuple(section.evaluations.names)
    stopping = section.early_stopping
    if stopping.metric:
        scores = _Scores("train.early_stopping.metric", Choice.parse(stopping.metric), others)
        found.append(EarlyStop(scores, stopping.patience, stopping.min_gain, before))
    if section.keep_best:
        # After it: the last evaluations, which an early stop brings, count too.
        scores = _Scores("train.keep_best", Choice.parse(section.keep_best), others)
        found.append(KeepBest(scores, checkpoints))
    return found


class _Scores:
    """The scores of a run's evaluations, by step.

    Args:
      field: of the config, that names the metric.
      choice: the metric.
      others: evaluations whose metrics are not there before their first time.
    """

    def __init__(self, field: str, choice: Choice, others: Sequence[str]):
        self.choice = choice
        self._field, self._others = field, others

    def read(self, loop: TrainLoop) -> Mapping[int, float]:
        return self.choice.scores(read_metrics(loop.metrics.workdir))

    def check(self, loop: TrainLoop) -> None:
        """Raises UserError if no evaluation of this run gives such a metric."""
        metric = self.choice.metric
        if any(metric.startswith(f"eval_{name}/") for name in self._others):
            return
        lines = read_metrics(loop.metrics.workdir)
        names = {name for line in lines for name in line if name.startswith("eval_")}
        if names and metric not in names:
            raise UserError(
                f"config.{self._field}: no evaluation gives {metric!r}; accepted: "
                f"{', '.join(sorted(names))}"
            )


class EarlyStop:
    """Ends training when evaluations get no better.

    The step becomes the run's last one: what is to happen after the last step happens then.

    Args:
      scores: of the metric.
      patience: see `best.stalled`.
      min_gain: likewise.
      before: hooks that are asked before this one, and may be due at a last step alone.
    """

    def __init__(self, scores: _Scores, patience: int, min_gain: float, before: Sequence[Hook]):
        self._scores, self._before = scores, before
        self._patience, self._min_gain = patience, min_gain

    def begin(self, loop: TrainLoop) -> None:
        """Ends a run before its first step that has stopped early already."""
        if processes.is_first():
            self._scores.check(loop)
        if loop.step > 0 and self._stalled(loop):
            self._end(loop)
            for hook in self._before:
                hook.begin(loop)  # what an earlier run was stopped in

    def is_due(self, loop: TrainLoop) -> bool:
        return not loop.stops and loop.evaluated == loop.step < loop.total_steps

    def __call__(self, loop: TrainLoop) -> None:
        if not self._stalled(loop):
            return
        done = [hook.is_due(loop) for hook in self._before]
        self._end(loop)
        for hook, was_due in zip(self._before, done, strict=True):
            if not was_due and hook.is_due(loop):
                hook(loop)

    def _stalled(self, loop: TrainLoop) -> bool:
        first = processes.is_first()
        return preemption.agreed(
            first and stalled(self._scores.read(loop), self._patience, self._min_gain)
        )

    def _end(self, loop: TrainLoop) -> None:
        _LOG.info(
            "stops early, after step %d of %d: %s was not better by more than %g in %d evaluations",
            loop.step,
            loop.total_steps,
            self._scores.choice.metric,
            self._min_gain,
            self._patience,
        )
        loop.total_steps = loop.step


class KeepBest:
    """Has the checkpoint of the best evaluation written, and kept.

    Args:
      scores: of the metric.
      checkpoints: where it is kept.
    """

    def __init__(self, scores: _Scores, checkpoints: Checkpoints):
        self._scores, self._checkpoints = scores, checkpoints

    def begin(self, loop: TrainLoop) -> None:
        if processes.is_first():
            self._scores.check(loop)
        self._look(loop)

    def is_due(self, loop: TrainLoop) -> bool:
        return not loop.stops and loop.evaluated == loop.step

    def __call__(self, loop: TrainLoop) -> None:
        self._look(loop)
        if loop.best == loop.step:
            _LOG.info("step %d: the best %s so far", loop.step, self._scores.choice.metric)

    def _look(self, loop: TrainLoop) -> None:
        step = best(self._scores.read(loop)) if processes.is_first() else None
        (step, *_) = processes.exchange(step, schema.Maybe(schema.Whole()))
        loop.best = self._checkpoints.best = step
