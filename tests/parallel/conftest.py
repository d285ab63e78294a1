"""The undisturbed run that runs of several processes are compared with."""

import pytest

pytest.register_assert_rewrite("tests.parallel.runs")

from attnpo_jax import config as config_lib  # noqa: E402  after it is known what to rewrite
from tests.parallel import runs, tiny  # noqa: E402


@pytest.fixture(scope="session")
def setting(tmp_path_factory):
    """A config of ten steps, and a compilation cache that all runs share."""
    folder = tmp_path_factory.mktemp("processes")
    config = config_lib.default_config()
    config.model.source = str(tiny.write_folder(folder))
    config.data.train = str(tiny.write_pairs(folder / "train.jsonl", 20))
    config.data.eval = str(tiny.write_pairs(folder / "eval.jsonl", 5))
    config.data.num_buckets = config.judge.num_buckets = 1
    config.judge.template = str(folder / "template.txt")
    (folder / "template.txt").write_text("{question} A {answer_a} B {answer_b} Which?")
    config.judge.layers = (0, 2)
    config.prepare.rows_per_shard = 3
    config.optim.learning_rate = 1e-3
    config.train.batch_size = 4
    config.train.eval_batch_size = 2
    config.train.epochs = 2
    config.train.save_every = 100
    config.train.keep_checkpoints = 5
    config.parallel.mesh.data = 1
    config.parallel.mesh.fsdp = -1
    (folder / "config.json").write_text(config_lib.to_json(config))
    return folder


@pytest.fixture(scope="session")
def single(setting):
    workdir = setting / "single"
    runs.run(setting, workdir, 1, "--config.train.save_every=4")
    return workdir
