"""Notice that the machine is about to be taken away: SIGTERM.

Training saves a checkpoint and ends with `Preempted`, which the command line turns into exit code
75 (`EX_TEMPFAIL` of sysexits.h: try again later); started again, the same command continues. A
process that SIGTERM killed before it could save has 143 instead.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


class Preempted(RuntimeError):
    """The run has stopped on notice, its work is saved, and the same command continues it."""


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], bool]]:
    """Takes SIGTERM as a notice, inside of the `with` block.

    Yields:
      A function to call after every step with the number of steps done: whether to save and stop
      now. Of several processes, any one's notice stops all of them after the same step.
    """
    if jax.process_count() > 1:
        # JAX's coordination service has taken the signal over, and agrees on a step.
        yield multihost_utils.reached_preemption_sync_point
        return
    noticed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may handle signals; elsewhere they are its business.
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: noticed.set())
    try:
        yield lambda step: noticed.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
