"""Every workload runs, and says what it did; how fast is not looked at."""

import pytest

from benchmarks import suite
from benchmarks.protocol import Worker

pytestmark = pytest.mark.process

PAIRS = 2


@pytest.fixture(scope="module")
def run(smollm2_folder, tmp_path_factory):
    """Runs a workload on two selected and prepared pairs: its info and what a repeat returns."""
    scratch = tmp_path_factory.mktemp("scratch")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS")  # one device, as on a machine that is measured

        def run(name, **spec):
            spec |= {"scratch": str(scratch)}
            with Worker(suite.OURS, name, spec, log=scratch / f"{name}.log") as worker:
                done = worker.repeat()
                assert worker.finish()["peak_resident_bytes"] > 2**20
            return worker.info, done

        chosen = {"pairs": "builtin:train", "min_chars": 60, "max_chars": 300, "limit": PAIRS}
        settings = {"batch_size": PAIRS, "remat": None, "dtype": None, "param_dtype": None}
        assert run("select", **chosen, **settings)[0]["pairs"] == PAIRS
        run("prepare")
        yield run


@pytest.mark.parametrize("name", ["judge", "reference", "train", "tokenize"])
def test_a_pass_over_the_pairs(run, name):
    info, done = run(name)
    assert info["pairs"] == PAIRS
    # Both responses of a pair have 60 characters at least.
    assert info["tokens"] > PAIRS * 2 * 10
    assert done["seconds"] > 0


def test_the_curve_has_a_time_for_every_length(run):
    info, done = run("curve", lengths=[8, 16])
    assert info["flops"][0] < info["flops"][1]
    assert len(done["seconds"]) == 2


def test_int8_changes_a_little_of_what_is_prepared(run):
    full, _ = run("prepare", weights="full")
    int8, _ = run("prepare", weights="int8")
    # One byte in place of four for all but the embedding: 134.5M parameters, 28.3M of them.
    assert full["parameter_bytes"] == pytest.approx(4 * 134.5e6, rel=1e-3)
    assert int8["parameter_bytes"] == pytest.approx(106.2e6 + 4 * 28.3e6, rel=1e-2)
    info, changed = run("int8_change")
    assert info["pairs"] == PAIRS
    assert changed["figures"]["verdicts"] == 2 * PAIRS
    assert 0 < changed["figures"]["nats_a_token"] < 0.2
    assert [point["layer"] for point in changed["points"]] == [0, 6, 14, 21, 29]
    assert all(0 < point["share_moved"] < 0.1 for point in changed["points"])


def test_compiling_is_timed_by_layers(run):
    _, done = run("compile", layers=[2, 3])
    assert {what: len(seconds) for what, seconds in done.items()} == {"step": 2, "judge": 2}
