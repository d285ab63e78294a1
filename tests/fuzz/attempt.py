"""One input, read with a limit of time and memory; what comes of it."""

import contextlib
import dataclasses
import pathlib
import resource
import signal
import traceback
from collections.abc import Iterator

from attnpo_jax.runtime.errors import UserError
from tests.fuzz.targets import Files, Target, read

SECONDS = 5.0
# Beyond what the process has; a file of a few kilobytes is to take far less.
MEMORY = 4 << 30


class TooLong(BaseException):
    """An input took longer than `SECONDS`. Nothing that is read catches it."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """An input that ended in something else than a result or a message.

    Attributes:
      error: its type, and its first words.
      place: the innermost line of the package.
    """

    error: str
    place: str


def attempt(target: Target, files: Files) -> Failure | None:
    """What is wrong with how a target reads an input; None if it holds."""
    try:
        with _limits():
            read(target, files)
    except (UserError, OSError):
        return None
    except (Exception, TooLong) as error:
        frames = [
            f"{pathlib.Path(*pathlib.Path(f.filename).parts[-3:])}:{f.lineno}"
            for f in traceback.extract_tb(error.__traceback__)
            if "attnpo_jax" in pathlib.Path(f.filename).parts
            or "/attnpo_jax/" in f.filename
            and "site-packages" not in f.filename
        ]
        return Failure(f"{type(error).__name__}: {str(error)[:80]}", frames[-1] if frames else "")
    return None


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    def late(*_):
        raise TooLong(f"{SECONDS:g} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    in_use = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, hard))
    # Again and again, since a callback that it is raised in may swallow it.
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
