"""A disk that is full: what tells it, and what to do."""

import errno
import re

REMEDY = "make room there, and the same command goes on from what is saved"

_SHORTAGES = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
}
_WORDS = re.compile("|".join(_SHORTAGES.values()))


def shortage(error: BaseException) -> str | None:
    """Which shortage of room an error tells of, in the system's words; None for another error.

    Libraries that write in languages of their own have the words in their messages alone.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return _SHORTAGES.get(error.errno)
    found = _WORDS.search(str(error))
    if found is None and error.__cause__ is not None:
        return shortage(error.__cause__)
    return found and found[0]


def as_os_error(error: Exception, path: str) -> OSError:
    """An error of a library that wrote to `path` as the OSError that it is, naming the path."""
    words = shortage(error)
    for number, text in _SHORTAGES.items():
        if text == words:
            return OSError(number, text, path)
    return OSError(f"{path} could not be written: {error}")
