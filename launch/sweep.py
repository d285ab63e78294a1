r"""Trains a grid of configs on one prepared dataset, and ranks them by held-out accuracy.

    python launch/sweep.py --config=configs/quickstart.py --workdir=runs/sweep \
        --set objective.beta=0.05,0.1 --set weighting.name=attention,uniform

The judge's and the reference's passes run once, into WORKDIR/prepared. Each point of the grid is a
run of its own in WORKDIR/runs/NAME, with a link to that dataset. Started again, the sweep skips
finished runs and resumes the one that was interrupted; a finished run's `checkpoints/` may be
deleted. Runs go one after another in this process.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import config_dict
from rich.console import Console
from rich.table import Table

from attnpo_jax import cli, prepare, train
from attnpo_jax import config as config_lib
from attnpo_jax.parallel import processes
from attnpo_jax.run import Run
from attnpo_jax.runtime import atomic, cache, json_files, metrics, program, schema
from attnpo_jax.runtime.errors import UsageError
from attnpo_jax.runtime.printable import plain, say
from attnpo_jax.train.hooks import NonFiniteError

# What a prepared dataset does not depend on.
SWEPT = ("seed", "weighting", "shaping", "objective", "optim", "train")
RESULT = "result.json"

# Columns of the closing table, the first one ranks.
COLUMNS = {
    "accuracy": "eval_rewards/accuracies",
    "weighted accuracy": "eval_rewards/weighted_accuracies",
    "margin": "eval_rewards/margins",
    "weighted margin": "eval_rewards/weighted_margins",
    "loss": "eval_loss",
}


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of the grid.

    Attributes:
      name: its folder's name.
      values: the swept fields and their values as on the command line.
      config: the config they make.
    """

    name: str
    values: dict[str, str]
    config: config_dict.ConfigDict


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a run: its last evaluation, or why it stopped."""

    point: Point
    evaluation: dict[str, Any] | None
    stopped: str | None = None


def parse_axis(text: str) -> tuple[str, list[str]]:
    """Splits `field=value,value,...`; commas inside brackets or quotes belong to a value.

    >>> parse_axis("weighting.layer=-1,(0, -1)")
    ('weighting.layer', ['-1', '(0, -1)'])

    Raises:
      UsageError: no field, no value, or a value twice.
    """
    field, equals, rest = text.partition("=")
    values = re.findall(r"""(?:\([^)]*\)|\[[^]]*\]|"[^"]*"|'[^']*'|[^,])+""", rest)
    values = [value.strip() for value in values]
    if not field or not equals or not all(values) or not values:
        raise UsageError(f"--set {text!r}; accepted: FIELD=VALUE,VALUE,...")
    if len(set(values)) < len(values):
        raise UsageError(f"--set {text!r}: a value is there twice")
    return field, values


def grid(config: str, axes: Sequence[str], overrides: Sequence[str] = ()) -> list[Point]:
    """All runs of a sweep, checked.

    Args:
      config: the config file, as `attnpo --config` takes it.
      axes: `field=value,value,...` each.
      overrides: `--config.field=value`, for all runs.

    Raises:
      UsageError: an axis that cannot be understood, or that would need another prepared dataset.
      ConfigError: a config of the grid is wrong.
    """
    parsed = [parse_axis(axis) for axis in axes]
    fields = [field for field, _ in parsed]
    for field in fields:
        if fields.count(field) > 1:
            raise UsageError(f"--set {field} is there twice")
        if field.split(".")[0] not in SWEPT:
            raise UsageError(
                f"--set {field}: all runs of a sweep share one prepared dataset; accepted: fields "
                f"of {', '.join(SWEPT)} (another --workdir for another dataset)"
            )
    points = []
    for chosen in itertools.product(*(values for _, values in parsed)):
        values = dict(zip(fields, chosen, strict=True))
        settings = [f"--config.{field}={value}" for field, value in values.items()]
        resolved = config_lib.load_config(config, [*overrides, *settings])
        config_lib.validate(resolved)
        if not resolved.data.eval:
            raise config_lib.ConfigError(["config.data.eval: a sweep is ranked on held-out pairs"])
        name = ",".join(f"{field}={value}" for field, value in values.items())
        points.append(Point(re.sub(r"[^\w.=,()+-]", "_", name), values, resolved))
    return points


def sweep(points: Sequence[Point], workdir: pathlib.Path, console: Console) -> list[Outcome]:
    """Prepares once, then trains every run that is not finished.

    Returns:
      The outcomes, best first; runs that stopped come last.

    Raises:
      As `prepare.prepare` and `train.train`; a loss that is not finite only ends its own run.
    """
    run = Run.resolve(points[0].config, workdir)
    for point in points:
        config_lib.check_layers(point.config, run.model.num_layers, run.model.layer_windows)
    outcomes = []
    with run.writing():
        prepare.prepare(run, console=console)
        for number, point in enumerate(points, 1):
            say(console, f"[{number}/{len(points)}] {point.name}")
            outcomes.append(_train(point, workdir))
    ranking = COLUMNS["accuracy"]
    finished = [outcome for outcome in outcomes if outcome.evaluation is not None]
    finished.sort(key=lambda outcome: -outcome.evaluation[ranking])
    return finished + [outcome for outcome in outcomes if outcome.evaluation is None]


def _train(point: Point, workdir: pathlib.Path) -> Outcome:
    folder = workdir / "runs" / point.name
    result = folder / RESULT
    wanted = json.loads(config_lib.to_json(point.config))
    if result.exists():
        of_any = schema.Mapped(schema.Anything())
        form = schema.Table({"config": of_any, "evaluation": of_any})
        found = json_files.read(result, form, "delete it, and the sweep looks at that run again")
        if found["config"] == wanted:
            return Outcome(point, found["evaluation"])
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "prepared"
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(workdir / "prepared", folder))
    try:
        # One table at the end has all runs.
        train.train(Run.resolve(point.config, folder), console=Console(quiet=True))
    except NonFiniteError as error:
        return Outcome(point, None, str(error))
    finally:
        # The next run compiles its own steps; these would stay in memory.
        jax.clear_caches()
    evaluation = [line for line in metrics.read(folder) if "eval_loss" in line][-1]
    content = json.dumps({"config": wanted, "evaluation": evaluation}, indent=2) + "\n"
    atomic.write_atomically(result, content.encode())
    return Outcome(point, evaluation)


def ranking(outcomes: Sequence[Outcome]) -> Table:
    """A table of the outcomes in their order."""
    table = Table(title="held-out pairs after training, best accuracy first")
    for field in outcomes[0].point.values:
        table.add_column(plain(field))
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for outcome in outcomes:
        if outcome.evaluation is None:
            cells = ["stopped", *[""] * (len(COLUMNS) - 1)]
        else:
            cells = [f"{outcome.evaluation[name]:.4f}" for name in COLUMNS.values()]
        table.add_row(*map(plain, outcome.point.values.values()), *cells)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sweep; returns an exit code as `attnpo` does, 1 too if a run stopped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument(
        "--set",
        dest="axes",
        action="append",
        required=True,
        metavar="FIELD=VALUE,...",
        help="an axis of the grid; --config.FIELD=VALUE sets a field in all runs",
    )
    options, overrides = parser.parse_known_args(argv)
    unknown = [text for text in overrides if not re.match(r"--(no)?config\.", text)]
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return program.exit_code("sweep", lambda: _main(options, overrides))


def _main(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    workdir = cli.workdir_path(options.workdir)
    if processes.find(os.environ) is not None:
        raise UsageError(
            "the environment announces several processes; a sweep runs in one, which "
            "ATTNPO_DISTRIBUTED=0 makes it"
        )
    program.start_logging()
    points = grid(options.config, options.axes, overrides)
    cache.keep_compiled_programs()
    console = Console()
    outcomes = sweep(points, workdir, console)
    console.print(ranking(outcomes))
    stopped = [outcome for outcome in outcomes if outcome.stopped]
    for outcome in stopped:
        say(console, f"{outcome.point.name}: {outcome.stopped}")
    return 1 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
