"""Evaluations while training: of the policy as it is, every so many steps and after the last."""

import dataclasses
import logging
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax.evaluate import Evaluator, Subject, find
from attnpo_jax.evaluate.files import FOLDER
from attnpo_jax.evaluate.stage import evaluate_one, lacks_pairs
from attnpo_jax.judge.language_model import LanguageModel
from attnpo_jax.parallel import backend as backends
from attnpo_jax.runtime.errors import Preempted, UsageError
from attnpo_jax.runtime.metrics import read as read_metrics
from attnpo_jax.sampling.model import SampledModel
from attnpo_jax.train.hooks import is_due
from attnpo_jax.train.loop import TrainLoop

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)


def evaluation_hooks(
    run: "Run", backend: backends.Backend, identity: Mapping[str, Any]
) -> list["Evaluations"]:
    """The hook that the config's `train.evaluations` asks for, or none.

    Args:
      backend: what trains.
      identity: what the run's checkpoints say that they are of.

    Raises:
      UsageError: there is no such evaluation, or there are no pairs for it.
    """
    wanted = run.config.train.evaluations
    evaluators = [find(name) for name in config_lib.as_tuple(wanted.names)]
    if not evaluators:
        return []
    for evaluator in evaluators:
        if lacks_pairs(run, evaluator):
            raise UsageError(
                f"config.train.evaluations.names: {evaluator.name!r}, but config.data.eval names "
                "no held-out pairs; accepted: evaluations that need none, or pairs there"
            )
    mesh = backend if isinstance(backend, backends.Sharded) else backends.all_by_rows(run.policy)
    model = LanguageModel(pathlib.Path(run.model_folder), run.policy, {}, run.tokenizer)
    sampled = SampledModel.of("", model, mesh)
    return [Evaluations(run, evaluators, sampled, identity, wanted.every)]


class Evaluations:
    """Evaluates the policy, from the parameters as they lie.

    Args:
      sampled: the policy, but for its parameters.
      identity: see `evaluation_hooks`.
      every: steps between two times; 0: after the last step alone.
    """

    def __init__(
        self,
        run: "Run",
        evaluators: Sequence[Evaluator],
        sampled: SampledModel,
        identity: Mapping[str, Any],
        every: int,
    ):
        self._run, self._evaluators, self._sampled = run, evaluators, sampled
        self._identity, self._every = identity, every

    def begin(self, loop: TrainLoop) -> None:
        # What an earlier run was stopped before; what it has finished is not done again.
        if loop.step > 0 and is_due(loop, self._every):
            self(loop)
            if loop.stops:
                raise Preempted(
                    f"told to stop while evaluating, after step {loop.step} of {loop.total_steps}; "
                    "the same command goes on from there"
                )

    def is_due(self, loop: TrainLoop) -> bool:
        return not loop.stops and is_due(loop, self._every)

    def __call__(self, loop: TrainLoop) -> None:
        """Sets `loop.stops` if it was told to stop meanwhile; the run that resumes goes on."""
        name = f"{self._run.workdir.resolve().name}/step-{loop.step}"
        model = dataclasses.replace(self._sampled.model, params=loop.state.policy)
        sampled = dataclasses.replace(self._sampled, name=name, model=model)
        checkpoint = loop.step, self._identity
        subject = Subject(self._run, sampled=sampled, checkpoint=checkpoint)
        loop.progress.evaluating()
        figures = {}
        try:
            for evaluator in self._evaluators:
                folder = self._run.workdir / FOLDER / evaluator.name
                found = evaluate_one(self._run, evaluator, subject, folder, Console(quiet=True))
                for key, figure in found.result.figures.items() if found else ():
                    if math.isfinite(figure.value) and not figure.detail:
                        figures[f"eval_{evaluator.name}/{key}"] = figure.value
        except Preempted:
            loop.stops = True
        if figures and not self._written(loop, figures):
            _LOG.info("step %d: %s", loop.step, figures)
            loop.metrics.write(loop.step, figures | {"epoch": loop.step / loop.steps_per_epoch})
        if not loop.stops:
            loop.evaluated = loop.step
        loop.speed.restart()

    def _written(self, loop: TrainLoop, figures: Mapping[str, float]) -> bool:
        """Whether the metrics have them, from before the run was interrupted."""
        lines = [line for line in read_metrics(self._run.workdir) if line["step"] == loop.step]
        return any(figures.keys() <= line.keys() for line in lines)
