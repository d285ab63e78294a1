"""The two parallel backends: one step on many devices by `jax.jit` over a mesh, or by `jax.pmap`.

Both take the same pure functions and the same batches, and keep parameters and state as ordinary
global arrays, so that checkpoints and exports do not depend on which one wrote them.

Shapes: n microbatches, B rows.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnpo_jax.models import placement
from attnpo_jax.models.decoder import ModelConfig, Params, abstract_params
from attnpo_jax.parallel import mesh as meshes
from attnpo_jax.parallel import processes, sharding
from attnpo_jax.runtime import schema

# Every program rounds to bfloat16 where the model does. XLA would leave that out within what it
# fuses, which differs with the shape of rows: policy and reference would round differently, though
# they are one model to begin with (see docs/performance.md). `jax.pmap` takes no such option.
_COMPILER_OPTIONS = {"xla_allow_excess_precision": False}

# Of a device's memory, what parameters may take where each process prepares by itself.
_FULL = 0.5


class Backend(Protocol):
    """Places arrays and compiles functions.

    Attributes:
      row_shards: in how many parts the rows of a batch are; batches have a multiple of it.
      axis_name: the axis that a step's function sums over itself, or None where the compiler does.
      devices: where it runs.
      description: the devices and how they are used, in words.
    """

    row_shards: int
    axis_name: str | None
    devices: Sequence[jax.Device]
    description: str

    def parameter_shardings(self) -> Any:
        """The tree of shardings that parameters are loaded with."""

    def abstract_state(self, state: Any) -> Any:
        """The tree of `jax.ShapeDtypeStruct`s with every array's sharding."""

    def create_state(self, create: Callable[[Params], Any], params: Params) -> Any:
        """`create(params)`, placed; the parameters are donated."""

    def train_step(self, step: Callable[[Any, Any], tuple[Any, Any]], state: Any) -> Callable:
        """Compiles `(state, batch) -> (state, metrics)`; the state is donated.

        `state` is as `abstract_state` returns it; batches are as `put_batch` returns them.
        """

    def of(self, model: ModelConfig) -> "Backend":
        """The same devices for another model."""

    def eval_step(self, step: Callable[..., Any], reference: ModelConfig | None = None) -> Callable:
        """Compiles `(params, batch) -> sums`; with a reference, `(params, batch, its params)`."""

    def put_batch(self, batch: Any) -> Any:
        """NumPy arrays (n, B, ...) to the devices, rows split."""

    def row_pass(self, function: Callable, out_axes: Sequence[int], **static: Any) -> Callable:
        """Compiles `(shared, rows) -> tuple of arrays` for the judge's and the reference's passes.

        Args:
          function: `rows` is a pytree of arrays (B, ...), `shared` what all rows need.
          out_axes: by output, the axis that counts rows.
          **static: hashable keyword arguments of the function.

        Returns:
          The function, which takes NumPy arrays for `rows`, whose results every process of the
          mesh can read. On a mesh, its `lower` takes shapes for both.
        """

    def whole_pass(self, function: Callable, **static: Any) -> Callable:
        """Compiles `(params, arrays) -> arrays` for what is done once; its result is whole."""

    def replicate(self, tree: Any) -> Any:
        """Arrays to all devices, whole."""

    def local_rows(self, num_rows: int) -> np.ndarray:
        """Which of a batch's B rows this process's devices hold: bool (B,)."""


def for_training(model: ModelConfig, parallel: Any) -> Backend:
    """What trains on all devices of all processes."""
    sizes = meshes.axis_sizes(parallel.mesh, jax.device_count())
    return _make(model, parallel.backend, sizes, jax.devices())


def for_preparing(model: ModelConfig, parallel: Any, devices: str, param_dtype: Any) -> Backend:
    """What judges and scores: this process's devices alone, or all; see `prepares_together`.

    Args:
      parallel: the `parallel` section of the config; see `mesh.local_sizes` for the mesh of a
        process's own devices.
      devices: `prepare.devices` of the config.
    """
    where = _where_prepared(model, parallel, devices, param_dtype)
    return _make(model, parallel.backend, *where)


def for_sampling(model: ModelConfig, parallel: Any, devices: str, param_dtype: Any) -> "Sharded":
    """What samples, on a mesh of the devices that `for_preparing` has."""
    return Sharded(model, *_where_prepared(model, parallel, devices, param_dtype))


def _where_prepared(
    model: ModelConfig, parallel: Any, devices: str, param_dtype: Any
) -> tuple[Mapping[str, int], Sequence[jax.Device]]:
    """Sizes of the axes, and devices, of what a process prepares on."""
    sizes = meshes.axis_sizes(parallel.mesh, jax.device_count())
    local = jax.local_devices()
    if jax.process_count() > 1:
        # None of them may decide by a memory that others have not.
        known = processes.exchange(_memory(local), schema.Maybe(schema.Whole()))
        memory = None if None in known else min(known)
        if prepares_together(model, devices, param_dtype, sizes, len(local), memory):
            return sizes, jax.devices()
    return meshes.local_sizes(sizes, len(local)), local


def prepares_together(
    model: ModelConfig,
    devices: str,
    param_dtype: Any,
    sizes: Mapping[str, int],
    num_own: int,
    memory: int | None,
) -> bool:
    """Whether all processes prepare the same shards, on the mesh of all devices.

    With "auto", they do where a process's own devices would be more than half full of parameters,
    and all devices together would not hold as much each.

    Args:
      devices: "auto", or what is settled: "all" or "process".
      sizes: of the axes of the mesh of all devices.
      num_own: how many devices a process has.
      memory: bytes of a device; None where it does not say.
    """
    if devices != "auto":
        return devices == "all"
    own = meshes.local_sizes(sizes, num_own)
    split, own_split = (at["fsdp"] * at["tensor"] for at in (sizes, own))
    params = jax.tree.leaves(abstract_params(model, jnp.dtype(param_dtype)))
    taken = sum(x.size * x.dtype.itemsize for x in params) / own_split
    return memory is not None and taken > _FULL * memory and split > own_split


def _memory(devices: Sequence[jax.Device]) -> int | None:
    """Bytes of the smallest of these devices; None where they do not say."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return None if None in limits else min(limits)


def one_device(model: ModelConfig) -> Backend:
    """The first of this process's devices."""
    return Sharded(model, dict.fromkeys(placement.AXES, 1), jax.local_devices()[:1])


def all_by_rows(model: ModelConfig) -> "Sharded":
    """A mesh of all devices that each have the whole model, as `jax.pmap` has them."""
    return Sharded(model, {"data": jax.device_count(), "fsdp": 1, "tensor": 1}, jax.devices())


def _make(model: ModelConfig, backend: str, sizes: Mapping[str, int], devices) -> Backend:
    if backend == "pmap":
        if jax.process_count() > 1:
            raise meshes.MeshError(
                f"parallel.backend = 'pmap' runs in one process, this is one of "
                f"{jax.process_count()}; accepted: 'jit'"
            )
        return Replicated(model, devices)
    return Sharded(model, sizes, devices)


class Sharded:
    """`jax.jit` over a mesh with axes `data`, `fsdp` and `tensor`."""

    axis_name = None

    def __init__(self, model: ModelConfig, sizes: Mapping[str, int], devices: Sequence[jax.Device]):
        meshes.check_model(model, sizes)
        self.mesh: Mesh = meshes.make_mesh(sizes, devices)
        self.devices = tuple(devices)
        self.row_shards = sizes["data"] * sizes["fsdp"]
        listed = ", ".join(f"{axis} {sizes[axis]}" for axis in placement.AXES)
        self.description = f"{len(devices)} {devices[0].device_kind} devices ({listed})"
        self._model = model
        self._whole = NamedSharding(self.mesh, PartitionSpec())
        self._rows = sharding.row_sharding(self.mesh, axis=1)

    def of(self, model: ModelConfig) -> "Sharded":
        return Sharded(model, self.mesh.shape, self.devices)

    def parameter_shardings(self) -> Any:
        return sharding.parameter_shardings(self._model, self.mesh)

    def abstract_state(self, state: Any) -> Any:
        shardings = sharding.like_parameters(
            state, abstract_params(self._model), self.parameter_shardings(), self._whole
        )
        return _with_shardings(state, shardings)

    def create_state(self, create: Callable[[Params], Any], params: Params) -> Any:
        abstract = self.abstract_state(jax.eval_shape(create, params))
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        return jax.jit(create, out_shardings=shardings, donate_argnums=0)(params)

    def train_step(self, step: Callable[[Any, Any], tuple[Any, Any]], state: Any) -> Callable:
        placed = jax.tree.map(lambda x: x.sharding, state)
        shardings = {"in_shardings": (placed, self._rows), "out_shardings": (placed, self._whole)}
        options = {"donate_argnums": 0, "compiler_options": _COMPILER_OPTIONS}
        return self._on_mesh(jax.jit(step, **shardings, **options))

    def eval_step(self, step: Callable[..., Any], reference: ModelConfig | None = None) -> Callable:
        placed = self.parameter_shardings(), self._rows
        if reference is not None:
            placed = *placed, self.of(reference).parameter_shardings()
        shardings = {"in_shardings": placed, "out_shardings": self._whole}
        return self._on_mesh(jax.jit(step, **shardings, compiler_options=_COMPILER_OPTIONS))

    def put_batch(self, batch: Any) -> Any:
        return sharding.put(batch, self._rows)

    def row_pass(self, function: Callable, out_axes: Sequence[int], **static: Any) -> Callable:
        out = tuple(sharding.row_sharding(self.mesh, axis) for axis in out_axes)
        if not self._whole.is_fully_addressable:
            # Every process reads all rows.
            out = (self._whole,) * len(out)
        compiled = self._compile(function, out, static)
        rows_sharding = sharding.row_sharding(self.mesh)

        def call(shared, rows):
            return compiled(shared, sharding.put(rows, rows_sharding))

        def lower(shared, rows):
            placed = jax.tree.map(lambda _: rows_sharding, rows)
            return compiled.lower(shared, _with_shardings(rows, placed))

        call.lower = lower
        return call

    def whole_pass(self, function: Callable, **static: Any) -> Callable:
        return self._compile(function, self._whole, static)

    def _compile(self, function: Callable, out: Any, static: Mapping[str, Any]) -> Callable:
        # By name, and not bound beforehand: so JAX knows the function again and compiles it once.
        compiled = jax.jit(
            function,
            static_argnames=tuple(static),
            out_shardings=out,
            compiler_options=_COMPILER_OPTIONS,
        )
        bound = functools.partial(compiled, **static)
        bound.lower = functools.partial(compiled.lower, **static)
        return self._on_mesh(bound)

    def zeros(self, shapes: Any, specs: Any) -> Any:
        """Zeros of some shapes and dtypes, split as partition specs say, a prefix of the tree."""

        def of(spec: PartitionSpec, part: Any) -> Any:
            placed = NamedSharding(self.mesh, spec)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=placed), part)

        is_spec = {"is_leaf": lambda x: isinstance(x, PartitionSpec)}
        return jax.tree.map(of, specs, shapes, **is_spec)

    def state_pass(self, function: Callable, state: Any, **static: Any) -> Callable:
        """Compiles `(shared, state, arrays) -> (state, results)` for what is done over and over.

        The state is donated and stays where it is; arrays and results are whole on every device.

        Args:
          state: arrays, or `jax.ShapeDtypeStruct`s with shardings.
          **static: hashable keyword arguments of the function.
        """
        placed = jax.tree.map(lambda x: x.sharding, state)
        compiled = jax.jit(
            function,
            static_argnames=tuple(static),
            donate_argnums=1,
            out_shardings=(placed, self._whole),
            compiler_options=_COMPILER_OPTIONS,
        )
        bound = functools.partial(compiled, **static)
        bound.lower = functools.partial(compiled.lower, **static)
        return self._on_mesh(bound)

    def replicate(self, tree: Any) -> Any:
        return sharding.put(tree, self._whole)

    def local_rows(self, num_rows: int) -> np.ndarray:
        mine = np.zeros(num_rows, bool)
        by_device = sharding.row_sharding(self.mesh).addressable_devices_indices_map((num_rows,))
        for (rows,) in by_device.values():
            mine[rows] = True
        return mine

    def _on_mesh(self, function: Callable) -> Callable:
        """The function, traced and run with the mesh current: the model's constraints refer to it.

        `lower` is that of the jitted function, for those who want to look at what is compiled.
        """

        def call(*args):
            with jax.set_mesh(self.mesh):
                return function(*args)

        def lower(*args):
            with jax.set_mesh(self.mesh):
                return function.lower(*args)

        call.lower = lower
        return call


class Replicated:
    """`jax.pmap`: every device has the whole state and its own rows."""

    axis_name = "devices"

    def __init__(self, model: ModelConfig, devices: Sequence[jax.Device]):
        self.devices = tuple(devices)
        self._model = model
        self.row_shards = len(self.devices)
        self.description = f"{len(devices)} {devices[0].device_kind} devices (pmap)"
        mesh = jax.make_mesh(
            (len(self.devices),),
            (self.axis_name,),
            axis_types=(jax.sharding.AxisType.Auto,),
            devices=self.devices,
        )
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, PartitionSpec(self.axis_name))

    def parameter_shardings(self) -> Any:
        return jax.tree.map(lambda _: self._whole, abstract_params(self._model))

    def abstract_state(self, state: Any) -> Any:
        return _with_shardings(state, jax.tree.map(lambda _: self._whole, state))

    def create_state(self, create: Callable[[Params], Any], params: Params) -> Any:
        return jax.jit(create, out_shardings=self._whole, donate_argnums=0)(params)

    def train_step(self, step: Callable[[Any, Any], tuple[Any, Any]], state: Any) -> Callable:
        del state
        # State and metrics are the same on every device: they go in and out without an axis.
        return self._pmap(step, out_axes=(None, None), donate_argnums=0)

    def of(self, model: ModelConfig) -> "Replicated":
        return Replicated(model, self.devices)

    def eval_step(self, step: Callable[..., Any], reference: ModelConfig | None = None) -> Callable:
        return self._pmap(step, out_axes=None, in_axes=(None, 0) + (None,) * bool(reference))

    def put_batch(self, batch: Any) -> Any:
        return sharding.put(self._by_device(batch, axis=1), self._split)

    def row_pass(self, function: Callable, out_axes: Sequence[int], **static: Any) -> Callable:
        compiled = self._pmap(functools.partial(function, **static), out_axes=tuple(out_axes))

        def call(shared, rows):
            outputs = compiled(shared, sharding.put(self._by_device(rows, axis=0), self._split))
            pairs = zip(outputs, out_axes, strict=True)
            return tuple(_rows_together(x, axis) for x, axis in pairs)

        return call

    def whole_pass(self, function: Callable, **static: Any) -> Callable:
        return jax.jit(functools.partial(function, **static), out_shardings=self._whole)

    def replicate(self, tree: Any) -> Any:
        return sharding.put(tree, self._whole)

    def local_rows(self, num_rows: int) -> np.ndarray:
        local = [device.process_index == jax.process_index() for device in self.devices]
        return np.repeat(local, num_rows // len(local))

    def _pmap(self, function: Callable, **options: Any) -> Callable:
        common = {"axis_name": self.axis_name, "in_axes": (None, 0), "devices": self.devices}
        return jax.pmap(function, **common | options)

    def _by_device(self, tree: Any, axis: int) -> Any:
        """Rows on `axis` as rows of each device, devices first."""

        def split(x: np.ndarray) -> np.ndarray:
            rows = x.shape[axis] // self.row_shards  # not -1: some arrays have nothing in them
            shape = (*x.shape[:axis], self.row_shards, rows, *x.shape[axis + 1 :])
            return np.moveaxis(np.reshape(x, shape), axis, 0)

        return jax.tree.map(split, tree)


def _rows_together(x: jax.Array, axis: int) -> jax.Array:
    """Axes `axis`, devices, and `axis` + 1, the rows of each, as one."""
    count = math.prod(x.shape[axis : axis + 2])
    return x.reshape(*x.shape[:axis], count, *x.shape[axis + 2 :])


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
