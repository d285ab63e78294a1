"""One at a time in a folder: a lock file that says who has it, and shows that its owner lives.

The owner makes the file `.attnpo.lock` where there is none (O_EXCL, which network file systems keep
too), and touches it every `BEAT_SECONDS`. Whoever finds it taken judges by what can be known:

- an owner on this machine is asked for: its process lives, or is gone and its lock taken over;
- of an owner elsewhere, another machine or another container, only the beats tell. The file is
  watched until it is touched, then its owner lives; or for `EXPIRY_SECONDS`, then it is taken over.
  No two machines' clocks are compared: a lock is as old as it has been watched here.

An owner whose lock was taken over, since it was held up for that long (a suspended machine), ends
at once, before it writes anything more.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from attnpo_jax.runtime import exit_codes, json_files, schema
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.printable import printable

_LOG = logging.getLogger(__name__)

FILE = ".attnpo.lock"
BEAT_SECONDS = 10
# Processes of a run that lose the one that beats end by themselves within this time.
EXPIRY_SECONDS = 60
_POLL_SECONDS = 0.5

_PROCESS = {
    "host": schema.Text(),
    "machine": schema.Text(),
    "pid": schema.Whole(1),
    "started": schema.Maybe(schema.Whole()),
}
_OWNER = schema.Table(
    {
        "token": schema.Text("[0-9a-f]{32}"),
        "processes": schema.Listed(schema.Table(_PROCESS)),
        "command": schema.Text(),
        "since": schema.Text(),
    }
)
PROCESS = schema.Table(_PROCESS)
"""The form of what `this_process` returns."""

_held: dict[pathlib.Path, "Lock"] = {}  # by its file


class LockedError(UserError):
    """Another run writes to the folder."""


def this_process() -> dict[str, Any]:
    """What tells this process from others, on this machine and on others."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _machine() -> str:
    """Names what process numbers are counted in: a machine since it was booted, or a container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> int | None:
    """When a process began, in ticks since boot; tells it from a later one with its number.

    None where that can't be known, or there is no such process.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        # The name, in brackets, may hold anything.
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] not in "ZX":  # one that has ended, and nobody has asked how
            return int(fields[19])
    return None


def _lives(process: dict[str, Any]) -> bool | None:
    """Whether a process lives; None where this one can't know."""
    if process["machine"] != _machine() or process["started"] is None:
        return None
    return _started(process["pid"]) == process["started"]


@dataclasses.dataclass(frozen=True)
class _Found:
    """A lock file of another: what it says (None if nothing sound), and when it was touched."""

    owner: dict[str, Any] | None
    beat: int

    @property
    def token(self) -> str | None:
        return self.owner and self.owner["token"]

    def lives(self) -> bool | None:
        """Whether the owner lives; None where that can't be known, or others of its run may."""
        if self.owner is None or not self.owner["processes"]:
            return None
        first, *others = map(_lives, self.owner["processes"])
        if first or (first is False and not any(one is not False for one in others)):
            return first
        return None

    def __str__(self) -> str:
        if self.owner is None:
            return "an owner that it does not name"
        first = self.owner["processes"][0] if self.owner["processes"] else {}
        return printable(
            f"`{self.owner['command']}`, process {first.get('pid')} on {first.get('host')}, since "
            f"{self.owner['since']}"
        )


def _look(file: pathlib.Path) -> _Found | None:
    """What is there, by opening it: a network file system then asks anew; None if nothing."""
    try:
        with file.open("rb") as opened:
            content, beat = opened.read(2**20), os.fstat(opened.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
    try:
        owner = json_files.loads(content)
        schema.check(owner, _OWNER)
    except ValueError:
        owner = None  # being written, or damaged: its beats tell
    return _Found(owner, beat)


class Lock:
    """The lock of a folder, held from `take` to `release`.

    Attributes:
      file: where it is.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.file = folder.resolve() / FILE
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._processes: list[dict[str, Any]] = []
        self._made: list[pathlib.Path] = []  # folders that there were not

    def take(self, processes: Sequence[dict[str, Any]] = ()) -> None:
        """Takes the lock, over from a dead owner if need be.

        Args:
          processes: what `this_process` says on each process of the run; this one first.

        Raises:
          LockedError: a living owner has it.
          OSError: the folder can't be written to.
        """
        self._make_folder()
        try:
            self._processes = list(processes) or [this_process()]
            self._take()
        except BaseException:
            self._remove_folders()
            raise
        _held[self.file] = self
        thread = threading.Thread(target=self._beat, name="lock of a folder", daemon=True)
        thread.start()

    def _take(self) -> None:
        first: _Found | None = None  # as it was when its owner was first asked after
        watched_since, told = 0.0, False
        refused_since = None  # since when another newcomer's guard stood in the way
        while not self._create():
            found = _look(self.file)
            if found is None:
                continue  # just released
            if first is None or found.token != first.token:
                first, watched_since = found, time.monotonic()
            lives = found.lives()
            if lives or found.beat != first.beat:
                raise LockedError(
                    f"{self.folder} is being written by {found}; accepted: another workdir, or "
                    "this one when that run has ended"
                )
            waited = time.monotonic() - watched_since
            if lives is False or waited >= EXPIRY_SECONDS:
                if self._remove(found):
                    # Of a process that is known to be gone, it is no news that its lock has stayed.
                    level = logging.INFO if lives is False else logging.WARNING
                    _LOG.log(level, "%s: taken over from %s, which is gone", self.folder, found)
                    continue
                refused_since = refused_since or time.monotonic()
                if time.monotonic() - refused_since >= EXPIRY_SECONDS:
                    # Held for moments only: who made it was killed in one.
                    self._guard(found.token).unlink(missing_ok=True)
                time.sleep(_POLL_SECONDS / 50)
            else:
                if not told and waited > _POLL_SECONDS:
                    told = True
                    _LOG.warning(
                        "%s is locked by %s; whether that is still at work can't be asked from "
                        "here, so its lock is watched for a sign of life for up to %g seconds",
                        self.folder,
                        found,
                        EXPIRY_SECONDS,
                    )
                time.sleep(_POLL_SECONDS)

    def release(self) -> None:
        """Gives the lock back; nothing if it is not held."""
        if _held.pop(self.file, None) is None:
            return
        self._stop.set()
        with contextlib.suppress(OSError):  # the work is done; a lock that stays is found dead
            found = _look(self.file)
            if found is not None and found.token == self._token:
                self._remove(found)
        self._remove_folders()

    def _create(self) -> bool:
        now = datetime.datetime.now().astimezone()
        owner = {
            "token": self._token,
            "processes": self._processes,
            "command": " ".join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])[:500],
            "since": now.isoformat(" ", "seconds"),
        }
        try:
            descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(json.dumps(owner, indent=2).encode() + b"\n")
        return True

    def _guard(self, token: str | None) -> pathlib.Path:
        """The file that whoever makes it alone may remove the lock with this token."""
        return self.file.with_name(f"{FILE}.{token}")

    def _remove(self, found: _Found) -> bool:
        """Removes a lock if it is still as found; False if another is about to remove it.

        Two newcomers may find one dead lock. Without the guard, the slower one might remove the
        lock that the faster one, or a third, has made since.
        """
        guard = self._guard(found.token)
        try:
            os.close(os.open(guard, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            return False
        try:
            now = _look(self.file)
            # A lock without a token may be one that is just being written.
            if now and now.token == found.token and (now.owner or now.beat == found.beat):
                self.file.unlink()
        finally:
            guard.unlink(missing_ok=True)
        return True

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                found = _look(self.file)
                if found is None and self._create():
                    continue  # somebody has deleted it
                if found is not None and found.token == self._token:
                    os.utime(self.file)
                    continue
            except OSError as error:
                _LOG.warning("%s can't be touched (%s); tried again", self.file, error)
                continue
            if self._stop.is_set():
                return
            sys.stderr.write(
                f"attnpo: error: {self.folder} has been taken over by another run ({found}), since "
                "this one gave no sign of life for a while; it ends before it writes anything "
                "more\n"
            )
            sys.stderr.flush()
            os._exit(exit_codes.FAILED)

    def _make_folder(self) -> None:
        folder, missing = self.file.parent, []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._made = missing

    def _remove_folders(self) -> None:
        """Removes folders that the lock was made in and nothing else was."""
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()


def release_all() -> None:
    """Gives all locks of this process back; for those who end it at once."""
    for lock in list(_held.values()):
        lock.release()


@contextlib.contextmanager
def held(folder: pathlib.Path, processes: Sequence[dict[str, Any]] = ()) -> Iterator[None]:
    """Holds a folder's lock inside of the `with` block; raises as `Lock.take` does."""
    lock = Lock(folder)
    lock.take(processes)
    try:
        yield
    finally:
        lock.release()
