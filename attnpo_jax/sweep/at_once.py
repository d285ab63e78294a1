"""Several runs of a sweep at a time, in processes that do one after the other: see `worker`.

Imports serve all runs of a process, and compiled programs those that differ in their seed alone. A
process that ends while it is at a run has lost that run alone; another one goes on with the rest.
All end with this one, also where it is killed: what they are told comes through a pipe, whose end
they see.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import selectors
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from attnpo_jax.parallel import preemption
from attnpo_jax.runtime.errors import Preempted

# The log is begun before anything is imported that would begin one of its own.
_CODE = """
import sys
from attnpo_jax.runtime import program
program.start_logging()
from attnpo_jax.sweep import worker
sys.exit(worker.main())
"""
_COMMAND = [sys.executable, "-c", _CODE]
_POLL_SECONDS = 0.2
# Of an accelerator's memory, what JAX takes at once of itself is three quarters.
_MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"

Ended = Callable[[str, str | None, int | None], None]


@dataclasses.dataclass(frozen=True)
class Task:
    """What one of the processes is to do.

    Attributes:
      name: see `worker`.
      log: the file that what it prints is added to; its folder is made if need be.
      kind: tasks of one kind have programs in common: where one process has compiled them, the
        next one finds them.
    """

    name: str
    log: pathlib.Path
    kind: str = ""


class _Process:
    """A process at work.

    Args:
      setup: what it reads first, see `worker.main`.
      log: what it says before its first task.
      share: how many such processes there may be.
    """

    def __init__(self, setup: Mapping[str, Any], log: pathlib.Path, share: int):
        self.task: Task | None = None
        log.parent.mkdir(parents=True, exist_ok=True)
        # Each is alone, whatever the environment says of a task that this process is.
        environment = os.environ | {"ATTNPO_DISTRIBUTED": "0"}
        environment.setdefault(_MEMORY, f"{0.9 / share:.3f}")
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                _COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                # Ctrl-C is for this process, which tells them itself, once.
                start_new_session=True,
            )
        self._tell(setup)

    @property
    def answers(self) -> Any:
        """Where it says what came of its task: a line of JSON each."""
        return self._process.stdout

    def begin(self, task: Task) -> None:
        """Has it do a task."""
        self.task = task
        self._tell({"task": task.name, "log": os.fspath(task.log)})

    def _tell(self, what: Mapping[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, which its answers tell
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()

    def tell_to_stop(self) -> None:
        """Has it save what it does, and end."""
        self._process.terminate()

    def has_ended(self, told: bool = False) -> int:
        """Waits for its end, which it comes to unless it has something to do; its exit code.

        Args:
          told: whether it was told to stop.
        """
        if not told:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        with self._process:
            return self._process.wait()


def run_all(
    setup: Mapping[str, Any],
    tasks: Sequence[Task],
    most: int,
    ended: Ended,
    first: str | None = None,
) -> None:
    """Has processes do tasks, some at a time, until all are done.

    Args:
      setup: of the processes, see `worker.main`.
      tasks: by and large in this order.
      most: how many are done at a time.
      ended: called with a task's name, why it failed (None if it did not), and the exit code of
        its process if that ended in the midst of it. What it raises ends the processes.
      first: the name of the first task if it must be done before any other begins.

    Raises:
      Preempted: SIGTERM or Ctrl-C came; the processes were told to stop, and have ended.
    """
    waiting = list(tasks)
    with contextlib.ExitStack() as stack:
        told_to_stop = stack.enter_context(preemption.watch())
        at_work = stack.enter_context(selectors.DefaultSelector())
        stack.enter_context(_ended_with(at_work))
        while waiting or at_work.get_map():
            limit = 1 if first is not None else most
            while waiting and len(at_work.get_map()) < limit:
                task = _taken(waiting, at_work)
                process = _Process(setup, task.log, most)
                at_work.register(process.answers, selectors.EVENT_READ, process)
                process.begin(task)
            for key, _ in at_work.select(_POLL_SECONDS):
                process, task = key.data, key.data.task
                answer = process.answers.readline()
                goes_on = bool(answer and waiting)
                if not goes_on:
                    at_work.unregister(process.answers)
                code = None if goes_on else process.has_ended()
                if answer:
                    ended(task.name, json.loads(answer)["failed"], None)
                else:
                    ended(task.name, "", code)
                first = None if task.name == first else first
                if goes_on:
                    process.begin(_taken(waiting, at_work, task.kind))
            if told_to_stop():
                raise Preempted(
                    "told to stop: what runs had done is saved; the same command goes on from there"
                )


def _taken(waiting: list[Task], at_work: selectors.BaseSelector, kind: str = "") -> Task:
    """Takes the next task: of this kind, or else of one that no process is at, or else the first.

    So that two processes do not compile the same programs at the same time.
    """
    under_way = {key.data.task.kind for key in at_work.get_map().values()}
    choices = (lambda task: task.kind == kind, lambda task: task.kind not in under_way)
    found = (task for choice in choices for task in waiting if choice(task))
    task = next(found, waiting[0])
    waiting.remove(task)
    return task


@contextlib.contextmanager
def _ended_with(at_work: selectors.BaseSelector) -> Iterator[None]:
    """Tells those that still work to stop when the block ends, and waits for them to save."""
    try:
        yield
    finally:
        processes = [key.data for key in at_work.get_map().values()]
        for process in processes:
            process.tell_to_stop()
        for process in processes:
            process.has_ended(told=True)


def setup_of(
    config: pathlib.Path, workdir: pathlib.Path, options: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """What processes read first; `options` are `axes` and `variants`."""
    level = logging.getLevelName(logging.getLogger("attnpo_jax").getEffectiveLevel())
    paths = {"config": os.fspath(config), "workdir": os.fspath(workdir)}
    return paths | {"level": level} | {name: list(value) for name, value in options.items()}
