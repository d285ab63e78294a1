"""Every workload runs, and says what it did; how fast is not looked at."""

import math

import jax
import pytest

from attnpo_jax import config as config_lib
from attnpo_jax.models import decoder
from attnpo_jax.models.io import hf_folder
from attnpo_jax.parallel import backend as backends
from benchmarks import suite
from benchmarks.protocol import Worker
from benchmarks.workloads import WORKLOADS
from tests import tiny

pytestmark = pytest.mark.process

PAIRS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model."""
    return tiny.write_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def scratch(model, tmp_path_factory):
    """A folder with two selected pairs, and the model in place of the one that is measured."""
    folder, default_config = tmp_path_factory.mktemp("scratch"), config_lib.default_config
    chosen = {"pairs": "builtin:train", "min_chars": 60, "max_chars": 300, "limit": PAIRS}
    settings = {"batch_size": PAIRS, "remat": None, "dtype": None, "param_dtype": None}
    spec = {"scratch": str(folder), **chosen, **settings}

    def config_of_model():
        config = default_config()
        config.model.source = str(model)
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_lib, "default_config", config_of_model)
        assert WORKLOADS["select"](spec).info["pairs"] == PAIRS
    return folder


@pytest.fixture(scope="module")
def run(scratch):
    """Runs a workload on the pairs once they are prepared: its info and what a repeat returns."""
    caching = jax.config.jax_enable_compilation_cache
    with pytest.MonkeyPatch.context() as patch:
        # One device, as on a machine that is measured.
        for name in ("for_training", "for_preparing"):
            patch.setattr(backends, name, lambda model, *_: backends.one_device(model))

        def run(name, **spec):
            workload = WORKLOADS[name](spec | {"scratch": str(scratch)})
            return workload.info, workload.repeat()

        run("prepare")
        yield run
    jax.config.update("jax_enable_compilation_cache", caching)


def test_a_worker_answers_and_says_what_memory_it_had(scratch):
    spec = {"scratch": str(scratch)}
    with Worker(suite.OURS, "tokenize", spec, log=scratch / "tokenize.log") as worker:
        assert worker.info["pairs"] == PAIRS
        assert worker.repeat()["seconds"] > 0
        assert worker.finish()["peak_resident_bytes"] > 2**20


@pytest.mark.parametrize(
    "name, spec",
    [
        ("judge", {}),
        ("judge", {"layers": ["rollout"]}),
        ("reference", {}),
        ("train", {}),
        ("tokenize", {}),
    ],
)
def test_a_pass_over_the_pairs(run, name, spec):
    info, done = run(name, **spec)
    assert info["pairs"] == PAIRS
    # Both responses of a pair have 60 characters at least.
    assert info["tokens"] > PAIRS * 2 * 10
    assert done["seconds"] > 0


def test_the_curve_has_a_time_for_every_length(run):
    info, done = run("curve", lengths=[8, 16])
    assert info["flops"][0] < info["flops"][1]
    assert len(done["seconds"]) == 2


def test_int8_changes_a_little_of_what_is_prepared(run, scratch, model):
    (scratch / "full").symlink_to(scratch)  # what is prepared where nothing is said
    full, _ = run("prepare", weights="full")
    int8, _ = run("prepare", weights="int8")
    # One byte in place of four for the layers' matrices, of 64 x 64 and 64 x 32 (two each) and
    # 64 x 96 (three) in each of three layers, and four for each of their outputs' scales.
    shape = decoder.abstract_params(hf_folder.load_config(model))
    everything = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shape))
    matrices, outputs = 3 * 64 * (2 * 64 + 2 * 32 + 3 * 96), 3 * (2 * 64 + 2 * 32 + 2 * 96 + 64)
    assert full["parameter_bytes"] == 4 * everything
    assert int8["parameter_bytes"] == 4 * everything - 3 * matrices + 4 * outputs
    info, changed = run("int8_change")
    assert info["pairs"] == PAIRS
    assert changed["figures"]["verdicts"] == 2 * PAIRS
    assert 0 < changed["figures"]["nats_a_token"] < 0.2
    assert [point["layer"] for point in changed["points"]] == [0, 1, 2]
    assert all(0 < point["share_moved"] < 0.1 for point in changed["points"])


def test_compiling_is_timed_by_layers(run):
    _, done = run("compile", layers=[1, 2])
    assert {what: len(seconds) for what, seconds in done.items()} == {"step": 2, "judge": 2}
