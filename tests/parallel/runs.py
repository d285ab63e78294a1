"""Runs of several processes: how tests start them, and how they compare what came of them."""

import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from attnpo_jax.data.prepared import Prepared
from attnpo_jax.runtime import metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = """
import pathlib
from attnpo_jax import config

def get_config():
    return config.from_json(pathlib.Path({path!r}).read_text())
"""


def environment():
    """Variables of a process; the tests' compilation cache is among those that it inherits."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        # These models are too small for their compilation to pay.
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0",
    }


def start(setting, workdir, count, *arguments):
    """The local launcher with `count` processes, at least two virtual devices in all.

    For the arguments, see `tests.parallel.scripted`.
    """
    devices = max(1, 2 // count)
    command = [sys.executable, "launch/local.py", f"--processes={count}", f"--devices={devices}"]
    command += ["--", sys.executable, "-m", "tests.parallel.scripted"]
    return subprocess.Popen(
        [*command, str(setting / "config.json"), str(workdir), *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        if process.poll() is None:
            process.terminate()  # the launcher passes it on
    assert process.returncode == code, output
    return output


def run(setting, workdir, count, *arguments, code=0):
    return finish(start(setting, workdir, count, *arguments), code)


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
