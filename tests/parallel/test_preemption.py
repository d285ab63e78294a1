import os
import signal

import pytest

from attnpo_jax import cli
from attnpo_jax.parallel import preemption
from attnpo_jax.train import loop


def test_sigterm_is_noticed_inside_the_block_alone():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.watch() as preempted:
        assert not preempted(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preempted(2) and preempted(3)
    assert signal.getsignal(signal.SIGTERM) is before
    with preemption.watch() as preempted:
        assert not preempted(1)


@pytest.mark.parametrize(
    "error, code", [(preemption.Preempted("step 3 is saved"), 75), (OSError("no"), 1)]
)
def test_exit_code_of_a_run_told_to_stop(monkeypatch, capsys, tmp_path, error, code):
    def train(config, workdir):
        raise error

    monkeypatch.setattr(loop, "train", train)
    arguments = ["train", "--config=configs/quickstart.py", f"--workdir={tmp_path}"]
    assert cli.main(arguments) == code
    assert str(error) in capsys.readouterr().err
