"""The training loop, in the order in which things happen.

A step's metrics are read while the next step runs, so that the device never waits for the host.
Before a hook runs, all metrics up to its step are written.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import grain
import jax

from attnpo_jax.data.batching import EvalBatches, PairBatch, TrainBatches
from attnpo_jax.parallel.checkpoint import Checkpoints
from attnpo_jax.parallel.state import TrainState
from attnpo_jax.runtime import interrupts
from attnpo_jax.runtime.metrics import MetricsWriter
from attnpo_jax.train.progress import Throughput, TrainProgress

if TYPE_CHECKING:
    from attnpo_jax.train.hooks import Hook, Report

# Batches that wait, ready, for the device.
AHEAD = 4


@dataclasses.dataclass
class TrainLoop:
    """A run under way, as its hooks see it.

    Attributes:
      state: after the last step.
      step: optimizer steps done.
      total_steps: of the whole run; a hook that has it end early sets it to the step done.
      steps_per_epoch: for the report; a whole number or not.
      last_saved: the step of the newest checkpoint; None if there is none.
      metrics, progress: where numbers go.
      speed: counts pairs and tokens.
      stops: whether the run was told to stop; a hook may set it.
      evaluated: the step of the newest evaluation that this process made; None before the first.
      best: the step of the best one, see `choosing.KeepBest`; None where none is looked for.
    """

    state: TrainState
    step: int
    total_steps: int
    steps_per_epoch: float
    last_saved: int | None
    metrics: MetricsWriter
    progress: TrainProgress
    speed: Throughput = dataclasses.field(default_factory=Throughput)
    stops: bool = False
    evaluated: int | None = None
    best: int | None = None

    def run(
        self,
        batches: TrainBatches,
        train_step: Callable[[TrainState, PairBatch], tuple[TrainState, dict[str, jax.Array]]],
        put_batch: Callable[[PairBatch], PairBatch],
        told_to_stop: Callable[[], bool],
        report: "Report",
        hooks: Sequence["Hook"],
        checkpoints: Checkpoints,
    ) -> None:
        """Trains until the last step, or until a hook raises.

        Args:
          batches: of the whole run; those before `step` are skipped.
          train_step: the compiled step; the state is donated.
          put_batch: brings a batch to the devices.
          told_to_stop: asked once after every step.
          report: takes the metrics of every step, one step late.
          hooks: what happens at steps, in order.
          checkpoints: may have failed in the background.
        """
        for hook in hooks:
            hook.begin(self)
        unreported: tuple[int, Any] | None = None
        self.speed.restart()
        first = self.step
        with contextlib.ExitStack() as lasting:
            # Of a run that has ended early, nothing is left to do.
            ahead = read_ahead(batches, self.step) if self.step < self.total_steps else ()
            for host_batch in ahead:
                # By which a profile tells the steps apart.
                with jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1):
                    batch = put_batch(host_batch)
                    with jax.transfer_guard("disallow"):
                        self.state, of_step = train_step(self.state, batch)
                if self.step == first:  # before it, a signal may end the process as it is
                    lasting.enter_context(interrupts.work_to_save())
                if unreported is not None:
                    report(self, *unreported)
                self.step += 1
                unreported = self.step, of_step
                checkpoints.check()
                self.stops = told_to_stop()
                for hook in hooks:
                    if hook.is_due(self):
                        if unreported is not None:
                            report(self, *unreported)
                            unreported = None
                        hook(self)
                if self.step == self.total_steps:
                    break
            checkpoints.wait()


def read_ahead(batches: TrainBatches | EvalBatches, start: int = 0) -> Iterator[PairBatch]:
    """Batches `start`, `start + 1`, ... in order, made by threads before they are asked for."""
    if start == len(batches):
        return iter(())
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=AHEAD)
    return iter(grain.MapDataset.source(batches)[start:].to_iter_dataset(options))
