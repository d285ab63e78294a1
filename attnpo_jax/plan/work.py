"""What a compiled program computes and moves: FLOPs of its products, bytes through main memory.

Both are sums over its instructions, each as often as it runs (see `hlo.Program`).
"""

import dataclasses
import json
import math
import re

import numpy as np

from attnpo_jax.plan.hlo import Computation, Instruction, Program, Shape

# Instructions that move nothing: they name, group or wait for what others made.
_NOTHING = (
    "after-all",
    "async-start",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "iota",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
)
# Instructions that update their first operand in place, and which operand has the update.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


# GPU programs call libraries for some products: cuBLAS, and cuDNN for all of attention.
_CUBLAS, _CUDNN_ATTENTION = "__cublas$", "__cudnn$fmha"


@dataclasses.dataclass(frozen=True)
class Parts:
    """Tokens of a row that cuDNN is told at run time, as `models.attention.split` has it compute.

    The program's text has them not: its arrays are as long as a row may be.
    """

    prefix: int
    response: int  # of each branch

    @property
    def causal(self) -> float:
        """Scores of a causal part, in the mean of both: prefix with a branch, and a branch."""
        lengths = self.prefix + self.response, self.response
        return sum(n * (n + 1) / 2 for n in lengths) / 2

    @property
    def whole(self) -> int:
        """Scores of the part without a rule: a branch over the prefix."""
        return self.response * self.prefix


def flops(program: Program, parts: Parts | None = None) -> int:
    """FLOPs of all matrix products, padding left out.

    TPU programs write them as convolutions, GPU programs partly as calls of cuBLAS; cuDNN's
    attention counts with all that it computes.

    Args:
      parts: of the rows that cuDNN attends to in parts; None: rows of one piece that fill their
        arrays.
    """
    total = 0.0
    for computation, i, times in program.instructions():
        kind = _kind(i)
        if kind == _CUDNN_ATTENTION:
            query = computation.instructions[i.operands[0]].shapes[0]
            total += times * cudnn_attention(i, query, parts)
        elif count := _COUNTS.get(kind):
            left, right = (computation.instructions[o].shapes[0] for o in i.operands[:2])
            total += times * count(i, left, right)
    return round(total)


def _kind(i: Instruction) -> str:
    """An instruction's opcode, or the library that it calls."""
    calls = (known for known in (_CUBLAS, _CUDNN_ATTENTION) if i.target.startswith(known))
    return next(calls, i.opcode) if i.opcode == "custom-call" else i.opcode


def _dot(i: Instruction, left: Shape, right: Shape) -> int:
    del right
    return _product(i, left, re.findall(r"\d+", i.attribute("lhs_contracting_dims") or ""))


def _cublas(i: Instruction, left: Shape, right: Shape) -> int:
    del right
    summed = re.search(r'"lhs_contracting_dimensions":\s*(\[[^\]]*\])', i.attributes)
    return _product(i, left, json.loads(summed[1]))


def _product(i: Instruction, left: Shape, summed: list[str]) -> int:
    return 2 * i.shapes[0].elements * math.prod(left.dims[int(d)] for d in summed)


def cudnn_attention(i: Instruction, query: Shape, parts: Parts | None = None) -> float:
    """FLOPs of two products forward and five backward, of what rule and lengths do not leave out.

    A mask leaves out nothing: the kernel computes what it then hides. What lengths leave out of a
    tile counts as left out.
    """
    scores = re.search(r'"intermediate_tensor_shape":.*?"dimensions":\s*(\[[^\]]*\])', i.attributes)
    B, N, L, S = map(int, json.loads(scores[1]))
    rule = re.search(r'"mask_type":\s*"(\w+)"', i.attributes)[1]
    parts = parts or Parts(L, 0)
    seen = {
        "CAUSAL": sum(min(t + 1, S) for t in range(L)),
        "PADDING_CAUSAL": parts.causal,
        "PADDING": parts.whole,
    }.get(rule, L * S)
    products = 5 if "Backward" in i.target else 2
    return products * 2 * B * N * seen * query.dims[-1]


def _convolution(i: Instruction, left: Shape, right: Shape) -> int:
    labels = re.match(r"(\w+)_(\w+)->(\w+)", i.attribute("dim_labels"))
    lhs, rhs, out = labels.groups()
    window = i.attribute("window") or ""
    found = {key: value.split("x") for key, value in re.findall(r"(\w+)=([\w-]+)", window)}
    products = 1
    for k in range(sum(letter.isdigit() for letter in out)):

        def of(name: str, default: str, k=k) -> str:
            return found[name][k] if name in found else default

        low = int(of("pad", "0_0").split("_")[0])
        stride, spread = int(of("stride", "1")), int(of("rhs_dilate", "1"))
        hole = int(of("lhs_dilate", "1"))
        length = (left.dims[lhs.index(str(k))] - 1) * hole + 1
        at = np.arange(i.shapes[0].dims[out.index(str(k))])[:, None] * stride - low
        at = at + np.arange(right.dims[rhs.index(str(k))])[None, :] * spread
        # Only where the window meets a number, not padding or a hole, is there a product.
        products *= int(((at >= 0) & (at < length) & (at % hole == 0)).sum())
    batch, features = left.dims[lhs.index("b")], right.dims[rhs.index("o")]
    groups = int(i.attribute("batch_group_count") or 1)
    return 2 * products * (batch // groups) * features * right.dims[rhs.index("i")]


_COUNTS = {
    "convolution": _convolution,
    "dot": _dot,
    _CUBLAS: _cublas,
}


def memory_traffic(program: Program) -> float:
    """Bytes read from and written to main memory, at least: each operand and result once.

    What an instruction slices out of an array counts, not all of the array; what XLA keeps in the
    core's own memory does not count.
    """
    return sum(
        times * traffic(program, computation, i)
        for computation, i, times in program.instructions()
        if computation.name not in program.fused
    )


def traffic(program: Program, computation: Computation, i: Instruction) -> float:
    """Bytes of an instruction's one run, as `memory_traffic` counts them."""
    if i.opcode in _NOTHING or i.opcode.endswith("-done"):
        return 0.0
    operands = [computation.instructions[o].shapes for o in i.operands]
    reads = [_in_hbm(shapes) for shapes in operands]
    writes = _in_hbm(i.shapes)
    if i.opcode in ("copy-start", "slice-start"):
        # (destination, source, state) or ((source), destination, state).
        target = i.shapes[0] if i.opcode == "copy-start" else i.shapes[1]
        source = operands[0][0]
        return target.bytes * (target.in_hbm + source.in_hbm)
    if i.opcode.endswith("-start"):
        return sum(reads) + max(writes - sum(reads), 0.0)
    if _kind(i) in (_CUBLAS, _CUDNN_ATTENTION):
        # The last result is room to work in.
        return sum(reads) + _in_hbm(i.shapes[:-1] or i.shapes)
    if i.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * writes if reads[0] else writes
    if i.opcode in _UPDATES:
        return 2 * reads[_UPDATES[i.opcode]]
    if i.opcode == "fusion":
        inner = program.computations[i.called()[0]]
        reads = [
            min(whole, _read(program, inner, p.name))
            for whole, p in zip(reads, inner.parameters, strict=False)
        ]
        writes = _written(inner, i)
    return sum(reads) + writes


def _in_hbm(shapes: tuple[Shape, ...]) -> float:
    return sum(s.bytes for s in shapes if s.in_hbm)


def _read(program: Program, inner: Computation, name: str) -> float:
    """Bytes that a fusion reads of a value: all of it, unless slices are all it takes."""
    total = 0.0
    for user in inner.users.get(name, []):
        if user.opcode in ("bitcast", "reshape"):
            total += _read(program, inner, user.name)
        elif user.opcode == "fusion":
            nested = program.computations[user.called()[0]]
            for operand, parameter in zip(user.operands, nested.parameters, strict=False):
                if operand == name:
                    total += _read(program, nested, parameter.name)
        elif user.opcode in ("dynamic-slice", "slice", "gather"):
            total += user.shapes[0].bytes
        elif user.opcode not in _UPDATES or user.operands[0] != name:
            return math.inf
    return total


def _written(inner: Computation, i: Instruction) -> float:
    """Bytes that a fusion writes: of what is updated in place, the update alone."""
    root = inner.root
    roots = [inner.instructions[o] for o in root.operands] if root.opcode == "tuple" else [root]
    total = 0.0
    for shape, made in zip(i.shapes, roots, strict=False):
        while made.opcode == "bitcast":
            made = inner.instructions[made.operands[0]]
        if shape.in_hbm and made.opcode in _UPDATES:
            total += inner.instructions[made.operands[_UPDATES[made.opcode]]].shapes[0].bytes
        elif shape.in_hbm:
            total += shape.bytes
    return total
