"""NVIDIA GPUs: cards with their published figures, and hosts of them.

Sources of the cards' figures: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM, H200 SXM and
L40S, and of the DGX B200 (its figures are those of eight GPUs). Of the peaks for bfloat16 they give
those with sparsity, but for the A100's and the L40S's; half of them are dense. NVLink and PCIe are
given both directions counted. "GB" is taken as 10^9 bytes: what a GPU has beyond that, its driver,
CUDA and NCCL need. Networks are those of machines that are sold as a unit: DGX A100 (a ConnectX-6
of 200 Gb/s a GPU), DGX H100, H200 and B200 (a ConnectX-7 of 400 Gb/s a GPU), and, for the L40S,
EC2's g6e.48xlarge (400 Gb/s for eight). Processors, L2 and clocks: the architectures' white papers
(A100, H100, Ada) and, where these have none, the device descriptions that come with XLA's source
(xla/backends/gpu/target_config/specs).

Sources of `ARCHITECTURES`: the tables of compute capabilities in NVIDIA's CUDA C++ Programming
Guide ("Technical Specifications per Compute Capability", "Arithmetic Instructions").
"""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from attnpo_jax.plan.accelerators import PlanError, Topology

_KIB, _MIB = 2**10, 2**20
# The most that the machines above have.
_OF_A_HOST = 8
# The libraries that runs are planned with: what jax[cuda12] 0.10.2 installs. Compiling needs none
# of them.
CUDNN, _CUDA = (9, 28, 0), (12, 9)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What all GPUs of one compute capability have, by streaming multiprocessor."""

    threads: int  # that can be resident
    shared: int  # bytes of shared memory; a block can have all but 1 KiB of it
    lanes: int  # float32 operations a cycle


# By compute capability, major and minor.
ARCHITECTURES = {
    (8, 0): Architecture(2048, 164 * _KIB, 64),
    (8, 9): Architecture(1536, 100 * _KIB, 128),
    (9, 0): Architecture(2048, 228 * _KIB, 128),
    (10, 0): Architecture(2048, 228 * _KIB, 128),
}


@dataclasses.dataclass(frozen=True)
class Card:
    """Published figures of one GPU."""

    name: str  # as in a topology's name
    kind: str  # as its driver names it
    flops: float  # bfloat16 FLOPs a second, dense
    hbm: int  # bytes of main memory
    hbm_bandwidth: float  # bytes a second, of main memory
    link: str  # what joins the GPUs of a host
    link_bandwidth: float  # bytes a second of it, one direction
    network_bandwidth: float  # bytes a second between hosts, by GPU, one direction
    capability: tuple[int, int]  # compute capability
    processors: int  # streaming multiprocessors
    l2: int  # bytes of its L2 cache
    clock: float  # GHz, boost


CARDS = {
    card.name: card
    for card in (
        Card(
            "a100-80gb", "NVIDIA A100-SXM4-80GB", 312e12, 80 * 10**9, 2.039e12,
            "NVLink", 600e9 / 2, 200e9 / 8, (8, 0), 108, 40 * _MIB, 1.41,
        ),
        Card(
            "h100", "NVIDIA H100 80GB HBM3", 1979e12 / 2, 80 * 10**9, 3.35e12,
            "NVLink", 900e9 / 2, 400e9 / 8, (9, 0), 132, 50 * _MIB, 1.98,
        ),
        Card(
            "h200", "NVIDIA H200", 1979e12 / 2, 141 * 10**9, 4.8e12,
            "NVLink", 900e9 / 2, 400e9 / 8, (9, 0), 132, 50 * _MIB, 1.98,
        ),
        Card(
            "b200", "NVIDIA B200", 4.5e15 / 2, 180 * 10**9, 8e12,
            "NVLink", 1800e9 / 2, 400e9 / 8, (10, 0), 148, 132_644_864, 1.965,
        ),
        Card(
            "l40s", "NVIDIA L40S", 362.05e12, 48 * 10**9, 8.64e11,
            "PCIe", 64e9 / 2, 400e9 / 8 / 8, (8, 9), 142, 96 * _MIB, 2.52,
        ),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cluster(Topology):
    """Hosts with equally many GPUs of one kind."""

    chip: Card
    shape: tuple[int, int]  # hosts, GPUs of each

    noun = "GPU"

    @property
    def name(self) -> str:
        hosts, each = self.shape
        return f"{self.chip.name}:{each}" if hosts == 1 else f"{self.chip.name}:{hosts}x{each}"

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def host(self) -> "Cluster":
        return dataclasses.replace(self, shape=(1, self.shape[1]))

    @property
    def links(self) -> tuple[str, ...]:
        return (self.chip.link,) if self.shape[0] == 1 else (self.chip.link, "network")

    def places(self, devices: Sequence[jax.Device]) -> np.ndarray:
        """Host, and which of its GPUs."""
        return np.array([divmod(device.id, self.shape[1]) for device in devices])

    def hosts(self, places: np.ndarray) -> int:
        return len(set(places[:, 0].tolist()))

    def bandwidths(self, places: np.ndarray) -> Mapping[str, float]:
        """As in `Topology`.

        Between hosts, rings through all their GPUs take every GPU's own part of the network, so
        what each of the group's GPUs on a host sends is spread over the parts of them all.
        """
        chip, hosts = self.chip, self.hosts(places) if len(places) else self.shape[0]
        inside = {chip.link: chip.link_bandwidth}
        if hosts == 1:
            return inside
        each = max(1, len(places) // hosts)
        between = {"network": each * chip.network_bandwidth}
        return between if each == 1 else inside | between

    def devices(self) -> list[jax.Device]:
        _prepare_plugin()
        try:
            found = topologies.get_topology_desc(
                platform="cuda",
                topology_name=self.chip.name,
                target_config=_target_config(self.chip),
                topology=f"1x{self.shape[0]}x{self.shape[1]}",
            )
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise PlanError(f"topology {self.name!r}: XLA refuses it: {reason}") from error
        return list(found.devices)

    def compiling(self) -> contextlib.AbstractContextManager:
        return answering_for(self.chip.capability)


@contextlib.contextmanager
def answering_for(
    capability: tuple[int, int], cudnn: tuple[int, int, int] = CUDNN
) -> Iterator[None]:
    """Answers what JAX's checks of cuDNN attention ask of this machine, as a GPU's machine would.

    They run while a program is traced, and know nothing of the devices that it is traced for. The
    three functions that ask for a compute capability or cuDNN's version are replaced, for as long
    as this lasts; what follows from the answers stays JAX's.
    """

    def number(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(".")))

    major, minor, patch = cudnn
    answers = {
        "check_compute_capability": lambda least: capability >= number(least),
        "is_cuda_compute_capability_equal": lambda asked: capability == number(asked),
        "check_cudnn_version": lambda: 10_000 * major + 100 * minor + patch,
    }
    before = {name: getattr(fused_attention_stablehlo, name) for name in answers}
    for name, answer in answers.items():
        setattr(fused_attention_stablehlo, name, answer)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(fused_attention_stablehlo, name, function)


def parse(kind: str, grid: str) -> Cluster:
    """The GPUs of `CARDS[kind]` that "8", or "4x8", 4 hosts of 8, means."""
    shape = tuple(map(int, grid.split("x")))
    hosts, each = (1, *shape)[-2:]
    if len(shape) > 2 or each > _OF_A_HOST:
        raise PlanError(
            f"topology '{kind}:{grid}': accepted for GPUs: how many a host has, 1 to "
            f"{_OF_A_HOST}, as {kind}:{_OF_A_HOST}; or hosts and GPUs of each, as "
            f"{kind}:4x{_OF_A_HOST}"
        )
    return Cluster(CARDS[kind], (hosts, each))


def _prepare_plugin() -> None:
    """Lets JAX's CUDA plugin be loaded where there is no GPU."""
    # XLA's own warnings, of a program that does not fit among others; it reads this as it starts.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    if not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
        raise PlanError(
            "attnpo plan compiles for GPUs with JAX's CUDA plugin, which is not installed; "
            "pip install '.[plan-cuda]' in a clone"
        )


def _target_config(card: Card) -> str:
    """The text form of XLA's GpuTargetConfigProto: what it would ask a GPU's driver for."""
    of = ARCHITECTURES[card.capability]
    major, minor = card.capability
    return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 * _KIB}
  shared_memory_per_block_optin: {of.shared - _KIB}
  shared_memory_per_core: {of.shared}
  threads_per_core_limit: {of.threads}
  core_count: {card.processors}
  fpus_per_core: {of.lanes}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  registers_per_core_limit: {2**16}
  registers_per_block_limit: {2**16}
  memory_bandwidth: {card.hbm_bandwidth:.0f}
  device_memory_size: {card.hbm}
  l2_cache_size: {card.l2}
  clock_rate_ghz: {card.clock}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} patch: {CUDNN[2]} }}
runtime_version {{ major: {_CUDA[0]} minor: {_CUDA[1]} }}
device_description_str: "{card.kind}"
"""
