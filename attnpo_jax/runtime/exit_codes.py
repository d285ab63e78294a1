"""What a process's exit code tells whoever started it.

- `FAILED`: an error; starting again without a change fails again.
- `USAGE`: a command line that cannot be understood.
- `PREEMPTED` (`EX_TEMPFAIL` of sysexits.h): told to stop, and has saved; start it again.
- `LOST`: another process of the run is gone without a word (killed, or its machine is); start all
  of them again.
- `INTERRUPTED`: Ctrl-C, as shells say it; a message says what is saved.
"""

FAILED = 1
USAGE = 2
PREEMPTED = 75
LOST = 76
INTERRUPTED = 130
