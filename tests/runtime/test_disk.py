import errno

import pytest

from attnpo_jax.runtime import disk


def caused(cause):
    error = RuntimeError("the write failed")
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "whatever the locale says", "file")


@pytest.mark.parametrize(
    "error, words",
    [
        (FULL, "No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
        (ValueError("RESOURCE_EXHAUSTED: ... No space left on device [os_error_code='28']"),
         "No space left on device"),
        (caused(FULL), "No space left on device"),
        (OSError("Error while serializing: I/O error: No space left on device (os error 28)"),
         "No space left on device"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "No space left on device"),
         None),
        (ValueError("the loss is not finite"), None),
    ],
)  # fmt: skip
def test_what_tells_of_a_full_disk(error, words):
    assert disk.shortage(error) == words


def test_an_error_of_a_library_becomes_one_of_the_system():
    error = disk.as_os_error(ValueError("I/O error: No space left on device"), "export")
    assert error.errno == errno.ENOSPC and str(error) == (
        "[Errno 28] No space left on device: 'export'"
    )
    assert str(disk.as_os_error(ValueError("bad header"), "export")) == (
        "export could not be written: bad header"
    )
