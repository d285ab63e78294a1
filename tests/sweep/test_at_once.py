"""Processes that do the runs of a sweep: who gets which, and what befalls them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from attnpo_jax.runtime.errors import Preempted
from attnpo_jax.sweep import at_once
from attnpo_jax.sweep.at_once import Task
from attnpo_jax.sweep.worker import _Tasks

# Does tasks as `worker` does, but what each is says what becomes of it.
STANDS_IN = """
import json, os, sys, time
setup = json.loads(sys.stdin.readline())
for line in sys.stdin:
    task = json.loads(line)
    os.makedirs(os.path.dirname(task["log"]), exist_ok=True)
    with open(task["log"], "a") as file:
        print(os.getpid(), setup["config"], os.environ["ATTNPO_DISTRIBUTED"], file=file)
    if task["task"] == "dies":
        os._exit(3)
    if task["task"] == "lasts":
        time.sleep(100)
    print(json.dumps({"failed": task["task"] if task["task"] == "fails" else None}), flush=True)
"""


@pytest.fixture
def stands_in(monkeypatch):
    monkeypatch.setattr(at_once, "_COMMAND", [sys.executable, "-c", STANDS_IN])


def tasks_of(folder, *names, **kinds):
    return [Task(name, folder / name / "log.txt", kinds.get(name, "")) for name in names]


def test_each_process_does_one_after_the_other_and_loses_what_it_died_at_alone(tmp_path, stands_in):
    ended = []
    tasks = tasks_of(tmp_path, "first", "a", "dies", "b", "fails", "c")
    at_once.run_all({"config": "x"}, tasks, 2, lambda *one: ended.append(one), "first")
    assert ended[0] == ("first", None, None)
    assert dict((task, found) for task, *found in ended[1:]) == {
        "a": [None, None], "dies": ["", 3], "b": [None, None], "fails": ["fails", None],
        "c": [None, None],
    }  # fmt: skip
    said = {task.name: task.log.read_text().split() for task in tasks}
    assert all(words[1:] == ["x", "0"] for words in said.values())
    processes = {words[0] for words in said.values()}
    assert 2 <= len(processes) <= 3  # at most two, and one for that which died


def test_processes_keep_to_a_kind_and_out_of_each_other_s(tmp_path):
    kinds = {"a": "x", "b": "x", "c": "y", "d": "y", "e": "z"}
    waiting = tasks_of(tmp_path, *kinds, **kinds)
    at_work = {}

    class Selector:
        @staticmethod
        def get_map():
            return at_work

    def begins(process, kind=""):
        task = at_once._taken(waiting, Selector, kind)
        at_work[process] = types.SimpleNamespace(data=types.SimpleNamespace(task=task))
        return task.name

    assert [begins(1), begins(2)] == ["a", "c"]
    assert [begins(1, "x"), begins(2, "y")] == ["b", "d"]
    assert begins(1, "x") == "e"
    waiting = tasks_of(tmp_path, "f", f="y")
    assert begins(1, "z") == "f"  # better than nothing


def test_what_an_end_raises_ends_the_processes(tmp_path, stands_in):
    tasks = tasks_of(tmp_path, "a", "lasts")
    log = tasks[1].log

    def ended(task, failed, code):
        _wait_for(log)
        raise ValueError(task)

    with pytest.raises(ValueError, match="a"):
        at_once.run_all({"config": "x"}, tasks, 2, ended)
    assert not _lives(int(log.read_text().split()[0]))


def test_who_is_told_to_stop_tells_the_processes(tmp_path, stands_in):
    tasks = tasks_of(tmp_path, "lasts")
    log = tasks[0].log

    def stop():
        _wait_for(log)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(Preempted):
        at_once.run_all({"config": "x"}, tasks, 1, print)
    assert not _lives(int(log.read_text().split()[0]))


def _wait_for(log):
    while not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.02)


def _lives(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_run_whose_sweep_is_killed_is_stopped():
    # As the worker reads its tasks; the run is a sleep.
    code = """
import sys, time
from attnpo_jax.sweep.worker import _Tasks
tasks = _Tasks(sys.stdin.buffer)
tasks.next()
print("begun", flush=True)
time.sleep(100)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdin.write(json.dumps({"task": "0"}).encode() + b"\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"begun\n"
    process.stdin.close()
    assert process.wait(timeout=30) == -signal.SIGTERM


def test_a_process_with_nothing_to_do_ends_where_no_task_comes(tmp_path):
    reads, writes = os.pipe()
    with os.fdopen(reads, "rb") as lines:
        tasks = _Tasks(lines)
        os.write(writes, b'{"task": "0"}\n')
        assert tasks.next() == {"task": "0"}
        tasks.done()
        os.close(writes)
        assert tasks.next() is None
