"""Checkpoints of a training run, checked when they are read.

A checkpoint is a folder named after its step with three items: `params`, `optimizer` (the
optimizer's state and the step), and `metadata`, a JSON object with

- `identity`: what a run must share with the one that it continues, as nested JSON;
- `tree`: dtype and shape of every array, by path;
- `sums`: a checksum of every array, since neither Orbax nor the file format has one.

The step says all of the position in the data and of its order. Checkpoints are written in the
background where the devices have memory of their own. Orbax writes under a temporary name first, so
that whatever has a final name was whole once; in a bucket, it adds a file at the end instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from attnpo_jax.parallel import failures, orbax_noise
from attnpo_jax.parallel.checkpoint_damage import (
    CheckpointError,
    CheckpointMismatch,
    newest_whole,
    outcomes_of_all,
    set_aside,
)
from attnpo_jax.parallel.state import TrainState
from attnpo_jax.runtime import disk, nested, schema

_ITEMS = ("params", "optimizer", "metadata")
_METADATA = schema.Table(
    {
        "identity": schema.Mapped(schema.Anything()),
        "tree": schema.Mapped(schema.Text()),
        "sums": schema.Mapped(schema.Whole(0, 2**32 - 1)),
    },
    open=True,
)


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Which checkpoints Orbax leaves: the newest, and the best one."""

    of: Checkpoints
    newest: int

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        first = len(checkpoints) - self.newest
        return [k >= first or info.step == self.of.best for k, info in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints of one workdir; a context manager that ends when all is written.

    Args:
      folder: where they are; made if need be. A path of this machine or what else Orbax can write.
      identity: nested JSON values that a run must share with the checkpoint that it continues.
      keep: how many of the newest to keep; an old one goes after the new one is whole.

    Attributes:
      best: a step whose checkpoint stays beside the newest, if it has one; the same on all
        processes.
    """

    best: int | None = None

    def __init__(self, folder: str | os.PathLike, identity: Mapping[str, Any], *, keep: int):
        self.folder = _absolute(folder)
        self._identity = identity
        self._failure: BaseException | None = None  # of a write in the background
        if jax.process_index() == 0:
            _warn_of_unfinished(self.folder)
        orbax_noise.silence()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Kept(self, keep),
            enable_async_checkpointing=_in_background(),
            async_options=ocp.AsyncOptions(barrier_sync_fn=self._meet),
            # By process 0, with a barrier: nobody lists what is being removed.
            cleanup_tmp_directories=True,
        )
        with _naming_failures(self.folder):
            self._manager = _open(self.folder, options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is None:
            self.wait()
            self._manager.close()
            return
        if isinstance(error, Exception) and failures.is_loss(error):
            return  # what is being written waits for who is gone; this process is to end at once
        with contextlib.suppress(Exception):  # what ends the run already is what it is told of
            self._manager.close()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState) -> None:
        """Writes a checkpoint of `state`, or starts to; the caller may donate it right after.

        Waits for the write before it, if that is still going on. CheckpointError says that this
        write failed, or the one before it.
        """
        step, state = int(state.step), _without_base(state)
        metadata = {"identity": self._identity, "tree": _describe(state), "sums": _checksums(state)}
        with _naming_failures(self.folder):
            written = self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(_optimizer_item(state)),
                    metadata=ocp.args.JsonSave(metadata),
                ),
            )
        if not written:
            raise CheckpointError(
                f"no checkpoint of step {step} was written to {self.folder}, which has one of step "
                f"{self._manager.latest_step()}; accepted: steps in increasing order"
            )

    def check(self) -> None:
        """Raises a `CheckpointError` if what is being written has failed; does not wait for it."""
        # Orbax keeps it to itself until the next write, which may be hours away.
        if self._failure is not None:
            with _naming_failures(self.folder):
                raise self._failure

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier of background writes, but for a process whose write has failed.

        Orbax has it wait for the others, who wait for that write, until the barrier's time is up.
        """
        error = sys.exception()
        if error is not None:
            self._failure = error
            raise RuntimeError(str(error)) from error
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def wait(self) -> None:
        """Returns when what is being written is whole."""
        with _naming_failures(self.folder):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The newest whole checkpoint, or None if there is none at all.

        A damaged one is skipped with a warning and, once an older one has been read, set aside as
        `damaged-<step>`, so that the run can save that step again.

        Args:
          abstract: the state as `jax.ShapeDtypeStruct`s; arrays go to their shardings, or to the
            default device where they have none. Its `base` and `reference` are left out: what is
            read has none.

        Raises:
          CheckpointMismatch: the newest one has another identity, or arrays of other shapes.
          CheckpointError: there are checkpoints, but all are damaged; or this or another process
            could not read one for a reason that is not damage, such as missing permission.
        """

        abstract = _without_base(abstract)

        def load(step: int) -> tuple[dict[str, Any], Any]:
            optimizer = _optimizer_item(abstract)
            return _load(reader, self.folder, step, abstract.params, optimizer, self._identity)

        # Every process reads its part alone: one that fails leaves no other in a barrier of Orbax.
        with _reader(self.folder) as reader:
            found = newest_whole(self.folder, self.steps(), load, _verify, outcomes_of_all)
        if found is None:
            return None
        _, items, damaged = found
        if damaged:
            if jax.process_index() == 0:
                for step in damaged:
                    set_aside(self.folder / str(step))
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
            self._manager.reload()
        return dataclasses.replace(abstract, **items)


def _absolute(folder: str | os.PathLike) -> epath.Path:
    path = epath.Path(folder)
    # Resolved, a bucket's name would become a folder of this machine.
    return path if "://" in os.fspath(path) else epath.Path(os.path.realpath(path))


def _warn_of_unfinished(folder: epath.Path) -> None:
    """Tells of checkpoints that were never whole, which are not read and soon removed."""
    if not folder.exists():
        return
    whole = {False: [0], True: [0]}
    for path in folder.iterdir():
        step = path.name.partition(".")[0]
        if step.isdigit() and path.is_dir():
            whole[ocp.utils.is_checkpoint_finalized(path)].append(int(step))
    for step in sorted(whole[False]):
        # What is older than a whole one was on its way out.
        if step > max(whole[True]):
            warnings.warn(
                f"checkpoint {folder / str(step)} was not written to its end and is left out; the "
                "run goes on from the one before it, or from the start if there is none",
                RuntimeWarning,
                stacklevel=3,
            )


def _in_background() -> bool:
    """Whether a checkpoint is written while training goes on."""
    # On CPU the copy that is being written would lie in memory beside the next step (1.7 GiB more
    # for 135M parameters), and the writer would take the step's cores.
    return jax.default_backend() != "cpu"


def origin(folder: str | os.PathLike, step: int | None = None) -> dict[str, Any] | None:
    """A checkpoint's step, the newest by default, and a digest of its parameters' checksums.

    None if there is no checkpoint or its metadata can't be read.
    """
    with _reader(folder) as manager:
        steps = sorted(manager.all_steps()) if step is None else [step]
        try:
            sums = _read_metadata(manager, steps[-1])["sums"] if steps else None
        except (ValueError, KeyError, OSError):
            return None  # damaged; restoring tells of it
    if sums is None:
        return None
    of_params = {path: total for path, total in sums.items() if path.startswith("params")}
    text = json.dumps(of_params, sort_keys=True)
    return {"step": steps[-1], "params": hashlib.sha256(text.encode()).hexdigest()}


def saved_steps(folder: str | os.PathLike) -> list[int]:
    """Steps that have a checkpoint, in order."""
    if not _absolute(folder).exists():
        return []
    with _reader(folder) as manager:
        return sorted(manager.all_steps())


def newest_identity(
    folder: str | os.PathLike, step: int | None = None
) -> tuple[int, Mapping[str, Any]] | None:
    """The step and identity of a checkpoint, the newest by default.

    None if there is none or it can't be read.
    """
    if not _absolute(folder).exists():
        return None
    with _reader(folder) as manager:
        steps = sorted(manager.all_steps()) if step is None else [step]
        try:
            return (steps[-1], _read_metadata(manager, steps[-1])["identity"]) if steps else None
        except (ValueError, KeyError, OSError):
            return None  # damaged; restoring tells of it


def restore_params(
    folder: str | os.PathLike,
    abstract_params: Any,
    identity: Mapping[str, Any] | None = None,
    *,
    step: int | None = None,
) -> tuple[Any, int]:
    """The parameters of a checkpoint in `folder`, and its step; nothing is changed.

    Args:
      abstract_params: the parameters as `jax.ShapeDtypeStruct`s; see `Checkpoints.restore`. Where
        they go to devices of several processes, all of these must call together.
      identity: the part of the checkpoint's identity that matters to the caller.
      step: the checkpoint's; None for the newest whole one.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    folder = _absolute(folder)
    with _reader(folder) as manager:

        def load(step: int) -> tuple[dict[str, Any], Any]:
            return _load(manager, folder, step, abstract_params, None, identity or {})

        together = any(
            x.sharding is not None and not x.sharding.is_fully_addressable
            for x in jax.tree.leaves(abstract_params)
        )
        outcomes = outcomes_of_all if together else lambda own: [own]
        steps = sorted(manager.all_steps()) if step is None else [step]
        found = newest_whole(folder, steps, load, _verify, outcomes)
    if found is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint: train first")
    step, items, _ = found
    return items["params"], step


def _load(
    manager: ocp.CheckpointManager,
    folder: epath.Path,
    step: int,
    params: Any,
    optimizer: dict[str, Any] | None,
    identity: Mapping[str, Any],
) -> tuple[dict[str, Any], Mapping[str, int]]:
    """Arrays like the abstract ones, and the checksums of all that the checkpoint has.

    Where no optimizer is asked for, neither are the other arrays of a run, nor what else its
    identity has.
    """
    metadata = _read_metadata(manager, step)
    tree, absent = metadata["tree"], "nothing"
    if optimizer is None:
        tree = {path: kind for path, kind in tree.items() if path.startswith("params")}
    found = nested.differences(metadata["identity"], identity, absent)
    if optimizer is None:
        found = {name: pair for name, pair in found.items() if pair[1] != absent}
    items = {"params": params, **(optimizer or {})}
    found |= nested.differences(tree, _describe(items), absent)
    if found:
        raise CheckpointMismatch(folder / str(step), found)
    args = {"params": ocp.args.StandardRestore(_placed(params))}
    if optimizer is not None:
        args["optimizer"] = ocp.args.StandardRestore(_placed(optimizer))
    restored = manager.restore(step, args=ocp.args.Composite(**args))
    return {"params": restored["params"], **(restored.get("optimizer") or {})}, metadata["sums"]


@contextlib.contextmanager
def _reader(folder: str | os.PathLike) -> Iterator[ocp.CheckpointManager]:
    # Of several processes, the one that asks reads alone.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone)
    manager = _open(_absolute(folder), options)
    try:
        yield manager
    finally:
        manager.close()


def _open(folder: epath.Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    handlers = {
        "params": ocp.StandardCheckpointHandler(),
        "optimizer": ocp.StandardCheckpointHandler(),
        "metadata": ocp.JsonCheckpointHandler(),
    }
    assert tuple(handlers) == _ITEMS
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def _without_base(state: TrainState) -> TrainState:
    # It does not change, and is where the run took it from; so it is with the reference.
    return dataclasses.replace(state, base=None, reference=None)


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state}


def _read_metadata(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
    try:
        metadata = manager.restore(step, args=args)["metadata"]
        schema.check(metadata, _METADATA)
    except RecursionError:
        raise schema.SchemaError("has brackets nested too deeply", "metadata") from None
    return metadata


def _placed(abstract: Any) -> Any:
    """Gives every array a sharding: without one, Orbax would use that of the run that saved it."""
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def place(x) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or default)

    return jax.tree.map(place, abstract)


def _describe(tree: Any) -> dict[str, str]:
    """Dtype and shape of every array, by path: {"params.final_norm": "float32[576]", ...}."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            f"{jnp.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"
        )
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


@jax.jit
def _bit_sums(arrays: list[jax.Array]) -> list[jax.Array]:
    def bit_sum(x):
        # Integers add up exactly, so the sum is the same on any number of devices.
        bits = x.view(f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        return jnp.sum(bits, dtype=jnp.uint32)

    return [bit_sum(x) for x in arrays]


def _checksums(tree: Any) -> dict[str, int]:
    """The sum modulo 2^32 of every array's bit patterns, by path; any single flip changes it."""
    sums = jax.device_get(_bit_sums(jax.tree.leaves(tree)))
    return dict(zip(_describe(tree), map(int, sums), strict=True))


def _verify(tree: Any, sums: Mapping[str, int]) -> None:
    for path, found in _checksums(tree).items():
        if found != sums[path]:
            raise CheckpointError(f"{path}: checksum {found}, written with {sums[path]}")


@contextlib.contextmanager
def _naming_failures(folder: epath.Path) -> Iterator[None]:
    """Turns what Orbax raises on a failed write into a `CheckpointError` that names the folder."""
    try:
        yield
    except Exception as error:
        # Who misses another process has not failed to write.
        if failures.is_loss(error):
            raise
        # TensorStore says it in ten lines, with the temporary name of an array's file.
        words = disk.shortage(error)
        raise CheckpointError(
            f"a checkpoint could not be written to {folder}: {words or error}; those written "
            f"before stay usable{f'; {disk.REMEDY}' if words else ''}"
        ) from error
