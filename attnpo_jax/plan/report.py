"""A plan as a table and as JSON."""

import dataclasses
from collections import defaultdict
from typing import Any

from rich.console import Group
from rich.table import Table

from attnpo_jax.plan.accelerators import GIB, Topology
from attnpo_jax.plan.lengths import Lengths
from attnpo_jax.plan.programs import Compiled
from attnpo_jax.plan.roofline import Roofline, group
from attnpo_jax.runtime.printable import plain


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will take."""

    source: str  # the model's name
    topology: Topology
    lengths: Lengths  # the pair that all pairs are taken to be like
    # The training step and, where something reads them, the reference's pass and the judge's.
    programs: tuple[Compiled, ...]
    # Pairs to prepare for training; None where nobody said and they can't be counted here.
    pairs: int | None
    trained_on: int | None  # how many of them training draws; None where that is unknown
    # Optimizer steps of the run; None where the number of pairs is needed and unknown.
    steps: int | None
    evaluates: bool = False  # whether there are pairs to evaluate on
    scorers: tuple[str, ...] = ()  # those that are models, whose passes are not planned

    @property
    def left_out(self) -> list[str]:
        """What the hours do not contain."""
        evaluation = ["preparing data.eval", "evaluation passes"] if self.evaluates else []
        scoring = [f"passes of the scorers {', '.join(self.scorers)}"] if self.scorers else []
        return [*scoring, *evaluation, "compiling", "reading and writing files"]

    def hours(self) -> dict[str, float]:
        """Hours of each program over the dataset, at the roofline; empty where it is unknown."""
        hours = {}
        for program in self.programs:
            seconds = Roofline.of(program).seconds
            if program.name == "train" and self.steps is not None:
                hours["train"] = seconds * self.steps / 3600
            elif program.name != "train" and self.pairs is not None:
                # Each copy of it takes pairs of its own.
                copies = self.topology.size / program.topology.size
                runs = self.pairs / program.batching.pairs / copies
                hours[program.name] = seconds * runs / 3600
        return hours

    def as_json(self) -> dict[str, Any]:
        """Everything, in plain types; bytes, FLOPs and seconds are per chip and run of a program
        but for `model_flops`, which are of all chips."""
        return {
            "model": self.source,
            "topology": self.topology.name,
            "chips": self.topology.size,
            "lengths": {**dataclasses.asdict(self.lengths), "row": self.lengths.row},
            "pairs": self.pairs,
            "trained_on": self.trained_on,
            "scorers_not_planned": list(self.scorers),
            "steps": self.steps,
            "hours_at_roofline": self.hours(),
            "hours_leave_out": self.left_out,
            "programs": {program.name: program_json(program) for program in self.programs},
        }


def program_json(program: Compiled) -> dict[str, Any]:
    """One program, in plain types."""
    roofline = Roofline.of(program)
    return {
        "topology": program.topology.name,
        "mesh": dict(program.mesh),
        "batching": dataclasses.asdict(program.batching),
        "attention": program.attention,
        "memory": {**dataclasses.asdict(program.memory), "hbm": program.topology.chip.hbm},
        "model_flops": program.model_flops,
        "flops": program.flops,
        "memory_traffic": program.traffic,
        "collectives": [
            {
                "kind": kind,
                "axes": list(axes),
                "inside_host": inside_host(program, axes),
                "times": times,
                "bytes": sent,
            }
            for (kind, axes), (times, sent) in by_kind(program).items()
        ],
        "seconds": {**roofline.parts, "roofline": roofline.seconds},
        "limit": roofline.limit,
        "mfu_at_roofline": roofline.mfu,
        "unknown_loops": list(program.unknown_loops),
        "compile_seconds": program.compile_seconds,
    }


def by_kind(program: Compiled) -> dict[tuple[str, tuple[str, ...]], tuple[int, float]]:
    """By kind and mesh axes: how many collectives a run has, and the bytes a chip sends in them."""
    sums: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(lambda: [0, 0.0])
    for c in program.collectives:
        sums[c.kind, c.axes][0] += c.times
        sums[c.kind, c.axes][1] += c.total
    order = sorted(sums.items(), key=lambda item: -item[1][1])
    return {key: (int(times), sent) for key, (times, sent) in order}


def inside_host(program: Compiled, axes: tuple[str, ...]) -> bool | None:
    """Whether groups along these mesh axes stay inside of a host; None where it can't be told."""
    if program.topology.size == program.topology.host.size:
        return True
    return program.topology.hosts(group(program, axes)) == 1 if axes else None


def table(plan: Plan) -> Group:
    """The plan for people."""
    head = Table(title=plain(f"plan: {plan.source} on {plan.topology.name}"), show_header=False)
    at = plan.lengths
    prompt, response = f"a prompt of {at.prompt}", f"two responses of {at.response}"
    head.add_row("rows", f"{at.row} tokens: {prompt}, {response}")
    judged = any(program.name == "judge" for program in plan.programs)
    none = "none, and no judge program: the weighting reads no judge"
    head.add_row("judge rows", f"{at.judge_row} tokens" if judged else none)
    head.add_row(
        "pairs", "unknown, so no hours; give --pairs=N" if plan.pairs is None else f"{plan.pairs:,}"
    )
    if plan.trained_on not in (None, plan.pairs):
        head.add_row("trained on", f"{plan.trained_on:,} pairs, drawn: train.pairs")
    if plan.scorers:
        like = "each takes a pass like the reference's, of its own model, over all pairs"
        head.add_row("scorers", plain(f"not planned: {', '.join(plan.scorers)}; {like}"))
    if plan.steps is not None:
        head.add_row("steps", f"{plan.steps:,}")
    for name, hours in plan.hours().items():
        head.add_row(f"{name}, at least", f"{hours:.2f} hours")
    if plan.hours():
        head.add_row("not in these hours", ", ".join(plan.left_out))
    return Group(head, _programs(plan), *(_collectives(p) for p in plan.programs))


def _programs(plan: Plan) -> Table:
    programs = plan.programs
    noun = plan.topology.noun
    made = Table(f"by {noun} and run", *(p.name for p in programs), title="programs")
    lines = [Roofline.of(p) for p in programs]

    def row(name, of):
        made.add_row(name, *(of(p, line) for p, line in zip(programs, lines, strict=True)))

    row(f"{noun}s", lambda p, _: p.topology.name)
    row("mesh", lambda p, _: ", ".join(f"{axis} {n}" for axis, n in p.mesh.items()))
    row("pairs", lambda p, _: str(p.batching.pairs))
    row("rows", lambda p, _: f"{p.batching.microbatches} x {p.batching.rows}")
    row("attention", lambda p, _: p.attention)
    row("arguments", lambda p, _: _gib(p.memory.arguments))
    row("temporaries", lambda p, _: _gib(p.memory.temporaries))
    row("peak", lambda p, _: f"{_gib(p.memory.peak)} of {_gib(p.topology.chip.hbm)}")
    row("FLOPs", lambda p, _: f"{p.flops / 1e12:.1f} T")
    row("model FLOPs", lambda p, _: f"{p.model_flops / p.topology.size / 1e12:.1f} T")
    row("memory traffic", lambda p, _: _gib(p.traffic))
    row("sent", lambda p, _: _gib(sum(c.total for c in p.collectives)))
    for part in ("compute", "memory", *plan.topology.links):
        row(part, lambda _, line, part=part: f"{line.parts.get(part, 0.0):.3f} s")
    row("at least", lambda _, line: f"{line.seconds:.3f} s, for {line.limit}")
    row("MFU at most", lambda _, line: f"{line.mfu:.0%}")
    row("compiled in", lambda p, _: f"{p.compile_seconds:.0f} s")
    if any(p.unknown_loops for p in programs):
        row("loops counted once", lambda p, _: str(len(p.unknown_loops)))
    return made


def _collectives(program: Compiled) -> Table:
    head = "kind", "axes", "inside a host", "times", "sent"
    made = Table(*head, title=f"collectives of {program.name}")
    for (kind, axes), (times, sent) in by_kind(program).items():
        over = " x ".join(axes) or "other groups"
        inside = {True: "yes", False: "no", None: "?"}[inside_host(program, axes)]
        made.add_row(kind, over, inside, f"{times:,}", f"{sent / 2**20:.1f} MiB")
    return made


def _gib(number: float) -> str:
    return f"{number / GIB:.2f} GiB"
