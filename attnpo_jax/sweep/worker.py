"""A process that does runs of a sweep, one after the other, as another one tells it to.

It reads lines of JSON: first what the sweep is, then tasks, each the number of a run or `prepare`,
with the file that it is to print to; and answers each task with a line. Where the lines end in the
midst of a task, whoever sent them is gone: the task is stopped as by SIGTERM, which saves what is
done.
"""

import json
import logging
import os
import pathlib
import queue
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax import prepare
from attnpo_jax.run import Run
from attnpo_jax.runtime import cache, program
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.sweep.grid import grid
from attnpo_jax.sweep.running import run_point
from attnpo_jax.sweep.shared import to_prepare

_LOG = logging.getLogger(__name__)

PREPARE = "prepare"


def main() -> int:
    """Does what the lines of standard input say; returns an exit code."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    setup = json.loads(sys.stdin.buffer.readline() or b"null")
    return program.exit_code("attnpo", lambda: _work(setup, sys.stdin.buffer, answers))


def _work(setup: dict[str, Any] | None, lines: BinaryIO, answers: BinaryIO) -> int:
    if setup is None:
        return 0  # gone before it began
    program.start_logging(setup["level"])
    tasks = _Tasks(lines)
    run = Run.resolve(config_lib.load_config(setup["config"], []), setup["workdir"])
    cache.keep_compiled_programs()
    points = grid(run.config, setup["axes"], setup["variants"])

    def do(task: str) -> str | None:
        if task != PREPARE:
            return run_point(run.workdir, points[int(task)]).failed
        for one in to_prepare(run, points):
            prepare.prepare(one, console=Console())
        return None

    while (task := tasks.next()) is not None:
        failed = _done(do, task)
        tasks.done()
        answers.write(json.dumps({"failed": failed}).encode() + b"\n")
        answers.flush()
    return 0


def _done(do: Callable[[str], str | None], task: dict[str, Any]) -> str | None:
    """Does a task, and says why it failed, if it did. What ends the process is no failure."""
    log = pathlib.Path(task["log"])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        return do(task["task"])
    except (UserError, OSError) as error:
        _LOG.error("%s", error)
        return str(error)
    finally:
        sys.stdout.flush()


class _Tasks:
    """The tasks as they come, read by a thread; stops this process where they end too early."""

    def __init__(self, lines: BinaryIO):
        self._tasks: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._open = 0
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    def _read(self, lines: BinaryIO) -> None:
        for line in iter(lines.readline, b""):
            self._open += 1
            self._tasks.put(json.loads(line))
        self._tasks.put(None)
        if self._open:
            _LOG.warning("the sweep that this run belongs to is gone: it stops too")
            os.kill(os.getpid(), signal.SIGTERM)

    def next(self) -> dict[str, Any] | None:
        """The next task; None when there will be no other."""
        return self._tasks.get()

    def done(self) -> None:
        """Says that the last one is."""
        self._open -= 1
