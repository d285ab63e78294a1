"""`attnpo sweep`: trains a grid of configs on one prepared dataset, and compares what comes of it.

The judge's and the reference's passes run once, into WORKDIR/prepared. Each run of the grid is one
of its own in WORKDIR/runs/NAME, with a link to that dataset.
"""

import json
import logging
import pathlib
import time
from collections.abc import Sequence

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
from attnpo_jax.sweep import results
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

_LOG = logging.getLogger(__name__)

LOG = "log.txt"
_WAIT_SECONDS = 10


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
    _check(run, points, checkpoints, baseline)
    if index is not None:
        return [_one(run, points, index, checkpoints, console)]
    if only_show:
        outcomes = [found for point in points if (found := outcome_of(run.workdir, point))]
    elif at_once > 1:
        outcomes = _in_processes(run, points, at_once, (axes, variants, checkpoints), console)
    else:
        outcomes = _in_turn(run, points, checkpoints, console)
    _show(run.workdir, outcomes, baseline or points[0].group, as_json, console)
    page = report.at_end(run, of_sweep=True) if outcomes else None
    if page and not as_json:
        say(console, f"report: {page}")
    _raise_failures(outcomes)
    return outcomes


def _check(run: Run, points: Sequence[Point], checkpoints: str, baseline: str | None) -> None:
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
    options: tuple[Sequence[str], Sequence[str], str],
    console: Console,
) -> list[Outcome]:
    workdir, (axes, variants, checkpoints) = run.workdir, options
    todo = {k: point for k, point in enumerate(points) if not _finished(workdir, point)}
    workdir.mkdir(parents=True, exist_ok=True)
    config = workdir / "config.json"
    atomic.write_atomically(config, config_lib.to_json(run.config).encode())
    common = [f"--config={config}", f"--workdir={workdir}"]
    first, *_ = to_prepare(run, points)  # the rest is left to the runs that read it
    if todo and not _is_prepared(first):
        # Not here: of an accelerator's memory, this process would keep a part.
        of_first = workdir / "prepare.json"
        atomic.write_atomically(of_first, config_lib.to_json(first.config).encode())
        command = at_once_lib.attnpo("prepare", f"--config={of_first}", f"--workdir={workdir}")
        _run_prepare(workdir, command, console)
    common += [f"--checkpoints={checkpoints}"]
    common += [f"--set={text}" for text in axes] + [f"--variant={text}" for text in variants]
    numbers = {folder_of(workdir, point) / LOG: k for k, point in todo.items()}
    codes: dict[int, int] = {}

    def ended(log: pathlib.Path, code: int) -> None:
        codes[numbers[log]] = code
        state = "done" if code == 0 else f"failed, see {log}"
        say(console, f"[{len(codes)}/{len(todo)}] {todo[numbers[log]].name}: {state}")

    commands = {
        log: at_once_lib.attnpo("sweep", *common, f"--index={k}") for log, k in numbers.items()
    }
    at_once_lib.run_all(commands, most, ended)
    outcomes = []
    for k, point in enumerate(points):
        found = outcome_of(workdir, point)
        if found is None or (codes.get(k) and not found.failed):
            log = folder_of(workdir, point) / LOG
            found = Outcome(point, failed=f"its process ended with code {codes.get(k)}, see {log}")
        remove_checkpoints(workdir, found, checkpoints)
        outcomes.append(found)
    return outcomes


def _run_prepare(workdir: pathlib.Path, command: Sequence[str], console: Console) -> None:
    log = workdir / "prepare.log"
    say(console, f"preparing, see {log}")
    codes = []
    at_once_lib.run_all({log: command}, 1, lambda _, code: codes.append(code))
    if codes != [0]:
        (*_, last) = ["", *log.read_text(errors="replace").splitlines()]
        raise UserError(f"preparing failed, see {log}; its last line: {last}")


def _show(
    workdir: pathlib.Path,
    outcomes: Sequence[Outcome],
    baseline: str,
    as_json: bool,
    console: Console,
) -> None:
    lines = compare.compare(outcomes, baseline) if outcomes else []
    if workdir.is_dir():
        results.write(workdir, outcomes, lines)
    if as_json:
        print(json.dumps([line.facts() for line in lines], indent=2), flush=True)
        return
    compare.show(console, lines, baseline)
    for outcome in outcomes:
        if outcome.failed:
            say(console, f"{outcome.point.name}: failed: {outcome.failed}")
    if outcomes:
        say(console, f"all figures in {workdir / results.CSV} and {workdir / results.JSON_LINES}")


def _raise_failures(outcomes: Sequence[Outcome]) -> None:
    failed = [outcome for outcome in outcomes if outcome.failed]
    if failed:
        first = failed[0]
        raise RunsFailed(
            f"{len(failed)} of {len(outcomes)} runs failed, the first one {first.point.name}: "
            f"{first.failed}; the same command tries them again"
        )
