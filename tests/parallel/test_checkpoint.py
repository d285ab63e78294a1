import errno
import os
import pathlib
import signal
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from attnpo_jax import config as config_lib
from attnpo_jax.parallel import checkpoint
from attnpo_jax.parallel.checkpoint import CheckpointError
from attnpo_jax.parallel.state import TrainState, create
from attnpo_jax.run import Run

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
IDENTITY = {"model": {"num_layers": 2}, "config": {"seed": 0, "layers": (0, 1)}, "prepared": "abc"}


def make_state(seed=0, width=16):
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "embedding": jax.random.normal(keys[0], (50, width)),
        "layers": {"down": jax.random.normal(keys[1], (2, width, 4), jnp.bfloat16)},
    }
    return create(params, OPTIMIZER)


@jax.jit
def advance(state):
    updates, opt_state = OPTIMIZER.update(state.params, state.opt_state, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)


def abstract(state):
    return jax.eval_shape(lambda: state)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


def save_steps(folder, *, number, keep=2):
    """Saves after each of `number` steps; returns the states on the host."""
    state, states = make_state(), {}
    with checkpoint.Checkpoints(folder, IDENTITY, keep=keep) as checkpoints:
        for step in range(1, number + 1):
            state = advance(state)
            states[step] = jax.device_get(state)
            checkpoints.save(state)
    return states


def test_restores_the_newest_exactly(tmp_path):
    states = save_steps(tmp_path, number=3)
    with checkpoint.Checkpoints(tmp_path, IDENTITY, keep=2) as checkpoints:
        assert checkpoints.steps() == [2, 3]
        restored = checkpoints.restore(abstract(make_state()))
    assert_same(restored, states[3])


def test_a_donated_state_is_saved_as_it_was_when_written_in_the_background(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_in_background", lambda: True)
    step = jax.jit(advance.__wrapped__, donate_argnums=0)
    state = advance(make_state(width=4096))
    expected = jax.tree.map(np.array, state)
    with checkpoint.Checkpoints(tmp_path, IDENTITY, keep=1) as checkpoints:
        checkpoints.save(state)
        for _ in range(5):
            state = step(state)
        checkpoints.wait()
        restored = checkpoints.restore(abstract(make_state(width=4096)))
    assert_same(restored, expected)


def test_checkpoints_are_where_the_config_says(tmp_path):
    config = config_lib.default_config()
    assert os.fspath(Run.resolve(config, tmp_path).checkpoint_folder) == f"{tmp_path}/checkpoints"
    pytest.importorskip("gcsfs")
    config.train.checkpoint_dir = "gs://bucket/run"
    assert os.fspath(Run.resolve(config, tmp_path).checkpoint_folder) == "gs://bucket/run"
    assert os.fspath(checkpoint._absolute("gs://bucket/run")) == "gs://bucket/run"


def test_accelerators_write_in_the_background_and_cpus_do_not(tmp_path, monkeypatch):
    made = []
    opened = checkpoint._open
    monkeypatch.setattr(checkpoint, "_open", lambda *a: made.append(a[1]) or opened(*a))
    for platform, asynchronous in (("cpu", False), ("gpu", True), ("tpu", True)):
        monkeypatch.setattr(checkpoint.jax, "default_backend", lambda name=platform: name)
        with checkpoint.Checkpoints(tmp_path / platform, IDENTITY, keep=1):
            assert made[-1].enable_async_checkpointing is asynchronous


def test_nothing_to_restore(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "new", IDENTITY, keep=1) as checkpoints:
        assert checkpoints.restore(abstract(make_state())) is None


def test_restores_onto_other_devices(tmp_path):
    states = save_steps(tmp_path, number=1)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(x):
        sharding = split if x.ndim > 1 else whole
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    wanted = jax.tree.map(place, abstract(make_state()))
    with checkpoint.Checkpoints(tmp_path, IDENTITY, keep=2) as checkpoints:
        restored = checkpoints.restore(wanted)
    assert_same(jax.device_get(restored), states[1])
    assert restored.params["embedding"].sharding == split
    assert restored.params["embedding"].addressable_shards[0].data.shape == (50, 4)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    save_steps(tmp_path, number=1)
    other = IDENTITY | {"model": {"num_layers": 3}, "config": {"seed": 1, "layers": [0, 1]}}
    with checkpoint.Checkpoints(tmp_path, other, keep=2) as checkpoints:
        with pytest.raises(checkpoint.CheckpointMismatch) as caught:
            checkpoints.restore(abstract(make_state(width=8)))
    message = str(caught.value)
    assert str(tmp_path / "1") in message
    assert "model.num_layers: 2 in the checkpoint, 3 here" in message
    assert "params.embedding: float32[50,16] in the checkpoint, float32[50,8] here" in message
    assert caught.value.differences["config.seed"] == (0, 1)
    assert "config.layers" not in caught.value.differences
    assert "another workdir" in message


def test_checkpoint_of_another_optimizer_is_refused(tmp_path):
    save_steps(tmp_path, number=1)
    wanted = abstract(create(make_state().params, optax.sgd(0.1)))
    with checkpoint.Checkpoints(tmp_path, IDENTITY, keep=2) as checkpoints:
        with pytest.raises(checkpoint.CheckpointMismatch, match="opt_state.*, nothing here"):
            checkpoints.restore(wanted)


def damage(folder, kind):
    """Damages the largest file of the parameters."""
    files = [p for p in (folder / "params").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    if kind == "truncated":
        largest.write_bytes(content[: len(content) // 2])
    elif kind == "gone":
        largest.unlink()
    elif kind == "one bit":
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    else:
        (folder / "metadata" / "metadata").write_bytes(kind)


# Of the metadata: not JSON, not UTF-8, too deep, no object, keys missing, and odd values.
METADATA = (
    b"{", b'{"sums": "\xff"}', b"[" * 100_000, b"[]", b"{}",
    b'{"identity": {}, "tree": [], "sums": {}}',
    b'{"identity": {}, "tree": {}, "sums": {"params.x": 1e30}}',
)  # fmt: skip


@pytest.mark.parametrize("kind", ["truncated", "gone", "one bit", *METADATA])
def test_damaged_newest_is_skipped_with_a_warning(tmp_path, kind):
    states = save_steps(tmp_path, number=3)
    damage(tmp_path / "3", kind)
    with checkpoint.Checkpoints(tmp_path, IDENTITY, keep=2) as checkpoints:
        with pytest.warns(RuntimeWarning, match=f"{tmp_path / '3'} is damaged and will be skipped"):
            restored = checkpoints.restore(abstract(make_state()))
        assert_same(restored, states[2])
        assert checkpoints.steps() == [2]
        # The run goes on and saves that step again.
        checkpoints.save(advance(restored))
    with checkpoint.Checkpoints(tmp_path, IDENTITY, keep=2) as checkpoints:
        assert_same(checkpoints.restore(abstract(make_state())), states[3])


def test_a_damaged_one_is_gone_from_memory_before_the_next_is_read(tmp_path, monkeypatch):
    save_steps(tmp_path, number=3)
    damage(tmp_path / "3", "one bit")
    read, live = checkpoint._read_metadata, []

    def read_and_look(manager, step):
        live.append(sum(x.nbytes for x in jax.live_arrays()))
        return read(manager, step)

    monkeypatch.setattr(checkpoint, "_read_metadata", read_and_look)
    with checkpoint.Checkpoints(tmp_path, IDENTITY, keep=2) as checkpoints:
        with pytest.warns(RuntimeWarning, match="checksum"):
            restored = checkpoints.restore(abstract(make_state()))
    state = sum(x.nbytes for x in jax.tree.leaves(restored))
    first, second = live
    assert second - first < state / 2, (live, state)


def test_a_write_in_the_background_that_fails_is_known_before_the_next_one(tmp_path, monkeypatch):
    class Failed:
        def result(self, timeout=None):
            raise OSError(errno.ENOSPC, "No space left on device")

    save = ocp.StandardCheckpointHandler.async_save

    async def save_and_fail(self, directory, *arguments, **options):
        written = await save(self, directory, *arguments, **options)
        return [*written, Failed()] if directory.name.startswith("params") else written

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "async_save", save_and_fail)
    monkeypatch.setattr(checkpoint, "_in_background", lambda: True)
    with pytest.raises(CheckpointError, match=f"written to {tmp_path}.*No space left on device"):
        with checkpoint.Checkpoints(tmp_path, IDENTITY, keep=2) as checkpoints:
            checkpoints.check()
            checkpoints.save(make_state())
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                checkpoints.check()
                time.sleep(0.01)
            pytest.fail("nobody was told")


def test_files_of_others_are_no_unfinished_checkpoints(tmp_path):
    states = save_steps(tmp_path, number=3)
    (tmp_path / "7").touch()
    (tmp_path / "1.orbax-checkpoint-tmp").mkdir()  # older than one that is whole
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with checkpoint.Checkpoints(tmp_path, IDENTITY, keep=2) as checkpoints:
            assert_same(checkpoints.restore(abstract(make_state())), states[3])


KILLED_WHILE_SAVING = """
import os, pathlib, signal, sys, threading
import jax.numpy as jnp
from attnpo_jax import config as config_lib
from attnpo_jax.parallel import checkpoint
from attnpo_jax.parallel.state import TrainState

def state(step):
    return TrainState(jnp.int32(step), {"w": jnp.full(30_000_000, step, jnp.float32)}, ())

def die_when_the_second_is_begun():
    while not list(pathlib.Path(sys.argv[1]).glob("2*/params*/*")):
        pass
    os.kill(os.getpid(), signal.SIGKILL)

checkpoints = checkpoint.Checkpoints(sys.argv[1], {}, keep=1)
checkpoints.save(state(1))
checkpoints.wait()
threading.Thread(target=die_when_the_second_is_begun).start()
checkpoints.save(state(2))
checkpoints.wait()
"""


@pytest.mark.process
def test_killed_while_saving_leaves_the_one_before(tmp_path):
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(os.listdir(tmp_path)) == 2  # the whole one and the torso
    torso = f"checkpoint {tmp_path / '2'} was not written to its end and is left out"
    wanted = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),
        {"w": jax.ShapeDtypeStruct((30_000_000,), jnp.float32)},
        (),
    )
    with pytest.warns(RuntimeWarning, match=torso):
        checkpoints = checkpoint.Checkpoints(tmp_path, {}, keep=1)
    with checkpoints:
        restored = checkpoints.restore(wanted)
    assert int(restored.step) == 1
    assert float(restored.params["w"].min()) == 1.0
    assert os.listdir(tmp_path) == ["1"]


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        ConnectionResetError("reset by peer"),
        OSError(errno.ESTALE, "Stale file handle"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.EHOSTUNREACH, "No route to host"),
        ValueError("RESOURCE_EXHAUSTED: out of memory while allocating"),
        ValueError("INTERNAL: CURL error"),
        jax.errors.JaxRuntimeError("INTERNAL: a device is lost"),
        ExceptionGroup("reading", [ValueError("DEADLINE_EXCEEDED: too slow")]),
    ],
)
def test_what_is_not_damage_is_not_skipped(tmp_path, monkeypatch, error):
    refuse_to_skip(tmp_path, monkeypatch, error)


def test_a_bucket_that_does_not_answer_is_no_damage(tmp_path, monkeypatch):
    retry = pytest.importorskip("gcsfs.retry")
    error = retry.HttpError({"code": 503, "message": "Service Unavailable"})
    refuse_to_skip(tmp_path, monkeypatch, error)


def refuse_to_skip(tmp_path, monkeypatch, error):
    def fail(manager, step):
        raise error

    save_steps(tmp_path, number=1)
    monkeypatch.setattr(checkpoint, "_read_metadata", fail)
    with checkpoint.Checkpoints(tmp_path, IDENTITY, keep=2) as checkpoints:
        words = f"{tmp_path / '1'} could not be read: "
        with warnings.catch_warnings(), pytest.raises(CheckpointError, match=words) as raised:
            warnings.simplefilter("error", RuntimeWarning)
            checkpoints.restore(abstract(make_state()))
    assert raised.value.__cause__ is error
    assert os.listdir(tmp_path) == ["1"]


def test_a_step_that_is_not_written_is_an_error(tmp_path):
    save_steps(tmp_path, number=2)
    with checkpoint.Checkpoints(tmp_path, IDENTITY, keep=2) as checkpoints:
        with pytest.raises(checkpoint.CheckpointError, match="no checkpoint of step 1 was written"):
            checkpoints.save(advance(make_state()))


def test_only_damaged_checkpoints_is_an_error_and_keeps_them(tmp_path):
    save_steps(tmp_path, number=1)
    damage(tmp_path / "1", "truncated")
    with checkpoint.Checkpoints(tmp_path, IDENTITY, keep=2) as checkpoints:
        with (
            pytest.warns(RuntimeWarning),
            pytest.raises(checkpoint.CheckpointError, match="none of the checkpoints.*delete them"),
        ):
            checkpoints.restore(abstract(make_state()))
    assert (tmp_path / "1").is_dir()


def test_restore_params_reads_them_alone(tmp_path):
    states = save_steps(tmp_path, number=2)
    params, step = checkpoint.restore_params(tmp_path, abstract(make_state()).params)
    assert step == 2
    assert_same(params, states[2].params)


def test_restore_params_refuses_another_model(tmp_path):
    save_steps(tmp_path, number=1)
    with pytest.raises(checkpoint.CheckpointMismatch, match="params.layers.down"):
        checkpoint.restore_params(tmp_path, abstract(make_state(width=8)).params)


def test_restore_params_without_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="train first"):
        checkpoint.restore_params(tmp_path, abstract(make_state()).params)


def test_full_disk_names_the_folder_and_keeps_what_was_there(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        states = save_steps(disk / "checkpoints", number=1)
        with pytest.raises(checkpoint.CheckpointError, match=f"{disk}/checkpoints.*stay usable"):
            checkpoints = checkpoint.Checkpoints(disk / "checkpoints", IDENTITY, keep=2)
            with checkpoints:
                pathlib.Path(disk / "filler").write_bytes(b"x" * 900_000)
                checkpoints.save(advance(advance(make_state())))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", RuntimeWarning)
            with checkpoint.Checkpoints(disk / "checkpoints", IDENTITY, keep=2) as checkpoints:
                assert_same(checkpoints.restore(abstract(make_state())), states[1])
        (words,) = [str(w.message) for w in told if "checkpoint" in str(w.message)]
        assert f"{disk}/checkpoints/2 was not written to its end" in words
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
