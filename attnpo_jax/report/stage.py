"""`attnpo report`: what came of a run, or of several, as one page."""

import contextlib
import logging
import os
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

import attnpo_jax
from attnpo_jax import config as config_lib
from attnpo_jax.report import runs, sections
from attnpo_jax.report.material import Material, digest
from attnpo_jax.report.runs import Source
from attnpo_jax.report.token_view import token_view
from attnpo_jax.runtime import atomic
from attnpo_jax.runtime.errors import UsageError, UserError
from attnpo_jax.runtime.printable import say

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)

FILE = "report.html"
_PAIRS_IN_TERMINAL = 5

_Source = "Run | str | os.PathLike"


def report(
    run_or_workdirs: "_Source | Sequence[_Source]",
    *,
    out: str | os.PathLike | None = None,
    pairs: int | None = None,
    run_plugins: bool = False,
    console: Console | None = None,
) -> pathlib.Path:
    """Writes the page of a run, or of several side by side.

    Args:
      run_or_workdirs: a run, or its workdir, or the workdir of a sweep; or several of these.
      out: the page's file. None: `report.html` of the workdir, of several of the folder that all
        are in.
      pairs: how many are shown token by token, at most; None: as `config.report.pairs` says.
      run_plugins: whether Python files that a workdir names as plugins are run; in workdirs of
        others, they are programs of others.
      console: where the page's path goes; None for standard output.

    Returns:
      The page's file.

    Raises:
      UsageError: a folder is no run's, or names plugins that are not to be run.
      LockedError: another run writes to the workdir, and `out` is None.
      OSError: the page can't be written; one from before stays.
    """
    several = isinstance(run_or_workdirs, (list, tuple))
    given = list(run_or_workdirs) if several else [run_or_workdirs]
    found = runs.sources(given, run_plugins=run_plugins)
    if not found:
        raise UsageError(f"{given[0]}: a sweep without any run; accepted: one with runs")
    path = pathlib.Path(out).expanduser() if out is not None else _place(given, found)
    most = found[0].run.config.report.pairs if pairs is None else pairs
    own = out is None and len(found) == 1
    with found[0].run.writing() if own else contextlib.nullcontext():
        is_new = _write(found, path, most)
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    say(console or Console(), f"report: {path} ({size}{'' if is_new else ', as it was before'})")
    return path


def _place(given: Sequence[Any], found: Sequence[Source]) -> pathlib.Path:
    """Where the page goes: to the one folder that is named, or the one that all are in."""
    if len(given) == 1:
        is_path = isinstance(given[0], (str, os.PathLike))
        return pathlib.Path(given[0]).expanduser() / FILE if is_path else given[0].workdir / FILE
    folders = [os.path.realpath(source.run.workdir) for source in found]
    return pathlib.Path(os.path.commonpath([os.path.dirname(folder) for folder in folders])) / FILE


def _write(found: Sequence[Source], path: pathlib.Path, most: int) -> bool:
    """Writes the page; whether another one was there, or none."""
    options = [(one.name, one.group, one.failed, one.run.config.report.policy) for one in found]
    whole = [attnpo_jax.__version__, most, *options]
    made_of = digest([source.run for source in found], whole)
    if _made_of(path) == made_of:
        return False
    if len(found) == 1:
        content = sections.of_run(Material.read(found[0].run), most, made_of)
    else:
        content = sections.of_runs(runs.members(found), most, made_of)
    atomic.write_atomically(path, content)
    return True


def _made_of(path: pathlib.Path) -> str | None:
    """The digest of what a page shows; None where there is no page."""
    try:
        with path.open("rb") as file:
            head = file.read(4000)
    except OSError:
        return None
    found = re.search(rb'<meta name="made-of" content="([0-9a-f]{64})">', head)
    return found and found[1].decode()


def command(
    run: "Run",
    *,
    workdirs: Sequence[str] = (),
    out: str | None = None,
    pairs: int | None = None,
    tokens: bool = False,
    weighting: str | None = None,
    run_plugins: bool = False,
    console: Console | None = None,
) -> None:
    """What `attnpo report` does.

    Args:
      run: of the command line's config and workdir; of neither where `workdirs` names others.
      workdirs: folders of runs.
      out, pairs, run_plugins, console: as for `report`.
      tokens: whether some pairs' weights are shown, and no page is written.
      weighting: of these; None for the run's own.

    Raises:
      UsageError: no workdir is named, or twice; options that do not go together.
    """
    if bool(workdirs) == (run.workdir is not None):
        raise UsageError(
            "report needs WORKDIR, the folder of a run; or --config=FILE --workdir=DIR"
        )
    if workdirs and config_lib.diff(config_lib.default_config(), run.config):
        raise UsageError("report WORKDIR has its config from there; accepted: --workdir=WORKDIR")
    given = [*workdirs] or [run]
    if not tokens:
        if weighting is not None:
            raise UsageError("--weighting is of --tokens; the page can show all weightings")
        report(given, out=out, pairs=pairs, run_plugins=run_plugins, console=console)
        return
    if len(given) > 1 or out is not None:
        raise UsageError("--tokens takes one WORKDIR, and no --out")
    most = _PAIRS_IN_TERMINAL if pairs is None else pairs
    (source,) = runs.sources(given, run_plugins=run_plugins)
    (console or Console()).print(token_view(source.run, weighting=weighting, pairs=most))


def at_end(run: "Run", *, of_sweep: bool = False) -> pathlib.Path | None:
    """The page that a run or a sweep ends with, where its config wants one.

    Whatever goes wrong with it is told in a line of warning: what was done is done. By the first
    process alone, which holds the workdir.

    Args:
      run: the run, or what all runs of the sweep have in common.
      of_sweep: whether its workdir is a sweep's.
    """
    if not run.config.report.enabled:
        return None
    try:
        return report(run.workdir if of_sweep else run, console=Console(quiet=True))
    except Exception as error:
        told = str(error) if isinstance(error, (UserError, OSError)) else repr(error)
        _LOG.warning("no report was written: %s", " ".join(told.split()))
        return None
