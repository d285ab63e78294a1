"""The undisturbed run that runs of several processes are compared with."""

import os
import shutil

import filelock
import pytest

pytest.register_assert_rewrite("tests.parallel.runs")

from attnpo_jax import config as config_lib  # noqa: E402  after it is known what to rewrite
from tests import tiny  # noqa: E402
from tests.parallel import runs  # noqa: E402


def once(folder, make):
    """Has the first of the test workers that comes here make the folder's content; the others wait.

    Where that failed, the next one tries again.
    """
    with filelock.FileLock(f"{folder}.lock"):
        done = folder.with_name(f"{folder.name}.done")
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def setting(tmp_path_factory):
    """A folder with a config of ten steps, the same for all test workers."""
    base = tmp_path_factory.getbasetemp()
    # A worker has a folder of its own in that of all.
    return once((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "processes", fill)


def fill(folder):
    config = tiny.write_inputs(folder)
    config.judge.num_buckets = 1
    config.prepare.rows_per_shard = 3
    config.train.save_every = 100
    config.train.keep_checkpoints = 5
    config.parallel.mesh.data = 1
    config.parallel.mesh.fsdp = -1
    (folder / "config.json").write_text(config_lib.to_json(config))


@pytest.fixture(scope="session")
def single(setting):
    def run(workdir):
        runs.run_here(setting, workdir, "--config.train.save_every=4")

    return once(setting / "single", run)
