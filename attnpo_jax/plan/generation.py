"""`attnpo plan --generate`: what sampling takes on chips, from its compiled programs.

A decode step in all slots, their cache full, and the reading of prompts. Tokens a second are those
of a roofline: what is read of memory is counted by hand, since the loop over the cache's blocks has
no length that a compiled program tells.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from rich.table import Table

from attnpo_jax.models import decode, flops, int8, kv_cache
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.models.decoder import abstract_params
from attnpo_jax.models.kv_cache import CacheShape
from attnpo_jax.parallel import mesh as meshes
from attnpo_jax.parallel.backend import Sharded
from attnpo_jax.plan.accelerators import GIB, PlanError, Topology
from attnpo_jax.plan.lengths import Batching
from attnpo_jax.plan.programs import Compiled, Setting
from attnpo_jax.plan.report import program_json
from attnpo_jax.plan.roofline import Roofline
from attnpo_jax.runtime.printable import plain
from attnpo_jax.sampling import programs
from attnpo_jax.sampling.programs import State

# Tokens of a prompt that are read at once, see `sampling.engine`.
_PREFILL = 1024


@dataclasses.dataclass(frozen=True)
class Generation:
    """What sampling takes, by chip.

    Attributes:
      source: the model.
      topology: all chips; copies of the model on parts of them sample responses of their own.
      shape: the cache of one copy.
      weights: bytes of the weights on a chip.
      cache: bytes of the cache on a chip.
      decode, prefill: the programs.
      step: the least seconds of a decode step, the cache full.
      limit: what it is spent on.
    """

    source: str
    topology: Topology
    shape: CacheShape
    weights: float
    cache: float
    decode: Compiled
    prefill: Compiled
    step: float
    limit: str

    @property
    def copies(self) -> int:
        """Copies of the program that work side by side."""
        return self.topology.size // self.decode.topology.size

    @property
    def tokens_per_second(self) -> float:
        """Of all chips together, at most, all slots busy and the cache full."""
        return self.copies * self.shape.slots / self.step

    def as_json(self) -> dict[str, Any]:
        """Everything, in plain types; bytes are per chip."""
        return {
            "model": self.source,
            "topology": self.topology.name,
            "chips": self.topology.size,
            "copies": self.copies,
            "slots": self.shape.slots,
            "length": self.shape.length,
            "weights_bytes": self.weights,
            "cache_bytes": self.cache,
            "decode_step_seconds": self.step,
            "limit": self.limit,
            "tokens_per_second": self.tokens_per_second,
            "programs": {p.name: program_json(p) for p in (self.decode, self.prefill)},
        }


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What both programs are compiled of.

    Attributes:
      model: with weights as sampling has them.
      where: the chips of one copy.
      shape: the cache of a copy.
      params, cache: shapes of arrays, placed.
    """

    setting: Setting
    model: ModelConfig
    where: Topology
    backend: Sharded
    shape: CacheShape
    params: Any
    cache: Any

    @classmethod
    def of(cls, setting: Setting) -> "Sampling":
        """As `config.generate` has it.

        Raises:
          PlanError: `generate.max_length` is 0, so that nothing says how large the cache is.
        """
        config, section = setting.config, setting.config.generate
        if not section.max_length:
            raise PlanError(
                "generate.max_length = 0: a plan has no prompts to take it from; accepted: the "
                "tokens of prompt and response together, as --config.generate.max_length=2048"
            )
        model = int8.shape_of_passes(setting.model, section.weights)
        dtype, param_dtype = jnp.dtype(config.model.dtype), jnp.dtype(config.model.param_dtype)
        where = setting.chips_of(model)
        sizes = meshes.local_sizes(setting.training_mesh(), where.size)
        backend = Sharded(model, sizes, where.devices())
        slots = -(-section.slots // backend.row_shards) * backend.row_shards
        shape = CacheShape.of(
            model, slots, section.max_length, dtype, quantized=section.cache == "int8"
        )
        params = backend.abstract_state(abstract_params(model, param_dtype))
        split = NamedSharding(backend.mesh, kv_cache.SPLIT)
        cache = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), shape.abstract()
        )
        return cls(setting, model, where, backend, shape, params, cache)

    def decode(self) -> Compiled:
        """A token in all slots; raises `DoesNotFit` where it needs more memory than a chip has."""
        slots = self.shape.slots
        step = self.backend.state_pass(_greedy_step, self._state, **self._static)
        return self._compile(
            "decode",
            slots,
            slots * flops.decoded(self.model, self.shape.length - 1, 1),
            lambda: step.lower(self.params, self._state, (_whole(slots), _whole(slots))),
        )

    def prefill(self) -> Compiled:
        """The reading of a prompt in each part of the rows; raises as `decode` does."""
        rows, length = self.backend.row_shards, min(_PREFILL, self.shape.length)
        attention = self.setting.attention_of(self.backend)
        read = self.backend.state_pass(
            programs.prefill, self._state, attention=attention, **self._static
        )
        prompts = _whole(rows, length), _whole(rows), _whole(rows, self.shape.slots)
        return self._compile(
            "prefill",
            rows,
            rows * flops.keys_and_values(self.model, length),
            lambda: read.lower((self.params, None), self._state, prompts),
        )

    @property
    def _state(self) -> State:
        return State(self.cache, None)

    @property
    def _static(self) -> dict[str, Any]:
        dtype = jnp.dtype(self.setting.config.model.dtype)
        return {"config": self.model, "shape": self.shape, "dtype": dtype}

    def _compile(self, name: str, rows: int, needed: int, lower) -> Compiled:
        batching = Batching(1, rows, rows)
        return self.setting.compile(name, self.where, self.backend, batching, needed, lower)


def plan(setting: Setting) -> Generation:
    """Compiles both programs as `config.generate` has them.

    Raises:
      DoesNotFit: one needs more memory than a chip has.
      PlanError: the config's `generate.max_length` is 0.
    """
    sampling = Sampling.of(setting)
    decoding, prefilling = sampling.decode(), sampling.prefill()
    weights = sum(_bytes_on_chip(x) for x in jax.tree.leaves(sampling.params))
    held = sampling.shape.nbytes / sampling.where.size
    return Generation(
        setting.config.model.source,
        setting.topology,
        sampling.shape,
        weights,
        held,
        decoding,
        prefilling,
        *_least_step(decoding, weights, held),
    )


def table(made: Generation) -> Table:
    """The plan for people."""
    shown = Table(
        title=plain(f"plan of sampling: {made.source} on {made.topology.name}"), show_header=False
    )
    chip = made.topology.chip
    noun = made.topology.noun
    shown.add_row("copies", f"{made.copies} of {made.decode.topology.size} {noun}s")
    shown.add_row("mesh of a copy", ", ".join(f"{a} {n}" for a, n in made.decode.mesh.items()))
    shown.add_row("slots of a copy", f"{made.shape.slots}, {made.shape.length} tokens each")
    shown.add_row(f"weights, by {noun}", f"{made.weights / GIB:.2f} GiB")
    shown.add_row(f"cache, by {noun}", f"{made.cache / GIB:.2f} GiB")
    for program in (made.decode, made.prefill):
        peak = f"{program.memory.peak / GIB:.2f} of {chip.hbm / GIB:.2f} GiB"
        shown.add_row(f"peak of {program.name}", peak)
    shown.add_row("decode step, at least", f"{1e3 * made.step:.2f} ms, for {made.limit}")
    shown.add_row("tokens a second, at most", f"{made.tokens_per_second:,.0f}")
    return shown


def _greedy_step(params, state: State, arrays, *, config, shape, dtype):
    token_B, length_B = arrays
    logits_BV, cache = decode.step(
        config, params, state.cache, shape, token_B, length_B, dtype=dtype
    )
    token_B = jnp.argmax(logits_BV, axis=-1)
    return State(cache, None), token_B


def _least_step(program: Compiled, weights: float, cache: float) -> tuple[float, str]:
    """Seconds of a decode step by the slowest of compute, memory and links, and which."""
    line = Roofline.of(program)
    memory = max(line.memory, (weights + cache) / program.topology.chip.hbm_bandwidth)
    parts = line.parts | {"memory": memory}
    limit = max(parts, key=parts.__getitem__)
    return parts[limit], limit


def _whole(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.int32)


def _bytes_on_chip(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
