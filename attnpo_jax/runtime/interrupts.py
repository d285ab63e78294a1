"""Ctrl-C and SIGTERM in a program: it ends soon, with its work saved if there is any.

The first Ctrl-C is for whoever is at work, the second ends the process at once. Python runs a
signal's handler between two steps of its main thread, which may be minutes away while that thread
compiles or reads. So a thread of its own hears of every signal as it comes, says what happens now,
and ends the process at the second SIGINT, or, as long as nothing would be lost, some seconds after
the first signal of either kind. The process's locks go with it.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from attnpo_jax.runtime import exit_codes, lock

# What comes sooner is the same Ctrl-C: some launchers pass on what the terminal has sent already.
AGAIN_SECONDS = 0.5

# What a process with nothing to save has to end by itself, once it was told to stop.
GRACE_SECONDS = 5.0

_first: float | None = None
_saving = 0  # how many `work_to_save` blocks are open
_handed_over = 0  # how many `handed_over` blocks are open


def came() -> bool:
    """Whether this program has had a SIGINT."""
    return _first is not None


def note() -> bool:
    """Takes note of a SIGINT, in a handler that lets the program go on for a while.

    Returns:
      Whether it is a second one.
    """
    global _first
    now = time.monotonic()
    if _first is None:  # without a lock: a handler may interrupt another one
        _first = now
    return now - _first > AGAIN_SECONDS


def forget() -> None:
    """Has the next SIGINT be the first."""
    global _first
    _first = None


def terminate(number: int, frame: Any) -> None:
    """Handles SIGTERM as the system does, and gives back what this process holds before."""
    lock.release_all()
    # Python lets the main thread alone set handlers.
    ctypes.CDLL(None).signal(signal.SIGTERM, 0)
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def work_to_save() -> Iterator[None]:
    """Has the process take its time to save, after a signal, inside of the `with` block."""
    global _saving
    _saving += 1
    try:
        yield
    finally:
        _saving -= 1


@contextlib.contextmanager
def handed_over() -> Iterator[None]:
    """Leaves every Ctrl-C to the program's own handler inside of the `with` block."""
    global _handed_over
    _handed_over += 1
    try:
        yield
    finally:
        _handed_over -= 1


def leave_to_others() -> None:
    """Has this process, one of several, never end before all have agreed to."""
    global _saving
    _saving += 1


@contextlib.contextmanager
def watched(program: str) -> Iterator[None]:
    """Ends the process, with 130, at the second SIGINT inside of the `with` block, and at a SIGTERM
    by which it would end anyhow.

    The first one, and SIGTERM, are handled as they were before. If SIGINT is not handled in
    Python's way, by a KeyboardInterrupt, a line on stderr says that the work is being saved.
    Without work to save (`work_to_save`), a process that is still there after `GRACE_SECONDS` is
    ended with 130 after SIGINT, 75 after SIGTERM.

    Args:
      program: its name, for the messages.
    """
    forget()
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's business
        return
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    ends_by_sigterm = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ends_by_sigterm:
        signal.signal(signal.SIGTERM, terminate)
    thread = threading.Thread(target=_listen, args=(reads, program), daemon=True, name="Ctrl-C")
    thread.start()
    try:
        yield
    finally:
        if ends_by_sigterm and signal.getsignal(signal.SIGTERM) is terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(before)
        os.close(writes)
        thread.join()
        os.close(reads)


def _listen(reads: int, program: str) -> None:
    said = False
    due: float | None = None  # when the process ends that has nothing to save
    code = exit_codes.PREEMPTED
    while True:
        wait = None if due is None else max(0.0, due - time.monotonic())
        if not select.select([reads], [], [], wait)[0]:
            if not _saving:
                _end(f"{program}: stopped, with nothing to save", code)
            due = None  # what there is to save by now ends the process when it is saved
            continue
        numbers = os.read(reads, 64)
        if not numbers:
            return
        if _handed_over:
            numbers = bytes(number for number in numbers if number != signal.SIGINT)
        if signal.SIGTERM in numbers and signal.getsignal(signal.SIGTERM) is terminate:
            terminate(signal.SIGTERM, None)
        if due is None and not _saving and {signal.SIGINT, signal.SIGTERM} & {*numbers}:
            due = time.monotonic() + GRACE_SECONDS
            code = exit_codes.INTERRUPTED if signal.SIGINT in numbers else exit_codes.PREEMPTED
        if signal.SIGINT not in numbers:
            continue
        # The main thread's handler may have run, and be gone again, by now.
        handled = came() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        if note():
            _end(f"{program}: interrupted", exit_codes.INTERRUPTED)
        if handled and not said:
            said = True
            text = "stops as soon as its work is saved; Ctrl-C again ends it at once"
            sys.stderr.write(f"{program}: {text}\n")
            sys.stderr.flush()


def _end(message: str, code: int) -> None:
    # A bar of progress may have hidden the cursor, and its lock may never be free.
    cursor = "\x1b[?25h\n" if os.isatty(2) else ""
    os.write(2, f"{cursor}{message}\n".encode())
    lock.release_all()
    os._exit(code)
