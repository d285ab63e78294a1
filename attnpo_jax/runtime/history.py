"""What stages did in a workdir, when and on what: `history.jsonl`, which only grows.

A stage that has work to do adds a line where that begins and one where it ends; one that was killed
has the first alone. They serve people and reports: nothing that a run computes depends on them.
"""

import contextlib
import dataclasses
import datetime
import logging
import os
import pathlib
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from attnpo_jax.runtime import checked_lines, json_files, schema
from attnpo_jax.runtime.errors import Preempted

_LOG = logging.getLogger(__name__)

FILE = "history.jsonl"
FINISHED, STOPPED = "finished", "told to stop"

_BEGAN, _ENDED = "began", "ended"
_LINE = schema.Table(
    {"event": schema.Choice((_BEGAN, _ENDED)), "id": schema.Text(), "time": schema.Text()},
    open=True,
)
_FIRST = schema.Table(
    {"stage": schema.Text(), "about": schema.Mapped(schema.Anything())}, open=True
)
_LAST = schema.Table({"seconds": schema.Number(), "how": schema.Text()}, open=True)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One time that a stage worked.

    Attributes:
      stage: its name.
      began: when, in UTC as ISO 8601 has it.
      about: what was told of it as it began.
      seconds: how long it took; None where it was killed, or works still.
      how: `FINISHED`, `STOPPED`, or the kind of error that ended it; None likewise.
    """

    stage: str
    began: str
    about: Mapping[str, Any]
    seconds: float | None = None
    how: str | None = None


@contextlib.contextmanager
def recorded(workdir: pathlib.Path, stage: str, about: Mapping[str, Any]) -> Iterator[None]:
    """Has the history say when the block began and ended, and how.

    Args:
      workdir: the run's folder, which the caller holds.
      stage: what works.
      about: JSON values that are worth knowing of it.

    Raises:
      OSError: the file can't be written; where the block itself raises, that comes through.
    """
    id, start = uuid.uuid4().hex[:12], time.monotonic()
    _append(workdir, {"event": _BEGAN, "id": id, "stage": stage, "about": dict(about)})

    def end(how: str) -> None:
        seconds = round(time.monotonic() - start, 3)
        _append(workdir, {"event": _ENDED, "id": id, "seconds": seconds, "how": how})

    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, (Preempted, KeyboardInterrupt))
        with contextlib.suppress(OSError):  # a full disk may be the reason
            end(STOPPED if stopped else type(error).__name__)
        raise
    end(FINISHED)


def _append(workdir: pathlib.Path, line: Mapping[str, Any]) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    path = workdir / FILE
    workdir.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        # What a crash has cut off shall not take this line with it.
        cut = file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        file.write(b"\n" * bool(cut) + checked_lines.encode({**line, "time": now}))
        file.flush()
        os.fsync(file.fileno())


def read(workdir: pathlib.Path) -> list[Entry]:
    """What stages did, in the order in which they began.

    Lines that are damaged are left out, with a warning; the last one may have been cut off.
    """
    path = workdir / FILE
    first: dict[str, Entry] = {}
    *whole, last = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, text in enumerate([*whole, last] if last else whole, 1):
        try:
            line = json_files.loads(text)
            schema.check(line, _LINE)
            schema.check(line, _FIRST if line["event"] == _BEGAN else _LAST)
            if "check" in line and not checked_lines.is_whole(text):  # those of old have none
                raise ValueError("holds something else than was written")
        except ValueError as error:
            if number <= len(whole) or b'"}' in text:
                _LOG.warning("%s, line %d is damaged and left out: %s", path, number, error)
            continue
        id = line["id"]
        if line["event"] == _BEGAN:
            first[id] = Entry(line["stage"], line["time"], line["about"])
        elif id in first:
            ended = {key: line[key] for key in ("seconds", "how")}
            first[id] = dataclasses.replace(first[id], **ended)
    return list(first.values())
