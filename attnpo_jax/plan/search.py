"""Tries meshes, microbatch sizes and remat policies, and ranks those that fit."""

import copy
import dataclasses
import logging
import math
from collections.abc import Iterator
from typing import Any

import jax
from rich.table import Table

from attnpo_jax.models import lora
from attnpo_jax.parallel import mesh as meshes
from attnpo_jax.plan.programs import Compiled, DoesNotFit, Setting
from attnpo_jax.plan.report import program_json
from attnpo_jax.plan.roofline import Roofline
from attnpo_jax.plan.topologies import GIB, PlanError
from attnpo_jax.train import loop
from attnpo_jax.train.state import TrainState

_LOG = logging.getLogger(__name__)

# Each is a compilation of a minute or two for a model of 8B.
TRIED = 12
# Of the same mesh and microbatch, tried in this order: what seldom fits comes last.
REMATS = ("dots", "layer", "none")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to train.

    Attributes:
      mesh: sizes of the mesh's axes.
      microbatch: `train.microbatch_size`.
      remat: `model.remat`.
    """

    mesh: dict[str, int]
    microbatch: int
    remat: str

    def __str__(self) -> str:
        sizes = ", ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        return f"{sizes}, microbatch {self.microbatch}, remat {self.remat}"


@dataclasses.dataclass(frozen=True)
class Found:
    """A candidate with its compiled training step, or why there is none."""

    candidate: Candidate
    program: Compiled | None
    problem: str = ""

    def as_json(self) -> dict[str, Any]:
        program = None if self.program is None else program_json(self.program)
        return {**dataclasses.asdict(self.candidate), "train": program, "problem": self.problem}


def ranking(setting: Setting) -> list[Found]:
    """Training steps of the likeliest candidates, the fastest first, those that do not fit last.

    Raises:
      PlanError: no mesh is worth a try.
    """
    likely = sorted(candidates(setting), key=lambda c: _guess(setting, c))[:TRIED]
    if not likely:
        raise PlanError(
            f"no mesh of {setting.topology.size} chips divides this model and leaves a chip "
            f"memory for its parameters and their moments; accepted: more chips, or larger ones"
        )
    found = []
    for k, candidate in enumerate(likely):
        _LOG.info("%d of %d: %s", k + 1, len(likely), candidate)
        try:
            found.append(Found(candidate, _with(setting, candidate).training()))
        except DoesNotFit as error:
            found.append(Found(candidate, None, str(error).split(", on ")[0]))
    return sorted(found, key=_seconds)


def candidates(setting: Setting) -> Iterator[Candidate]:
    """All that divide the model and the batch, and have room for parameters and moments."""
    n, batch = setting.topology.size, setting.config.train.batch_size
    state = _state_bytes(setting)
    for tensor in _divisors(n):
        for fsdp in _divisors(n // tensor):
            mesh = {"data": n // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}
            try:
                meshes.check_model(setting.model, mesh)
            except meshes.MeshError:
                continue
            rows = mesh["data"] * fsdp
            # With more parts of a batch than pairs, chips would have none.
            if rows > batch or state / (fsdp * tensor) > setting.topology.chip.hbm:
                continue
            # A microbatch divides the batch. Where none fills all parts, the whole batch is padded.
            sizes = [size for size in _divisors(batch) if size % rows == 0] or [batch]
            for size in sizes:
                for remat in REMATS:
                    yield Candidate(mesh, size, remat)


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


def _elements(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _state(setting: Setting) -> TrainState:
    """The training state, as shapes."""
    return loop.initial_state(setting.config, lora.adapted(setting.model, setting.config.lora))


def _state_bytes(setting: Setting) -> int:
    """Parameters, moments of those that are trained, and their float32 gradient."""
    state = _state(setting)
    kept = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    return kept + 4 * _elements(state.params)


def _guess(setting: Setting, candidate: Candidate) -> tuple[float, float]:
    """What to try first: little to send; of the same, little to compute or keep.

    Per microbatch, the layers' weights are gathered twice and the gradients of those that are
    trained reduced once over `fsdp`; per layer, activations are summed six times over `tensor`.
    """
    model, mesh, state = setting.model, candidate.mesh, _state(setting)
    trained, read = _elements(state.params), _elements((state.params, state.base))
    n = -(-setting.config.train.batch_size // candidate.microbatch)
    weights = 2 * (2 * read + trained) / mesh["tensor"] * n * (mesh["fsdp"] > 1)
    gradients = 2 * 4 * trained / mesh["fsdp"] / mesh["tensor"] * (mesh["data"] > 1)
    rows = setting.config.train.batch_size / (mesh["data"] * mesh["fsdp"])
    tokens = rows * setting.lengths.row
    sums = 6 * 2 * 2 * tokens * model.hidden_size * model.num_layers * (mesh["tensor"] > 1)
    return weights + gradients + sums, REMATS.index(candidate.remat)


def _with(setting: Setting, candidate: Candidate) -> Setting:
    config = copy.deepcopy(setting.config)
    config.parallel.mesh.update(candidate.mesh)
    config.train.microbatch_size = candidate.microbatch
    config.model.remat = candidate.remat
    return dataclasses.replace(setting, config=config)


def _seconds(found: Found) -> float:
    return math.inf if found.program is None else Roofline.of(found.program).seconds


def table(ranking: list[Found]) -> Table:
    """The ranking for people."""
    made = Table("data", "fsdp", "tensor", "microbatch", "remat")
    for name in ("peak", "at least", "MFU at most", "limit"):
        made.add_column(name)
    for found in ranking:
        c = found.candidate
        cells = [*map(str, c.mesh.values()), str(c.microbatch), c.remat]
        if found.program is None:
            made.add_row(*cells, "does not fit", found.problem.partition("needs ")[2], "", "")
            continue
        line = Roofline.of(found.program)
        peak = f"{found.program.memory.peak / GIB:.2f} GiB"
        made.add_row(*cells, peak, f"{line.seconds:.3f} s", f"{line.mfu:.0%}", line.limit)
    return made
