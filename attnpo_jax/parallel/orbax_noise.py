"""What Orbax prints of a failed write beside raising it: hundreds of lines of traceback.

Each of its threads logs the failure that it hands on; asyncio logs the tasks of the other arrays,
which nobody waits for once one has failed; and TensorStore, when it is through with those, finds
their event loop closed. `parallel.checkpoint` raises what failed, once.
"""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

_FAILED_WRITE = "Error writing"  # TensorStore's words


@functools.cache
def silence() -> None:
    """Leaves that out from here on; everything else is logged and printed as before."""
    logging.getLogger("absl").addFilter(lambda record: not _is_handed_on(record))
    logging.getLogger("asyncio").addFilter(lambda record: not _is_left_behind(record))
    sys.unraisablehook = functools.partial(_show_others, sys.unraisablehook)


def _is_handed_on(record: logging.LogRecord) -> bool:
    """Whether Orbax logs an exception, which it raises as well."""
    from_orbax = "/orbax/checkpoint/" in record.pathname.replace("\\", "/")
    return from_orbax and record.levelno >= logging.ERROR and bool(record.exc_info)


def _is_left_behind(record: logging.LogRecord) -> bool:
    """Whether asyncio logs that nobody asked a task of TensorStore for its failure."""
    error = record.exc_info[1] if record.exc_info else None
    return isinstance(error, ValueError) and _FAILED_WRITE in str(error)


def _show_others(show: Callable[[Any], None], unraisable: Any) -> None:
    """Hands on what could not be raised, but for TensorStore's late news of a write."""
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        show(unraisable)
