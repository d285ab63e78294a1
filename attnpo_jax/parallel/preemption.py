"""Notice that the machine is about to be taken away: SIGTERM.

Training saves a checkpoint, preparing leaves the shard under way, and both end with `Preempted`,
which the command line turns into exit code 75 (`EX_TEMPFAIL` of sysexits.h: try again later);
started again, the same command continues. A process that SIGTERM killed before it could do so has
143 instead.

Of several processes, JAX's coordination service takes the signal over: it tells all of them of any
one's notice.
"""

import contextlib
import dataclasses
import itertools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax._src import distributed  # the coordination service's key-value store has no public name
from jax.experimental import multihost_utils

# Where the service's preemption manager writes that a process has had notice.
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"


@contextlib.contextmanager
def watch() -> Iterator[Callable[[], bool]]:
    """Takes SIGTERM as a notice, inside of the `with` block.

    Notice that nobody was told of by the end of the block is sent again then, to whatever handles
    the signal outside.

    Yields:
      A function that says whether this process, or another one of the run, has had notice. Some
      may be told a moment before others are: see `agreed` and `watch_steps`.
    """
    if jax.process_count() > 1:
        yield _service_has_notice
        return
    noticed, told = threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may handle signals; elsewhere they are its business.
        yield lambda: False
        return

    def preempted() -> bool:
        if noticed.is_set():
            told.set()
        return told.is_set()

    before = signal.signal(signal.SIGTERM, lambda *_: noticed.set())
    try:
        yield preempted
    finally:
        # None stands for a handler that Python did not install and can't install again.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
    # An error that ends the block ends the program's work as well.
    if noticed.is_set() and not told.is_set():
        signal.raise_signal(signal.SIGTERM)


@dataclasses.dataclass(frozen=True)
class Notice:
    """Whether a run has been told to stop; all of its processes ask together and hear the same."""

    after_step: Callable[[], bool]  # to call once after every training step
    # To call at other times, as often as one likes; it may wait for the other processes.
    between: Callable[[], bool]


@contextlib.contextmanager
def watch_steps(start: int) -> Iterator[Notice]:
    """As `watch`, for work that all processes do in step, with `start` steps done before."""
    if jax.process_count() > 1:
        # The service has all processes stop one step after the latest that any has told it of.
        # Orbax tells it the step of every checkpoint, so ours must be the run's steps as well.
        multihost_utils.reached_preemption_sync_point(start)
        # Notice that came before may be due at a step that is over. If nobody has seen it here,
        # it comes after all have told of `start`.
        early = agreed(_service_has_notice())
        steps = itertools.count(start + 1)
        yield Notice(
            lambda: multihost_utils.reached_preemption_sync_point(next(steps)) or early,
            lambda: agreed(_service_has_notice()),
        )
        return
    with watch() as noticed:
        yield Notice(noticed, noticed)


def agreed(stops: bool) -> bool:
    """Whether any process says that it stops; all of them must ask together."""
    return agreed_each([stops])[0]


def agreed_each(flags: Sequence[bool]) -> list[bool]:
    """For each flag, whether any process has it set; all of them must ask together."""
    if jax.process_count() == 1:
        return list(flags)
    return np.any(multihost_utils.process_allgather(np.array(flags, bool)), axis=0).tolist()


def _service_has_notice() -> bool:
    try:
        distributed.global_state.client.key_value_try_get(_NOTICE)
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("NOT_FOUND"):
            raise
        return False
    return True
