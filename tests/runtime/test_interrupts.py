import os
import signal
import subprocess
import sys
import time

import pytest

from attnpo_jax.parallel import preemption
from attnpo_jax.runtime import interrupts, program
from attnpo_jax.runtime.errors import Preempted

# A program at work in native code, where Python runs no handler: it would take an hour.
BUSY = """
import hashlib, sys
from attnpo_jax.parallel import preemption
from attnpo_jax.runtime import program
def main():
    with preemption.watch():
        print("at work", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
sys.exit(program.exit_code("attnpo", main))
"""


@pytest.mark.process
def test_the_second_ctrl_c_ends_a_process_in_native_code_at_once():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", BUSY], **pipes)
    try:
        assert process.stdout.readline() == "at work\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == (
            "attnpo: stops as soon as its work is saved; Ctrl-C again ends it at once\n"
        )
        time.sleep(interrupts.AGAIN_SECONDS + 0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 130
        assert process.stderr.read() == "attnpo: interrupted\n"
    finally:
        process.kill()


# As the one above, but with nothing to save, and a lock.
HOLDS = BUSY.replace("preemption.watch()", "lock.held(pathlib.Path(sys.argv[1]))").replace(
    "import hashlib, sys", "import hashlib, pathlib, sys\nfrom attnpo_jax.runtime import lock"
)


@pytest.mark.process
def test_sigterm_ends_a_process_in_native_code_at_once_and_its_locks_go(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "at work\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == -signal.SIGTERM
        assert list(tmp_path.iterdir()) == []
    finally:
        process.kill()


def test_sigterm_that_work_is_saved_for_is_handed_on_to_it():
    def work():
        assert signal.getsignal(signal.SIGTERM) is interrupts.terminate
        with preemption.watch() as noticed:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
            assert noticed()
            raise Preempted("step 3 is saved")

    assert program.exit_code("attnpo", work) == 75
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_ctrl_c_in_watched_work_exits_with_130_and_says_what_is_saved(capfd):
    def work():
        with preemption.watch() as noticed:
            assert not noticed()
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # the same, passed on by a launcher
            time.sleep(0.2)
            assert noticed()
            raise Preempted("step 3 is saved")

    assert program.exit_code("attnpo", work) == 130
    assert capfd.readouterr().err == (
        "attnpo: stops as soon as its work is saved; Ctrl-C again ends it at once\n"
        "attnpo: step 3 is saved\n"
    )


def test_sigterm_after_another_program_s_ctrl_c_exits_with_75(capfd):
    def work():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    def told():
        raise Preempted("step 3 is saved")

    assert program.exit_code("attnpo", work) == 130
    assert capfd.readouterr().err == "attnpo: interrupted\n"
    assert program.exit_code("attnpo", told) == 75


@pytest.mark.process
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_a_process_in_native_code_that_has_nothing_to_save(number, code):
    short = "from attnpo_jax.runtime import interrupts\ninterrupts.GRACE_SECONDS = 0.2\n"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", short + BUSY], **pipes)
    try:
        assert process.stdout.readline() == "at work\n"
        process.send_signal(number)
        assert process.wait(timeout=10) == code
        told = process.stderr.read()
        assert told.endswith("attnpo: stopped, with nothing to save\n")
    finally:
        process.kill()


def test_work_to_save_is_not_cut_short(monkeypatch, capfd):
    monkeypatch.setattr(interrupts, "GRACE_SECONDS", 0.1)

    def work():
        with preemption.watch() as noticed:
            os.kill(os.getpid(), signal.SIGTERM)
            with interrupts.work_to_save():  # as if a first step ended just now
                time.sleep(0.4)
                assert noticed()
                raise Preempted("step 1 is saved")

    assert program.exit_code("attnpo", work) == 75
    assert capfd.readouterr().err == "attnpo: step 1 is saved\n"


def test_a_handed_over_ctrl_c_is_neither_told_of_nor_counted(capfd):
    came = []

    def work():
        outside = signal.signal(signal.SIGINT, lambda *_: came.append(1))
        with interrupts.handed_over():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(interrupts.AGAIN_SECONDS + 0.1)
        signal.signal(signal.SIGINT, outside)
        return 0

    assert program.exit_code("attnpo", work) == 0
    assert len(came) == 2 and capfd.readouterr().err == ""
