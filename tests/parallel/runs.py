"""Runs of several processes: how tests start them, and how they compare what came of them."""

import json
import os
import re
import shutil
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy

from attnpo_jax.data.prepared import Prepared
from attnpo_jax.parallel import backend as backends
from attnpo_jax.runtime import metrics
from tests import forked
from tests.parallel import scripted

CONFIG = """
import pathlib
from attnpo_jax import config

def get_config():
    return config.from_json(pathlib.Path({path!r}).read_text())
"""


def environment():
    """Variables of a process; the tests' compilation cache is among those that it inherits."""
    return {**os.environ, "JAX_PLATFORMS": "cpu"}


def run(setting, workdir, count, *arguments, code=0):
    """The local launcher with `count` processes, at least two virtual devices in all.

    For the arguments, see `tests.parallel.scripted`. Returns what was printed.
    """
    devices = max(1, 2 // count)
    command = [sys.executable, forked.LAUNCHER, f"--processes={count}", f"--devices={devices}"]
    command += ["--", sys.executable, "-m", "tests.parallel.scripted"]
    command += [setting / "config.json", workdir, *arguments]
    return finish(forked.Process(command, environment()), code)


def finish(process, code=0):
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        if process.poll() is None:
            process.terminate()  # the launcher passes it on
    assert process.returncode == code, output
    return output


def run_here(setting, workdir, *arguments):
    """What `run` with one process does, by this process: on two of its devices."""

    def on_two_devices(model, *_):
        return backends.Sharded(model, {"data": 1, "fsdp": 2, "tensor": 1}, jax.devices()[:2])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "for_training", on_two_devices)
        patch.setattr(backends, "for_preparing", on_two_devices)
        scripted.record_what_is_fed(workdir / "fed-1-0.jsonl", patch.setattr)
        scripted.run_parts(setting / "config.json", workdir, scripted.read(arguments))


def prepared_before(workdir, single):
    """A run that finds the rows prepared."""
    shutil.copytree(single / "prepared", workdir / "prepared")
    return workdir


def assert_same_metrics(found, expected):
    lines, wanted = metrics.read(found), metrics.read(expected)
    assert [line["step"] for line in lines] == [0, *range(1, 11), 10]
    assert len(wanted) == len(lines)
    for line, other in zip(lines, wanted, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            # Until the first update with a rate above 0, margins are 0 but for rounding.
            chance = "accuracies" in name and line["step"] <= 2
            if not name.endswith("_per_second") and not chance:
                assert value == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


def assert_same_rows(found, expected, splits=("train", "eval")):
    for split in splits:
        ours, theirs = (Prepared.open(w / "prepared" / split) for w in (found, expected))
        assert len(ours) == len(theirs) == {"train": 20, "eval": 5}[split]
        for row, other in zip(ours, theirs, strict=True):
            assert row.keys() == other.keys()
            for name, value in row.items():
                if isinstance(value, np.ndarray) and value.dtype == np.float32:
                    np.testing.assert_allclose(value, other[name], atol=1e-5, rtol=0)
                else:
                    assert np.array_equal(value, other[name]), name


def assert_same_exports(found, expected):
    ours, theirs = (
        safetensors.numpy.load_file(w / "export" / "model.safetensors") for w in (found, expected)
    )
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=1e-4, err_msg=name)


def fed(workdir, count):
    """(step, pairs) in the order in which `count` processes had them, the pairs of all together."""
    files = [workdir / f"fed-{count}-{process}.jsonl" for process in range(count)]
    records = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    found = []
    for of_all in zip(*records, strict=True):
        assert len({record["step"] for record in of_all}) == 1
        pairs = sorted(tuple(pair) for record in of_all for pair in record["pairs"])
        found.append((of_all[0]["step"], pairs))
    return found


def assert_ended_by_itself(output, workdir, victim):
    """That, of two processes, the other one ended within a minute of the death of this one."""
    killed_at = float((workdir / "killed-at").read_text())
    assert time.time() - killed_at < 60, output
    assert "did not end by itself" not in output
    # Said by itself, or by JAX where its watch came first.
    reason = r"is gone without a word|fatal errors.*another task died"
    assert re.search(rf"^\[{1 - victim}\] .*({reason})", output, re.MULTILINE), output
    assert f"process {victim} of 2 ended: killed by SIGKILL" in output
    assert f"process {1 - victim} of 2 ended: exit code 76" in output
