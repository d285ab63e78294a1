"""The local launcher's own behaviour; tests/parallel has it run processes that work together."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from attnpo_jax import cli, config

ROOT = pathlib.Path(__file__).parents[2]


def local(*arguments):
    return subprocess.run(
        [sys.executable, "launch/local.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "the following arguments are required: --processes, command"),
        (["--processes=2"], "the following arguments are required: command"),
        (["--", "attnpo"], "the following arguments are required: --processes"),
        (["--processes=two", "--", "attnpo"], "invalid int value: 'two'"),
        (["--processes=0", "--", "attnpo"], "--processes=0; accepted: 1 or more"),
        (["--processes=1", "--devices=0", "--", "attnpo"], "--devices=0; accepted: 1 or more"),
        (["--processes=2", "attnpo", "--workdir=a"], "unrecognized arguments: --workdir=a"),
        (["--processes=2", "--", "no-such-command", "run"], "no command 'no-such-command'"),
    ],
)
def test_of_a_command_line_it_cannot_use_it_prints_usage_why_and_an_example(arguments, words):
    done = local(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    usage, *_, error, example = done.stderr.splitlines()
    assert usage.startswith("usage: local.py") and "Traceback" not in done.stderr
    assert "error: " in error and words in error
    assert example.startswith("example: python launch/local.py --processes=2 -- attnpo run ")


def test_the_example_of_the_help_is_a_line_to_copy():
    *_, line = local("--help").stdout.splitlines()
    words = shlex.split(line)
    assert words[:5] == ["example:", "python", "launch/local.py", "--processes=2", "--"]
    values, overrides = cli.parse("run", words[7:])
    config.load_config(str(ROOT / values["config"]), overrides)
    assert words[5:7] == ["attnpo", "run"] and values["workdir"]


def test_processes_know_their_number_and_the_first_failure_is_the_code():
    script = "echo $ATTNPO_PROCESS_ID of $ATTNPO_NUM_PROCESSES; exit $((3 * ATTNPO_PROCESS_ID))"
    done = local("--processes=2", "--", "sh", "-c", script)
    assert done.returncode == 3
    assert sorted(done.stdout.splitlines()) == [
        "[0] 0 of 2",
        "[1] 1 of 2",
        "[1] process 1 of 2 ended: exit code 3",
    ]


@pytest.mark.process
def test_it_ends_with_its_processes_though_one_has_left_another_behind(tmp_path):
    script = f"sleep 120 & echo $! > {tmp_path}/left; echo said"
    start = time.monotonic()
    try:
        done = local("--processes=1", "--", "sh", "-c", script)
        assert done.returncode == 0 and done.stdout.splitlines() == ["[0] said"]
        assert time.monotonic() - start < 60
    finally:
        os.kill(int((tmp_path / "left").read_text()), signal.SIGKILL)


def test_lines_of_many_do_not_mix():
    script = "for i in $(seq 300); do echo $i of $ATTNPO_PROCESS_ID; done; exit 1"
    lines = local("--processes=4", "--", "sh", "-c", script).stdout.splitlines()
    expected = {f"[{k}] {i} of {k}" for i in range(1, 301) for k in range(4)}
    expected |= {f"[{k}] process {k} of 4 ended: exit code 1" for k in range(4)}
    assert set(lines) == expected and len(lines) == 1204
