"""Runs of several processes against runs of one."""

import http.server
import re
import signal
import socket
import sys
import threading
import time

import numpy as np
import pytest
from rich.console import Console

from attnpo_jax import cli
from attnpo_jax import config as config_lib
from attnpo_jax.parallel import processes
from attnpo_jax.prepare.stage import prepare
from attnpo_jax.run import Run
from attnpo_jax.runtime import metrics
from tests import forked
from tests.parallel.runs import (
    CONFIG,
    assert_ended_by_itself,
    assert_same_exports,
    assert_same_metrics,
    assert_same_rows,
    environment,
    fed,
    finish,
    prepared_before,
    run,
    run_here,
)


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
        "cluster_detection_method": "deactivate",
    }
    assert processes.find(environ | {"ATTNPO_DISTRIBUTED": "0"}) is None
    for change, words in (
        ({"ATTNPO_PROCESS_ID": "4"}, "accepted: 0 to 3"),
        ({"ATTNPO_PROCESS_ID": "x"}, "ATTNPO_PROCESS_ID is 'x'"),
        ({"ATTNPO_NUM_PROCESSES": "0"}, "there must be at least one"),
        ({"ATTNPO_PROCESS_ID": ""}, "not ATTNPO_PROCESS_ID; set all or none"),
        ({"ATTNPO_COORDINATOR": "host"}, "accepted: host:port"),
        ({"ATTNPO_DISTRIBUTED": "yes"}, "accepted: 0, 1, or unset"),
    ):
        with pytest.raises(processes.ProcessesError, match=words):
            processes.find(environ | change)


def test_options_count_before_the_environment():
    options = {"coordinator-address": "host:123", "num-processes": "4", "process-id": "3"}
    for environ in ({}, {"ATTNPO_DISTRIBUTED": "0"}, {"ATTNPO_PROCESS_ID": "1"}):
        assert processes.find(environ, options) == {
            "coordinator_address": "host:123",
            "num_processes": 4,
            "process_id": 3,
            "cluster_detection_method": "deactivate",
        }


@pytest.mark.parametrize(
    "options, words",
    [
        (["--process-id=0"], "--process-id set, but not --coordinator-address, --num-processes"),
        (
            ["--coordinator-address=host", "--num-processes=2", "--process-id=0"],
            "--coordinator-address is 'host'; accepted: host:port",
        ),
        (
            ["--coordinator-address=host:1", "--num-processes=2", "--process-id=2"],
            "--process-id is 2 of 2 processes; accepted: 0 to 1",
        ),
        (
            ["--coordinator-address=host:1", "--num-processes=two", "--process-id=0"],
            "--num-processes is 'two'; accepted: a whole number",
        ),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(capsys, tmp_path, options, words):
    command = ["train", "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
    assert cli.main([*command, *options]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_plan_takes_no_process_options(capsys):
    command = ["plan", "--config=configs/quickstart.py", "--topology=v5e:2x2", "--process-id=0"]
    assert cli.main(command) == 2
    assert "unknown option --process-id" in capsys.readouterr().err


_POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


def test_indexed_job_needs_the_client_that_jax_asks_with(monkeypatch):
    pod = _POD
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(processes.ProcessesError, match="pip install kubernetes"):
        processes.find(pod)
    assert processes.find(pod | {"ATTNPO_DISTRIBUTED": "0"}) is None
    monkeypatch.setattr(
        processes.importlib.util, "find_spec", lambda name: name == "kubernetes" or None
    )
    assert processes.find(pod) == {}
    assert processes.find({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None  # no Job's pod
    assert (
        processes.find(pod | {"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    )  # a slice of one host


@pytest.mark.parametrize(
    "environ, several",
    [
        ({}, False),
        ({"ATTNPO_DISTRIBUTED": "1"}, True),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_NTASKS": "8"}, False),  # a shell in an allocation
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        # In a pod of an indexed Job, which would have to be asked about itself.
        ({"OMPI_COMM_WORLD_SIZE": "2", **_POD}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ],
)
def test_clusters_that_jax_can_ask(monkeypatch, environ, several):
    # Or it would look whether this is a Cloud TPU VM.
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    assert processes.find(environ) == ({} if several else None)


@pytest.mark.process
def test_two_slurm_tasks_on_nodes_of_their_own_meet_and_see_all_gpus():
    """With stand-ins for the variables that Slurm sets, as of `srun -N2 --ntasks-per-node=1`."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    code = (
        "import jax; from attnpo_jax.parallel import processes; assert processes.initialize(); "
        "print(jax.process_count(), jax.config.read('jax_cuda_visible_devices'))"
    )
    step = {
        "SLURM_JOB_ID": "17",
        "JAX_COORDINATOR_PORT": str(port),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_LOCALID": "0",
        "SLURM_GPUS_ON_NODE": "8",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
    }
    tasks = [
        forked.Process(
            [sys.executable, "-c", code],
            environment() | step | {"SLURM_PROCID": str(i), "SLURM_NODEID": str(i)},
        )
        for i in range(2)
    ]
    # Left to itself, JAX would say 0 here: the first GPU alone.
    said = [task.communicate(timeout=120)[0].splitlines()[-1] for task in tasks]
    assert said == ["2 all"] * 2


@pytest.mark.parametrize(
    "endpoints, changes, several",
    [
        ("10.0.0.2,10.0.0.3", {}, True),
        ("10.0.0.2", {}, False),
        ("10.0.0.2,10.0.0.3", {"TPU_SKIP_MDS_QUERY": "1"}, False),  # JAX saw no chips
        ("10.0.0.2,10.0.0.3", {"JAX_PLATFORMS": "cpu"}, False),
        ("10.0.0.2,10.0.0.3", {"ATTNPO_DISTRIBUTED": "0"}, False),
        (None, {}, False),  # chips, but not a Cloud TPU VM
    ],
)
def test_hosts_of_a_cloud_tpu_slice_find_each_other(monkeypatch, endpoints, changes, several):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = "/computeMetadata/v1/instance/attributes/worker-network-endpoints"
            there = endpoints and (self.path, self.headers["Metadata-Flavor"]) == (wanted, "Google")
            self.send_response(200 if there else 404)
            self.end_headers()
            self.wfile.write((endpoints or "").encode())

        def log_message(self, *_):
            pass

    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name == "libtpu")
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        environ = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"} | changes
        assert processes.find(environ) == ({} if several else None)
        server.shutdown()


@pytest.mark.process
def test_four_processes_end_as_one_does(setting, single):
    """All that `attnpo run` does: preparing, training, evaluating, exporting."""
    workdir = setting / "by-4"
    output = run(setting, workdir, 4, "--config.log.profile=4:6")
    assert_same_rows(workdir, single)
    assert_same_metrics(workdir, single)
    assert_same_exports(workdir, single)
    # Each has files of its own, though all have one host's name.
    traces = workdir.glob("profile/plugins/profile/steps-4-5/*.xplane.pb")
    assert sorted(file.name for file in traces) == [f"process-{i}.xplane.pb" for i in range(4)]
    # Only the first process speaks of the whole.
    assert re.findall(r"\[(\d)\] model \(Hugging Face\)", output) == ["0"]
    # Every process wrote shards of its own: 7 of the training pairs, 2 of the held-out ones.
    owners = re.findall(r"\[(\d)\] shard \d is written", output)
    assert sorted(set(owners)) == ["0", "1", "2", "3"] and len(owners) == 9

    wanted = fed(single, 1)
    # Both epochs have each of the 20 pairs once, each in an order of its own.
    epochs = [[pair[-1] for _, pairs in wanted[e : e + 5] for pair in pairs] for e in (0, 5)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs) and epochs[0] != epochs[1]
    assert_same_batches(fed(workdir, 4), wanted, more_rows=True)


def assert_same_batches(found, wanted, more_rows=False):
    """That all steps have the pairs of one process, in the same places.

    With more devices a microbatch has `more_rows`, and pairs may share them otherwise, and be in
    other microbatches of the step.
    """
    assert [step for step, _ in found] == [step for step, _ in wanted]
    for (step, pairs), (_, expected) in zip(found, wanted, strict=True):
        if more_rows:
            pairs, expected = (sorted(pair for *_, pair in of) for of in (pairs, expected))
        assert pairs == expected, step


@pytest.mark.process
def test_two_commands_that_say_by_options_who_they_are_share_a_model(setting, single, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    (tmp_path / "config.py").write_text(CONFIG.format(path=str(setting / "config.json")))
    command = [sys.executable, "-m", "attnpo_jax.cli", "prepare", "--config.prepare.devices=all"]
    scorers = ["kind.prefix=Be kind.", "new.function=diff"]
    scorers = [f"--config.prepare.scorers.{text}" for text in scorers]
    command += [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path}", *scorers]
    command += [f"--coordinator-address={address}", "--num-processes=2"]
    environ = environment()
    # The last one counts.
    environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
    commands = [forked.Process([*command, f"--process-id={index}"], environ) for index in range(2)]
    outputs = [finish(process) for process in commands]
    for index, output in enumerate(outputs):
        assert f"process {index} of 2, 1 of 2 devices" in output
    assert "preparing on 2 cpu devices (data 1, fsdp 2, tensor 1)" in outputs[0]
    assert "prepared: train" in outputs[0] and "prepared: train" not in outputs[1]
    assert_same_rows(tmp_path, single)
    # What each has tokenized for a scorer, the other one has too.
    config = config_lib.load_config(str(tmp_path / "config.py"), scorers)
    alone = Run.resolve(config, prepared_before(tmp_path / "alone", single))
    prepare(alone, console=Console(quiet=True))
    for split in ("train", "eval"):
        runs = Run.resolve(config, tmp_path), alone
        for row, other in zip(*(one.open_prepared(split) for one in runs), strict=True):
            assert row["scores_chosen"].shape == (2, len(row["chosen_ids"]))
            np.testing.assert_allclose(row["scores_chosen"], other["scores_chosen"], atol=1e-5)


@pytest.mark.process
def test_told_to_stop_at_any_time_it_saves_and_the_same_command_continues(setting, single):
    """By two processes, by four, by two again, one of which can't read all, then by one."""
    workdir = setting / "stopped"

    def checkpoints():
        return {path.name for path in (workdir / "checkpoints").iterdir()}

    stopped = run(setting, workdir, 2, "--sigterm-after-shard=1", code=75)
    assert stopped.count("shards of") == 2, stopped  # by both processes, though one was told
    assert 1 <= len(list((workdir / "prepared" / "train").glob("*.arrow"))) < 7
    assert not (workdir / "metrics.jsonl").exists()

    stopped = run(setting, workdir, 2, "--sigterm-at=3", code=75)
    first = [line["step"] for line in metrics.read(workdir) if "loss" in line][-1]
    assert 3 <= first < 9
    assert checkpoints() == {str(first)}

    # Notice while a resumed run starts stops it after its first step. Ctrl-C is notice too.
    stopped = run(setting, workdir, 4, "--interrupt=1", code=130)
    second = first + 1
    assert stopped.count("Ctrl-C again ends it at once") == 4
    assert stopped.count(f"step {second} of 10 is saved; the same command goes on") == 4, stopped
    assert checkpoints() == {str(first), str(second)}

    # What one process cannot read is skipped by all.
    unreadable = f"--process-1-cannot-read={second}"
    stopped = run(setting, workdir, 2, unreadable, "--sigterm-in-last-evaluation=1", code=75)
    damaged = rf"^\[(\d)\].*checkpoints/{second} is damaged and will be skipped"
    assert sorted(re.findall(damaged, stopped, re.MULTILINE)) == ["0", "1"], stopped
    assert "(CheckpointError: process 1 could not read its part)" in stopped
    assert "(ValueError: not what was written)" in stopped
    assert "step 10 of 10 is saved" in stopped
    assert checkpoints() == {str(first), f"damaged-{second}", "10"}
    assert [line["step"] for line in metrics.read(workdir)] == list(range(11))

    run_here(setting, workdir)
    assert_same_metrics(workdir, single)
    assert_same_exports(workdir, single)
    wanted = fed(single, 1)
    assert_same_batches(fed(workdir, 2), wanted)
    assert_same_batches(fed(workdir, 4), wanted[first:second], more_rows=True)


@pytest.mark.process
def test_when_the_first_one_dies_the_other_ends_too_and_a_restart_continues(setting, single):
    workdir = prepared_before(setting / "killed", single)
    options = ["--parts=train,export", "--config.train.save_every=2"]
    output = run(
        setting, workdir, 2, *options, "--victim=0", "--kill-at=5", code=128 + signal.SIGKILL
    )
    assert_ended_by_itself(output, workdir, victim=0)
    assert (workdir / "checkpoints" / "4").is_dir()
    run_here(setting, workdir, *options)
    assert_same_metrics(workdir, single)


@pytest.mark.process
def test_a_workdir_that_is_not_shared_is_refused_at_once(setting, tmp_path):
    for index in range(2):
        (tmp_path / f"of-{index}" / "x").mkdir(parents=True)
    output = run(setting, f"{tmp_path}/of-$ATTNPO_PROCESS_ID/x", 2, code=1)
    assert re.search(
        r"attnpo: error: workdir = '.*of-0.*' is another folder for process 1 than for process "
        "0; accepted: a folder on a disk that the hosts of all 2 processes mount",
        output,
    ), output
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "how, code, why",
    [
        ("UsageError", 2, "UsageError: no such field"),
        ("KeyboardInterrupt", 130, "KeyboardInterrupt: interrupted"),
    ],
)
@pytest.mark.process
def test_a_usage_error_or_ctrl_c_of_one_ends_all(tmp_path, how, code, why):
    script = tmp_path / "one.py"
    script.write_text(
        "import sys, time\n"
        "from attnpo_jax.parallel import failures\n"
        "from attnpo_jax.runtime import errors, program\n"
        "def main():\n"
        "    failures.join()\n"
        "    import jax\n"
        "    if jax.process_index() == 1:\n"
        f"        raise {'errors.' if how == 'UsageError' else ''}{how}('no such field')\n"
        "    time.sleep(600)\n"
        "sys.exit(program.exit_code('attnpo', main))\n"
    )
    command = [sys.executable, forked.LAUNCHER, "--processes=2", "--", sys.executable, script]
    begun = time.monotonic()
    output, ended = forked.run(command, environment())
    assert ended == code and time.monotonic() - begun < 60, output
    lines = output.splitlines()
    assert f"[0] attnpo: error: process 1 of 2 failed: {why}; process 0 of 2 ends too" in lines
    assert f"[0] process 0 of 2 ended: exit code {code}" in lines


@pytest.mark.parametrize("victim, other", [(1, 0), (0, 1)])
@pytest.mark.process
def test_when_one_fails_the_others_say_why_and_end(setting, single, tmp_path, victim, other):
    prepared_before(tmp_path, single)
    faults = [f"--victim={victim}", "--fail-at=2"]
    output = run(setting, tmp_path, 2, "--parts=train", *faults, code=1)
    ended = time.time()
    assert ended - float((tmp_path / "killed-at").read_text()) < 30, output
    lines = output.splitlines()
    assert f"[{victim}] attnpo: error: the disk is full" in lines
    why = f"process {victim} of 2 failed: OSError: the disk is full"
    assert (f"[{other}] attnpo: error: {why}; process {other} of 2 ends too") in lines
    for index in range(2):
        assert f"[{index}] process {index} of 2 ended: exit code 1" in lines
    assert "Traceback" not in output
