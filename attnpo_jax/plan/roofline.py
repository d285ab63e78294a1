"""The least time a program can take on a chip whose published peaks it reaches.

The chip computes, reads its memory and sends to its neighbours at once; the slowest of the three
decides. Real programs overlap them in part, and reach none of the peaks: 40 to 60% of the estimated
rate is usual.
"""

import dataclasses
from collections.abc import Mapping

from attnpo_jax.plan.programs import Compiled


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one run of a program, by what they are spent on."""

    compute: float  # FLOPs at the chip's peak
    memory: float  # bytes at its memory's bandwidth
    interconnect: float  # bytes sent at the bandwidth of the links that lead to the group
    mfu: float  # share of all chips' peak that goes into model FLOPs, at best

    @classmethod
    def of(cls, program: Compiled) -> "Roofline":
        chip = program.topology.chip
        # What a kernel computes is not among the program's FLOPs, but is needed.
        needed = program.model_flops / program.topology.size
        compute = max(program.flops, needed) / chip.flops
        memory = program.traffic / chip.hbm_bandwidth
        network = sum(
            c.total / (chip.link_bandwidth * links(program, c.axes)) for c in program.collectives
        )
        seconds = max(compute, memory, network)
        available = seconds * chip.flops * program.topology.size
        return cls(compute, memory, network, program.model_flops / available)

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.interconnect)

    @property
    def limit(self) -> str:
        """What takes longest: "compute", "memory" or "interconnect"."""
        parts: Mapping[str, float] = dataclasses.asdict(self)
        return max(("compute", "memory", "interconnect"), key=parts.__getitem__)


def links(program: Compiled, axes: tuple[str, ...]) -> int:
    """Links over which a chip reaches its group along these mesh axes; 1 where there are none."""
    if not axes:
        return 1
    along = tuple(slice(None) if axis in axes else 0 for axis in program.mesh)
    group = program.coordinates[along].reshape(-1, program.coordinates.shape[-1])
    return max(1, program.topology.links(group))
