"""Measurements run in processes of their own, so that each has its own peak of resident memory.

A worker sets itself up, says that it is ready, and then does one repeat whenever it is told to; so
two workers can take turns. Standard library alone: peers run without this package's dependencies.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Workload(Protocol):
    """What a worker measures. `info` says what a repeat does; `repeat` does it and times it."""

    info: dict[str, Any]

    def repeat(self) -> dict[str, Any]: ...


class WorkerFailed(RuntimeError):
    """A worker ended before it had answered; the message holds the end of what it printed."""


def serve(workloads: Mapping[str, Callable[[dict[str, Any]], Workload]]) -> None:
    """A worker's main function: `python -m MODULE NAME SPEC`, the spec as JSON."""
    # Libraries print to standard output, which is the channel of the answers: send them elsewhere.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(message: Mapping[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")

    name, spec = sys.argv[1:]
    workload = workloads[name](json.loads(spec))
    answer(workload.info)
    for _ in sys.stdin:
        answer(workload.repeat())
    answer({"peak_resident_bytes": peak_resident_bytes()})


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident.

    `getrusage` counts what the parent had when it started this process as well; Linux knows better.
    """
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, with the checkout first on the module path."""
    path = os.environ.get("PYTHONPATH")
    paths = [str(ROOT), *([path] if path else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **changes}


class Worker:
    """The parent's end: starts a worker and waits until it is ready.

    Args:
      module: what to run.
      name: which of the module's workloads.
      spec: what it is to do, as JSON.
      log: file for what the worker prints.
      python: the interpreter.

    Raises:
      WorkerFailed: it ended before it was ready.
    """

    def __init__(
        self,
        module: str,
        name: str,
        spec: Mapping[str, Any],
        *,
        log: pathlib.Path,
        python: str = sys.executable,
    ):
        self._name = f"{module} {name}"
        self._log = log
        with log.open("wb") as printed:
            self._process = subprocess.Popen(
                [python, "-m", module, name, json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                text=True,
                env=environment(),
                cwd=ROOT,
            )
        self.info = self._answer()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()

    def repeat(self) -> dict[str, Any]:
        """One repeat's figures."""
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed() from None
        return self._answer()

    def finish(self) -> dict[str, Any]:
        """Ends the worker: its peak of resident memory."""
        self._process.stdin.close()
        last = self._answer()
        self._process.wait()
        return last

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise self._failed()
        return json.loads(line)

    def _failed(self) -> WorkerFailed:
        code = self._process.wait()
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
        return WorkerFailed(f"{self._name} ended with code {code}:\n{tail}")
