"""Where a pass's time goes: shares of a trace, and what the program's text says of an operation."""

import collections
import dataclasses
import math
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from attnpo_jax.judge.language_model import load_model
from attnpo_jax.models import decoder
from attnpo_jax.models.config import PROJECTIONS
from benchmarks import breakdown
from benchmarks.breakdown import HOST, INPUT, Breakdown, Operation
from tests import tiny


@dataclasses.dataclass
class Event:
    name: str
    start_ns: float
    duration_ns: float
    stats: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, name, start, end, run=1):
        stats = (("hlo_op", name), ("hlo_module", "jit_f"), ("run_id", run))
        return cls(name, start, end - start, stats)


@dataclasses.dataclass
class Profile:
    events: list[Event]

    @property
    def planes(self):
        lines = [types.SimpleNamespace(events=some) for some in (self.events[:3], self.events[3:])]
        return [types.SimpleNamespace(lines=lines)]


def operation(waits_for=None):
    return Operation("head", "forward", (), "f32", 0.0, 1, waits_for)


def shares(events, known):
    """As `breakdown.shares`, in nanoseconds and by name."""
    whole, seconds, runs = breakdown.shares(Profile(events), known)
    by_name = {key if isinstance(key, str) else key[1]: 1e9 * s for key, s in seconds.items()}
    return 1e9 * whole, by_name, runs


def test_time_is_shared_among_what_runs():
    events = [
        Event("breakdown", 1000, 1000),
        Event.of("before", 0, 1100),
        Event.of("dot.1", 1200, 1600),
        Event.of("while.2", 1000, 1900),
        Event.of("add.3", 1400, 1800, run=2),
        Event("end: dot.1", 1600, 100, (("hlo_op", "dot.1"), ("hlo_module", "jit_f"))),
        Event("of the host", 1000, 900),
        Event(INPUT, 1750, 100),
    ]
    known = {("jit_f", name): operation() for name in ("before", "dot.1", "add.3")}
    whole, of, runs = shares(events, known)
    assert whole == pytest.approx(1000)
    assert of == pytest.approx({"before": 100, HOST: 250, INPUT: 50, "dot.1": 300, "add.3": 300})
    assert runs == {"jit_f": 2}


def test_a_product_of_which_the_trace_has_the_beginning_takes_until_what_waits_for_it():
    events = [
        Event("breakdown", 1000, 1000),
        Event.of("before", 1000, 1100),
        Event.of("add.2", 1600, 1700),
        Event.of("dot.1", 1100, 1150),
        Event.of("add.3", 1800, 2000),
    ]
    known = {("jit_f", name): operation() for name in ("before", "dot.1", "add.3")}
    known["jit_f", "add.2"] = operation("dot.1")
    _, of, _ = shares(events, known)
    took = {"before": 100, "dot.1": 500, "add.2": 100, HOST: 100, "add.3": 200}
    assert of == pytest.approx(took)


def test_what_takes_a_product_waits_for_it():
    def f(x, y):
        return jnp.sin(jnp.einsum("tw,td->wd", x, y).reshape(-1, 4, 64))

    compiled = jax.jit(f).lower(jnp.ones((16, 128)), jnp.ones((16, 64))).compile()
    found = breakdown.operations([compiled.runtime_executable()])
    products = [name for (_, name), one in found.items() if one.products]
    waiting = {one.waits_for for one in found.values()} - {None}
    assert len(products) == 1 and waiting == set(products)


def test_what_is_not_known_is_other():
    events = [Event("breakdown", 0, 10), Event.of("dot.1", 0, 10)]
    _, of, _ = shares(events, {})
    assert of == pytest.approx({breakdown.OTHER: 10})


@pytest.mark.parametrize(
    ("frames", "part"),
    [
        (["/a/attnpo_jax/models/layers.py:Layers._project", "/a/x.py:f"], "projections"),
        (["/x/jax/numpy.py:f", "/a/attnpo_jax/models/layers.py:rms_norm"],
         "norms, rotations, gates"),
        (["/a/models/attention/core.py:f", "/a/models/layers.py:Layers._project"], "attention"),
        (["/site-packages/optax/_src/transform.py:update"], "optimizer"),
        (["/x/y.py:f"], "other"),
        ([], "other"),
    ],
)  # fmt: skip
def test_the_nearest_function_that_is_listed_tells_the_part(frames, part):
    assert breakdown.part_of(frames) == part


class Decoding:
    """A tiny decoder's outputs, or their gradients, twice."""

    TOKENS = 2 * 32

    def __init__(self, model, change=lambda function: function):
        self.info = {"pairs": 1, "tokens": self.TOKENS}
        tokens = jnp.ones((2, 32), jnp.int32)

        def decoded(params):
            positions = jnp.broadcast_to(jnp.arange(32), tokens.shape)
            hidden = decoder.forward(model.config, params, tokens, positions, tokens)
            return jnp.sum(jnp.square(hidden))

        self._run, self._params = jax.jit(change(decoded)), model.params

    def repeat(self):
        start = time.perf_counter()
        for _ in range(2):
            jax.block_until_ready(self._run(self._params))
        return {"seconds": time.perf_counter() - start}


def flops_of(measured):
    """By part and direction."""
    flops = collections.Counter()
    for (module, _), one in measured.operations.items():
        if module == "jit_decoded":
            for size, count in one.products:
                flops[one.part, one.direction] += 2 * math.prod(size) * count * one.times
    return flops


@pytest.mark.parametrize("change", [lambda function: function, jax.grad], ids=["alone", "gradient"])
def test_projections_are_told_with_a_backward_pass_and_without(tmp_path, change):
    jax.clear_caches()
    model = load_model(str(tiny.write_folder(tmp_path)))
    flops = flops_of(Breakdown(Decoding(model, change)))
    weights = sum(model.params["layers"][name].size for name in PROJECTIONS.values())
    of_projections = 2 * Decoding.TOKENS * weights
    assert flops["projections", "forward"] == of_projections
    assert flops["projections", "backward"] == (2 * of_projections if change is jax.grad else 0)
    assert flops["attention", "forward"] > 0
    assert {part for part, _ in flops} == {"projections", "attention"}


def test_parts_of_a_program_that_runs(tmp_path):
    jax.clear_caches()
    measured = Breakdown(Decoding(load_model(str(tiny.write_folder(tmp_path))), jax.grad))
    found = measured.repeat()
    names = {"projections, backward", "attention, forward", "norms, rotations, gates, backward"}
    assert names <= set(found["parts"])
    taken, limits = zip(*found["parts"].values(), strict=True)
    assert sum(taken) == pytest.approx(found["traced_seconds"])
    assert found["parts"]["projections, backward"][1] > 0 and min(limits) >= 0
    rows = breakdown.points("train", [found, found])
    assert sum(row["share_of_the_pass"] for row in rows) == pytest.approx(1)
    assert [row["seconds"] for row in rows] == sorted((r["seconds"] for r in rows), reverse=True)


def test_of_two_programs_of_one_name_nothing_is_said():
    def f(x):
        return x @ x

    both = [jax.jit(f).lower(jnp.ones((n, n))).compile().runtime_executable() for n in (8, 16)]
    assert breakdown.operations(both) == {}
    ((key, one),) = ((k, v) for k, v in breakdown.operations(both[:1]).items() if v.products)
    assert key[0] == "jit_f" and one.products == (((1, 8, 8, 8), 1),)
    assert one.traffic == 2 * 8 * 8 * 4  # each array once
