"""One run of a sweep: trained, evaluated, and what came of it written down."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax import train
from attnpo_jax.evaluate import files
from attnpo_jax.evaluate.evaluator import find
from attnpo_jax.evaluate.files import FOLDER, Evaluation
from attnpo_jax.evaluate.stage import evaluate_one, wanted
from attnpo_jax.evaluate.task import Subject
from attnpo_jax.generate import model as models
from attnpo_jax.run import Run
from attnpo_jax.runtime import atomic, json_files, metrics, schema
from attnpo_jax.runtime.errors import Preempted, UserError
from attnpo_jax.runtime.lock import LockedError
from attnpo_jax.sweep.grid import Point

_LOG = logging.getLogger(__name__)

RUNS = "runs"
RESULT, FAILURE = "result.json", "failure.json"
CHECKPOINTS = ("keep", "drop", "best")
_RESULT = schema.Table(
    {
        "config": schema.Mapped(schema.Anything()),
        "step": schema.Whole(),
        "loss": schema.Maybe(schema.Number()),
        "evaluations": schema.Listed(schema.Text()),
    }
)
_FAILURE = schema.Table({"config": schema.Mapped(schema.Anything()), "reason": schema.Text()})
# What a finished run may have had otherwise.
_INDIFFERENT = (
    "log.",
    "parallel.",
    "report.",
    "serve.",
    "train.keep_checkpoints",
    "train.log_every",
    "train.save_every",
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
      point: the run.
      step: the checkpoint's that was evaluated; None for a run that failed.
      loss: on the held-out pairs at that step; None where it was not evaluated there.
      evaluations: of the trained model, by name.
      failed: why there is none; None for a finished run.
    """

    point: Point
    step: int | None = None
    loss: float | None = None
    evaluations: Mapping[str, Evaluation] = dataclasses.field(default_factory=dict)
    failed: str | None = None

    @property
    def group(self) -> str:
        """What it is called together with those that differ from it in their seed."""
        return self.point.group

    @property
    def seed(self) -> int:
        """The run's."""
        return self.point.config.seed


def folder_of(workdir: pathlib.Path, point: Point) -> pathlib.Path:
    """The run's own workdir."""
    return workdir / RUNS / point.name


def outcome_of(workdir: pathlib.Path, point: Point) -> Outcome | None:
    """What is known of a run with this config; None for one that has not ended.

    Raises:
      UserError: a file is damaged.
    """
    folder = folder_of(workdir, point)
    remedy = "delete it, and the sweep looks at that run again"
    if (folder / RESULT).exists():
        found = json_files.read(folder / RESULT, _RESULT, remedy)
        if _telling(found["config"]) == _telling(_config_of(point)):
            kept = {
                name: folder / FOLDER / name / f"step-{found['step']}.json"
                for name in found["evaluations"]
            }
            if all(file.is_file() for file in kept.values()):
                evaluations = {name: files.read(file) for name, file in kept.items()}
                return Outcome(point, found["step"], found["loss"], evaluations)
    if (folder / FAILURE).exists():
        found = json_files.read(folder / FAILURE, _FAILURE, remedy)
        if _telling(found["config"]) == _telling(_config_of(point)):
            return Outcome(point, failed=found["reason"])
    return None


def run_point(workdir: pathlib.Path, point: Point) -> Outcome:
    """Does one run, from where it was interrupted.

    Args:
      workdir: the sweep's, with the prepared dataset.
      point: the run.

    Returns:
      What came of it; an error that ends the run is a failure, and kept as one.

    Raises:
      Preempted, KeyboardInterrupt: it was told to stop.
    """
    folder = folder_of(workdir, point)
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "prepared"
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(workdir / "prepared", folder))
    try:
        run = Run.resolve(point.config, folder)
        with run.writing():
            (folder / FAILURE).unlink(missing_ok=True)
            _train_and_evaluate(run, point)
        return outcome_of(workdir, point)
    except Preempted:
        raise
    except LockedError as error:  # whoever has it says what comes of it
        return Outcome(point, failed=str(error))
    except Exception as error:
        if not isinstance(error, (UserError, OSError)):
            _LOG.exception("%s", point.name)
        reason = str(error) or type(error).__name__
        with contextlib.suppress(OSError):  # a full disk may be the reason
            content = {"config": _config_of(point), "reason": reason}
            atomic.write_json(folder / FAILURE, content)
        return Outcome(point, failed=reason)
    finally:
        # The next run compiles its own steps; these would stay in memory.
        jax.clear_caches()


def _train_and_evaluate(run: Run, point: Point) -> None:
    quiet = Console(quiet=True)  # one table at the end has all runs
    train.train(run, console=quiet)
    subject = Subject(run, models.TRAINED)  # the best, where the config looks for one
    step = int(subject.name.removeprefix("step-"))
    done = []
    for name in dict.fromkeys(("pairs", *wanted(run))):
        if evaluate_one(run, find(name), subject, run.workdir / FOLDER / name, quiet) is not None:
            done.append(name)
    subject.release()
    losses = [
        line["eval_loss"]
        for line in metrics.read(run.workdir)
        if line["step"] == step and "eval_loss" in line
    ]
    content = {
        "config": _config_of(point),
        "step": step,
        "loss": losses[-1] if losses and math.isfinite(losses[-1]) else None,
        "evaluations": done,
    }
    atomic.write_json(run.workdir / RESULT, content)


def remove_checkpoints(workdir: pathlib.Path, outcome: Outcome, checkpoints: str) -> None:
    """Leaves of a finished run's checkpoints what `checkpoints` says; nothing of a failed run's."""
    if outcome.failed or checkpoints == "keep":
        return
    for path in (folder_of(workdir, outcome.point) / "checkpoints").glob("[0-9]*"):
        if path.name.isdigit() and (checkpoints == "drop" or int(path.name) != outcome.step):
            shutil.rmtree(path)


def _config_of(point: Point) -> dict[str, Any]:
    return json.loads(config_lib.to_json(point.config))


def _telling(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that decide what comes of a run."""
    return {
        field: value
        for field, value in config_lib.flatten(config).items()
        if not field.startswith(_INDIFFERENT)
    }
