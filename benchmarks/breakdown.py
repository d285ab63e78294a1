"""Where the time of a pass goes, by part, and how near each part is to its own limit.

A profiler's trace says when each of the compiled program's operations ran; the program's text says
which function of the package each comes from, what it multiplies and what it moves. Where several
run at a time, the time is shared out among them; where none does, it is that of a product that the
next one waits for (of those that XLA leaves to Eigen, a trace has the beginning alone), else of the
input or the host. So the parts' times add up to all of it.
"""

import collections
import dataclasses
import math
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnpo_jax.plan import hlo, work
from benchmarks.protocol import Workload

HOST, OTHER = "host", "other"
INPUT = "input"  # the trace's name for waiting for a batch too
_WHOLE = "breakdown"  # the trace's name for a repeat

# The function nearest to an operation that is listed tells its part: a file, or a file's function.
_PARTS = {
    "models/attention/": "attention",
    "models/lm_head.py": "head",
    "models/layers.py:Layers._project": "projections",
    "models/layers.py:linear": "projections",
    "models/layers.py:product": "projections",
    "models/layers.py:": "norms, rotations, gates",
    "models/layer_kinds.py:": "norms, rotations, gates",
    "models/decoder.py:Decoder.final": "norms, rotations, gates",
    "models/decoder.py:Decoder.embed": "embedding",
    "models/placement.py:lookup": "embedding",
    "losses/": "loss",
    "weighting/": "loss",
    "train/optim": "optimizer",
    "train/step.py:": "optimizer",  # the gradients' sums and norm, and the parameters' update
    "optax/": "optimizer",
}
# What a scan does with what it goes over, its layers' parameters and residuals.
_OF_SCAN = re.compile(r"while/body/(\w*/)*(jit\()?dynamic_(update_)?(slice|index_in_dim)")
_SCAN = "layers in and out"
_BACKWARD, _AGAIN = "transpose(", "rematted_computation"
_CONTAINERS = ("while", "call", "conditional")


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction that runs by itself.

    Attributes:
      part: of `_PARTS`, or another.
      direction: forward, backward, or again (computed anew for the backward pass).
      products: (batch, rows, summed, columns) and how many such products it has.
      dtype: of these.
      traffic: bytes that it moves, at least.
      times: how often it does in a run of its program.
      waits_for: the instruction of a product that it takes, if that is none of a fusion's.
    """

    part: str
    direction: str
    products: tuple[tuple[tuple[int, int, int, int], int], ...]
    dtype: str
    traffic: float
    times: int
    waits_for: str | None = None


class Breakdown:
    """A workload, traced."""

    def __init__(self, workload: Workload):
        self._workload = workload
        workload.repeat()
        # Before rates are measured, which compiles more.
        self.operations = operations(jax.devices()[0].client.live_executables())
        self._limits = Limits(self.operations.values())
        self.info = {key: workload.info[key] for key in ("pairs", "tokens")}

    def repeat(self) -> dict[str, Any]:
        untraced = self._workload.repeat()["seconds"]
        options = jax.profiler.ProfileOptions()
        options.host_tracer_level, options.python_tracer_level = 2, 0
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                with jax.profiler.TraceAnnotation(_WHOLE):
                    self._workload.repeat()
            (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
            profile = jax.profiler.ProfileData.from_file(str(file))
        whole, seconds, runs = shares(profile, self.operations)
        parts: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
        for key, taken in seconds.items():
            operation = self.operations.get(key)
            name = f"{operation.part}, {operation.direction}" if operation else key
            parts[name][0] += taken
            if operation:
                times = runs[key[0]] * operation.times
                parts[name][1] += times * self._limits.seconds(operation)
        return {"seconds": untraced, "traced_seconds": whole, "parts": parts}


def operations(executables: Iterable[Any]) -> dict[tuple[str, str], Operation]:
    """What runs in compiled programs, by module and instruction.

    Of two programs of one name, none: a trace does not tell them apart.
    """
    modules = [one.hlo_modules()[0] for one in executables]
    texts = [(module.name, module.to_string()) for module in modules]
    count = collections.Counter(name for name, _ in texts)
    found = {}
    for name, text in texts:
        if count[name] > 1:
            continue
        program, frames = hlo.parse(text), Frames(text)
        for computation, i, times in program.instructions():
            if computation.name not in program.fused and i.opcode not in _CONTAINERS:
                found[name, i.name] = _operation(program, computation, i, times, frames)
    return found


def _operation(
    program: hlo.Program,
    computation: hlo.Computation,
    i: hlo.Instruction,
    times: int,
    frames: "Frames",
) -> Operation:
    direction = "backward" if _BACKWARD in i.source else "forward"
    if _AGAIN in i.source:
        direction = "again"
    inside = [(computation, i)]
    if i.opcode == "fusion":
        inner = program.computations[i.called()[0]]
        inside = [(inner, one) for one in inner.instructions.values()]
    products = collections.Counter(
        _product(where, one) for where, one in inside if one.opcode == "dot"
    )
    part = _SCAN if not products and _OF_SCAN.search(i.source) else part_of(frames.of(i))
    return Operation(
        part,
        direction,
        tuple(products.items()),
        i.shapes[0].dtype if i.shapes else "",
        work.traffic(program, computation, i),
        times,
        next(filter(None, (_product_at(computation, name) for name in i.operands)), None),
    )


def _product_at(computation: hlo.Computation, name: str) -> str | None:
    """The product that an operand is, bitcast or not."""
    i = computation.instructions.get(name)
    while i is not None and i.opcode == "bitcast":
        i = computation.instructions.get(i.operands[0])
    return i.name if i is not None and i.opcode == "dot" else None


def _product(computation: hlo.Computation, dot: hlo.Instruction) -> tuple[int, int, int, int]:
    left, right = (computation.instructions[o].shapes[0] for o in dot.operands[:2])

    def size(side: hlo.Shape, kind: str) -> int:
        places = re.findall(r"\d+", dot.attribute(kind) or "")
        return math.prod(side.dims[int(d)] for d in places)

    batch, summed = size(left, "lhs_batch_dims"), size(left, "lhs_contracting_dims")
    rows, columns = (side.elements // batch // summed for side in (left, right))
    return batch, rows, summed, columns


class Frames:
    """The functions that each operation was traced in, from a program's text."""

    def __init__(self, text: str):
        files, functions = (self._names(text, f"{kind}Names") for kind in ("File", "Function"))
        self._places = {
            id: f"{files[file]}:{functions[function]}"
            for id, file, function in self._numbers(text, "FileLocations")
        }
        # A parent's number is its id and 1; the first has none.
        self._frames = {
            id: (place, parent - 1) for id, place, parent in self._numbers(text, "StackFrames")
        }

    def of(self, i: hlo.Instruction) -> list[str]:
        """Files with functions, innermost first."""
        found = re.search(r"stack_frame_id=(\d+)", i.attributes)
        id, listed = int(found[1]) if found else 0, []
        while id in self._frames and len(listed) < len(self._frames):
            place, id = self._frames[id]
            listed.append(self._places[place])
        return listed

    @staticmethod
    def _section(text: str, title: str) -> list[str]:
        found = re.search(rf"^{title}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        return found[1].splitlines() if found else []

    def _names(self, text: str, title: str) -> dict[int, str]:
        rows = (line.split(" ", 1) for line in self._section(text, title))
        return {int(number): name.strip('"') for number, name in rows}

    def _numbers(self, text: str, title: str) -> list[tuple[int, int, int]]:
        return [
            tuple(map(int, re.findall(r"(?:^|=)(\d+)", line)[:3]))
            for line in self._section(text, title)
        ]


def part_of(frames: Iterable[str]) -> str:
    """The part that an operation belongs to, by the functions that it was traced in."""
    for frame in frames:
        for place, part in _PARTS.items():
            if f"/{place}" in frame:
                return part
    return OTHER


def shares(
    profile: Any, known: Mapping[tuple[str, str], Operation]
) -> tuple[float, dict[Any, float], collections.Counter[str]]:
    """The seconds of the whole repeat; those of each operation, of `INPUT` and of `HOST`; and how
    often each program ran.
    """
    ran, whole, runs = [], None, set()
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                span = event.start_ns, event.start_ns + event.duration_ns
                if event.name == _WHOLE:
                    whole = span
                elif event.name == INPUT:
                    ran.append((*span, INPUT))
                elif not event.name.startswith(("end: ", "ThunkExecutor")):
                    stats = dict(event.stats)
                    key = stats.get("hlo_module", ""), stats.get("hlo_op", "")
                    if key[1] and key[1].partition(".")[0] not in _CONTAINERS:
                        ran.append((*span, key if key in known else OTHER))
                        runs.add((key[0], stats.get("run_id")))
    start, end = whole
    borders = sorted(
        (min(max(at, start), end), step, key)
        for low, high, key in ran
        for at, step in ((low, 1), (high, -1))
    )

    def awaited(key: Any) -> Any:
        """The product that the next operation waits for while none runs."""
        product = key in known and (key[0], known[key].waits_for)
        return product if product in known else HOST

    seconds: dict[Any, float] = collections.defaultdict(float)
    active: collections.Counter = collections.Counter()
    before = start
    for at, step, key in (*borders, (end, 0, None)):
        if at > before:
            running = [one for one, number in active.items() if number and one != INPUT]
            for one in running or [INPUT if active[INPUT] else awaited(key)]:
                seconds[one] += (at - before) * 1e-9 / max(1, len(running))
            before = at
        active[key] += step
    return (end - start) * 1e-9, seconds, collections.Counter(program for program, _ in runs)


class Limits:
    """The least time of an operation: its products at the rate of such products alone, or its bytes
    at the rate of a copy, whichever takes longer.
    """

    def __init__(self, operations: Iterable[Operation]):
        sizes = {(size, one.dtype) for one in operations for size, _ in one.products}
        self._products = {key: _seconds_of_product(*key) for key in sizes}
        x = jnp.zeros(1 << 26, jnp.float32)
        self._copied = 2 * x.nbytes / _seconds(lambda x: x + 1, x)

    def seconds(self, operation: Operation) -> float:
        """Of one run of an operation."""
        computing = sum(
            count * self._products[size, operation.dtype] for size, count in operation.products
        )
        return max(computing, operation.traffic / self._copied)


def _seconds_of_product(size: tuple[int, int, int, int], dtype: str) -> float:
    batch, rows, summed, columns = size
    dtype = {"bf16": jnp.bfloat16, "f16": jnp.float16}.get(dtype, jnp.float32)
    x = jnp.ones((batch, rows, summed), dtype)
    y = jnp.ones((batch, summed, columns), dtype)
    if batch == 1:
        x, y = x[0], y[0]
    return _seconds(lambda out, x, y: x @ y, x @ y, x, y)


def _seconds(
    function: Callable[..., jax.Array], out: jax.Array, *operands: jax.Array, least: float = 0.05
) -> float:
    """The median of several runs, each into the array of the one before: new memory takes time."""
    run = jax.jit(function, donate_argnums=0, keep_unused=True)
    out = jax.block_until_ready(run(out, *operands))
    taken: list[float] = []
    while sum(taken) < least or len(taken) < 3:
        start = time.perf_counter()
        out = jax.block_until_ready(run(out, *operands))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def points(of: str, repeats: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each part: its median seconds, those of its limit, and its shares."""
    names = dict.fromkeys(name for repeat in repeats for name in repeat["parts"])
    rows = []
    for name in names:
        taken, limit = np.median([r["parts"].get(name, (0.0, 0.0)) for r in repeats], axis=0)
        share = taken / statistics.median(r["traced_seconds"] for r in repeats)
        rows.append(
            {
                "pass": of,
                "part": name,
                "seconds": float(taken),
                "share_of_the_pass": float(share),
                "limit_seconds": float(limit),
                "share_of_limit": float(limit / taken) if taken else 0.0,
            }
        )
    return sorted(rows, key=lambda row: -row["seconds"])
