"""What happens at a training step beside the step: report, evaluate, save, stop.

`train.stage.train` lists the hooks, in the order in which they are asked. A hook's `is_due(loop)`
is asked after every step; where it is due, all metrics up to that step are written, and the hook is
called with the loop. `begin(loop)` is called once, before the first step.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from attnpo_jax.data.batching import EvalBatches, PairBatch
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.parallel import preemption, processes
from attnpo_jax.parallel.checkpoint import Checkpoints
from attnpo_jax.runtime.errors import Preempted, UserError
from attnpo_jax.runtime.metrics import read as read_metrics
from attnpo_jax.train import loop as loops
from attnpo_jax.train.loop import TrainLoop

_LOG = logging.getLogger(__name__)

# Of log-ratios times beta, root mean square over the first step's responses: what rounding may set
# policy and reference apart. Half of it is usual in bfloat16 at a beta of 0.1, see
# docs/performance.md; at this much the losses of the first step are off log 2 by some 0.05.
MOST_SPREAD = 0.1


class Hook(Protocol):
    """Something that happens at some steps."""

    def begin(self, loop: TrainLoop) -> None: ...

    def is_due(self, loop: TrainLoop) -> bool: ...

    def __call__(self, loop: TrainLoop) -> None: ...


class NonFiniteError(UserError, FloatingPointError):
    """A step whose loss or gradient is not finite; the run has stopped.

    Attributes:
      step: the step, counted from 1.
      pair_ids: the pairs whose loss is not finite, or all of the step's if each one's is.
    """

    def __init__(
        self, step: int, values: Mapping[str, float], pair_ids: list[str], last: int | None
    ):
        kept = (
            f"the checkpoint of step {last} is kept"
            if last is not None
            else "no checkpoint has been written yet"
        )
        super().__init__(
            f"step {step}: loss is {values['loss']}, grad_norm {values['grad_norm']}; "
            f"pairs: {', '.join(pair_ids)}; {kept}"
        )
        self.step = step
        self.pair_ids = pair_ids


class Report:
    """Checks every step's loss, and writes its metrics every so many steps.

    Args:
      data: the prepared pairs, to name those whose loss is not finite.
      every: steps between two lines of metrics.
      beta: scale of the rewards; None where they are not of policy against reference.
    """

    def __init__(self, data: Prepared, *, every: int, beta: float | None):
        self._data, self._every, self._beta = data, every, beta

    def __call__(self, loop: TrainLoop, step: int, of_step: Mapping[str, jax.Array]) -> None:
        """Waits for a step; raises NonFiniteError."""
        counted = ("loss", "grad_norm", "pairs", "tokens")
        values = {k: v.item() for k, v in _fetch(of_step, counted).items()}
        finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        loop.speed.add(values["pairs"], values["tokens"])
        if step == 1 and finite and self._beta is not None and processes.is_first():
            _tell_spread(of_step, self._beta)
        if step % self._every == 0 or step == loop.total_steps or not finite:
            scalars = [name for name, value in of_step.items() if value.ndim == 0]
            values = {k: v.item() for k, v in _fetch(of_step, scalars).items()}
            values["epoch"] = step / loop.steps_per_epoch
            values |= loop.speed.look()
            loop.metrics.write(step, values)
            loop.progress.metrics(step, values)
        loop.progress.step(step)
        if not finite:
            loop.metrics.flush()
            raise NonFiniteError(step, values, _suspects(self._data, of_step), loop.last_saved)


class Evaluate:
    """Evaluates before the first step, after the last, and every so many steps between.

    Args:
      eval_step: see `step.make_eval_step`.
      batches: of the held-out pairs; None if there are none.
      put_batch: brings one to the devices.
      stops: whether to leave off; asked after every batch.
      every: steps between two evaluations; 0 for none between.
    """

    def __init__(
        self,
        eval_step: Callable[[Any, PairBatch], dict[str, jax.Array]],
        batches: EvalBatches | None,
        put_batch: Callable[[PairBatch], PairBatch],
        stops: Callable[[], bool],
        *,
        every: int,
    ):
        self._eval_step, self._batches = eval_step, batches
        self._put_batch, self._stops, self._every = put_batch, stops, every

    def begin(self, loop: TrainLoop) -> None:
        """Evaluates where the run begins, unless `metrics.jsonl` has that already."""
        # Only the first process reads what it alone writes.
        evaluated = processes.is_first() and any(
            line["step"] == loop.step and "eval_loss" in line
            for line in read_metrics(loop.metrics.workdir)
        )
        due = loop.step == 0 or is_due(loop, self._every)
        if due and not preemption.agreed(evaluated):
            self(loop)
            if loop.stops:
                raise Preempted(
                    f"told to stop while evaluating, after step {loop.step} of {loop.total_steps}, "
                    "where this run began; the same command goes on from there"
                )

    def is_due(self, loop: TrainLoop) -> bool:
        # Told to stop, it is left to the run that resumes.
        return not loop.stops and is_due(loop, self._every)

    def __call__(self, loop: TrainLoop) -> None:
        """Sets `loop.stops` if it was told to stop meanwhile; then it counts for nothing."""
        if self._batches is None:
            return
        loop.progress.evaluating()
        eval_step, reference = self._eval_step, loop.state.reference
        if reference is not None:

            def eval_step(params, batch):
                return self._eval_step(params, batch, reference)

        values = evaluate(eval_step, loop.state.policy, self._batches, self._put_batch, self._stops)
        loop.progress.evaluated(loop.step, values)
        if values is None:
            loop.stops = True
            return
        loop.metrics.write(loop.step, values | {"epoch": loop.step / loop.steps_per_epoch})
        loop.evaluated = loop.step
        loop.speed.restart()


class Save:
    """Writes a checkpoint every so many steps, after the last and the best, and when told to stop.

    All metrics up to its step are on the disk before.
    """

    def __init__(self, checkpoints: Checkpoints, *, every: int):
        self._checkpoints, self._every = checkpoints, every

    def begin(self, loop: TrainLoop) -> None:
        pass

    def is_due(self, loop: TrainLoop) -> bool:
        return loop.stops or loop.step == loop.best or is_due(loop, self._every)

    def __call__(self, loop: TrainLoop) -> None:
        loop.metrics.flush()
        self._checkpoints.save(loop.state)
        loop.last_saved = loop.step
        loop.speed.restart()


class Stop:
    """Ends a run that was told to stop, when its checkpoint is whole."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def begin(self, loop: TrainLoop) -> None:
        pass

    def is_due(self, loop: TrainLoop) -> bool:
        return loop.stops

    def __call__(self, loop: TrainLoop) -> None:
        self._checkpoints.wait()
        raise Preempted(
            f"told to stop: step {loop.step} of {loop.total_steps} is saved; the same command goes "
            "on from there"
        )


def is_due(loop: TrainLoop, every: int) -> bool:
    """Whether the loop is at a step that `every` divides, or at its last; 0: at its last alone."""
    return loop.step == loop.total_steps or (every > 0 and loop.step % every == 0)


def evaluate(
    eval_step: Callable[[Any, PairBatch], dict[str, jax.Array]],
    params: Any,
    batches: EvalBatches,
    put_batch: Callable[[PairBatch], PairBatch] = jax.device_put,
    stops: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Means over all pairs of `batches`, under the names of the training metrics after `eval_`.

    Args:
      eval_step: see `step.make_eval_step`.
      params: the model's parameters.
      batches: the batches.
      put_batch: brings one to the devices.
      stops: whether to leave off; asked after every batch but the last.

    Returns:
      The means; None if it left off.
    """
    on_host, waiting = [], None
    for number, host_batch in enumerate(loops.read_ahead(batches), 1):
        batch = put_batch(host_batch)
        with jax.transfer_guard("disallow"):
            running = eval_step(params, batch)
        # One batch behind: the device does not wait, and the host does not hurry ahead of it, to
        # where it would ask in vain.
        if waiting is not None:
            on_host.append(jax.device_get(waiting))
        waiting = running
        if number < len(batches) and stops():
            return None
    on_host.append(jax.device_get(waiting))
    totals = {name: math.fsum(float(s[name]) for s in on_host) for name in on_host[0]}
    pairs = totals.pop("pairs")
    return {f"eval_{name}": total / pairs for name, total in totals.items()}


def _tell_spread(of_step: Mapping[str, jax.Array], beta: float) -> None:
    """Says how far the first step's policy is from the reference, which is the same model."""
    arrays = _fetch(of_step, ("pair", "log_ratio"))
    log_ratios = arrays["log_ratio"][arrays["pair"] >= 0]
    spread = math.sqrt(np.mean(np.square(log_ratios, dtype=np.float64)))
    found = (
        "at the first step, where policy and reference are one model, log-ratios of responses are "
        f"{spread:.1e} (root mean square; largest {np.abs(log_ratios).max():.1e}), which times "
        f"beta is {beta * spread:.1e}"
    )
    if beta * spread <= MOST_SPREAD:
        _LOG.info("%s", found)
    else:
        _LOG.warning(
            "%s, above %g, and stays in all losses: the reference was computed with other rounding "
            "than the policy is; with model.dtype = 'float32' there is next to none, with "
            "model.prepare_weights = 'int8' it is large",
            found,
            MOST_SPREAD,
        )


def _fetch(values: Mapping[str, jax.Array], names: Any) -> dict[str, np.ndarray]:
    return jax.device_get({name: values[name] for name in names})


def _suspects(data: Prepared, of_step: Mapping[str, jax.Array]) -> list[str]:
    """Ids of the step's pairs whose loss is not finite; of all its pairs if every loss is."""
    arrays = _fetch(of_step, ("pair", "pair_loss"))
    there = arrays["pair"] >= 0
    bad = there & ~np.isfinite(arrays["pair_loss"])
    rows = np.sort(arrays["pair"][bad if bad.any() else there])
    return [data[int(row)]["id"] for row in rows]
