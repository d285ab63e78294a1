"""What a process of a run of several does when it, or another one, fails: it says why, and ends.

A process that fails leaves its reason in the coordination service's key-value store, where the
others look once a second: they repeat it and end. One that dies without a word (SIGKILL, a machine
that is gone) is missed by whoever computes with it, or by the service after
`processes.HEARTBEAT_SECONDS`; the service itself, which process 0 hosts, is missed at once.

For what the service misses, or when it is gone, JAX's client prints a long line and aborts its
process; it can be given no callback in Python (jaxlib does not convert the status that it would be
called with). So abort() is held up for a few seconds, and a thread that sees it under way adds a
line that can be read and ends the process with code 76. Seeing it takes Linux's /proc; elsewhere
JAX's line and SIGABRT are the end, those seconds later.

The exit code of all is that of the one that has failed and said why, 1 mostly: starting again fails
again. It is 76 on all that are left where one is gone without a word: starting again is the cure.
"""

import atexit
import ctypes
import functools
import logging
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping

import jax
from jax._src import distributed  # the coordination service's key-value store has no public name

from attnpo_jax.parallel import preemption, processes
from attnpo_jax.runtime import exit_codes, lock
from attnpo_jax.runtime import program as programs
from attnpo_jax.runtime.printable import printable

_FOLDER = "attnpo_jax/failed/"
_KIND = "failed"  # as what reasons are signed
POLL_SECONDS = 1
# How long a process that fails stays for the others to learn why.
STAY_SECONDS = 3
# How long one that misses another looks for that one's reason.
LOOK_SECONDS = 3
# An abort waits for as many seconds as SIGABRT has for a number, 6: `sleep` is its handler. To see
# it, to ask whether process 0 is there, and to stay for the others takes less.
ABORT_POLL_SECONDS = 0.5
PROBE_SECONDS = 2
# What JAX, Gloo, NCCL and the coordination service say of a partner that is gone.
_LOST = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|[Hh]eartbeat|Socket closed|Barrier failed|"
    r"tasks? .*unhealthy|remote process|NCCL.*remote|^UNAVAILABLE:"
)

_ending = threading.Lock()


def join(options: Mapping[str, str] | None = None) -> None:
    """Makes this process one of several where options or environment say so; the first speaks.

    Args:
      options: those of `attnpo_jax.parallel.processes.find` that were given.

    Raises:
      ProcessesError: see `attnpo_jax.parallel.processes.find`.
      SecretError: a process does not know the run's secret.
    """
    processes.initialize(options=options)
    if jax.distributed.is_initialized() and processes.own_count() > 1:
        meet = functools.partial(processes.barrier, "all are done")
        programs.others = programs.Others(meet, fail)
        watch()
        processes.admit()
        preemption.take_interrupts()
        if not processes.is_first():
            # What all would say, the first one says; what this one alone knows, it says itself.
            logging.getLogger("attnpo_jax").setLevel(logging.WARNING)


def watch(program: str = "attnpo") -> None:
    """Starts to look for failures of the others, and ends this process for one.

    Process 0 of several may end before the others if all goes well: JAX's farewell waits for all.
    """
    _watch_abort(program)
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(POLL_SECONDS):
            if reasons := _reasons():
                _end_with_others(program, reasons)

    thread = threading.Thread(target=look, name="failures of others", daemon=True)
    thread.start()

    def no_more() -> None:
        stop.set()
        thread.join()

    # Before JAX's own farewell, which takes the store away.
    atexit.register(no_more)


def fail(
    program: str, error: BaseException, *, expected: bool, code: int = exit_codes.FAILED
) -> None:
    """Ends this process for an error, and with it the run; does not return.

    Waiting for the others at the end, as Python would, could take as long as they live.

    Args:
      expected: whether its message alone says what to mend; otherwise its traceback is shown.
      code: the exit code, of the others too.
    """
    if not is_loss(error):
        if not expected:
            programs.show_traceback(error)
        tell = f"{_who()} failed: {_first_line(error)}"
        _end(f"{program}: error: {error}", code, tell)
    deadline = time.monotonic() + LOOK_SECONDS
    while not (reasons := _reasons()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS / 4)
    if reasons:
        _end_with_others(program, reasons)
    if not _first_is_there():
        _end(_ends_too(program, _first_is_gone()), exit_codes.LOST)
    lost = f"another process of this run is gone without a word ({_first_line(error)})"
    programs.show_traceback(error)  # all there is to go by
    _end(_ends_too(program, lost), exit_codes.LOST, f"{_who()} found that {lost}")


def is_loss(error: BaseException) -> bool:
    """Whether an error, or what it comes from, says that another process is gone."""
    # Some of Gloo's are raised as ValueErrors, when a computation of all is started.
    kinds = jax.errors.JaxRuntimeError if "Gloo" not in str(error) else (ValueError, RuntimeError)
    if isinstance(error, kinds) and _LOST.search(str(error)):
        return True
    return error.__cause__ is not None and is_loss(error.__cause__)


def _watch_abort(program: str) -> None:
    """Holds up aborts of this process, and starts to look for one; see the module's docstring."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    # Not a function of ours: what the aborting thread holds, Python might wait for without end.
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))

    def look() -> None:
        while not _is_aborting():
            time.sleep(ABORT_POLL_SECONDS)
        # The service's client waits for the aborting thread: nothing here may ask it.
        if processes.own_index() > 0 and not _first_is_there():
            message = _ends_too(program, _first_is_gone())
        else:
            message = f"{program}: error: {_who()} is aborted, for the reason said above"
        # Whoever ends this process already has said why.
        if _ending.acquire(timeout=ABORT_POLL_SECONDS):
            print(printable(message), file=sys.stderr, flush=True)
        if processes.own_index() == 0:
            time.sleep(PROBE_SECONDS)  # others ask whether it is there
            lock.release_all()
        os._exit(exit_codes.LOST)

    # To the very end: JAX's farewell may miss another process too.
    threading.Thread(target=look, name="abort of this process", daemon=True).start()


def _is_aborting() -> bool:
    """Whether one of this process's threads is in the handler of SIGABRT.

    It blocks that signal there; threads that take no signals at all block SIGTERM too.
    """
    abort, term = (1 << (number - 1) for number in (signal.SIGABRT, signal.SIGTERM))
    for status in pathlib.Path("/proc/self/task").glob("*/status"):
        try:
            blocked = re.search(r"^SigBlk:\s*(\w+)", status.read_text(), re.MULTILINE)
        except (FileNotFoundError, ProcessLookupError):
            continue  # a thread that has ended
        if blocked and int(blocked[1], 16) & (abort | term) == abort:
            return True
    return False


def _first_is_there() -> bool:
    """Whether the coordination service, which process 0 hosts, answers a connection."""
    host, _, port = distributed.global_state.coordinator_address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), PROBE_SECONDS) as connection:
            # A gRPC server speaks first. A connection alone may be to one that is being torn down.
            connection.settimeout(PROBE_SECONDS)
            return bool(connection.recv(1))
    except OSError:
        return False


def _first_is_gone() -> str:
    return f"process 0 of {processes.own_count()}, which the others meet at, is gone without a word"


def _end(message: str, code: int, tell: str | None = None) -> None:
    """Prints a message, leaves the others a reason if there is one to tell, and ends at once."""
    with _ending:  # to the very end: whoever comes second has nothing to add
        print(printable(message), file=sys.stderr, flush=True)
        if tell is not None:
            try:
                mine = processes.own_index()
                signature = processes.key.sign(_KIND, mine, f"{code} {tell}".encode())
                text = f"{signature.hex()} {code} {tell}"
                distributed.global_state.client.key_value_set(f"{_FOLDER}{mine}", text)
                time.sleep(STAY_SECONDS)
            except jax.errors.JaxRuntimeError as error:
                told = f"the others can't be told why: {_first_line(error)}"
                print(printable(told), file=sys.stderr)
        if processes.own_index() == 0:
            # JAX aborts those that are still there when the service goes with this process.
            time.sleep(2 * POLL_SECONDS if tell is not None else STAY_SECONDS + 2 * POLL_SECONDS)
        lock.release_all()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_with_others(program: str, reasons: list[tuple[int, str]]) -> None:
    """Ends at once, as others did who left these exit codes and reasons; does not return."""
    codes = [code for code, _ in reasons if code != exit_codes.LOST]
    message = _ends_too(program, "; ".join(reason for _, reason in reasons))
    _end(message, codes[0] if codes else exit_codes.LOST)


def _ends_too(program: str, reason: str) -> str:
    return f"{program}: error: {reason}; {_who()} ends too"


def _who() -> str:
    return f"process {processes.own_index()} of {processes.own_count()}"


def _reasons() -> list[tuple[int, str]]:
    """Exit codes and reasons that other processes have left, in the order of the processes.

    None where the service is gone: then JAX's own watch ends this process. What is not signed with
    the run's key is not believed.
    """
    try:
        found = distributed.global_state.client.key_value_dir_get(_FOLDER)
    except jax.errors.JaxRuntimeError:
        return []
    told = {key.rpartition("/")[2]: text for key, text in found}
    reasons = []
    for process in range(processes.own_count()):
        text = told.get(str(process))
        if text is None or process == processes.own_index():
            continue
        signature, _, said = text.partition(" ")
        if not re.fullmatch("[0-9a-f]{64}", signature):
            continue
        if processes.key.holds(_KIND, process, said.encode(), bytes.fromhex(signature)):
            code, _, reason = said.partition(" ")
            reasons.append((int(code), reason))
    return reasons


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: " + str(error).strip().partition("\n")[0]
