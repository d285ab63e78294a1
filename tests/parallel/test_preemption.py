import contextlib
import os
import signal

import pytest

from attnpo_jax import cli
from attnpo_jax.parallel import preemption
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


@WATCHES
def test_sigterm_is_noticed_inside_the_block_alone(watch):
    before = signal.getsignal(signal.SIGTERM)
    with watch() as preempted:
        assert not preempted()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preempted() and preempted()
    assert signal.getsignal(signal.SIGTERM) is before
    with watch() as preempted:
        assert not preempted()


@WATCHES
def test_sigterm_that_nobody_was_told_of_is_not_lost(watch):
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        with watch() as preempted:
            assert not preempted()
            os.kill(os.getpid(), signal.SIGTERM)
            assert not received
        assert received == [True]
        with watch() as preempted:
            os.kill(os.getpid(), signal.SIGTERM)
            assert preempted()
        assert received == [True]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("error, code", [(Preempted("step 3 is saved"), 75), (OSError("no"), 1)])
def test_exit_code_of_a_run_told_to_stop(monkeypatch, capsys, tmp_path, error, code):
    def train(run):
        raise error

    monkeypatch.setattr(stage, "train", train)
    arguments = ["train", "--config=configs/quickstart.py", f"--workdir={tmp_path}"]
    assert cli.main(arguments) == code
    assert str(error) in capsys.readouterr().err
