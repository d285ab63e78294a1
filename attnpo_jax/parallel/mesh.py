"""The mesh of devices that a run computes on."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from attnpo_jax.models.decoder import ModelConfig, abstract_params, logical_axes
from attnpo_jax.models.placement import AXES, RULES
from attnpo_jax.runtime.errors import UserError


class MeshError(UserError):
    """A mesh that the devices or the model do not fit; the message names the config's fields."""


def axis_sizes(wanted: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """Sizes of the mesh's axes, -1 replaced by the devices that are left."""
    sizes = {axis: int(wanted[axis]) for axis in AXES}
    named = ", ".join(f"parallel.mesh.{axis} = {size}" for axis, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise MeshError(f"{named}: accepted: sizes of 1 or more, or -1 for one of them")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise MeshError(f"{named}: accepted: -1 for at most one of them")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and num_devices % fixed == 0:
        sizes[open_axes[0]] = num_devices // fixed
    elif open_axes or fixed != num_devices:
        what = "must divide" if open_axes else "must be"
        raise MeshError(
            f"{named}: the product of the sizes is {fixed}, which {what} the number of devices, "
            f"{num_devices}; accepted: other sizes, or -1 for the devices that are left"
        )
    return sizes


def local_sizes(sizes: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """The mesh that one process can make of its own devices alone, as near to `sizes` as can be."""
    tensor = math.gcd(sizes["tensor"], num_devices)
    fsdp = math.gcd(sizes["fsdp"], num_devices // tensor)
    return {"data": num_devices // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `data`, `fsdp` and `tensor`, neighbours on `tensor` closest together."""
    return jax.make_mesh(
        tuple(sizes[axis] for axis in AXES),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices,
    )


def check_model(model: ModelConfig, sizes: Mapping[str, int]) -> None:
    """Checks that the mesh's axes divide the lengths of the model that they split.

    Raises:
      MeshError: names the config's field, the model's lengths, and the sizes that would fit.
    """
    lengths: dict[str, dict[str, int]] = {axis: {} for axis in AXES}
    shapes, names = abstract_params(model), logical_axes(model)
    is_axes = {"is_leaf": lambda x: isinstance(x, tuple)}
    for leaf, axes in zip(jax.tree.leaves(shapes), jax.tree.leaves(names, **is_axes), strict=True):
        for logical, length in zip(axes, leaf.shape, strict=True):
            split = RULES.get(logical)
            # An odd vocabulary stays whole.
            if split is not None and logical != "vocab":
                lengths[split][logical] = length
    for axis, by_name in lengths.items():
        if any(length % sizes[axis] for length in by_name.values()):
            common = math.gcd(*by_name.values())
            accepted = [n for n in range(1, common + 1) if common % n == 0]
            listed = ", ".join(f"{name} {length}" for name, length in by_name.items())
            raise MeshError(
                f"parallel.mesh.{axis} = {sizes[axis]} does not divide what it splits in this "
                f"model ({listed}); accepted: {', '.join(map(str, accepted))}"
            )
