"""The least time a program can take on a chip whose published peaks it reaches.

The chip computes, reads its memory and sends over each kind of its links at once; the slowest of
these decides. Real programs overlap them in part, and reach none of the peaks: 40 to 60% of the
estimated rate is usual.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from attnpo_jax.plan.programs import Compiled


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one run of a program, by what they are spent on."""

    compute: float  # FLOPs at the chip's peak
    memory: float  # bytes at its memory's bandwidth
    # By kind of link (`Topology.links`): bytes sent at the bandwidth that leads to the group.
    links: Mapping[str, float]
    mfu: float  # share of all chips' peak that goes into model FLOPs, at best

    @classmethod
    def of(cls, program: Compiled) -> "Roofline":
        chip = program.topology.chip
        # What a kernel computes may not be among the program's FLOPs, but is needed.
        needed = program.model_flops / program.topology.size
        compute = max(program.flops, needed) / chip.flops
        memory = program.traffic / chip.hbm_bandwidth
        links = dict.fromkeys(program.topology.links, 0.0)
        for c in program.collectives:
            bandwidths = program.topology.bandwidths(group(program, c.axes))
            for link, bandwidth in bandwidths.items():
                links[link] += c.total / bandwidth
        seconds = max(compute, memory, *links.values())
        available = seconds * chip.flops * program.topology.size
        return cls(compute, memory, links, program.model_flops / available)

    @property
    def parts(self) -> dict[str, float]:
        """The seconds by name: "compute", "memory", and those of the links."""
        return {"compute": self.compute, "memory": self.memory, **self.links}

    @property
    def seconds(self) -> float:
        return max(self.parts.values())

    @property
    def limit(self) -> str:
        """The name of what takes longest."""
        return max(self.parts, key=self.parts.__getitem__)


def group(program: Compiled, axes: tuple[str, ...]) -> np.ndarray:
    """Places (chips, k) of a group along these mesh axes, of those on the most hosts; of no axes
    none."""
    if not axes:
        return program.places.reshape(-1, program.places.shape[-1])[:0]
    names = list(program.mesh)
    along = [names.index(axis) for axis in axes]
    last = np.moveaxis(program.places, along, range(-1 - len(along), -1))
    members = int(np.prod([program.mesh[axis] for axis in axes]))
    groups = last.reshape(-1, members, program.places.shape[-1])
    return max(groups, key=program.topology.hosts)
