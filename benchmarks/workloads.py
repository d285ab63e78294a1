"""The package's side of every measurement: `python -m benchmarks.workloads NAME SPEC`.

Each is set up and warmed up (everything compiled) before it says that it is ready; a repeat then
does the work once and times it. `tokens` counts both sequences of a pair whole, so that it means
the same for an implementation that does not share their beginning.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from attnpo_jax import config as config_lib
from attnpo_jax.data import template_process
from attnpo_jax.data.batching import (
    Example,
    PairBatch,
    RowShape,
    TrainBatches,
    fill_rows,
)
from attnpo_jax.data.packing import round_up
from attnpo_jax.data.pair import Pair
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.data.sources import load_pairs, pairs_digest
from attnpo_jax.data.tokenize import ChatTokenizer, tokenize_pair
from attnpo_jax.judge.judge import Judge, compile_pass
from attnpo_jax.judge.language_model import LanguageModel, load_model
from attnpo_jax.judge.prompt import JudgePrompter, JudgeTemplate
from attnpo_jax.models import decoder, flops
from attnpo_jax.models.attention import implementations
from attnpo_jax.models.io import hf_folder
from attnpo_jax.models.lm_head import token_logps
from attnpo_jax.parallel import backend as backends
from attnpo_jax.parallel.state import TrainState
from attnpo_jax.prepare import reference
from attnpo_jax.prepare import stage as prepare
from attnpo_jax.prepare.pair_forms import PairTokenizer
from attnpo_jax.run import Run
from attnpo_jax.train import loop, stage
from benchmarks import breakdown, protocol
from benchmarks.int8_change import change

Spec = dict[str, Any]
MATMUL_SIZE = 2048


def select(spec: Spec) -> dict[str, Any]:
    """Picks the pairs, and writes them, the config and the judge prompts for the other workers."""
    scratch = pathlib.Path(spec["scratch"])
    low, high = spec["min_chars"], spec["max_chars"]
    pairs = [
        pair
        for pair in load_pairs(spec["pairs"], on_bad_row="skip").pairs
        if all(low <= len(text) <= high for text in (pair.chosen, pair.rejected))
    ][: spec["limit"]]
    if not pairs:
        raise ValueError(f"{spec['pairs']}: no pair with responses of {low} to {high} characters")
    rows = [json.dumps(dataclasses.asdict(pair)) + "\n" for pair in pairs]
    (scratch / "pairs.jsonl").write_text("".join(rows))
    config = config_lib.default_config()
    config.data.train = str(scratch / "pairs.jsonl")
    config.data.eval = ""
    config.train.batch_size = config.train.microbatch_size = spec["batch_size"]
    config.log.progress = False
    for field in ("remat", "dtype", "param_dtype"):
        if spec[field] is not None:
            config.model[field] = spec[field]
    config_lib.validate(config)
    (scratch / "config.json").write_text(config_lib.to_json(config))
    (scratch / "config.py").write_text(
        "import pathlib\n\nfrom attnpo_jax.config import from_json\n\n\ndef get_config():\n"
        '    return from_json(pathlib.Path(__file__).with_suffix(".json").read_text())\n'
    )

    folder = hf_folder.resolve(config.model.source)
    tokenizer = ChatTokenizer.load(folder)
    prompts = [_prompter(config, tokenizer).build(pair) for pair in pairs]
    layers = hf_folder.load_config(folder).num_layers
    peer_input = {
        "model": str(folder),
        "layers": config_lib.source_layers(config.judge.layers, layers),
        "letters": prompts[0].letter_ids,
        "prompts": [[ids.tolist() for ids in prompt.ids] for prompt in prompts],
    }
    (scratch / "judge_prompts.json").write_text(json.dumps(peer_input))
    tokenized = [_tokenize(config, tokenizer, pair) for pair in pairs]
    sequences = [
        len(t.prompt_ids) + len(ids) for t in tokenized for ids in (t.chosen_ids, t.rejected_ids)
    ]
    return {
        "pairs": len(pairs),
        "source": spec["pairs"],
        "digest": pairs_digest(pairs),
        "model": str(folder),
        "judge_prompt_tokens": float(np.mean([len(ids) for p in prompts for ids in p.ids])),
        "sequence_tokens": float(np.mean(sequences)),
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }


class Select:
    def __init__(self, spec: Spec):
        self.info = select(spec)

    def repeat(self) -> dict[str, Any]:
        return {}


class Prepare:
    """Prepares the pairs for training; all is done when it is ready.

    With `weights` in the spec, as `model.prepare_weights` has them, into a folder of that name.
    """

    def __init__(self, spec: Spec):
        config, scratch = _config(spec), pathlib.Path(spec["scratch"])
        if "weights" in spec:
            config.model.prepare_weights = spec["weights"]
            scratch /= spec["weights"]
        run = Run.resolve(config, scratch)
        prepare.prepare(run)
        params = decoder.abstract_params(run.passes, jnp.dtype(config.model.param_dtype))
        leaves = jax.tree.leaves(params)
        self.info = {"parameter_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)}

    def repeat(self) -> dict[str, Any]:
        return {}


class Int8Change:
    """What the pairs prepared with int8 projections differ in from those prepared in full."""

    def __init__(self, spec: Spec):
        scratch = pathlib.Path(spec["scratch"])
        self._full, self._int8 = (
            Prepared.open(scratch / weights / "prepared" / "train") for weights in ("full", "int8")
        )
        self.info = {"pairs": len(self._full)}

    def repeat(self) -> dict[str, Any]:
        return change(self._full, self._int8, self._full.source_layers)


class Matmul:
    """The machine's own rate: products of square float32 matrices."""

    PRODUCTS = 8

    def __init__(self, spec: Spec):
        del spec
        self._x = jax.random.normal(jax.random.key(0), (MATMUL_SIZE, MATMUL_SIZE), jnp.float32)
        self._product = jax.jit(jnp.matmul)
        jax.block_until_ready(self._product(self._x, self._x))
        self.info = {"flops": self.PRODUCTS * 2 * MATMUL_SIZE**3}

    def repeat(self) -> dict[str, Any]:
        start = time.perf_counter()
        for _ in range(self.PRODUCTS):
            jax.block_until_ready(self._product(self._x, self._x))
        return {"seconds": time.perf_counter() - start}


class Judging:
    """All pairs judged, from built prompts to weights on the trained tokens.

    The pass over what all prompts begin with is part of it, as it is of a run.
    """

    def __init__(self, spec: Spec):
        config, self._pairs = _config(spec), _pairs(spec)
        if "layers" in spec:
            config.judge.layers = tuple(spec["layers"])
        model = _model(config)
        self._judge = _judge(config, model)
        self._prompts = [self._judge.prompter.build(pair) for pair in self._pairs]
        self._tokenized = [_tokenize(config, model.tokenizer, pair) for pair in self._pairs]
        self.repeat()
        common = _common_beginning([ids for prompt in self._prompts for ids in prompt.ids])
        rows = sum(
            flops.judge_row(
                model.config,
                min(common, prompt.prefix_length),
                prompt.prefix_length,
                [len(ids) for ids in prompt.ids],
            )
            for prompt in self._prompts
        )
        self.info = {
            "pairs": len(self._pairs),
            "tokens": sum(len(ids) for prompt in self._prompts for ids in prompt.ids),
            "flops": rows + flops.keys_and_values(model.config, common),
        }

    def repeat(self) -> dict[str, Any]:
        start = time.perf_counter()
        self._judge.fit(self._prompts)
        judged = dict(
            item for done in self._judge.run(self._prompts, self._tokenized) for item in done
        )
        seconds = time.perf_counter() - start
        verdicts = [judged[i].verdict.tolist() for i in range(len(self._pairs))]
        return {"seconds": seconds, "verdicts": verdicts}


class Reference:
    """The reference's log-probs of all pairs."""

    def __init__(self, spec: Spec):
        config, pairs = _config(spec), _pairs(spec)
        model = _model(config)
        self._tokenized = [_tokenize(config, model.tokenizer, pair) for pair in pairs]
        backend = _preparing_backend(config, model.config)
        attention = _attention(config, model.config, backend)
        self._reference = reference.Reference(
            model,
            self._tokenized,
            dtype=jnp.dtype(config.model.dtype),
            chunk=config.model.logps_chunk,
            batch_size=config.judge.batch_size,
            token_budget=config.judge.token_budget,
            num_buckets=config.judge.num_buckets,
            backend=backend,
            attention=attention,
        )
        self.repeat()
        lengths = [
            (len(t.prompt_ids), (len(t.chosen_ids), len(t.rejected_ids))) for t in self._tokenized
        ]
        self.info = {
            "pairs": len(pairs),
            "tokens": sum(2 * prompt + sum(responses) for prompt, responses in lengths),
            "flops": sum(flops.response_logps(model.config, *length) for length in lengths),
        }

    def repeat(self) -> dict[str, Any]:
        start = time.perf_counter()
        done = sum(len(batch) for batch in self._reference.run(self._tokenized))
        assert done == len(self._tokenized)
        return {"seconds": time.perf_counter() - start}


class Training:
    """One epoch of optimizer steps over the prepared pairs, as the training loop does them."""

    def __init__(self, spec: Spec):
        config = _config(spec)
        for field in ("remat", "dtype", "param_dtype"):
            if spec.get(field) is not None:
                config.model[field] = spec[field]
        folder = hf_folder.resolve(config.model.source)
        model = hf_folder.load_config(folder)
        # Prepared once, in one dtype: for the time it takes, the values do not matter.
        data = Run.resolve(_config(spec), pathlib.Path(spec["scratch"])).open_prepared("train")
        trainer = _Trainer(config, model, data.source_layers)
        backend = trainer.backend
        self._batches = TrainBatches(
            data,
            batch_size=config.train.batch_size,
            microbatch_size=config.train.microbatch_size,
            shuffle=False,
            seed=config.seed,
            num_buckets=config.data.num_buckets,
            row_multiple=backend.row_shards,
            local_rows=backend.local_rows,
        )
        self._step, self._put = trainer.compiled.run, backend.put_batch
        self._state = trainer.first_state(folder)
        warm = set()
        for batch in (self._batches[i] for i in range(len(self._batches))):
            shape = tuple(x.shape for x in jax.tree.leaves(batch))
            if shape not in warm:
                warm.add(shape)
                self._state, _ = self._step(self._state, self._put(batch))
        jax.block_until_ready(self._state)
        lengths = [
            (int(p), (int(c), int(r)))
            for p, c, r in zip(
                *(data.lengths()[name] for name in ("prompt", "chosen", "rejected")), strict=True
            )
        ]
        self.info = {
            "pairs": len(data),
            "tokens": sum(2 * prompt + sum(responses) for prompt, responses in lengths),
            "flops": sum(flops.training(model, *length) for length in lengths),
            "padding": self._batches.padding,
            "shapes": len(warm),
        }

    def repeat(self) -> dict[str, Any]:
        start = time.perf_counter()
        last = None
        for host_batch in loop.read_ahead(self._batches):
            self._state, metrics = self._step(self._state, self._put(host_batch))
            if last is not None:
                jax.device_get(last)
            last = metrics["loss"]
        jax.block_until_ready(self._state)
        return {"seconds": time.perf_counter() - start}


class Tokenization:
    """All pairs tokenized, for training and for the judge, from text to ids and offsets.

    Each repeat does it with the process that renders chat templates, and with them rendered here.
    """

    def __init__(self, spec: Spec):
        self._config, self._pairs = _config(spec), _pairs(spec)
        tokenizer = ChatTokenizer.load(hf_folder.resolve(self._config.model.source))
        template = JudgeTemplate.load(self._config.judge.template)
        self._template = tokenizer.template
        self._tokenize = PairTokenizer.from_config(self._config, tokenizer, template)
        self.info = {"pairs": len(self._pairs), "tokens": self._run()}

    def _run(self) -> int:
        tokens = 0
        for form in self._tokenize(self._pairs)[0]:
            t = form.tokenized
            tokens += 2 * len(t.prompt_ids) + len(t.chosen_ids) + len(t.rejected_ids)
            tokens += sum(len(ids) for ids in form.prompt.ids)
        return tokens

    def repeat(self) -> dict[str, Any]:
        for _ in range(2):  # what the last repeat had rendered is gone then
            self._template.announce([])
        start = time.perf_counter()
        self._run()
        middle = time.perf_counter()
        with _templates_rendered_here():
            self._run()
        end = time.perf_counter()
        return {"seconds": middle - start, "seconds_rendering_here": end - middle}


@contextlib.contextmanager
def _templates_rendered_here() -> Iterator[None]:
    """Chat templates are rendered by this process."""

    def render(template: str, conversation: str) -> str:
        messages, tools, generation_prompt, variables = json.loads(conversation)
        ((text,), _) = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=template,
            add_generation_prompt=generation_prompt,
            **variables,
        )
        return text

    patched = mock.patch.multiple(
        template_process.process, announce=lambda conversations: None, render=render
    )
    with patched:
        yield


class Curve:
    """A training step on one pair of random tokens, for several lengths of its responses."""

    PROMPT = 64

    def __init__(self, spec: Spec):
        config = _config(spec)
        folder = hf_folder.resolve(config.model.source)
        model = hf_folder.load_config(folder)
        trainer = _Trainer(config, model, (model.num_layers - 1,))
        self._step, self._state = trainer.compiled.run, trainer.first_state(folder)
        self._batches = [trainer.random_batch(self.PROMPT, n) for n in spec["lengths"]]
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
        self._config, self._layers = _config(spec), spec["layers"]
        self._model = hf_folder.load_config(hf_folder.resolve(self._config.model.source))
        # The compiler's own start-up is not a matter of layers.
        self._compile_step(1)
        self._compile_judge(1)
        self.info = {"layers": self._layers}

    def _compile_step(self, layers: int) -> float:
        model = dataclasses.replace(self._model, num_layers=layers)
        trainer = _Trainer(self._config, model, (layers - 1,))
        batch = trainer.random_batch(64, 128)
        start = time.perf_counter()
        trainer.compiled.run.lower(trainer.compiled.abstract_state, batch).compile()
        return time.perf_counter() - start

    def _compile_judge(self, layers: int) -> float:
        config = self._config
        model = dataclasses.replace(self._model, num_layers=layers)
        backend = _preparing_backend(config, model)
        compiled = compile_pass(
            backend,
            (0, layers - 1),
            config=model,
            dtype=jnp.dtype(config.model.dtype),
            attention=_attention(config, model, backend),
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
        config = _config(spec)
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


def _config(spec: Spec):
    config = config_lib.from_json((pathlib.Path(spec["scratch"]) / "config.json").read_text())
    config.update_from_flattened_dict(spec.get("changes", {}))
    return config


def _pairs(spec: Spec) -> list[Pair]:
    return load_pairs(str(pathlib.Path(spec["scratch"]) / "pairs.jsonl")).pairs


def _model(config) -> LanguageModel:
    return load_model(config.model.source, param_dtype=jnp.dtype(config.model.param_dtype))


def _tokenize(config, tokenizer: ChatTokenizer, pair: Pair):
    return tokenize_pair(
        tokenizer,
        pair,
        max_length=config.data.max_length,
        max_prompt_length=config.data.max_prompt_length,
    )


def _prompter(config, tokenizer: ChatTokenizer) -> JudgePrompter:
    template = JudgeTemplate.load(config.judge.template)
    return JudgePrompter(
        tokenizer, template, config.judge.max_length, config.judge.max_answer_length
    )


def _judge(config, model: LanguageModel) -> Judge:
    return Judge(
        model,
        template=config.judge.template,
        max_length=config.judge.max_length,
        max_answer_length=config.judge.max_answer_length,
        source_layers=config_lib.source_layers(config.judge.layers, model.config.num_layers),
        dtype=jnp.dtype(config.model.dtype),
        batch_size=config.judge.batch_size,
        token_budget=config.judge.token_budget,
        num_buckets=config.judge.num_buckets,
        backend=_preparing_backend(config, model.config),
        attention=config.model.attention,
    )


def _common_beginning(sequences: Sequence[np.ndarray]) -> int:
    """How many ids all sequences begin with."""
    shortest = min(len(ids) for ids in sequences)
    table = np.stack([ids[:shortest] for ids in sequences])
    differs = np.flatnonzero((table != table[0]).any(axis=0))
    return int(differs[0]) if len(differs) else shortest


class _Trainer:
    """A run's compiled step, and the state it starts from, as the training loop makes them."""

    def __init__(self, config, model: decoder.ModelConfig, source_layers: tuple[int, ...]):
        self.backend = backends.for_training(model, config.parallel)
        attention = _attention(config, model, self.backend)
        settings = config_lib.step_settings(config, model, source_layers, attention)
        self.compiled = stage.compile_step(config, settings, self.backend, total_steps=1000)
        self._model, self._dtype = model, jnp.dtype(config.model.param_dtype)

    def first_state(self, folder: pathlib.Path) -> TrainState:
        params = hf_folder.load_params(
            folder,
            self._model,
            param_dtype=self._dtype,
            shardings=self.backend.parameter_shardings(),
        )
        return self.backend.create_state(self.compiled.first_state, params)

    def random_batch(self, prompt: int, response: int) -> PairBatch:
        """One pair of random tokens, on the devices."""
        rows = self.backend.row_shards
        return self.backend.put_batch(_random_batch(self._model, prompt, response, rows))


def _preparing_backend(config, model: decoder.ModelConfig) -> backends.Backend:
    return backends.for_preparing(
        model, config.parallel, config.prepare.devices, config.model.param_dtype
    )


def _attention(config, model: decoder.ModelConfig, backend: backends.Backend) -> str:
    choice = implementations.choose(
        config.model.attention, model, config.model.dtype, backend.devices
    )
    return choice.implementation


def _random_batch(model: decoder.ModelConfig, prompt: int, response: int, rows: int) -> PairBatch:
    """One microbatch of one pair of random tokens, its row no longer than rounding asks for.

    The other rows are empty: where there are several devices, each takes one.
    """
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
    return jax.tree.map(
        lambda x: x[None], fill_rows([[example], *[[]] * (rows - 1)], shape, num_sources=1)
    )


def breakdown_of(spec: Spec) -> breakdown.Breakdown:
    """A workload's breakdown; its batches all have one shape, so that each program is one."""
    rows = {"judge.batch_size": 4, "judge.num_buckets": 1, "data.num_buckets": 1}
    return breakdown.Breakdown(WORKLOADS[spec["of"]](spec | {"changes": rows}))


WORKLOADS = {
    "breakdown": breakdown_of,
    "select": Select,
    "prepare": Prepare,
    "matmul": Matmul,
    "judge": Judging,
    "reference": Reference,
    "train": Training,
    "tokenize": Tokenization,
    "int8_change": Int8Change,
    "curve": Curve,
    "compile": Compile,
    "logps_memory": LogpsMemory,
}

if __name__ == "__main__":
    protocol.serve(WORKLOADS)
