"""What is left to read of a run when one of its processes dies. As a script: such a process."""

import os
import pathlib
import re
import signal
import sys
import time

import jax
import pytest

from attnpo_jax.parallel import failures
from attnpo_jax.runtime import program
from tests import forked


def run(count, code, *arguments):
    """Output of `count` processes of this script, by the local launcher."""
    command = [sys.executable, forked.LAUNCHER, f"--processes={count}", "--devices=1", "--"]
    command += [sys.executable, "-m", "tests.parallel.test_failures", *arguments]
    output, ended = forked.run(command, os.environ)
    assert ended == code, output
    return output


def assert_ended_soon(output, folder):
    assert "did not end by itself" not in output
    assert time.time() - float((folder / "killed-at").read_text()) < 60, output


@pytest.mark.process
@pytest.mark.parametrize("count, doing", [(2, "collective"), (4, "each")])
def test_when_the_first_is_killed_the_others_say_so_and_end(tmp_path, count, doing):
    """Wherever it reaches them: on the host, in a collective or at a barrier."""
    output = run(count, 128 + signal.SIGKILL, doing, "0", tmp_path)
    assert_ended_soon(output, tmp_path)
    lines = output.splitlines()
    assert f"[0] process 0 of {count} ended: killed by SIGKILL" in lines
    for k in range(1, count):
        why = f"process 0 of {count}, which the others meet at, is gone without a word"
        assert f"[{k}] attnpo: error: {why}; process {k} of {count} ends too" in lines, output
        assert f"[{k}] process {k} of {count} ended: exit code 76" in lines, output


@pytest.mark.process
def test_when_another_is_killed_that_nobody_waits_for_the_others_end_with_code_76(tmp_path):
    """The coordination service misses its heartbeats; JAX's line names it."""
    output = run(3, 128 + signal.SIGKILL, "host", "1", tmp_path)
    assert_ended_soon(output, tmp_path)
    lines = output.splitlines()
    for k in (0, 2):
        assert re.search(rf"^\[{k}\] .*fatal errors.* unhealthy", output, re.MULTILINE), output
        words = f"process {k} of 3 is aborted, for the reason said above"
        assert f"[{k}] attnpo: error: {words}" in lines, output
        assert f"[{k}] process {k} of 3 ended: exit code 76" in lines, output


@pytest.mark.process
@pytest.mark.parametrize("doing", ["first-ends-first", "first-ends-last"])
def test_whoever_is_done_first_is_not_taken_for_dead(tmp_path, doing):
    output = run(3, 0, doing, "-1", tmp_path)
    assert "attnpo: error" not in output and "abort" not in output, output
    assert sorted(re.findall(r"^\[(\d)\] done", output, re.MULTILINE)) == ["0", "1", "2"]


def caused(error, by):
    error.__cause__ = jax.errors.JaxRuntimeError(by)
    return error


@pytest.mark.parametrize(
    "error, loss",
    [
        (jax.errors.JaxRuntimeError("UNAVAILABLE: recvmsg:Connection reset by peer"), True),
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllReduce failed: Connection closed"), True),
        (ValueError("UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (ValueError("no such dataset: Connection refused"), False),
        (ConnectionRefusedError("Connection refused"), False),
        (caused(TimeoutError("at a barrier"), "INTERNAL: Barrier failed: unhealthy"), True),
        (caused(TimeoutError("at a barrier"), "INTERNAL: out of memory"), False),
    ],
)
def test_what_counts_as_the_loss_of_another_process(error, loss):
    assert failures.is_loss(error) is loss


def test_a_process_that_runs_is_not_aborting():
    assert not failures._is_aborting()


def main(doing, victim, folder):
    from attnpo_jax.parallel import processes

    processes.HEARTBEAT_SECONDS = 5  # or a test would take half a minute more
    processes.SHUTDOWN_SECONDS = 3
    failures.join()
    from jax.experimental import multihost_utils

    mine = jax.process_index()
    multihost_utils.sync_global_devices("all are there")
    if mine == int(victim):
        time.sleep(1)
        (pathlib.Path(folder) / "killed-at").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    if doing == "each":
        doing = ("host", "host", "collective", "barrier")[mine]
    if doing == "host":
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            sum(range(10_000))
            time.sleep(0.001)  # or it would take the others' cores
    elif doing == "collective":
        multihost_utils.sync_global_devices("without the victim")
    elif doing == "barrier":
        processes.barrier("without the victim")
    else:
        first = (mine == 0) == (doing == "first-ends-first")
        time.sleep(0 if first else 2 * processes.SHUTDOWN_SECONDS)
    print("done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(program.exit_code("attnpo", lambda: main(*sys.argv[1:])))
