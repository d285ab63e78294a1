"""Compiles a run's own programs for chips that are not there, and reads off what they take.

The training step, the reference's pass and the judge's pass are those that a run compiles, with
shapes for parameters and batches: nothing is allocated.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnpo_jax import config as config_lib
from attnpo_jax.judge import judge
from attnpo_jax.models import flops, int8, lora, reading
from attnpo_jax.models.attention import implementations
from attnpo_jax.models.decoder import ModelConfig, abstract_params
from attnpo_jax.models.io import known
from attnpo_jax.parallel import mesh as meshes
from attnpo_jax.parallel.backend import Sharded, prepares_together
from attnpo_jax.plan import hlo, lengths, work
from attnpo_jax.plan.accelerators import GIB, PlanError, Topology
from attnpo_jax.plan.collectives import Collective, collectives
from attnpo_jax.plan.lengths import Batching, Lengths
from attnpo_jax.prepare import reference
from attnpo_jax.train import stage as train
from attnpo_jax.weighting import Source


class DoesNotFit(PlanError):
    """A program needs more memory than a chip has; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a chip's memory."""

    arguments: int  # parameters, optimizer state and batch
    temporaries: int  # what exists only while the program runs
    code: int  # the program
    # All that is there at the peak, as XLA has it. It may be less than the sum of the others:
    # temporaries take the place of arguments that are done with.
    peak: int

    @classmethod
    def of(cls, analysis: Any) -> "Memory":
        arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
        code = analysis.generated_code_size_in_bytes
        return cls(arguments, temporaries, code, analysis.peak_memory_in_bytes)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program and what it takes, by chip and run."""

    name: str  # "train", "reference" or "judge"
    topology: Topology  # the chips of one copy of it
    mesh: Mapping[str, int]  # sizes of their mesh's axes
    # Where the mesh's devices are, int (data, fsdp, tensor, k), as `Topology.places` has it.
    places: np.ndarray
    batching: Batching  # what it takes at a time
    # What computes attention, one of `models.attention.implementations.IMPLEMENTATIONS`.
    attention: str
    memory: Memory  # bytes
    model_flops: int  # that the result needs, over all chips (see `attnpo_jax.models.flops`)
    # Of a chip's matrix products, repeated work and padding included; without those inside
    # tokamax's attention kernel, which XLA does not see.
    flops: int
    traffic: float  # bytes through a chip's main memory
    collectives: tuple[Collective, ...]  # what the chips exchange
    unknown_loops: tuple[str, ...]  # loops that count once, since their length could not be read
    compile_seconds: float  # how long XLA took


@dataclasses.dataclass(frozen=True)
class Setting:
    """What programs are compiled for."""

    config: Any
    model: ModelConfig
    topology: Topology  # all chips of the run
    lengths: Lengths  # the pair that all pairs are like

    @property
    def judging(self) -> "Setting":
        """The setting whose model is the judge."""
        source = self.config.judge.source
        return dataclasses.replace(self, model=known.shape_of(source)) if source else self

    @property
    def judge_layers(self) -> tuple[Source, ...]:
        model = self.judging.model
        return config_lib.judge_layers(
            self.config, model.num_layers, model.layer_windows, model.num_heads
        )

    @property
    def weight_columns(self) -> tuple[str, ...]:
        """The columns that the run's weighting reads by name: scorers and the data's."""
        columns = config_lib.weight_columns(self.config)
        if columns == "all":
            raise PlanError(
                "data.weight_columns = 'all': a plan reads no data; accepted: the columns' names"
            )
        columns = (*sorted(self.config.prepare.scorers), *columns)
        config_lib.check_columns(self.config, columns)
        return columns

    @property
    def other_reference(self) -> ModelConfig | None:
        """The shape of the reference, where it is another model than training starts from."""
        source = self.config.reference.source
        return None if source in ("", self.config.model.source) else known.shape_of(source)

    def training_mesh(self) -> dict[str, int]:
        return meshes.axis_sizes(self.config.parallel.mesh, self.topology.size)

    def training(self) -> Compiled:
        """The training step on all chips.

        Raises:
          DoesNotFit: it needs more memory than a chip has.
        """
        config, at = self.config, self.lengths
        policy = lora.adapted(self.model, config.lora)
        backend = Sharded(policy, self.training_mesh(), self.topology.devices())
        batching = Batching.training(config, backend.row_shards)
        attention = self.attention_of(backend)
        columns, reads = self.weight_columns, config_lib.reads(config)
        layers = self.judge_layers if "judge" in reads else ()
        reference = train.reference_in_memory(config, self.model, self.other_reference)
        settings = config_lib.step_settings(config, policy, layers, attention, columns, reference)
        step = train.compile_step(config, settings, backend, total_steps=100)
        whole = config.judge.whole_responses and "judge" in reads
        batch = lengths.train_batch(at, batching, len(layers), len(columns), reads, whole)
        lengths_of = at.prompt, (at.response,) * 2
        needed = flops.training(self.model, *lengths_of)
        if config_lib.reads_distribution(config):
            needed += flops.response_logps(reference or self.model, *lengths_of)
        return self.compile(
            "train",
            self.topology,
            backend,
            batching,
            batching.pairs * needed,
            lambda: step.run.lower(step.abstract_state, batch),
        )

    def reference(self) -> Compiled:
        """The reference's pass on the chips of `prepares_on`; raises as `training` does."""
        other = self.other_reference
        of = self if other is None else dataclasses.replace(self, model=other)
        at, backend = self.lengths, of._preparing_backend()
        batching = Batching.preparing(self.config, at.row, backend.row_shards)
        call = reference.compile_pass(
            backend,
            config=of._of_passes,
            dtype=jnp.dtype(self.config.model.dtype),
            chunk=self.config.model.logps_chunk,
            attention=of.attention_of(backend),
            entropy="reference_entropy" in config_lib.reads(self.config),
        )
        batch = lengths.reference_batch(at, batching.rows)
        needed = flops.response_logps(of.model, at.prompt, (at.response,) * 2)
        return of.compile(
            "reference",
            of.prepares_on,
            backend,
            batching,
            batching.pairs * needed,
            lambda: call.lower(of._params(backend), batch),
        )

    def judge(self) -> Compiled:
        """The judge's pass on the chips of `prepares_on`, for one source or more.

        Raises as `training` does.
        """
        at, backend = self.lengths, self._preparing_backend()
        batching = Batching.preparing(self.config, at.judge_row, backend.row_shards)
        sources = judge.attention_sources(self.judge_layers)
        call = judge.compile_pass(
            backend,
            sources,
            verdict=self.config.judge.verdict,
            config=self._of_passes,
            dtype=jnp.dtype(self.config.model.dtype),
            attention=self.attention_of(backend),
        )
        rows = lengths.judge_rows(at, batching.rows)
        letters = jax.ShapeDtypeStruct((2,), jnp.int32)
        needed = flops.judge_row(
            self.model,
            0,
            at.judge_prefix,
            (at.judge_order,) * 2,
            last_layer=None
            if self.config.judge.verdict
            else reading.last_layer(sources, self.model.num_layers),
        )
        return self.compile(
            "judge",
            self.prepares_on,
            backend,
            batching,
            batching.pairs * needed,
            lambda: call.lower((self._params(backend), None, letters), rows),
        )

    @property
    def _of_passes(self) -> ModelConfig:
        return int8.shape_of_passes(self.model, self.config.model.prepare_weights)

    @property
    def prepares_on(self) -> Topology:
        """The chips that work on one shard of the prepared dataset together."""
        return self.chips_of(self._of_passes)

    def chips_of(self, model: ModelConfig) -> Topology:
        """The chips that pass over the same rows together, with a model: a host's, or all."""
        chips, host = self.topology, self.topology.host
        several = chips.size > host.size
        together = several and prepares_together(
            model,
            self.config.prepare.devices,
            self.config.model.param_dtype,
            self.training_mesh(),
            host.size,
            chips.chip.hbm,
        )
        return chips if together else host

    def _preparing_backend(self) -> Sharded:
        chips = self.prepares_on
        sizes = meshes.local_sizes(self.training_mesh(), chips.size)
        return Sharded(self._of_passes, sizes, chips.devices())

    def attention_of(self, backend: Sharded) -> str:
        model = self.config.model
        with self.topology.compiling():
            choice = implementations.choose(
                model.attention, self.model, jnp.dtype(model.dtype), backend.devices
            )
        return choice.implementation

    def parts_of(self, name: str) -> work.Parts | None:
        """What cuDNN is told of a program's rows; None of those that are a prompt alone."""
        at = self.lengths
        if name in ("train", "reference"):
            return work.Parts(at.prompt, at.response)
        if name == "judge":
            return work.Parts(at.judge_prefix, at.judge_order - at.judge_prefix)
        return None

    def _params(self, backend: Sharded) -> Any:
        params = abstract_params(self._of_passes, jnp.dtype(self.config.model.param_dtype))
        return backend.abstract_state(params)

    def compile(
        self,
        name: str,
        topology: Topology,
        backend: Sharded,
        batching: Batching,
        needed: int,
        lower: Callable[[], Any],
    ) -> Compiled:
        """Compiles a program of any name for some chips; raises as `training` does."""
        sizes, start = dict(backend.mesh.shape), time.monotonic()

        def too_large(excess: str) -> DoesNotFit:
            mesh = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
            return DoesNotFit(
                f"the {name} program needs {excess}, on {topology.name} ({mesh}); "
                f"change: {self._changes(name, batching)}"
            )

        # Nothing that runs here is compiled: no use in a cache.
        cached = jax.config.jax_enable_compilation_cache
        jax.config.update("jax_enable_compilation_cache", False)
        try:
            with topology.compiling():
                compiled = lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise too_large(_excess_of(str(error), topology.noun)) from error
        finally:
            jax.config.update("jax_enable_compilation_cache", cached)
        seconds = time.monotonic() - start
        memory, room = Memory.of(compiled.memory_analysis()), topology.chip.hbm
        # For GPUs, XLA compiles what does not fit too.
        if memory.peak > room:
            raise too_large(_excess(memory.peak / GIB, room / GIB, topology.noun))
        program = hlo.parse(compiled.as_text())
        return Compiled(
            name=name,
            topology=topology,
            mesh=sizes,
            places=_places(topology, backend.mesh),
            batching=batching,
            attention=self.attention_of(backend),
            memory=memory,
            model_flops=needed,
            flops=work.flops(program, self.parts_of(name)),
            traffic=work.memory_traffic(program),
            collectives=tuple(collectives(program, sizes)),
            unknown_loops=program.unknown_loops,
            compile_seconds=seconds,
        )

    def _changes(self, name: str, batching: Batching) -> str:
        config, changes = self.config, []
        sizes = self.training_mesh()
        if name == "train":
            if sizes["data"] > 1:
                changes.append(f"parallel.mesh.data = {sizes['data']} to 1 and fsdp larger")
            if config.model.remat != "layer":
                changes.append(f"model.remat = {config.model.remat!r} to 'layer'")
            if batching.rows > sizes["data"] * sizes["fsdp"]:
                size = config.train.microbatch_size
                changes.append(f"a smaller train.microbatch_size than {size}")
            elif shared := self._with_shared_rows(sizes):
                changes.append(
                    f"parallel.mesh.tensor = {sizes['tensor']} to {shared['tensor']}, fsdp to "
                    f"{shared['fsdp']} and train.microbatch_size to {shared['fsdp']}, so that "
                    f"{self.topology.noun}s share a row"
                )
            if config.model.dtype != "bfloat16":
                changes.append("model.dtype to 'bfloat16'")
            changes.append(f"a smaller model.logps_chunk than {config.model.logps_chunk}")
            changes.append(f"more {self.topology.noun}s than {self.topology.size}")
        elif name in ("decode", "prefill"):
            section = config.generate
            changes.append(f"fewer generate.slots than {section.slots}")
            changes.append(f"a smaller generate.max_length than {section.max_length}")
            if section.cache != "int8":
                changes.append("generate.cache to 'int8'")
            if section.weights != "int8":
                changes.append("generate.weights to 'int8'")
        else:
            if batching.rows > 1:
                changes.append(f"a smaller judge.token_budget than {config.judge.token_budget}")
            if config.model.param_dtype != "bfloat16":
                changes.append("model.param_dtype to 'bfloat16'")
            if self.prepares_on != self.topology:
                changes.append(f"prepare.devices = {config.prepare.devices!r} to 'all'")
            changes.append(f"{self.topology.noun}s with more memory")
        changes.append(f"a smaller data.max_length than {config.data.max_length}")
        return ", or ".join(changes)

    def _with_shared_rows(self, sizes: Mapping[str, int]) -> dict[str, int] | None:
        """A mesh with twice the chips to a row, the others on `fsdp`; None if there is none."""
        tensor = 2 * sizes["tensor"]
        shared = {"data": 1, "fsdp": self.topology.size // tensor, "tensor": tensor}
        if self.topology.size % tensor or self.config.train.batch_size % shared["fsdp"]:
            return None
        try:
            meshes.check_model(self.model, shared)
        except meshes.MeshError:
            return None
        return shared


def _places(topology: Topology, mesh: jax.sharding.Mesh) -> np.ndarray:
    """Where the mesh's devices are: int (data, fsdp, tensor, k)."""
    return topology.places(list(mesh.devices.flat)).reshape(*mesh.devices.shape, -1)


def _excess_of(message: str, noun: str) -> str:
    """What XLA says of a program that is too large."""
    number = r"([\d.]+)([KMGT])"
    for pattern in (
        rf"Used {number} of {number} hbm",
        rf"temporaries \({number}\) exceeds available HBM \({number}\)",
    ):
        sizes = re.search(pattern, message)
        if sizes:
            return _excess(*(_gib(*sizes.group(k, k + 1)) for k in (1, 3)), noun)
    return f"more memory than a {noun} has"


def _excess(used: float, room: float, noun: str) -> str:
    return f"{used:.2f} GiB of a {noun}'s {room:.2f} GiB, {used - room:.2f} GiB too much"


def _gib(number: str, unit: str) -> float:
    return float(number) * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[unit] / GIB
