"""Which of a run's checkpoints is asked for: by its step, the best, or what is taken unasked."""

import functools
import logging
import os
import pathlib

from attnpo_jax.parallel import checkpoint
from attnpo_jax.runtime import best, metrics
from attnpo_jax.runtime.errors import UserError

_LOG = logging.getLogger(__name__)


def saved_step(
    folder: str | os.PathLike, workdir: pathlib.Path, keep_best: str, asked: str | int | None
) -> int | None:
    """The step of a checkpoint.

    Args:
      folder: where the checkpoints are.
      workdir: the run's, with its metrics.
      keep_best: `config.train.keep_best`.
      asked: a step, as a number or a text; `best`; or None for the best if there is one.

    Returns:
      A step that has a checkpoint; None where none is asked for and there is no best one.

    Raises:
      UserError: there is no such checkpoint, or no way to tell the best.
    """
    steps = checkpoint.saved_steps(folder)
    listed = f"{folder} has those of {', '.join(map(str, steps)) or 'no step'}"
    if asked not in (None, "best"):
        if not str(asked).isdecimal() or int(asked) not in steps:
            raise UserError(f"no checkpoint {asked!r}: {listed}; accepted: a step, best, or newest")
        return int(asked)
    if not keep_best:
        raise UserError(
            "the best checkpoint is asked for, but config.train.keep_best names no metric; "
            "accepted: one there, or a step"
        )
    choice = best.Choice.parse(keep_best)
    step = best.best(choice.scores(metrics.read(workdir)))
    if asked is None:
        _say_which(workdir, keep_best, step, step in steps)
        return step if step in steps else None
    if step is None:
        raise UserError(
            f"{workdir / metrics.FILE} has no `{choice.metric}` after a training step, "
            "which config.train.keep_best names; accepted: a metric that it has, or a step"
        )
    if step not in steps:
        raise UserError(
            f"the best evaluation is that of step {step}, which has no checkpoint: {listed}; "
            "accepted: one of these steps"
        )
    return step


@functools.cache  # once in a process: several stages ask
def _say_which(workdir: pathlib.Path, metric: str, step: int | None, saved: bool) -> None:
    """Tells which checkpoint is taken where nobody has said so."""
    if saved:
        _LOG.info("the trained model is that of step %d, the best by %s", step, metric)
    elif step is not None:
        _LOG.warning(
            "%s: the best by %s is step %d, which has no checkpoint: the newest is taken",
            workdir,
            metric,
            step,
        )
