"""Tries meshes, microbatch sizes and remat policies, and ranks those that fit."""

import copy
import dataclasses
import logging
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
from rich.table import Table

from attnpo_jax.models import lora
from attnpo_jax.parallel import mesh as meshes
from attnpo_jax.parallel.state import TrainState
from attnpo_jax.plan.accelerators import GIB, PlanError
from attnpo_jax.plan.programs import Compiled, DoesNotFit, Setting
from attnpo_jax.plan.report import program_json
from attnpo_jax.plan.roofline import Roofline
from attnpo_jax.train import stage as train

_LOG = logging.getLogger(__name__)

# Compilations of a minute or two for a model of 8B: so many that fit, and so many in all. One that
# does not fit says so in seconds.
FITTING, TRIED = 12, 36
# By the memory they take: where one does not fit, those after it do not.
REMATS = ("layer", "dots", "none")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to train."""

    mesh: dict[str, int]  # sizes of the mesh's axes
    microbatch: int  # `train.microbatch_size`
    remat: str  # `model.remat`

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
    """Training steps, the fastest first, those that do not fit last.

    The config's own comes first; then those that send least. Of each mesh and microbatch, remat
    policies are tried from the thriftiest on, until one does not fit, and of each mesh no
    microbatch that is larger than one that does not fit with the thriftiest.
    """
    own = _own(setting)
    waiting = sorted(candidates(setting), key=lambda c: _guess(setting, c))
    if own is not None:
        waiting = [own] + [c for c in waiting if c != own]
    found: list[Found] = []
    too_large: list[Candidate] = []
    fitting = 0
    for candidate in waiting:
        if fitting == FITTING or len(found) == TRIED:
            break
        if any(_takes_more(candidate, other) for other in too_large):
            continue
        _LOG.info("%d: %s", len(found) + 1, candidate)
        try:
            program, problem = _with(setting, candidate).training(), ""
        except DoesNotFit as error:
            program, problem = None, str(error).split(", on ")[0]
            too_large.append(candidate)
        except jax.errors.JaxRuntimeError as error:
            # What is found so far has taken minutes.
            program, problem = None, str(error).splitlines()[0]
            _LOG.warning("%s: %s", candidate, problem)
        found.append(Found(candidate, program, problem))
        fitting += program is not None
    return sorted(found, key=_place)


def _own(setting: Setting) -> Candidate | None:
    """The config's own way to train, if its mesh fits the slice and the model."""
    train = setting.config.train
    try:
        mesh = setting.training_mesh()
        meshes.check_model(setting.model, mesh)
    except meshes.MeshError:
        return None
    return Candidate(mesh, train.microbatch_size, setting.config.model.remat)


def _takes_more(candidate: Candidate, other: Candidate) -> bool:
    """Whether it surely needs as much memory as another one, or more."""
    return (
        candidate.mesh == other.mesh
        and candidate.microbatch >= other.microbatch
        and REMATS.index(candidate.remat) >= REMATS.index(other.remat)
    )


def candidates(setting: Setting) -> Iterator[Candidate]:
    """All that divide the model and the batch, and have room for parameters and moments."""
    batch = setting.config.train.batch_size
    for mesh in _meshes(setting):
        rows = mesh["data"] * mesh["fsdp"]
        # A microbatch divides the batch. Where none fills all parts, the whole batch is padded.
        sizes = [size for size in _divisors(batch) if size % rows == 0] or [batch]
        for size in sizes:
            for remat in REMATS:
                yield Candidate(mesh, size, remat)


def _meshes(setting: Setting) -> list[dict[str, int]]:
    n, noun = setting.topology.size, setting.topology.noun
    batch = setting.config.train.batch_size
    state, hbm = _state_bytes(setting), setting.topology.chip.hbm
    divide = []
    for tensor in _divisors(n):
        for fsdp in _divisors(n // tensor):
            mesh = {"data": n // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}
            try:
                meshes.check_model(setting.model, mesh)
            except meshes.MeshError:
                continue
            divide.append(mesh)
    if not divide:
        raise PlanError(f"no mesh of {n} {noun}s divides this model; accepted: another number")
    roomy = [mesh for mesh in divide if state / (mesh["fsdp"] * mesh["tensor"]) <= hbm]
    if not roomy:
        most = max(mesh["fsdp"] * mesh["tensor"] for mesh in divide)
        raise PlanError(
            f"parameters, moments and gradient take {state / most / GIB:.2f} GiB of a {noun}'s "
            f"{hbm / GIB:.2f} GiB, split as far as {n} {noun}s and this model allow; accepted: "
            f"more {noun}s, or larger ones"
        )
    # With more parts of a batch than pairs, chips would have none.
    busy = [mesh for mesh in roomy if mesh["data"] * mesh["fsdp"] <= batch]
    if not busy:
        parts = min(mesh["data"] * mesh["fsdp"] for mesh in roomy)
        raise PlanError(
            f"on {n} {noun}s a batch is in {parts} parts or more, since this model can't be split "
            f"further by tensor, and train.batch_size is {batch}; accepted: a train.batch_size of "
            f"{parts} or more, or fewer {noun}s"
        )
    return busy


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


def _elements(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _state(setting: Setting) -> TrainState:
    """The training state, as shapes."""
    return train.initial_state(setting.config, lora.adapted(setting.model, setting.config.lora))


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


def _place(found: Found) -> tuple[float, float]:
    if found.program is None:
        return math.inf, math.inf
    return Roofline.of(found.program).seconds, found.program.memory.peak


def table(ranking: list[Found]) -> Table:
    """The ranking for people."""
    made = Table(title="training steps")
    # Wide as they are, they fit a terminal of 80 columns.
    for name in (
        "data,\nfsdp,\ntensor", "microbatch", "remat", "peak,\nGiB", "at\nleast", "MFU at\nmost",
        "limit",
    ):  # fmt: skip
        made.add_column(name, no_wrap=True)
    for found in ranking:
        c = found.candidate
        cells = [", ".join(map(str, c.mesh.values())), str(c.microbatch), c.remat]
        if found.program is None:
            used = re.search(r"needs ([\d.]+) GiB", found.problem)
            made.add_row(
                *cells, used[1] if used else "?", "", "", "does not fit" if used else "failed"
            )
            continue
        line = Roofline.of(found.program)
        peak = f"{found.program.memory.peak / GIB:.2f}"
        made.add_row(*cells, peak, f"{line.seconds:.3f} s", f"{line.mfu:.0%}", line.limit)
    return made
