"""A forked program says and ends what one that is started does."""

import os
import subprocess
import sys

import pytest

from tests import forked

PROGRAMS = {
    "ends": "print('done')",
    "exit": "import sys; print('x', file=sys.stderr); sys.exit(3)",
    "message": "raise SystemExit('why')",
    "error": "raise ValueError('why')",
    "Ctrl-C": "import atexit; atexit.register(print, 'last'); raise KeyboardInterrupt",
    "signal": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "exit functions": "import atexit; atexit.register(print, 'last'); print('first')",
    "arguments": "import os, sys; print(sys.argv, os.getcwd(), os.environ['TOLD'])",
    "imported": "import __main__; a = 1; print(__main__.a, __name__)",
}
ENVIRONMENT = {**os.environ, "TOLD": "of it"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_ends_as_a_program_that_is_started(name):
    command = [sys.executable, "-c", PROGRAMS[name], "an argument"]
    started = subprocess.run(
        command,
        cwd=forked.ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output, code = forked.run(command, ENVIRONMENT)
    assert code == started.returncode
    # Of a traceback, the frames of the fork itself come first.
    assert output.splitlines()[-1:] == started.stdout.splitlines()[-1:]
    assert name in ("error", "Ctrl-C", "signal") or output == started.stdout


def test_what_the_launcher_starts_is_a_fork_and_ends_as_one_that_is_started():
    program = "import os, sys; print('attnpo_jax.cli' in sys.modules, flush=True); os._exit(5)"
    command = [sys.executable, forked.LAUNCHER, "--processes=2", "--devices=1", "--"]
    output, code = forked.run([*command, sys.executable, "-c", program], os.environ)
    lines = output.splitlines()
    assert code == 5 and {"[0] True", "[1] True"} <= {*lines}, output
