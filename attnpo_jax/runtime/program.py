"""What a program does around its work: it keeps a log, and ends with an exit code that tells."""

import dataclasses
import logging
import os
import sys
import traceback
from collections.abc import Callable

from attnpo_jax.runtime import disk, exit_codes, interrupts
from attnpo_jax.runtime.errors import Preempted, UsageError, UserError
from attnpo_jax.runtime.printable import Formatter, printable


@dataclasses.dataclass(frozen=True)
class Others:
    """How a process of several ends.

    Attributes:
      meet: waits until all have come as far; JAX's own farewell gives up, and ends those that work,
        after half a minute.
      fail: ends this process and tells the others why; see `attnpo_jax.parallel.failures.fail`.
    """

    meet: Callable[[], None]
    fail: Callable[..., None]


others: Others | None = None
"""Set by `attnpo_jax.parallel.failures.join`: this module, which --help needs, imports no JAX."""


def exit_code(program: str, body: Callable[[], int]) -> int:
    """Runs a program, and tells what stopped it in one message where that says what to mend.

    Args:
      program: its name, for the message.
      body: the program; returns an exit code.

    Returns:
      What `body` does, or one of `exit_codes`: 1 for an error that the user can mend (told in one
      message on stderr), 2 for a command line that cannot be understood, 75 when preparing or
      training was told to stop (SIGTERM) and its work is saved, 130 after Ctrl-C, saved or not.
      With 76, since another process of the run is gone, or at the second Ctrl-C, it does not come
      back here.

    Raises:
      Exception: whatever is neither a `UserError` nor an OSError.
    """
    with interrupts.watched(program):
        return _exit_code(program, body)


def _exit_code(program: str, body: Callable[[], int]) -> int:
    try:
        try:
            code = body()
        except Preempted as notice:
            print(printable(f"{program}: {notice}"), file=sys.stderr)
            code = exit_codes.INTERRUPTED if interrupts.came() else exit_codes.PREEMPTED
        if others:
            others.meet()
        return code
    except KeyboardInterrupt:
        error, code, told = KeyboardInterrupt("interrupted"), exit_codes.INTERRUPTED, "interrupted"
    except UsageError as raised:
        error, code = raised, exit_codes.USAGE
        told = f"error: {error}\n(see {program} --help)"
    except Exception as raised:
        error, code = raised, exit_codes.FAILED
        told = f"error: {error}" if isinstance(error, (UserError, OSError)) else None
        # Others say themselves what to do.
        if isinstance(error, OSError) and disk.shortage(error):
            told = f"{told}; {disk.REMEDY}"
    if others:
        others.fail(program, error, expected=told is not None, code=code)
    if told is None:
        raise error
    print(printable(f"{program}: {told}"), file=sys.stderr)
    return code


def start_logging(level: str = "info") -> None:
    """Lines of log on stderr: the package's own from `level` on, others' from warnings on."""
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[lines], level=logging.WARNING)
    sys.excepthook = lambda kind, error, trace: show_traceback(error)
    # That it found no PyTorch, which nothing here needs, is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # The libraries' own notes would drown ours; their warnings are wanted.
    logging.getLogger("attnpo_jax").setLevel(level.upper())


def show_traceback(error: BaseException) -> None:
    """Shows an error as Python does, made safe to print."""
    sys.stderr.write(printable("".join(traceback.format_exception(error))))
