"""TPUs: chips with their published peaks, and slices of them.

Source of the figures: the pages of Cloud TPU's documentation on the chips,
https://docs.cloud.google.com/tpu/docs/v4, .../v5e, .../v5p and .../v6e. They give a chip's
interconnect as a whole, both directions counted: 400 GB/s for the 4 links of a v5e, 800 for the 4
of a v6e, 1200 for the 6 of a v5p. For the v4, the paper on it (Jouppi et al. 2023, "TPU v4: An
Optically Reconfigurable Supercomputer for Machine Learning with Hardware Support for Embeddings",
arXiv 2304.01433) gives 50 GB/s a link. The pages on the v4 and v5p say that slices of whole cubes
of 4x4x4 chips are tori; smaller ones, 2x2x4 among them, are taken to be open on all axes.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import topologies

from attnpo_jax.plan.accelerators import GIB, PlanError, Topology


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip."""

    name: str  # as in a topology's name
    flops: float  # bfloat16 FLOPs a second
    hbm: int  # bytes of main memory
    hbm_bandwidth: float  # bytes a second, of main memory
    link_bandwidth: float  # bytes a second over one link to a neighbour, one direction
    host: tuple[int, ...]  # chips of one host of a larger slice, by axis of the slice
    alone: int  # slices of so many chips, or fewer, have one host
    wraps: int  # multiples of this many chips on an axis close to a ring
    cubes: bool  # whether they do only where all axes are such multiples
    largest: int  # the most chips on an axis
    # What libtpu has to be told of it.
    libtpu: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        """How many chips an axis of a slice may have."""
        if self.cubes:
            return [1, 2, *range(self.wraps, self.largest + 1, self.wraps)]
        return [2**k for k in range(self.largest.bit_length())]


# Both TensorCores of a chip as one device, as on TPU VMs.
_MEGACORE = {"chip_config_name": "megacore"}

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * GIB, 1.2e12, 50e9, (2, 2, 1), 4, 4, True, 24, _MEGACORE),
        Chip("v5e", 197e12, 16 * GIB, 8.19e11, 400e9 / 8, (2, 2), 8, 16, False, 16),
        Chip("v5p", 459e12, 95 * GIB, 2.765e12, 1200e9 / 12, (2, 2, 1), 4, 4, True, 24),
        Chip("v6e", 918e12, 32 * GIB, 1.6e12, 800e9 / 8, (2, 2), 8, 16, False, 16),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice(Topology):
    """Chips of one kind in a grid."""

    chip: Chip
    shape: tuple[int, ...]  # chips by axis

    noun = "chip"
    links = ("interconnect",)

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def host(self) -> "Slice":
        """A host's chips, or all where one host has them."""
        if self.size <= self.chip.alone:
            return self
        shape = tuple(min(*pair) for pair in zip(self.shape, self.chip.host, strict=True))
        return dataclasses.replace(self, shape=shape)

    def places(self, devices: Sequence[jax.Device]) -> np.ndarray:
        return np.array([tuple(device.coords) for device in devices])

    def hosts(self, places: np.ndarray) -> int:
        blocks = places[:, : len(self.shape)] // np.array(self.host.shape)
        return len(set(map(tuple, blocks.tolist())))

    def bandwidths(self, places: np.ndarray) -> Mapping[str, float]:
        return {"interconnect": self.chip.link_bandwidth * max(1, self.ways(places))}

    def ways(self, places: Sequence[Sequence[int]]) -> int:
        """Links by which a chip reaches a group of chips: one a varying axis, two along a ring.

        Along a part of a ring it is one, since the way round belongs to the other parts too.
        """
        lengths = [len(set(at)) for at in np.array(places).T[: len(self.shape)]]
        closes = [length % self.chip.wraps == 0 for length in self.shape]
        if self.chip.cubes and not all(closes):
            closes = [False] * len(closes)
        return sum(
            2 if ring and here == length else 1
            for here, length, ring in zip(lengths, self.shape, closes, strict=True)
            if here > 1
        )

    def devices(self) -> list[jax.Device]:
        _prepare_libtpu()
        try:
            found = topologies.get_topology_desc(
                platform="tpu",
                topology_name=self.name,
                chips_per_host_bounds=(*self.host.shape, 1, 1)[:3],
                **self.chip.libtpu,
            )
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise PlanError(f"topology {self.name!r}: libtpu refuses it: {reason}") from error
        return list(found.devices)


def parse(kind: str, grid: str) -> Slice:
    """The slice of `CHIPS[kind]` that a grid like "8x8" or "2x2x4" means."""
    chip, shape = CHIPS[kind], tuple(map(int, grid.split("x")))
    if len(shape) != len(chip.host) or not set(shape) <= {*chip.lengths}:
        raise PlanError(
            f"topology '{kind}:{grid}': accepted for {kind}: {len(chip.host)} axes, each of "
            f"{', '.join(map(str, chip.lengths))} chips"
        )
    return Slice(chip, shape)


def _prepare_libtpu() -> None:
    """Lets libtpu be loaded where there is no TPU, or where another process uses one."""
    try:
        import libtpu  # noqa: F401  JAX loads it by itself; this is to see that it is there.
    except ImportError as error:
        raise PlanError(
            "attnpo plan compiles with libtpu, which is not installed; "
            "pip install '.[plan]' in a clone"
        ) from error
    # Without these it asks the network what machine it is on, and takes a lock on the chips.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
