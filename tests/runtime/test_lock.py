"""Who may write to a folder. As a script: a process that holds its lock until it is told to end."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from attnpo_jax.runtime import lock

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 0.4)
    monkeypatch.setattr(lock, "_POLL_SECONDS", 0.02)


def written(folder, **changes):
    """A lock file that this process has not made: of itself, with changes."""
    process = lock.this_process()
    owner = {
        "token": "a" * 32,
        "processes": [process | changes],
        "command": "attnpo train --config=x.py",
        "since": "2026-11-01 10:00:00+00:00",
    }
    (folder / lock.FILE).write_text(json.dumps(owner))
    return folder / lock.FILE


def test_it_says_who_has_it_and_goes_at_the_end(tmp_path):
    with lock.held(tmp_path):
        owner = json.loads((tmp_path / lock.FILE).read_text())
        assert owner["processes"] == [lock.this_process()]
        assert owner["processes"][0]["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_it_goes_with_an_error_too_and_with_folders_that_it_made_alone(tmp_path):
    with pytest.raises(KeyError), lock.held(tmp_path / "new" / "run"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with lock.held(tmp_path / "new" / "run"):
        (tmp_path / "new" / "kept").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "kept"]


def test_a_second_one_is_told_at_once_who_is_there(tmp_path):
    with lock.held(tmp_path):
        with pytest.raises(lock.LockedError) as found, lock.held(tmp_path):
            raise AssertionError
        assert f"{tmp_path} is being written by `" in str(found.value)
        assert f"process {os.getpid()} on {lock.this_process()['host']}, since 20" in str(
            found.value
        )
        assert (tmp_path / lock.FILE).exists()  # the first one still has it


def test_a_link_to_a_folder_is_that_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with lock.held(tmp_path / "folder"):
        with pytest.raises(lock.LockedError), lock.held(tmp_path / "link"):
            pass


def gone():
    """The number of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
        return process.pid


@pytest.mark.parametrize("how", ["gone", "reused", "zombie"])
def test_of_a_dead_owner_of_this_machine_it_is_taken_over_at_once(tmp_path, how):
    if how == "reused":  # by this very process, which began at another time
        written(tmp_path, started=lock.this_process()["started"] - 1)
    elif how == "gone":
        written(tmp_path, pid=gone())
    else:
        process = subprocess.Popen(["sleep", "60"])
        written(tmp_path, pid=process.pid, started=lock._started(process.pid))
        with pytest.raises(lock.LockedError), lock.held(tmp_path):
            pass
        process.kill()
        time.sleep(0.2)  # it has ended, and nobody has waited for it
    begun = time.monotonic()
    with lock.held(tmp_path):
        assert json.loads((tmp_path / lock.FILE).read_text())["processes"] == [lock.this_process()]
    assert time.monotonic() - begun < 1
    assert list(tmp_path.iterdir()) == []
    if how == "zombie":
        process.wait()


def test_of_an_owner_elsewhere_it_is_taken_over_when_its_beats_stop(tmp_path, quick, caplog):
    file = written(tmp_path, machine="another", host="node7", pid=3)
    begun = time.monotonic()
    with lock.held(tmp_path):
        assert time.monotonic() - begun >= lock.EXPIRY_SECONDS
    told, taken = [record.getMessage() for record in caplog.records]
    assert "locked by `attnpo train --config=x.py`, process 3 on node7, since 2026-11-01" in told
    assert "watched for a sign of life for up to 0.4 seconds" in told
    assert f"{tmp_path}: taken over from" in taken
    assert not file.exists()


def test_what_an_owner_calls_itself_is_printed_as_text(tmp_path):
    written(tmp_path, host="\x1b]0;node\x07")
    with pytest.raises(lock.LockedError) as found, lock.held(tmp_path):
        pass
    assert r"on \x1b]0;node\x07, since" in str(found.value)


def test_an_owner_elsewhere_that_beats_lives(tmp_path, quick):
    """Whatever its clock says."""
    file = written(tmp_path, machine="another", host="node7")
    beat = threading.Timer(0.1, os.utime, [file, (1, 1)])
    beat.start()
    with pytest.raises(lock.LockedError, match="on node7"), lock.held(tmp_path):
        pass
    beat.join()
    assert file.exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"{}", b'{"token": 1}'])
def test_a_file_that_says_nothing_is_judged_by_its_beats(tmp_path, quick, content):
    (tmp_path / lock.FILE).write_bytes(content)
    begun = time.monotonic()
    with lock.held(tmp_path):
        assert time.monotonic() - begun >= lock.EXPIRY_SECONDS


def test_while_others_of_its_run_live_a_dead_owner_s_lock_stays(tmp_path, quick):
    other = subprocess.Popen(["sleep", "0.2"])
    here = lock.this_process()
    dead = here | {"pid": gone()}
    living = here | {"pid": other.pid, "started": lock._started(other.pid)}
    file = written(tmp_path)
    owner = json.loads(file.read_text()) | {"processes": [dead, living]}
    file.write_text(json.dumps(owner))
    with lock.held(tmp_path):
        assert lock._started(other.pid) is None
    other.wait()


def test_an_owner_shows_that_it_lives(tmp_path, quick):
    with lock.held(tmp_path):
        os.utime(tmp_path / lock.FILE, (1, 1))
        deadline = time.monotonic() + 5
        while (tmp_path / lock.FILE).stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_of_many_newcomers_at_once_one_takes_a_dead_owner_s_lock(tmp_path):
    """Threads with locks of their own; each holds it for a moment, and notes who else does."""
    written(tmp_path, pid=gone())
    inside, most, taken = [], [], []

    def newcomer():
        try:
            with lock.held(tmp_path):
                inside.append(None)
                most.append(len(inside))
                time.sleep(0.05)
                inside.pop()
                taken.append(None)
        except lock.LockedError:
            pass

    threads = [threading.Thread(target=newcomer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken and set(most) == {1}
    assert list(tmp_path.iterdir()) == []


def test_a_guard_whose_maker_was_killed_does_not_last(tmp_path, quick):
    written(tmp_path, pid=gone())
    guard = tmp_path / f"{lock.FILE}.{'a' * 32}"
    guard.touch()
    begun = time.monotonic()
    with lock.held(tmp_path):
        assert time.monotonic() - begun >= lock.EXPIRY_SECONDS
    assert list(tmp_path.iterdir()) == []


def start(folder, beat):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.runtime.test_lock", str(folder), str(beat)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "holds it\n", process.stderr.read()
    return process


@pytest.mark.process
def test_killed_it_leaves_a_lock_that_the_next_one_takes(tmp_path):
    process = start(tmp_path, 10)
    with pytest.raises(lock.LockedError, match=f"process {process.pid} on"), lock.held(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    begun = time.monotonic()
    with lock.held(tmp_path):
        assert time.monotonic() - begun < 1


@pytest.mark.process
def test_who_was_held_up_and_lost_it_ends_before_it_writes_more(tmp_path):
    process = start(tmp_path, 0.1)
    process.send_signal(signal.SIGSTOP)
    written(tmp_path, machine="another", host="node7")
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "has been taken over by another run (`attnpo train" in errors
    assert json.loads((tmp_path / lock.FILE).read_text())["token"] == "a" * 32


if __name__ == "__main__":
    lock.BEAT_SECONDS = float(sys.argv[2])
    with lock.held(pathlib.Path(sys.argv[1])):
        print("holds it", flush=True)
        time.sleep(60)
