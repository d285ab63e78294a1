"""Notice to stop: SIGTERM, since the machine is about to be taken away, or Ctrl-C.

Training saves a checkpoint, preparing leaves the shard under way, and both end with `Preempted`,
which the command line turns into exit code 75 (`EX_TEMPFAIL` of sysexits.h: try again later), or
130 after Ctrl-C; started again, the same command continues. A process that SIGTERM killed before it
could do so has 143 instead. One with nothing to save yet, as while it compiles its first step, ends
within seconds; see `runtime.interrupts`.

Of several processes, JAX's coordination service takes SIGTERM over: it tells all of them of any
one's notice. Ctrl-C is handed to it as SIGTERM.
"""

import contextlib
import dataclasses
import itertools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the coordination service's key-value store has no public name
from jax.experimental import multihost_utils

from attnpo_jax.runtime import interrupts

# Where the service's preemption manager writes that a process has had notice.
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"


@contextlib.contextmanager
def watch() -> Iterator[Callable[[], bool]]:
    """Takes SIGTERM and the first SIGINT as a notice, inside of the `with` block.

    Notice that nobody was told of by the end of the block is handed on then, to whatever handles
    the signal outside.

    Yields:
      A function that says whether this process, or another one of the run, has had notice. Some
      may be told a moment before others are: see `agreed` and `watch_steps`.
    """
    if jax.process_count() > 1:
        yield _service_has_notice
        return
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may handle signals; elsewhere they are its business.
        yield lambda: False
        return
    noticed: list[int] = []
    told = threading.Event()

    def preempted() -> bool:
        if noticed:
            told.set()
        return told.is_set()

    def notice(number: int, frame: Any) -> None:
        again = interrupts.note() if number == signal.SIGINT else False
        if again and callable(outside[number]):
            outside[number](number, frame)  # the second one is not for us
        noticed.append(number)

    # Where SIGINT is ignored, as in the background of a script, it stays so.
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    numbers = (signal.SIGTERM,) if ignored else (signal.SIGTERM, signal.SIGINT)
    outside: dict[int, Any] = {}
    interrupts.forget()
    for number in numbers:
        # None stands for a handler that Python did not install and can't install again.
        outside[number] = signal.getsignal(number) or signal.SIG_DFL
        signal.signal(number, notice)
    try:
        yield preempted
    finally:
        for number, handler in outside.items():
            signal.signal(number, handler)
    # An error that ends the block ends the program's work as well.
    if noticed and not told.is_set():
        number = noticed[0]
        if callable(outside[number]):
            outside[number](number, None)
        else:
            signal.raise_signal(number)


def take_interrupts() -> None:
    """Has Ctrl-C do what SIGTERM does to this process of several, from here on."""
    interrupts.leave_to_others()

    def hand_over(number: int, _: Any) -> None:
        interrupts.note()
        signal.raise_signal(signal.SIGTERM)

    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, hand_over)


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
