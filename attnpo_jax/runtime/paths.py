"""Paths: where links lead, and what a message says of one at which nothing is."""

import difflib
import os
import pathlib


def followed(path: str | os.PathLike) -> pathlib.Path:
    """The path that a symbolic link leads to, there or not; any other path as it is."""
    return pathlib.Path(os.path.realpath(path) if os.path.islink(path) else path)


def searched(path: str | os.PathLike) -> str:
    """The folder in which a path was looked for, and the closest name in it.

    Where the path's folder is missing too, that is told of the first one that is.

    Args:
      path: where nothing is; a relative one counts from the current folder.
    """
    missing = pathlib.Path(os.path.abspath(pathlib.Path(path).expanduser()))
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    folder = missing.parent
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f"searched {folder} ({error.strerror})"
    by_lower = {name.lower(): name for name in reversed(names)}
    close = difflib.get_close_matches(missing.name.lower(), by_lower, n=1, cutoff=0.5)
    found = f"the closest name there is {by_lower[close[0]]!r}" if close else "nothing alike there"
    return f"searched {folder} for {missing.name!r}: {found}"


def leaves(file: pathlib.Path, folder: str | os.PathLike) -> pathlib.Path | None:
    """Where a file of a folder really is, if links lead out of the folder; None if they do not.

    A snapshot in the hub's cache is links to the blobs beside it: these do not count.
    """
    root, target = pathlib.Path(folder).resolve(), file.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    return None if any(target.is_relative_to(place) for place in allowed) else target
