"""The collectives of a compiled program: kind, mesh axes, how much each moves, and how often.

TPU programs hide some of them. A gather that is spread over the matrix products around it appears
once in each of these fusions, all with one chain id; an all-reduce inside a fusion named
all-reduce-scatter leaves each chip only its part; and a reduction of a product may be a ring of
collective-permutes in a loop.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from attnpo_jax.plan.hlo import Computation, Instruction, Program

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program."""

    kind: str  # one of `KINDS`
    # The mesh axes it runs over, in the mesh's order; empty where its groups are not lines or
    # planes of the mesh.
    axes: tuple[str, ...]
    group: int  # chips that take part together
    # Of the whole arrays: what is gathered to, reduced or exchanged.
    shapes: tuple[tuple[int, ...], ...]
    sent: float  # bytes that each chip must send at least, each time
    times: int  # how often it runs in a step
    source: str  # what in the traced function it comes from

    @property
    def total(self) -> float:
        """Bytes that each chip sends in a step."""
        return self.sent * self.times


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """All collectives that move something, in the program's order.

    Devices count up along the last of the mesh's axes first.
    """
    found, chains = [], set()
    for computation, instruction, times in program.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
        if chain is not None:
            if (chain[1], kind) in chains:
                continue
            chains.add((chain[1], kind))
        made = _collective(program, computation, instruction, kind, times, mesh)
        if made.group > 1:
            found.append(made)
    return found


def _collective(
    program: Program, computation: Computation, i: Instruction, kind: str, times: int, mesh
) -> Collective:
    size = int(np.prod(list(mesh.values())))
    operands = [s for o in i.operands for s in computation.instructions[o].shapes]
    # A started collective's type holds its operands too.
    results = i.shapes
    if i.opcode.endswith("-start"):
        results = i.shapes[len(operands) : 2 * len(operands)] or i.shapes
    moved = sum(s.bytes for s in (results if kind == "all-gather" else operands))
    whole = results if kind == "all-gather" else operands
    if kind == "collective-permute":
        members = _ring(i.attribute("source_target_pairs"))
        share = 1.0
    else:
        members = _first_group(i.attribute("replica_groups") or "", i.attributes, size)
        share = (len(members) - 1) / len(members)
        name = computation.name
        scattered = name in program.fused and name.startswith("all-reduce-scatter")
        if kind == "all-reduce" and scattered:
            kind = "reduce-scatter"
        elif kind == "all-reduce":
            share *= 2
    return Collective(
        kind,
        _axes(members, mesh),
        len(members),
        tuple(s.dims for s in whole),
        moved * share,
        times,
        i.source,
    )


def _axes(members: list[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the members' places in the mesh differ, if they are all of these."""
    places = np.array(np.unravel_index(members, tuple(mesh.values())))
    axes = [axis for axis, at in zip(mesh, places, strict=True) if len(set(at)) > 1]
    full = int(np.prod([mesh[axis] for axis in axes])) == len(members)
    return tuple(axes) if full else ()


def _ring(pairs: str) -> list[int]:
    """The devices that are reached from the first source, itself included, in ascending order."""
    following = dict(tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)\}", pairs))
    first = next(iter(following))
    members, at = [first], following[first]
    while at not in members:
        members.append(at)
        if at not in following:
            break
        at = following[at]
    return sorted(members)


def _first_group(text: str, attributes: str, size: int) -> list[int]:
    """The devices of the first group, in any of the notations that XLA prints.

    `{{0,1},{2,3}}`; `[2,2]<=[4]` and `[2,2]<=[2,2]T(1,0)`, rows of device numbers reshaped and
    transposed; `mesh['a'=2,'b'=2] {'b'}`, the axes of a mesh, whose `device_ids` may be such rows.
    """
    listed = re.match(r"\{\{([\d,]*)\}", text)
    if listed:
        return [int(n) for n in listed[1].split(",") if n] or list(range(size))
    if text.startswith("mesh["):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", text)}
        along = re.search(r"replica_groups=mesh\[.*?\{([^}]*)\}", attributes)
        wanted = re.findall(r"'(\w+)'", along[1])
        order = re.search(r"device_ids=\((\[.*?\)?)\)[ ,]", attributes)
        ids = _iota(f"{order[1]}", size) if order else np.arange(size)
        ids = ids.reshape(tuple(sizes.values()))
        index = tuple(slice(None) if name in wanted else 0 for name in sizes)
        return sorted(ids[index].reshape(-1).tolist())
    rows = re.match(r"\[(\d+),(\d+)\]<=(.*)", text)
    if rows:
        return sorted(_iota(rows[3], size).reshape(int(rows[1]), int(rows[2]))[0].tolist())
    return list(range(size))


def _iota(text: str, size: int) -> np.ndarray:
    """`[4]` or `[2,2]T(1,0)`: numbers from 0, as an array of these lengths, transposed."""
    dims, _, order = text.partition("T")
    ids = np.arange(size).reshape([int(n) for n in re.findall(r"\d+", dims)])
    return ids.transpose([int(n) for n in re.findall(r"\d+", order)]) if order else ids
