import contextlib
import os
import signal
import time

import pytest

from attnpo_jax import cli
from attnpo_jax.parallel import preemption
from attnpo_jax.runtime import interrupts
from attnpo_jax.runtime.errors import Preempted
from attnpo_jax.train import stage


@contextlib.contextmanager
def after_step():
    with preemption.watch_steps(0) as notice:
        yield notice.after_step


@contextlib.contextmanager
def between():
    with preemption.watch_steps(0) as notice:
        yield notice.between


WATCHES = pytest.mark.parametrize("watch", [preemption.watch, after_step, between])


SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@SIGNALS
@WATCHES
def test_a_signal_is_noticed_inside_the_block_alone(watch, number):
    before = signal.getsignal(number)
    with watch() as preempted:
        assert not preempted()
        os.kill(os.getpid(), number)
        assert preempted() and preempted()
    assert signal.getsignal(number) is before
    with watch() as preempted:
        assert not preempted()


@SIGNALS
@WATCHES
def test_a_signal_that_nobody_was_told_of_is_not_lost(watch, number):
    received = []
    before = signal.signal(number, lambda *_: received.append(True))
    try:
        with watch() as preempted:
            assert not preempted()
            os.kill(os.getpid(), number)
            assert not received
        assert received == [True]
        with watch() as preempted:
            os.kill(os.getpid(), number)
            assert preempted()
        assert received == [True]
    finally:
        signal.signal(number, before)


@WATCHES
def test_the_second_ctrl_c_is_a_keyboard_interrupt(watch):
    with pytest.raises(KeyboardInterrupt), watch() as preempted:
        os.kill(os.getpid(), signal.SIGINT)
        assert preempted()
        time.sleep(interrupts.AGAIN_SECONDS + 0.1)
        os.kill(os.getpid(), signal.SIGINT)


@WATCHES
def test_ctrl_c_that_is_ignored_stays_so(watch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with watch() as preempted:
            os.kill(os.getpid(), signal.SIGINT)
            assert not preempted()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("error, code", [(Preempted("step 3 is saved"), 75), (OSError("no"), 1)])
def test_exit_code_of_a_run_told_to_stop(monkeypatch, capsys, tmp_path, error, code):
    def train(run):
        raise error

    monkeypatch.setattr(stage, "train", train)
    arguments = ["train", "--config=configs/quickstart.py", f"--workdir={tmp_path}"]
    assert cli.main(arguments) == code
    assert str(error) in capsys.readouterr().err
