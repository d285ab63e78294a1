"""Sampling, the package's side: `python -m benchmarks.generation NAME SPEC`.

Prompts are those of the selected pairs, of mixed length; each response has as many tokens as was
drawn for it, so that both sides do the same work. What a peer computes beyond a response's end, or
on padding, is not counted.

Shapes: as in `sampling.engine`.
"""

import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnpo_jax.data.chat_template import Conversation
from attnpo_jax.judge.language_model import load_model
from attnpo_jax.models import decoder, flops
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.sampling import Engine, Request, SamplingSettings
from benchmarks import protocol

FEWEST, MOST = 16, 128  # tokens of a response
LONGEST_PROMPT = 256
CALLS, INSTRUCTION = 8, 768  # one by one; tokens that all of them begin with
BYTES_READ = 1 << 30
_TIMES = 8  # so that it takes long enough to be measured


class Sample:
    """Greedy responses of drawn lengths, `slots` at a time.

    The spec has `slots`, and `requests`, how many.
    """

    def __init__(self, spec: dict[str, Any]):
        scratch = pathlib.Path(spec["scratch"])
        config = json.loads((scratch / "config.json").read_text())
        pairs = [json.loads(line) for line in (scratch / "pairs.jsonl").read_text().splitlines()]
        model = load_model(config["model"]["source"])
        prompts = [_prompt(model, pair) for pair in pairs]
        lengths = np.random.default_rng(0).integers(FEWEST, MOST + 1, spec["requests"]).tolist()
        self._requests = [
            Request(
                str(k),
                prompts[k % len(prompts)],
                SamplingSettings(temperature=0, max_new_tokens=n),
            )
            for k, n in enumerate(lengths)
        ]
        asked = {
            "prompts": [request.tokens.tolist() for request in self._requests],
            "lengths": lengths,
            "model": str(model.folder),
            "batch_size": spec["slots"],
            "dtype": config["model"]["dtype"],
        }
        (scratch / "generate.json").write_text(json.dumps(asked))
        longest = max(len(prompt) for prompt in prompts)
        self._engine = Engine(
            model.config,
            model.params,
            model.tokenizer,
            length=longest + MOST,
            slots=spec["slots"],
            dtype=jnp.dtype(config["model"]["dtype"]),
        )
        list(self._engine.run(self._requests))
        shape = self._engine.cache_shape
        self.info = {
            "responses": len(self._requests),
            "tokens": sum(lengths),
            "cache_bytes": shape.nbytes,
        } | _work(model.config, config["model"]["dtype"], self._requests, lengths, shape.slots)

    def repeat(self) -> dict[str, Any]:
        start = time.perf_counter()
        responses = list(self._engine.run(self._requests))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "sampled": sum(len(r.tokens) for r in responses)}


class OneByOne:
    """Prompts that begin as those before them, asked one by one: what a call takes on the average.

    Of the spec's `kind`: `chat`, turns of one conversation, in which the user says what the
    selected pairs' prompts do; or `judge`, an instruction and something else behind it each time.
    `caching` says whether the engine has prefix caching.
    """

    def __init__(self, spec: dict[str, Any]):
        scratch = pathlib.Path(spec["scratch"])
        config = json.loads((scratch / "config.json").read_text())
        pairs = [json.loads(line) for line in (scratch / "pairs.jsonl").read_text().splitlines()]
        model = load_model(config["model"]["source"])
        self._said = [_prompt(model, pair) for pair in pairs]
        self._turns = spec["kind"] == "chat"
        self._instruction = np.concatenate(self._said)[:INSTRUCTION]
        self._engine = Engine(
            model.config,
            model.params,
            model.tokenizer,
            length=2048,
            slots=1,
            dtype=jnp.dtype(config["model"]["dtype"]),
            prefix_caching=spec["caching"],
        )
        self.info: dict[str, Any] = {"calls": CALLS}
        self.repeat()

    def repeat(self) -> dict[str, Any]:
        settings = SamplingSettings(temperature=0, max_new_tokens=FEWEST)
        self._engine.release()  # as if nobody had asked before
        prompt, start = self._instruction[:0], time.perf_counter()
        read = cached = 0
        for said in self._said[:CALLS]:
            prompt = np.concatenate([prompt if self._turns else self._instruction, said])
            self._engine.add(Request("call", prompt, settings))
            while self._engine.waiting or self._engine.running:
                [update] = self._engine.step()
                prompt = np.concatenate([prompt, update.tokens]).astype(np.int32)
            read += update.response.prompt_tokens
            cached += update.response.cached_tokens
        seconds = (time.perf_counter() - start) / CALLS
        return {"seconds": seconds, "prompt_tokens": read, "cached_tokens": cached}


def _prompt(model: Any, pair: dict[str, Any]) -> np.ndarray:
    messages = tuple(pair["prompt"])
    tokens, _ = model.tokenizer.encode_conversation(Conversation(messages, (), True))
    return np.asarray(tokens[-LONGEST_PROMPT:], np.int32)


def _work(
    config: ModelConfig, dtype: str, requests: Sequence[Request], lengths: list[int], slots: int
) -> dict[str, float]:
    """The least that the responses take: FLOPs, and bytes of memory that have to be read.

    Weights once for each step in which all slots work; of the cache, what is there of each response
    at each of its steps.
    """
    width = jnp.dtype(dtype).itemsize
    sizes = [x.size for x in jax.tree.leaves(decoder.abstract_params(config))]
    weights = sum(sizes)
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size  # looked up, not read
    of_position = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    positions = sum(
        len(request.tokens) * n + n * (n - 1) // 2
        for request, n in zip(requests, lengths, strict=True)
    )
    steps = -(-sum(lengths) // slots)
    computed = sum(
        flops.keys_and_values(config, len(request.tokens) - 1)
        + flops.decoded(config, len(request.tokens) - 1, n)
        for request, n in zip(requests, lengths, strict=True)
    )
    return {
        "flops": float(computed),
        "read_bytes": float(weights * width * steps + of_position * width * positions),
    }


class ProductOfRows:
    """How fast rows of tokens, one for each slot, are multiplied with weights of a layer each.

    The rate that decoding can reach, where `matmul` is that of large square matrices.
    """

    def __init__(self, spec: dict[str, Any]):
        model = json.loads((pathlib.Path(spec["scratch"]) / "config.json").read_text())["model"]
        config = load_model(model["source"]).config
        layers, rows = config.num_layers, spec["slots"]
        width, between = config.hidden_size, config.intermediate_size
        dtype = jnp.dtype(model["dtype"])
        weights_LDF = jnp.full((layers, width, between), 1 / width, dtype)
        weights_LFD = jnp.full((layers, between, width), 1 / between, dtype)

        def products(x_BD, weights):
            return jax.lax.scan(
                lambda x_BD, of_layer: (x_BD @ of_layer[0] @ of_layer[1], None), x_BD, weights
            )[0]

        self._arguments = jnp.ones((rows, width), dtype), (weights_LDF, weights_LFD)
        self._products = jax.jit(products)
        jax.block_until_ready(self._products(*self._arguments))
        self.info = {"flops": _TIMES * layers * 2 * 2 * rows * width * between}

    def repeat(self) -> dict[str, Any]:
        start = time.perf_counter()
        for _ in range(_TIMES):
            jax.block_until_ready(self._products(*self._arguments))
        return {"seconds": time.perf_counter() - start}


class Bandwidth:
    """How fast memory is read, by all cores."""

    def __init__(self, spec: dict[str, Any]):
        del spec
        self._array = jnp.ones((8, BYTES_READ // 32), jnp.float32)
        self._sum = jax.jit(lambda x: jnp.max(x, axis=1))
        self._sum(self._array).block_until_ready()
        self.info = {"bytes": BYTES_READ}

    def repeat(self) -> dict[str, Any]:
        start = time.perf_counter()
        self._sum(self._array).block_until_ready()
        return {"seconds": time.perf_counter() - start}


WORKLOADS = {
    "generate": Sample,
    "one_by_one": OneByOne,
    "bandwidth": Bandwidth,
    "product_of_rows": ProductOfRows,
}

if __name__ == "__main__":
    protocol.serve(WORKLOADS)
