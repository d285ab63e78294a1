"""Several runs of a sweep at a time, each in a process of its own."""

import collections
import contextlib
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from attnpo_jax.parallel import preemption
from attnpo_jax.runtime.errors import Preempted

_POLL_SECONDS = 0.2


def attnpo(*arguments: str) -> list[str]:
    """The command line of another attnpo."""
    return [sys.executable, "-m", "attnpo_jax.cli", *arguments]


def run_all(
    commands: Mapping[pathlib.Path, Sequence[str]],
    most: int,
    ended: Callable[[pathlib.Path, int], None],
) -> None:
    """Runs commands, some at a time, until all have ended.

    Args:
      commands: by the file that what each prints is added to; the folder is made if need be.
      most: how many run at a time.
      ended: called with a command's file and exit code.

    Raises:
      Preempted: SIGTERM or Ctrl-C came; the commands were told to stop, and have ended.
    """
    waiting = collections.deque(commands.items())
    running: dict[pathlib.Path, subprocess.Popen] = {}
    with preemption.watch() as told_to_stop, _ended_with(running):
        while waiting or running:
            while waiting and len(running) < most:
                log, command = waiting.popleft()
                running[log] = _start(command, log)
            time.sleep(_POLL_SECONDS)
            for log, process in list(running.items()):
                if process.poll() is not None:
                    del running[log]
                    ended(log, process.returncode)
            if told_to_stop():
                raise Preempted(
                    "told to stop: what runs had done is saved; the same command goes on from there"
                )


def _start(command: Sequence[str], log: pathlib.Path) -> subprocess.Popen:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            # Each is alone, whatever the environment says of a task that this process is.
            env=os.environ | {"ATTNPO_DISTRIBUTED": "0"},
            # Ctrl-C is for this process, which tells them itself, once.
            start_new_session=True,
        )


@contextlib.contextmanager
def _ended_with(running: Mapping[pathlib.Path, subprocess.Popen]) -> Iterator[None]:
    """Tells those that still run to stop when the block ends, and waits for them to save."""
    try:
        yield
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
