"""Python programs that tests launch, as forks of a process that has imported what they import.

Imports take such a process a third of its time. The process that is forked has started no backend
of JAX, and a fork takes its own environment, arguments, folder and output, and ends, as one that
was started by itself does. What is read when JAX is imported (`JAX_COMPILATION_CACHE_DIR`, ...) is
that of the tests.
"""

import atexit
import ctypes
import functools
import gc
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import types

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCHER = "launch/local.py"

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.launched.imported"])


class Process:
    """A Python program; what tests use of `subprocess.Popen`, for its output with its errors.

    Processes that `launch/local.py` starts are forks as well.

    Args:
      command: the command line, of this Python.
      env: the environment.
    """

    def __init__(self, command, env):
        assert command[0] == sys.executable
        # Not a pipe: nobody reads before the end.
        self._output = tempfile.NamedTemporaryFile()
        command = [os.fspath(word) for word in command]
        arguments = (command, dict(env), self._output.name)
        self._process = _server.Process(target=_first, args=arguments, daemon=True)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    poll = returncode.fget

    def terminate(self):
        self._process.terminate()

    def communicate(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return pathlib.Path(self._output.name).read_text(errors="replace"), None


def run(command, env):
    """Output and errors of a program that ends within four minutes, and its exit code."""
    process = Process(command, env)
    try:
        return process.communicate(timeout=240)[0], process.returncode
    finally:
        process.terminate()


def _first(command, env, output):
    """What a fork of the server does."""
    with open(os.devnull, "rb") as nothing, open(output, "wb") as file:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    if command[1] == LAUNCHER:
        subprocess.Popen = _Fork
    _go_on(command, env)


class _Fork(subprocess.Popen):
    """A process of the launcher's: a fork where `subprocess.Popen` would start Python anew."""

    def __init__(self, command, *, env, **options):
        assert command[0] == sys.executable
        # In place of what may be done before a program is started, it is run.
        instead = functools.partial(_started, command, env)
        super().__init__(command, env=env, preexec_fn=instead, **options)


def _started(command, env):
    subprocess.Popen = _Fork.__base__
    gc.enable()  # held up until another program is started
    _go_on(command, env)


def _go_on(command, env):
    """Does what this Python does with a command line, and ends."""
    from jax._src import xla_bridge

    assert not xla_bridge.backends_are_initialized()
    # As Python has them when it starts; the server and the launcher have others.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # By one of them, the launcher waits to be told that the program is started.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    os.environ.update(env)
    sys.stdin = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = open(
        2, "w", buffering=1, errors="backslashreplace", closefd=False
    )
    try:
        _run(command[1:])
        code = 0
    except SystemExit as end:
        code = end.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
        if isinstance(error, KeyboardInterrupt):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
    # As at the end of any program: threads, what is registered with atexit, the libraries' own.
    ctypes.pythonapi.Py_Exit(code or 0)


def _run(arguments):
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(pathlib.Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")
