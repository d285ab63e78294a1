"""What a plan is made for: chips of one kind with their published peaks, and how they are joined.

`tpus` and `gpus` have the kinds there are; `topologies` finds the one that a name means.
"""

import abc
import contextlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import numpy as np

from attnpo_jax.runtime.errors import UserError

GIB = 2**30


class PlanError(UserError):
    """A plan that cannot be made; the message says what to change."""


class Chip(Protocol):
    """Published figures of one chip."""

    name: str  # as in a topology's name
    flops: float  # bfloat16 FLOPs a second, dense
    hbm: int  # bytes of main memory
    hbm_bandwidth: float  # bytes a second, of main memory


class Topology(abc.ABC):
    """Chips of one kind, on one host or several.

    Attributes:
      chip: one of them.
      noun: what people call one of them.
      name: as `topologies.parse` takes it.
      size: how many there are.
      host: the part that one process has.
      links: the kinds of links between them, by name.
    """

    chip: Chip
    noun: str

    @property
    @abc.abstractmethod
    def name(self) -> str: ...

    @property
    @abc.abstractmethod
    def size(self) -> int: ...

    @property
    @abc.abstractmethod
    def host(self) -> "Topology": ...

    @property
    @abc.abstractmethod
    def links(self) -> tuple[str, ...]: ...

    @abc.abstractmethod
    def devices(self) -> list[jax.Device]:
        """Devices to compile for; there is nothing to run on.

        Raises:
          PlanError: what compiles for them is not installed, or refuses them.
        """

    @abc.abstractmethod
    def places(self, devices: Sequence[jax.Device]) -> np.ndarray:
        """Where some of `devices` are: int (devices, k), in these chips' coordinates."""

    @abc.abstractmethod
    def hosts(self, places: np.ndarray) -> int:
        """On how many hosts a group of chips is, from its places (chips, k)."""

    @abc.abstractmethod
    def bandwidths(self, places: np.ndarray) -> Mapping[str, float]:
        """How fast a group of chips exchanges arrays, from its places (chips, k).

        Bytes a second that each of them can send to the others, in one direction, for each kind of
        link on the way. Of no places: the slowest that there is.
        """

    def compiling(self) -> contextlib.AbstractContextManager:
        """What programs for these chips are traced and compiled within."""
        return contextlib.nullcontext()
