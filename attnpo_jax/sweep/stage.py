"""`attnpo sweep`: trains a grid of configs on one prepared dataset, and compares what comes of it.

The judge's and the reference's passes run once, into WORKDIR/prepared. Each run of the grid is one
of its own in WORKDIR/runs/NAME, with a link to that dataset.
"""

import contextlib
import json
import logging
import pathlib
import time
from collections.abc import Mapping, Sequence

from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax import prepare, report
from attnpo_jax.evaluate import compare
from attnpo_jax.evaluate.evaluator import find
from attnpo_jax.evaluate.stage import wanted
from attnpo_jax.run import Run
from attnpo_jax.runtime import atomic
from attnpo_jax.runtime.errors import UsageError, UserError
from attnpo_jax.runtime.lock import LockedError
from attnpo_jax.runtime.printable import say
from attnpo_jax.sweep import at_once as at_once_lib
from attnpo_jax.sweep import plots, results
from attnpo_jax.sweep.grid import Point, grid
from attnpo_jax.sweep.running import (
    CHECKPOINTS,
    Outcome,
    folder_of,
    outcome_of,
    remove_checkpoints,
    run_point,
)
from attnpo_jax.sweep.shared import to_prepare
from attnpo_jax.sweep.worker import PREPARE

_LOG = logging.getLogger(__name__)

LOG = "log.txt"
_WAIT_SECONDS = 3
_MOST_LISTED = 5


class RunsFailed(UserError):
    """Runs of a sweep have failed; the others are done."""


def sweep(
    run: Run,
    *,
    axes: Sequence[str] = (),
    variants: Sequence[str] = (),
    index: int | None = None,
    at_once: int = 1,
    checkpoints: str = "keep",
    baseline: str | None = None,
    metrics: Sequence[str] = (),
    only_show: bool = False,
    as_json: bool = False,
    console: Console | None = None,
) -> list[Outcome]:
    """Prepares once, does every run that is not finished, and shows how they compare.

    Args:
      run: what all runs have in common; its workdir is the sweep's.
      axes: `field=value,value,...` each, see `grid.parse_axis`.
      variants: `name=field=value ...` each, see `grid.parse_variant`.
      index: of the only run to do, from 0; then nothing is compared.
      at_once: how many runs go on at a time; more than one have processes of their own.
      checkpoints: what finished runs keep: `keep`, `drop`, `best`.
      baseline: the group that others are held against; None for the first.
      metrics: the figures that are compared, see `compare.shown`; the first one orders the groups.
      only_show: whether nothing is done but to show what is finished.
      as_json: print lines of the comparison as JSON in place of tables.
      console: where figures go; None for standard output.

    Returns:
      What came of the runs, in the grid's order; of those that were to be done or are finished.

    Raises:
      UsageError: see `grid.grid`; no run has such an index, no group is the baseline.
      RunsFailed: at least one run failed; the others were done all the same.
      Preempted: SIGTERM or Ctrl-C came; what is done is kept.
      UserError: as `prepare.prepare` raises.
    """
    console = console or Console()
    points = grid(run.config, axes, variants)
    _check(run, points, checkpoints, baseline, metrics)
    if index is not None:
        return [_one(run, points, index, checkpoints, console)]
    if only_show:
        outcomes = [found for point in points if (found := outcome_of(run.workdir, point))]
    elif at_once > 1:
        options = {"axes": axes, "variants": variants}
        outcomes = _in_processes(run, points, at_once, checkpoints, options, console)
    else:
        outcomes = _in_turn(run, points, checkpoints, console)
    _show(run.workdir, outcomes, baseline or points[0].group, metrics, as_json, console)
    if not as_json:
        _say_what_is_missing(points, outcomes, console)
    page = report.at_end(run, of_sweep=True) if outcomes else None
    if page and not as_json:
        say(console, f"report: {page}")
    _raise_failures(outcomes)
    return outcomes


def _check(
    run: Run,
    points: Sequence[Point],
    checkpoints: str,
    baseline: str | None,
    metrics: Sequence[str],
) -> None:
    """All that can be told before anything is computed or written."""
    if checkpoints not in CHECKPOINTS:
        raise UsageError(f"--checkpoints={checkpoints}; accepted: {', '.join(CHECKPOINTS)}")
    groups = dict.fromkeys(point.group for point in points)
    if baseline is not None and baseline not in groups:
        raise UsageError(f"--baseline={baseline}; accepted: {', '.join(groups)}")
    seen: set[tuple[str, int]] = set()
    for point in points:
        if checkpoints == "best" and not point.config.train.keep_best:
            raise UsageError(
                f"--checkpoints=best: {point.name} has no config.train.keep_best; accepted: a "
                "metric there, or --checkpoints=keep or drop"
            )
        if (point.group, point.config.seed) in seen:
            raise UsageError(
                f"{point.name}: another run is called {point.group!r} and has the seed "
                f"{point.config.seed} too; accepted: names and axes that tell runs apart"
            )
        seen.add((point.group, point.config.seed))
    to_prepare(run, points)  # tells what the runs can't share
    for name in wanted(run):
        find(name)
    evaluations = dict.fromkeys(("pairs", *wanted(run)))
    for metric in metrics:
        name = metric.removeprefix("min:")
        if name != "loss" and name.partition("/")[0] not in evaluations:
            raise UsageError(
                f"--metric={metric}: no such evaluation; accepted: loss, or a figure of "
                f"{', '.join(evaluations)} (config.evaluate.names), as pairs/accuracy"
            )


def _one(run: Run, points: Sequence[Point], index: int, checkpoints: str, console: Console):
    if index >= len(points):
        raise UsageError(f"--index={index}; accepted: 0 to {len(points) - 1}")
    point = points[index]
    _prepare_or_wait(to_prepare(run, points), console)
    say(console, f"[{index} of 0 to {len(points) - 1}] {point.name}")
    outcome = _finished(run.workdir, point) or run_point(run.workdir, point)
    remove_checkpoints(run.workdir, outcome, checkpoints)
    _raise_failures([outcome])
    return outcome


def _prepare_or_wait(runs: Sequence[Run], console: Console) -> None:
    """Of several tasks, one prepares, and the others wait for it."""
    told = False
    while lacking := [run for run in runs if not _is_prepared(run)]:
        try:
            for run in lacking:
                prepare.prepare(run, console=console)
            return
        except LockedError as error:
            if not told:
                _LOG.info("waits for another task to prepare: %s", error)
            told = True
            time.sleep(_WAIT_SECONDS)


def _is_prepared(run: Run) -> bool:
    try:
        for split in run.splits:
            run.open_prepared(split)
    except FileNotFoundError:
        return False
    return True


def _finished(workdir: pathlib.Path, point: Point) -> Outcome | None:
    """What came of a run that need not be done again; one that failed is."""
    found = outcome_of(workdir, point)
    return None if found is None or found.failed else found


def _in_turn(
    run: Run, points: Sequence[Point], checkpoints: str, console: Console
) -> list[Outcome]:
    outcomes = []
    with run.writing():
        for one in to_prepare(run, points):
            if not _is_prepared(one):
                prepare.prepare(one, console=console)
        for number, point in enumerate(points, 1):
            outcome = _finished(run.workdir, point)
            if outcome is None:
                say(console, f"[{number}/{len(points)}] {point.name}")
                outcome = run_point(run.workdir, point)
                if outcome.failed:
                    say(console, f"failed: {outcome.failed}")
            remove_checkpoints(run.workdir, outcome, checkpoints)
            outcomes.append(outcome)
    return outcomes


def _in_processes(
    run: Run,
    points: Sequence[Point],
    most: int,
    checkpoints: str,
    options: Mapping[str, Sequence[str]],
    console: Console,
) -> list[Outcome]:
    workdir = run.workdir
    todo = {str(k): point for k, point in enumerate(points) if not _finished(workdir, point)}
    config = workdir / "config.json"
    with run.writing():  # what prepares, in another process, holds it next
        atomic.write_atomically(config, config_lib.to_json(run.config).encode())
    setup = at_once_lib.setup_of(config, workdir, options)
    prepares = bool(todo) and not all(map(_is_prepared, to_prepare(run, points)))
    # In another process: of an accelerator's memory, this one would keep a part.
    logs = {PREPARE: workdir / f"{PREPARE}.log"} if prepares else {}
    logs |= {task: folder_of(workdir, point) / LOG for task, point in todo.items()}
    tasks = [
        at_once_lib.Task(name, log, todo[name].group if name in todo else "")
        for name, log in logs.items()
    ]
    failures: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        if prepares:
            say(console, f"preparing, see {logs[PREPARE]}")
        else:
            stack.enter_context(run.writing())

        def ended(task: str, failed: str | None, code: int | None) -> None:
            if code is not None:
                failed = f"its process ended with code {code}, see {logs[task]}"
            if task == PREPARE:
                if failed:
                    raise UserError(f"preparing failed: {failed}")
                stack.enter_context(run.writing())
                return
            if failed:
                failures[task] = failed
            done.append(task)
            remove_checkpoints(workdir, _outcome(workdir, todo[task], failed), checkpoints)  # early
            told = f"failed: {failed}" if failed else "done"
            say(console, f"[{len(done)}/{len(todo)}] {todo[task].name}: {told}")

        done: list[str] = []
        at_once_lib.run_all(setup, tasks, most, ended, PREPARE if prepares else None)
    outcomes = [_outcome(workdir, point, failures.get(str(k))) for k, point in enumerate(points)]
    for outcome in outcomes:
        remove_checkpoints(workdir, outcome, checkpoints)
    return outcomes


def _outcome(workdir: pathlib.Path, point: Point, failed: str | None) -> Outcome:
    """What came of a run; `failed`, if it says nothing itself."""
    found = outcome_of(workdir, point)
    if found is None or (failed and not found.failed):
        return Outcome(point, failed=failed or "nothing came of it")
    return found


def _show(
    workdir: pathlib.Path,
    outcomes: Sequence[Outcome],
    baseline: str,
    metrics: Sequence[str],
    as_json: bool,
    console: Console,
) -> None:
    ranking = metrics[0] if metrics else compare.RANKING
    lines = compare.compare(outcomes, baseline, ranking) if outcomes else []
    if workdir.is_dir():
        results.write(workdir, outcomes, lines)
    names = compare.shown(lines, metrics)
    drawn = plots.write(workdir, outcomes, lines, names, baseline) if lines else None
    if as_json:
        print(json.dumps([line.facts() for line in lines], indent=2), flush=True)
        return
    compare.show(console, lines, baseline, names)
    for outcome in outcomes:
        if outcome.failed:
            say(console, f"{outcome.point.name}: failed: {outcome.failed}")
    if outcomes:
        say(console, f"all figures in {workdir / results.CSV} and {workdir / results.JSON_LINES}")
    if drawn:
        say(console, f"plots in {drawn}")


def _say_what_is_missing(
    points: Sequence[Point], outcomes: Sequence[Outcome], console: Console
) -> None:
    there = {outcome.point.name for outcome in outcomes}
    missing = [point.name for point in points if point.name not in there]
    if missing:
        listed = "; ".join(missing[:_MOST_LISTED])
        listed += f"; and {len(missing) - _MOST_LISTED} more" * (len(missing) > _MOST_LISTED)
        say(console, f"{len(missing)} of {len(points)} runs are not finished: {listed}")


def _raise_failures(outcomes: Sequence[Outcome]) -> None:
    failed = [outcome for outcome in outcomes if outcome.failed]
    if failed:
        first = failed[0]
        raise RunsFailed(
            f"{len(failed)} of {len(outcomes)} runs failed, the first one {first.point.name}: "
            f"{first.failed}; the same command tries them again"
        )
