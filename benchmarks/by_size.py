"""Measurements by size: of random tokens, of layers, of chunks. They need no pairs."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnpo_jax.data.batching import (
    Example,
    PairBatch,
    RowShape,
    fill_rows,
)
from attnpo_jax.data.packing import round_up
from attnpo_jax.judge.judge import compile_pass
from attnpo_jax.models import decoder, flops
from attnpo_jax.models.io import hf_folder
from attnpo_jax.models.lm_head import token_logps
from benchmarks import protocol, setting
from benchmarks.setting import Spec


class Curve:
    """A training step on one pair of random tokens, for several lengths of its responses."""

    PROMPT = 64

    def __init__(self, spec: Spec):
        config = setting.config_of(spec)
        folder = hf_folder.resolve(config.model.source)
        model = hf_folder.load_config(folder)
        trainer = setting.Trainer(config, model, (model.num_layers - 1,))
        self._step, self._state = trainer.compiled.run, trainer.first_state(folder)
        self._batches = [_random_batch(trainer, self.PROMPT, n) for n in spec["lengths"]]
        for batch in self._batches:
            self._state, _ = jax.block_until_ready(self._step(self._state, batch))
        self.info = {
            "lengths": spec["lengths"],
            "flops": [flops.training(model, self.PROMPT, (n, n)) for n in spec["lengths"]],
        }

    def repeat(self) -> dict[str, Any]:
        seconds = []
        for batch in self._batches:
            start = time.perf_counter()
            self._state, _ = jax.block_until_ready(self._step(self._state, batch))
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}


class Compile:
    """Tracing and compiling the training step and the judge's pass, by number of layers."""

    def __init__(self, spec: Spec):
        jax.config.update("jax_enable_compilation_cache", False)
        self._config, self._layers = setting.config_of(spec), spec["layers"]
        self._model = hf_folder.load_config(hf_folder.resolve(self._config.model.source))
        # The compiler's own start-up is not a matter of layers.
        self._compile_step(1)
        self._compile_judge(1)
        self.info = {"layers": self._layers}

    def _compile_step(self, layers: int) -> float:
        model = dataclasses.replace(self._model, num_layers=layers)
        trainer = setting.Trainer(self._config, model, (layers - 1,))
        batch = _random_batch(trainer, 64, 128)
        start = time.perf_counter()
        trainer.compiled.run.lower(trainer.compiled.abstract_state, batch).compile()
        return time.perf_counter() - start

    def _compile_judge(self, layers: int) -> float:
        config = self._config
        model = dataclasses.replace(self._model, num_layers=layers)
        backend = setting.preparing_backend(config, model)
        compiled = compile_pass(
            backend,
            (0, layers - 1),
            config=model,
            dtype=jnp.dtype(config.model.dtype),
            attention=setting.attention_of(config, model, backend),
        )
        tokens = jax.ShapeDtypeStruct((8, 512), jnp.int32)
        reads = jax.ShapeDtypeStruct((8, 2), jnp.int32)
        letters = jax.ShapeDtypeStruct((2,), jnp.int32)
        params = backend.abstract_state(decoder.abstract_params(model))
        start = time.perf_counter()
        compiled.lower((params, None, letters), (tokens, tokens, tokens, reads)).compile()
        return time.perf_counter() - start

    def repeat(self) -> dict[str, Any]:
        jax.clear_caches()  # or a second repeat finds what the first compiled
        return {
            "step": [self._compile_step(n) for n in self._layers],
            "judge": [self._compile_judge(n) for n in self._layers],
        }


class LogpsMemory:
    """Memory of token log-probs with their gradients, for a number of tokens in all."""

    def __init__(self, spec: Spec):
        config = setting.config_of(spec)
        model = hf_folder.load_config(hf_folder.resolve(config.model.source))
        tokens, chunk = spec["tokens"], config.model.logps_chunk
        self._arrays = (
            jnp.zeros((1, tokens, model.hidden_size)),
            jnp.zeros((model.vocab_size, model.hidden_size)),
        )
        target = jnp.zeros((1, tokens), jnp.int32)
        total = jax.grad(
            lambda hidden, unembedding: jnp.sum(
                token_logps(hidden, unembedding, target, chunk=chunk)
            ),
            argnums=(0, 1),
        )
        self._gradients = jax.jit(total).lower(*self._arrays).compile()
        self.info = {
            "chunk": chunk,
            "temporary_bytes": self._gradients.memory_analysis().temp_size_in_bytes,
        }

    def repeat(self) -> dict[str, Any]:
        before = protocol.peak_resident_bytes()
        start = time.perf_counter()
        jax.block_until_ready(self._gradients(*self._arrays))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "grown_bytes": protocol.peak_resident_bytes() - before}


def _random_batch(trainer: setting.Trainer, prompt: int, response: int) -> PairBatch:
    """One microbatch of one pair of random tokens, on the devices, its row as short as can be.

    The other rows are empty: where there are several devices, each takes one.
    """
    model, rows = trainer.model, trainer.backend.row_shards
    rng = np.random.default_rng(0)

    def ids(n: int) -> np.ndarray:
        return rng.integers(model.vocab_size, size=n, dtype=np.int32)

    attention = np.ones((2, 1, response), np.float32)
    logps = np.full(response, -2.0, np.float32)
    example = Example(
        index=0,
        prompt_ids=ids(prompt),
        response_ids=(ids(response), ids(response)),
        text_lengths=(response, response),
        judge=(attention, attention),
        verdict=np.zeros(2, np.float32),
        reference_logps=(logps, logps),
    )
    shape = RowShape(
        length=round_up(example.row_length),
        scored=round_up(2 * response),
        response=round_up(response),
    )
    batch = fill_rows([[example], *[[]] * (rows - 1)], shape, num_sources=1)
    return trainer.backend.put_batch(jax.tree.map(lambda x: x[None], batch))
