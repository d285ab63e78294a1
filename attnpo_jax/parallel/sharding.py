"""Shardings of parameters, optimizer state and batches on a mesh.

Shapes: n microbatches, B rows.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnpo_jax.models.decoder import ModelConfig, abstract_params, logical_axes
from attnpo_jax.models.placement import ROWS, parameter_spec


def parameter_shardings(model: ModelConfig, mesh: Mesh) -> Any:
    """A tree like the model's parameters of their shardings."""

    def of(leaf, axes) -> NamedSharding:
        return NamedSharding(mesh, parameter_spec(axes, leaf.shape, mesh.shape))

    return jax.tree.map(of, abstract_params(model), logical_axes(model))


def like_parameters(tree: Any, abstract: Any, shardings: Any, default: Any) -> Any:
    """Shardings for a tree that holds trees like the parameters', such as an optimizer's moments.

    Args:
      tree: a pytree of arrays or `jax.ShapeDtypeStruct`s. A leaf whose path ends in the path of a
        parameter of the same shape is placed like it.
      default: the sharding of all other leaves.
    """
    known = {
        tuple(map(str, path)): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(shardings), strict=True
        )
    }

    def of(path, leaf) -> Any:
        keys = tuple(map(str, path))
        for start in range(len(keys)):
            shape, sharding = known.get(keys[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return default

    return jax.tree_util.tree_map_with_path(of, tree)


def row_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Arrays whose axis `axis` counts rows: B of (B, ...), or of (n, B, ...) for axis 1."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, ROWS))


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Global arrays of NumPy arrays that every process has; each puts its own devices' part there.

    Of an array that is split over processes, only this process's part need hold anything.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), tree
    )
