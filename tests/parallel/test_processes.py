"""Runs of two processes against runs of one. As a script: prepares and trains as it is told."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from attnpo_jax import config as config_lib
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.parallel import processes
from attnpo_jax.train import metrics
from tests.parallel import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_explicit_variables():
    environ = {
        "ATTNPO_COORDINATOR": "host:123",
        "ATTNPO_NUM_PROCESSES": "4",
        "ATTNPO_PROCESS_ID": "3",
    }
    assert processes.find(environ) == {
        "coordinator_address": "host:123",
        "num_processes": 4,
        "process_id": 3,
    }
    assert processes.find(environ | {"ATTNPO_DISTRIBUTED": "0"}) is None
    for change, words in (
        ({"ATTNPO_PROCESS_ID": "4"}, "accepted: 0 to 3"),
        ({"ATTNPO_PROCESS_ID": "x"}, "ATTNPO_PROCESS_ID is 'x'"),
        ({"ATTNPO_PROCESS_ID": ""}, "not ATTNPO_PROCESS_ID; set all or none"),
        ({"ATTNPO_COORDINATOR": "host"}, "accepted: host:port"),
        ({"ATTNPO_DISTRIBUTED": "yes"}, "accepted: 0, 1, or unset"),
    ):
        with pytest.raises(processes.ProcessesError, match=words):
            processes.find(environ | change)


@pytest.mark.parametrize(
    "environ, several",
    [
        ({}, False),
        ({"ATTNPO_DISTRIBUTED": "1"}, True),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_NTASKS": "8"}, False),  # a shell in an allocation
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ],
)
def test_clusters_that_jax_can_ask(environ, several):
    assert processes.find(environ) == ({} if several else None)


@pytest.fixture(scope="module")
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
    config.train.epochs = 2
    config.train.keep_checkpoints = 5
    config.parallel.mesh.data = 1
    config.parallel.mesh.fsdp = -1
    (folder / "config.json").write_text(config_lib.to_json(config))
    return folder


def start(setting, workdir, count, *arguments):
    """The local launcher with `count` processes, two virtual devices in all."""
    command = [sys.executable, "launch/local.py", f"--processes={count}", f"--devices={2 // count}"]
    command += ["--", sys.executable, "-m", "tests.parallel.test_processes"]
    environ = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(setting / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [*command, str(setting / "config.json"), str(workdir), *arguments],
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def run(setting, workdir, count, *arguments, code=0):
    return finish(start(setting, workdir, count, *arguments), code)


@pytest.fixture(scope="module")
def single(setting):
    workdir = setting / "single"
    run(setting, workdir, 1)
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


def test_two_processes_end_as_one_does(setting, single):
    workdir = setting / "two"
    output = run(setting, workdir, 2)
    for split in ("train", "eval"):
        ours, theirs = (Prepared.open(w / "prepared" / split) for w in (workdir, single))
        assert len(ours) == len(theirs) == {"train": 20, "eval": 5}[split]
        for row, other in zip(ours, theirs, strict=True):
            assert row.keys() == other.keys()
            for name, value in row.items():
                if isinstance(value, np.ndarray) and value.dtype == np.float32:
                    np.testing.assert_allclose(value, other[name], atol=1e-5, rtol=0)
                else:
                    assert np.array_equal(value, other[name]), name
    assert_same_metrics(workdir, single)
    # Exports hold the same parameters, and only the first process speaks.
    sizes = [(w / "export" / "model.safetensors").stat().st_size for w in (workdir, single)]
    assert sizes[0] == sizes[1]
    assert "[0] wrote" in output and "[1] wrote" not in output


@pytest.mark.parametrize("count", [1, 2])
def test_told_to_stop_it_saves_and_the_same_command_continues(setting, single, count):
    workdir = setting / f"stopped-{count}"
    stopped = run(setting, workdir, count, "--sigterm-at=3", code=75)
    assert "step" in stopped
    done = [line["step"] for line in metrics.read(workdir) if "loss" in line]
    assert 3 <= done[-1] < 10
    assert (workdir / "checkpoints" / str(done[-1])).is_dir()
    run(setting, workdir, count)
    assert_same_metrics(workdir, single)


def test_a_run_goes_on_with_another_number_of_processes(setting, single):
    workdir = setting / "moved"
    run(setting, workdir, 2, "--sigterm-at=3", code=75)
    run(setting, workdir, 1)
    assert_same_metrics(workdir, single)


def test_when_one_dies_the_others_end_too_and_a_restart_continues(setting, single):
    workdir = setting / "killed"
    process = start(setting, workdir, 2, "--kill-process-1-at=5", "--save-every=2")
    output, _ = process.communicate(timeout=300)
    ended = time.time()
    assert process.returncode == 128 + signal.SIGKILL, output
    assert "did not end by itself" not in output
    assert ended - float((workdir / "killed-at").read_text()) < 60, output
    assert (workdir / "checkpoints" / "4").is_dir()
    run(setting, workdir, 2, "--save-every=2")
    assert_same_metrics(workdir, single)


def main(config_file, workdir, *arguments):
    processes.initialize()
    import jax

    from attnpo_jax import prepare
    from attnpo_jax.export import export
    from attnpo_jax.parallel import preemption
    from attnpo_jax.train import loop

    config = config_lib.from_json(pathlib.Path(config_file).read_text())
    options = dict(argument.lstrip("-").split("=") for argument in arguments)
    config.train.save_every = int(options.get("save-every", 100))
    put_batch = loop.read_ahead

    def read_and_signal(batches, start=0):
        for number, batch in enumerate(put_batch(batches, start), start + 1):
            if type(batches).__name__ == "TrainBatches":
                last = jax.process_index() == jax.process_count() - 1
                if last and number == int(options.get("sigterm-at", -1)):
                    os.kill(os.getpid(), signal.SIGTERM)
                if jax.process_index() == 1 and number == int(options.get("kill-process-1-at", -1)):
                    (pathlib.Path(workdir) / "killed-at").write_text(str(time.time()))
                    os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    loop.read_ahead = read_and_signal
    prepare.prepare(config, workdir)
    try:
        loop.train(config, workdir)
    except preemption.Preempted as notice:
        print(notice)
        return 75
    folder = export(config, workdir)
    if processes.is_first():
        print(f"wrote {folder}", json.dumps(sorted(p.name for p in folder.iterdir())))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
