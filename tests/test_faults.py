"""Runs that something befalls, restarted, against the undisturbed run.

Whatever happened, the restarted run ends with the same metrics, prepared rows and model, with no
step or row lost or doubled. As a script, this file is `attnpo` with a fault: SIGKILL at a moment
that a test chooses. Faults of several processes are in
tests/parallel/test_processes.py and test_process_faults.py.
"""

import contextlib
import copy
import errno
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

from attnpo_jax import cli
from attnpo_jax import config as config_lib
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.data.prepared_writer import PreparedWriter
from attnpo_jax.parallel import backend as backends
from attnpo_jax.parallel import checkpoint
from attnpo_jax.prepare import stage as prepare
from attnpo_jax.run import Run, run
from attnpo_jax.runtime import metrics
from attnpo_jax.runtime.errors import Preempted
from attnpo_jax.train import loop
from tests import forked, tiny

pytestmark = pytest.mark.process

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 10
CONFIG = """
import pathlib
from attnpo_jax import config
from attnpo_jax.runtime.errors import Preempted

def get_config():
    return config.from_json(pathlib.Path({path!r}).read_text())
"""


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A config of ten steps that saves at every other."""
    folder = tmp_path_factory.mktemp("faults")
    config = tiny.write_inputs(folder)
    config.prepare.rows_per_shard = 4
    config.train.save_every = 2
    config.train.keep_checkpoints = 3
    config.log.progress = False
    (folder / "config.json").write_text(config_lib.to_json(config))
    (folder / "config.py").write_text(CONFIG.format(path=str(folder / "config.json")))
    return folder, config


@pytest.fixture
def use_devices(monkeypatch):
    """A function that gives runs the first n of this process's devices, `fsdp` over all of them."""

    def use(number):
        def make(model, *_):
            sizes = {"data": 1, "fsdp": number, "tensor": 1}
            return backends.Sharded(model, sizes, jax.devices()[:number])

        monkeypatch.setattr(backends, "for_training", make)
        monkeypatch.setattr(backends, "for_preparing", make)

    use(1)
    return use


@pytest.fixture(scope="module")
def undisturbed(setting):
    folder, config = setting
    with pytest.MonkeyPatch.context() as patch:
        for name in ("for_training", "for_preparing"):
            patch.setattr(backends, name, lambda model, *_: backends.one_device(model))
        run(Run.resolve(config, folder / "undisturbed"))
    return folder / "undisturbed"


def prepared_before(workdir, undisturbed):
    """A run that finds the rows prepared."""
    shutil.copytree(undisturbed / "prepared", workdir / "prepared")
    return workdir


def assert_same_rows(workdir, expected):
    for split, number in (("train", 20), ("eval", 5)):
        ours, theirs = (Prepared.open(w / "prepared" / split) for w in (workdir, expected))
        assert [row["id"] for row in ours] == [f"p{i}" for i in range(number)]
        for row, other in zip(ours, theirs, strict=True):
            for name in ("judge_chosen", "judge_verdict", "ref_rejected_logps", "chosen_ids"):
                np.testing.assert_allclose(row[name], other[name], atol=1e-5, rtol=0)


def assert_same(workdir, expected, rtol=1e-6):
    """Rows, metrics and model of two workdirs; looser where the numbers of devices differ."""
    assert_same_rows(workdir, expected)
    lines, wanted = metrics.read(workdir), metrics.read(expected)
    assert [line["step"] for line in lines] == [0, *range(1, STEPS + 1), STEPS]
    for line, other in zip(lines, wanted, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            # Until the first update with a rate above 0, margins are 0 but for rounding.
            chance = "accuracies" in name and line["step"] <= 2 and rtol > 1e-6
            if not name.endswith("_per_second") and not chance:
                assert value == pytest.approx(other[name], rel=rtol, abs=rtol), name
    ours, theirs = (
        safetensors.numpy.load_file(w / "export" / "model.safetensors") for w in (workdir, expected)
    )
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=rtol, err_msg=name)


def train_lines(workdir):
    return [line["step"] for line in metrics.read(workdir) if "loss" in line]


def saved_steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def sigterm_at(monkeypatch, step):
    """SIGTERM comes to this process while it makes that step's batch; 0: never."""
    read = loop.__dict__.get("_read_ahead", loop.read_ahead)
    monkeypatch.setattr(loop, "_read_ahead", read, raising=False)

    def read_and_signal(batches, start=0):
        for number, batch in enumerate(read(batches, start), start + 1):
            if isinstance(batches, loop.TrainBatches) and number == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(loop, "read_ahead", read_and_signal)


def killed(setting, workdir, fault):
    """`attnpo run` in a process of its own that SIGKILL ends at `fault`."""
    folder, _ = setting
    command = [sys.executable, "-m", "tests.test_faults", fault, folder / "config.py", workdir]
    output, code = forked.run(command, os.environ)
    assert code == -signal.SIGKILL, output


def test_sigkill_while_preparing(setting, undisturbed, use_devices):
    workdir = setting[0] / "killed-preparing"
    killed(setting, workdir, "preparing")
    prepared = workdir / "prepared" / "train"
    shards = sorted(prepared.glob("*.arrow"))
    assert len(shards) == 2 and list(prepared.glob(".*.tmp"))  # two of five, and a torso
    written = [shard.stat().st_mtime_ns for shard in shards]
    run(Run.resolve(setting[1], workdir))
    assert [shard.stat().st_mtime_ns for shard in shards] == written
    assert not list(prepared.glob(".*.tmp"))
    assert_same(workdir, undisturbed)


def test_sigkill_while_training(setting, undisturbed, use_devices):
    workdir = prepared_before(setting[0] / "killed-training", undisturbed)
    killed(setting, workdir, "training")
    assert train_lines(workdir) == [1, 2, 3, 4, 5] and saved_steps(workdir) == [2, 4]
    run(Run.resolve(setting[1], workdir))
    assert_same(workdir, undisturbed)


def test_sigkill_while_saving(setting, undisturbed, use_devices):
    workdir = prepared_before(setting[0] / "killed-saving", undisturbed)
    killed(setting, workdir, "saving")
    assert train_lines(workdir) == [1, 2, 3, 4] and saved_steps(workdir) == [2]
    assert len(list((workdir / "checkpoints").iterdir())) == 2  # the whole one and the torso
    with pytest.warns(RuntimeWarning, match="checkpoints/4 was not written to its end"):
        run(Run.resolve(setting[1], workdir))
    assert_same(workdir, undisturbed)


def test_sigkill_while_saving_in_the_background(setting, undisturbed, use_devices, monkeypatch):
    """As on accelerators: training goes on while a checkpoint is written."""
    workdir = prepared_before(setting[0] / "killed-saving-in-the-background", undisturbed)
    killed(setting, workdir, "saving-in-the-background")
    # It goes on until the next save, which waits for this one.
    assert train_lines(workdir) in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6])
    assert saved_steps(workdir) == [2] and len(list((workdir / "checkpoints").iterdir())) == 2
    monkeypatch.setattr(checkpoint, "_in_background", lambda: True)
    with pytest.warns(RuntimeWarning, match="checkpoints/4 was not written to its end"):
        run(Run.resolve(setting[1], workdir))
    assert saved_steps(workdir) == [6, 8, 10]
    assert_same(workdir, undisturbed)


def test_a_write_in_the_background_that_fails_ends_the_run(
    setting, undisturbed, use_devices, monkeypatch
):
    workdir = prepared_before(setting[0] / "full-disk", undisturbed)
    rename = os.rename

    def rename_or_fail(source, target, *arguments, **options):
        if pathlib.Path(target).name == "6":
            raise OSError(errno.ENOSPC, "No space left on device", os.fspath(target))
        return rename(source, target, *arguments, **options)

    monkeypatch.setattr(checkpoint, "_in_background", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename_or_fail)
        with pytest.raises(checkpoint.CheckpointError, match="No space left on device"):
            run(Run.resolve(setting[1], workdir))
    assert saved_steps(workdir) == [2, 4]
    assert not (workdir / "export").exists()
    run(Run.resolve(setting[1], workdir))
    assert_same(workdir, undisturbed)


@pytest.mark.parametrize("last", [1, 4])
def test_sigterm_while_preparing(setting, undisturbed, use_devices, monkeypatch, last):
    workdir = setting[0] / f"stopped-preparing-{last}"
    write = PreparedWriter.write

    def write_and_signal(self, shard, *rows):
        write(self, shard, *rows)
        if shard == last:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(PreparedWriter, "write", write_and_signal)
    with pytest.raises(Preempted, match="prepared/train that were finished stay"):
        prepare.prepare(Run.resolve(setting[1], workdir))
    # The shard that was computed while that one was written may be there too.
    there = len(list((workdir / "prepared" / "train").glob("*.arrow")))
    assert last + 1 <= there <= min(last + 2, 5)
    monkeypatch.setattr(PreparedWriter, "write", write)
    prepare.prepare(Run.resolve(setting[1], workdir))
    assert_same_rows(workdir, undisturbed)


def test_sigterm_when_evaluation_is_due(setting, undisturbed, use_devices, monkeypatch):
    """It is left to the resumed run, also after the last step."""
    workdir = prepared_before(setting[0] / "stopped-at-the-end", undisturbed)
    sigterm_at(monkeypatch, STEPS)
    with pytest.raises(Preempted, match="step 10 of 10 is saved"):
        run(Run.resolve(setting[1], workdir))
    assert [line["step"] for line in metrics.read(workdir)] == list(range(STEPS + 1))
    assert saved_steps(workdir)[-1] == STEPS and not (workdir / "export").exists()
    sigterm_at(monkeypatch, 0)
    run(Run.resolve(setting[1], workdir))
    assert_same(workdir, undisturbed)


@pytest.mark.parametrize("evaluation, step", [(1, 0), (2, STEPS)])
def test_sigterm_during_an_evaluation(
    setting, undisturbed, use_devices, monkeypatch, evaluation, step
):
    """It is left off at once, and done again, whole, by the resumed run."""
    workdir = prepared_before(setting[0] / f"stopped-evaluating-{evaluation}", undisturbed)
    batches_made, read = [], loop.read_ahead

    def read_and_signal(batches, start=0):
        for batch in read(batches, start):
            if isinstance(batches, loop.EvalBatches):
                assert len(batches) == 3
                batches_made.append(batch)
                if len(batches_made) == 3 * (evaluation - 1) + 2:
                    os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(loop, "read_ahead", read_and_signal)
    with pytest.raises(Preempted, match=f"step {step} of 10"):
        run(Run.resolve(setting[1], workdir))
    assert len(batches_made) == 3 * (evaluation - 1) + 2  # its third was not even made
    evaluated = [line["step"] for line in metrics.read(workdir) if "eval_loss" in line]
    assert evaluated == [0] * (evaluation - 1)
    assert not step or saved_steps(workdir)[-1] == step
    run(Run.resolve(setting[1], workdir))
    assert_same(workdir, undisturbed)


def test_newest_checkpoint_truncated(setting, undisturbed, use_devices, monkeypatch):
    workdir = prepared_before(setting[0] / "truncated", undisturbed)
    sigterm_at(monkeypatch, 7)
    with pytest.raises(Preempted, match="step 7 of 10 is saved"):
        run(Run.resolve(setting[1], workdir))
    assert saved_steps(workdir) == [4, 6, 7]
    files = [p for p in (workdir / "checkpoints" / "7" / "params").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    sigterm_at(monkeypatch, 0)
    with pytest.warns(RuntimeWarning, match="checkpoints/7 is damaged and will be skipped"):
        run(Run.resolve(setting[1], workdir))
    assert_same(workdir, undisturbed)


def test_checkpoints_in_a_bucket(setting, undisturbed, use_devices, monkeypatch, bucket):
    """Stopped, with the newest checkpoint truncated, then continued."""
    name, server = bucket
    workdir = prepared_before(setting[0] / "bucket", undisturbed)
    config = copy.deepcopy(setting[1])
    config.train.checkpoint_dir = f"gs://{name}/run/checkpoints"

    def objects(folder):
        """Sizes of the objects in a folder of the bucket, by name."""
        listing = f"{server}/storage/v1/b/{name}/o?prefix={folder}/"
        with urllib.request.urlopen(listing) as answer:
            return {x["name"]: int(x["size"]) for x in json.load(answer)["items"]}

    def steps():
        return {name.split("/")[2] for name in objects("run/checkpoints")}

    sigterm_at(monkeypatch, 7)
    with pytest.raises(Preempted, match="step 7 of 10 is saved"):
        run(Run.resolve(config, workdir))
    assert steps() == {"4", "6", "7"}
    sizes = objects("run/checkpoints/7/params")
    largest = max(sizes, key=sizes.get)
    address = f"{server}/{name}/{largest}"
    with urllib.request.urlopen(address) as answer:
        half = answer.read()[: sizes[largest] // 2]
    urllib.request.urlopen(urllib.request.Request(address, half, method="PUT")).close()
    assert objects("run/checkpoints/7/params")[largest] == len(half) > 0
    sigterm_at(monkeypatch, 0)
    with pytest.warns(RuntimeWarning, match="gs://bucket/run/checkpoints/7 is damaged and will be"):
        run(Run.resolve(config, workdir))
    assert steps() == {"6", "8", "10", "damaged-7"}
    assert_same(workdir, undisturbed)
    assert not (workdir / "checkpoints").exists() and not pathlib.Path("gs:").exists()


def test_resumed_on_1_then_4_then_2_devices(setting, undisturbed, use_devices, monkeypatch):
    workdir = prepared_before(setting[0] / "moved", undisturbed)
    for devices, stop in ((1, 3), (4, 7), (2, 0)):
        use_devices(devices)
        sigterm_at(monkeypatch, stop)
        if stop:
            with pytest.raises(Preempted, match=f"step {stop} of 10 is saved"):
                run(Run.resolve(setting[1], workdir))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                run(Run.resolve(setting[1], workdir))
    assert_same(workdir, undisturbed, rtol=1e-4)


def fill_disk(file, spare):
    """Leaves no more than so many bytes free."""
    with file.open("wb", buffering=0) as ballast:
        with contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(1 << 16))
        ballast.truncate(max(0, ballast.tell() - spare))


# A disk of 16 MB that only this command sees; what is on it in the end is copied out.
ON_SMALL_DISK = """
mount -t tmpfs -o size=16m tmpfs "$1" && cp -r "$2/prepared" "$1" || exit 99
shift 2
"$@"
code=$?
rm -f "$6/ballast"
cp -r "$6/." "$6-copy"
exit $code
"""
IN_NAMESPACE = ("unshare", "--map-root-user", "--mount")


def has_namespaces():
    script = 'mount -t tmpfs tmpfs "$(mktemp -d)"'
    try:
        done = subprocess.run([*IN_NAMESPACE, "sh", "-c", script], capture_output=True)
    except FileNotFoundError:
        return False
    return done.returncode == 0


@pytest.mark.parametrize("how", ["full-disk", "full-disk-in-the-background"])
def test_a_full_disk_is_one_message_and_room_is_all_it_takes(
    setting, undisturbed, use_devices, how
):
    if not has_namespaces():
        pytest.skip("mounting a small disk takes a kernel that lets users have namespaces")
    folder, config = setting
    workdir = folder / f"small-disk-{how}"
    workdir.mkdir()
    program = [sys.executable, "-m", "tests.test_faults", how, folder / "config.py", workdir]
    script = ["sh", "-c", ON_SMALL_DISK, "sh", workdir, undisturbed, *program]
    done = subprocess.run(
        [*IN_NAMESPACE, *map(str, script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    # As the program ends, Python may find a coroutine of Orbax's that the failure left unawaited.
    unawaited = re.compile(r"RuntimeWarning: (coroutine .* was never awaited|Enable tracemalloc)")
    *lines, last = (line for line in done.stderr.splitlines() if not unawaited.search(line))
    remedy = "; make room there, and the same command goes on from what is saved"
    assert last in (
        f"attnpo: error: a checkpoint could not be written to {workdir}/checkpoints: No space left "
        f"on device; those written before stay usable{remedy}",
        # What is written while the checkpoint is may meet the full disk first.
        f"attnpo: error: [Errno 28] No space left on device: '{workdir}/metrics.jsonl'{remedy}",
    )
    # All else is the log of this package.
    assert [line for line in lines if "INFO" not in line] == [], done.stderr
    shutil.copytree(f"{workdir}-copy", workdir, dirs_exist_ok=True)
    assert saved_steps(workdir) == [2]
    with pytest.warns(RuntimeWarning, match="checkpoints/4 was not written to its end"):
        run(Run.resolve(config, workdir))
    assert_same(workdir, undisturbed)


def main(fault, config, workdir):
    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def wait_for_step(step):
        while train_lines(pathlib.Path(workdir))[-1] < step:
            time.sleep(0.01)

    # One of as many devices as in the tests' own process: another number rounds otherwise.
    backends.for_training = backends.for_preparing = lambda model, *_: backends.one_device(model)
    if "in-the-background" in fault:
        checkpoint._in_background = lambda: True
    if fault.startswith("full-disk"):
        save = checkpoint.Checkpoints.save

        def save_without_room(self, state):
            if int(state.step) == 4:
                while saved_steps(pathlib.Path(workdir)) != [2]:  # still in the background
                    time.sleep(0.01)
                fill_disk(pathlib.Path(workdir) / "ballast", spare=100_000)
            save(self, state)

        checkpoint.Checkpoints.save = save_without_room
    elif fault == "training":
        write = metrics.MetricsWriter.write

        def write_and_die(self, step, values):
            write(self, step, values)
            if step == 5:
                die()

        metrics.MetricsWriter.write = write_and_die
    else:
        # What has been written whole gets its final name: the last moment at which it has not.
        name = "data-00002-of-00005.arrow" if fault == "preparing" else "4"

        def dying(rename):
            def rename_or_die(source, target, *arguments, **options):
                if pathlib.Path(target).name == name:
                    if fault == "saving-in-the-background":
                        wait_for_step(5)
                    die()
                return rename(source, target, *arguments, **options)

            return rename_or_die

        os.replace, os.rename = dying(os.replace), dying(os.rename)
    return cli.main(["run", f"--config={config}", f"--workdir={workdir}"])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
