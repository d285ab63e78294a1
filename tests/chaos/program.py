"""`attnpo` on a machine that lets it down, as variables of the environment say.

- `CHAOS_CLOCK`: the wall clock jumps by up to so many seconds, forward or back, at every look;
- `CHAOS_ROOM`: after so many bytes of files written by Python, the disk is full. A stand-in for a
  small disk, where none can be mounted.
"""

import errno
import os
import random
import sys
import time


def main() -> int:
    if seconds := float(os.environ.get("CHAOS_CLOCK", 0)):
        _let_clock_jump(seconds)
    if room := int(os.environ.get("CHAOS_ROOM", 0)):
        _let_disk_fill(room)
    from attnpo_jax import cli

    return cli.main()


def _let_clock_jump(seconds: float) -> None:
    read, read_ns = time.time, time.time_ns
    time.time = lambda: read() + random.uniform(-seconds, seconds)
    time.time_ns = lambda: read_ns() + random.randint(-int(seconds), int(seconds)) * 10**9


def _let_disk_fill(room: int) -> None:
    write, left = os.write, [room]

    def write_or_fail(descriptor, content):
        if descriptor > 2:
            left[0] -= len(content)
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content)

    os.write = write_or_fail


if __name__ == "__main__":
    sys.exit(main())
