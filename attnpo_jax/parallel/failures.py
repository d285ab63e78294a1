"""What a process of a run of several does when it, or another one, fails: it says why, and ends.

A process that fails leaves its reason in the coordination service's key-value store, where the
others look once a second: they repeat it and end. One that dies without a word (SIGKILL, a machine
that is gone) is missed by whoever computes with it, or by the service after
`processes.HEARTBEAT_SECONDS`, which then ends all others with a message of its own.
"""

import atexit
import os
import re
import sys
import threading
import time
import traceback

import jax
from jax._src import distributed  # the coordination service's key-value store has no public name

_FOLDER = "attnpo_jax/failed/"
POLL_SECONDS = 1
# How long a process that fails stays for the others to learn why.
STAY_SECONDS = 3
# How long one that misses another looks for that one's reason.
LOOK_SECONDS = 3
# What JAX, Gloo, NCCL and the coordination service say of a partner that is gone.
_LOST = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|[Hh]eartbeat|Socket closed|Barrier failed|"
    r"tasks? .*unhealthy|remote process|NCCL.*remote|^UNAVAILABLE:",
)

_ending = threading.Lock()


def watch(program: str = "attnpo") -> None:
    """Starts to look for failures of the others, and ends this process with code 1 for one.

    Args:
      program: the name in front of the message.
    """
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(POLL_SECONDS):
            if reasons := _reasons():
                _end(_ends_too(program, "; ".join(reasons)), code=1)

    thread = threading.Thread(target=look, name="failures of others", daemon=True)
    thread.start()

    def no_more() -> None:
        stop.set()
        thread.join()

    # Before JAX's own farewell, which takes the store away.
    atexit.register(no_more)


def fail(program: str, error: BaseException, *, expected: bool, code: int = 1) -> None:
    """Ends this process for an error, and with it the run; does not return.

    Waiting for the others at the end, as Python would, could take as long as they live.

    Args:
      program: the name in front of the message.
      error: what happened.
      expected: whether its message alone says what to mend; otherwise its traceback is shown.
      code: the exit code.
    """
    if not is_loss(error):
        if not expected:
            traceback.print_exception(error)
        _end(f"{program}: error: {error}", code, tell=f"{_who()} failed: {_first_line(error)}")
    deadline = time.monotonic() + LOOK_SECONDS
    while not (reasons := _reasons()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS / 4)
    if not reasons:
        traceback.print_exception(error)  # all there is to go by
    lost = f"another process of this run is gone without a word ({_first_line(error)})"
    tell = None if reasons else f"{_who()} found that {lost}"
    _end(_ends_too(program, "; ".join(reasons) or lost), code, tell)


def is_loss(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    return isinstance(error, jax.errors.JaxRuntimeError) and bool(_LOST.search(str(error)))


def _end(message: str, code: int, tell: str | None = None) -> None:
    """Prints a message, leaves the others a reason if there is one to tell, and ends at once."""
    with _ending:  # to the very end: whoever comes second has nothing to add
        print(message, file=sys.stderr, flush=True)
        if tell is not None:
            try:
                key = f"{_FOLDER}{jax.process_index()}"
                distributed.global_state.client.key_value_set(key, tell)
                time.sleep(STAY_SECONDS)
            except jax.errors.JaxRuntimeError as error:
                print(f"the others can't be told why: {_first_line(error)}", file=sys.stderr)
        if jax.process_index() == 0:
            # JAX aborts those that are still there when the service goes with this process.
            time.sleep(2 * POLL_SECONDS if tell is not None else STAY_SECONDS + 2 * POLL_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ends_too(program: str, reason: str) -> str:
    return f"{program}: error: {reason}; {_who()} ends too"


def _who() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


def _reasons() -> list[str]:
    """What other processes have left, in their order; nothing where the service is gone."""
    try:
        found = distributed.global_state.client.key_value_dir_get(_FOLDER)
    except jax.errors.JaxRuntimeError:
        return []  # JAX's own watch ends this process
    mine = str(jax.process_index())
    return [reason for key, reason in sorted(found) if key.rpartition("/")[2] != mine]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: " + str(error).strip().partition("\n")[0]
