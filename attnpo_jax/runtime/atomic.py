"""Files that appear under their final name only when they are whole."""

import itertools
import json
import os
import pathlib
import uuid
from collections.abc import Iterable, Mapping
from typing import Any


def temporary_pattern(name: str) -> str:
    """Glob pattern of what a killed `write_atomically` of a file called `name` leaves behind."""
    return f".{name}.*.tmp"


def write_atomically(
    path: str | os.PathLike, content: bytes | memoryview | Iterable[bytes]
) -> None:
    """Write `content`, or its parts, to `path`: a reader sees the old file or the whole new one.

    The bytes go to a temporary file in the same folder, reach the disk, and are then renamed.

    Raises:
        OSError: the disk is full or the folder can't be written; the temporary file is removed and
            whatever was at `path` before stays.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            parts = [content] if isinstance(content, (bytes, memoryview)) else content
            for part in parts:
                rest = memoryview(part).cast("B")
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            # A failed write or fsync does not say which file it was about.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    # The rename itself must survive a power cut too.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a JSON value, indented and with sorted keys, whole or not at all."""
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    write_atomically(path, text.encode())


def write_json_lines(path: str | os.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON lines, whole or not at all; without any, remove what is at `path`."""
    path = pathlib.Path(path)
    lines = (json.dumps(dict(record)).encode() + b"\n" for record in records)
    first = next(lines, None)
    if first is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, itertools.chain([first], lines))
