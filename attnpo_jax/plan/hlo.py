"""Reads the text of a compiled XLA program: its computations, and how often each one runs.

XLA's own cost analysis counts the body of a loop once. Here the body of a scan over 32 layers
counts 32 times, inside one over 4 microbatches 128 times.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BYTES_OF = {
    0.5: "s4 u4",
    1: "pred s8 u8",
    2: "s16 u16 bf16 f16",
    4: "s32 u32 f32",
    8: "s64 u64 f64",
}
_BYTES = {dtype: size for size, dtypes in _BYTES_OF.items() for dtype in dtypes.split()}
_LEAF = re.compile(r"\b([a-z]+\d*(?:e\d\w*)?)\[([\d,]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.-]+)")
_HEAD = re.compile(r"\s*(ROOT )?%([\w.-]+) = ")
# Attributes that name computations which run when the instruction does. A reduction's `to_apply`
# is scalar and left out.
_CALLED = re.compile(r"(?:calls|body|branch_computations|called_computations)=\{?((?:%[\w., %-]+))")
_APPLIED = re.compile(r"to_apply=(%[\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array."""

    dtype: str  # as XLA names it
    dims: tuple[int, ...]  # its lengths
    # Whether it lies in the chip's main memory, rather than in a memory on the core.
    in_hbm: bool = True

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.elements * _BYTES.get(self.dtype, 1)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: its arrays, and the text of its attributes."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @property
    def source(self) -> str:
        """What in the traced function it comes from; empty where XLA does not say."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self) -> tuple[str, ...]:
        """The computations that run as part of it."""
        groups = _CALLED.findall(self.attributes)
        if self.opcode == "call":
            groups += _APPLIED.findall(self.attributes)
        return tuple(name for group in groups for name in _NAME.findall(group))

    @property
    def target(self) -> str:
        """What a custom call calls; empty for others."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str | None:
        """An attribute's text up to the next comma outside of brackets."""
        found = re.search(rf"\b{name}=", self.attributes)
        return None if found is None else _until_comma(self.attributes[found.end() :])


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions, by name and in order."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in reversed(self.instructions.values()) if i.is_root)

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return tuple(sorted(found, key=lambda i: int(i.arguments)))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        by_name: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                by_name.setdefault(operand, []).append(instruction)
        return by_name


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program."""

    computations: dict[str, Computation]  # by name
    entry: str  # the name of the one that runs first

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs, over all places it is called from."""
        return self._walk()[0]

    @functools.cached_property
    def fused(self) -> frozenset[str]:
        """Computations inside fusions: what they compute does not go through memory."""
        return self._walk()[1]

    @functools.cached_property
    def unknown_loops(self) -> tuple[str, ...]:
        """Loops whose number of rounds can't be told from the text; their bodies count once."""
        return tuple(
            i.source or i.name
            for name in self.runs
            for i in self.computations[name].instructions.values()
            if i.opcode == "while" and self.rounds(self.computations[name], i) is None
        )

    def _walk(self) -> tuple[dict[str, int], frozenset[str]]:
        runs: dict[str, int] = {}
        fused = set()

        def visit(name: str, times: int, inside: bool) -> None:
            runs[name] = runs.get(name, 0) + times
            if inside:
                fused.add(name)
            computation = self.computations[name]
            for i in computation.instructions.values():
                rounds = 1
                if i.opcode == "while":
                    rounds = self.rounds(computation, i)
                    rounds = 1 if rounds is None else rounds
                for called in i.called():
                    if called in self.computations:
                        visit(called, times * rounds, inside or i.opcode == "fusion")

        visit(self.entry, 1, False)
        return runs, frozenset(fused)

    def instructions(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """All instructions that run, with their computation and how often they do."""
        for name, times in self.runs.items():
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                yield computation, instruction, times

    def rounds(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a loop goes round, if it counts a number up to a constant; else None."""
        known = re.search(r"known_trip_count\D+(\d+)", loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[_NAME.findall(loop.attribute("condition"))[0]]
        compare = condition.root
        sides = [condition.instructions[o] for o in compare.operands]
        if compare.opcode == "fusion":
            inner = self.computations[compare.called()[0]]
            compare = inner.root
            factors = [inner.instructions[o] for o in compare.operands]
            if any(factor.opcode != "parameter" for factor in factors):
                return None
            sides = [sides[int(factor.arguments)] for factor in factors]
        if compare.opcode != "compare":
            return None
        left, right = sides
        limit = _constant(condition, right)
        if left.opcode != "get-tuple-element" or limit is None:
            return None
        if "direction=LT" not in compare.attributes:
            return None
        place = int(re.search(r"index=(\d+)", left.attributes)[1])
        start, step = self._start(computation, loop, place), self._step(loop, place)
        if start is None or step is None:
            return None
        return max(0, -(-(limit - start) // step))

    def _start(self, computation: Computation, loop: Instruction, place: int) -> int | None:
        state = computation.instructions[loop.operands[0]]
        if state.opcode != "tuple":
            return None
        return _constant(computation, computation.instructions[state.operands[place]])

    def _step(self, loop: Instruction, place: int) -> int | None:
        body = self.computations[_NAME.findall(loop.attribute("body"))[0]]
        if body.root.opcode != "tuple":
            return None
        following = body.instructions[body.root.operands[place]]
        while following.opcode in ("copy", "bitcast"):
            following = body.instructions[following.operands[0]]
        if following.opcode != "add":
            return None
        by = [_constant(body, body.instructions[o]) for o in following.operands]
        by = [value for value in by if value is not None]
        return by[0] if len(by) == 1 and by[0] > 0 else None


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current, lines = "", None, {}
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")) and line.rstrip().endswith("{"):
            current = _NAME.search(line)[1]
            lines = {}
            if line.startswith("ENTRY "):
                entry = current
        # An instruction's attributes may go over several lines; the last of these starts with "}}".
        elif line.startswith("}") and not line.startswith("}}") and current is not None:
            computations[current] = Computation(current, lines)
            current = None
        elif current is not None:
            instruction = _instruction(line)
            if instruction is not None:
                lines[instruction.name] = instruction
    if entry not in computations:
        raise ValueError("the compiled program's text has no entry computation")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    head = _HEAD.match(line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing]
    return Instruction(
        name=head[2],
        opcode=rest[:opening],
        shapes=shapes(kind),
        operands=tuple(_NAME.findall(arguments)),
        arguments=arguments,
        attributes=rest[closing + 1 :],
        is_root=bool(head[1]),
    )


def shapes(kind: str) -> tuple[Shape, ...]:
    """The arrays of a type, those of a tuple in order."""
    return tuple(
        # S(n): a memory other than the main one.
        Shape(dtype, tuple(map(int, filter(None, dims.split(",")))), "S(" not in layout)
        for dtype, dims, layout in _LEAF.findall(kind)
    )


def _constant(computation: Computation, instruction: Instruction) -> int | None:
    while instruction.opcode in ("copy", "bitcast"):
        instruction = computation.instructions[instruction.operands[0]]
    found = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.arguments)
    return int(instruction.arguments) if found else None


def _closing(text: str, opening: int) -> int:
    depth = 0
    for k in range(opening, len(text)):
        depth += (text[k] == "(") - (text[k] == ")")
        if not depth:
            return k
    raise ValueError(f"unbalanced: {text[:200]}")


def _until_comma(text: str) -> str:
    depth = 0
    for k, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if depth < 0 or (letter == "," and not depth):
            return text[:k]
    return text
