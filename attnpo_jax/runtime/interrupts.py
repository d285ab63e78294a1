"""Ctrl-C in a program: the first is for whoever is at work, the second ends the process at once.

Python runs a signal's handler between two steps of its main thread, which may be minutes away while
that thread compiles. So a thread of its own hears of every SIGINT as it comes, says what happens
now, and ends the process at the second. It ends it at a SIGTERM too that nobody saves work for: the
process's locks go with it.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from attnpo_jax.runtime import exit_codes, lock

# What comes sooner is the same Ctrl-C: some launchers pass on what the terminal has sent already.
AGAIN_SECONDS = 0.5

_first: float | None = None


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
def watched(program: str) -> Iterator[None]:
    """Ends the process, with 130, at the second SIGINT inside of the `with` block, and at a SIGTERM
    by which it would end anyhow.

    The first one is handled as it was before. If that is not Python's way, a KeyboardInterrupt, a
    line on stderr says that the work is being saved.

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
    while numbers := os.read(reads, 64):
        if signal.SIGTERM in numbers and signal.getsignal(signal.SIGTERM) is terminate:
            terminate(signal.SIGTERM, None)
        if signal.SIGINT not in numbers:
            continue
        # The main thread's handler may have run, and be gone again, by now.
        handled = came() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        if note():
            # A bar of progress may have hidden the cursor, and its lock may never be free.
            cursor = "\x1b[?25h\n" if os.isatty(2) else ""
            os.write(2, f"{cursor}{program}: interrupted\n".encode())
            lock.release_all()
            os._exit(exit_codes.INTERRUPTED)
        if handled and not said:
            said = True
            text = "stops as soon as its work is saved; Ctrl-C again ends it at once"
            sys.stderr.write(f"{program}: {text}\n")
            sys.stderr.flush()
