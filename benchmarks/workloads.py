"""The package's side of every measurement: `python -m benchmarks.workloads NAME SPEC`.

Each is set up and warmed up (everything compiled) before it says that it is ready; a repeat then
does the work once and times it. `tokens` counts both sequences of a pair whole, so that it means
the same for an implementation that does not share their beginning.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from attnpo_jax import config as config_lib
from attnpo_jax.data import template_process
from attnpo_jax.data.batching import (
    TrainBatches,
)
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.data.sources import load_pairs, pairs_digest
from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.judge.prompt import JudgeTemplate, common_beginning
from attnpo_jax.models import decoder, flops
from attnpo_jax.models.io import hf_folder
from attnpo_jax.prepare import reference
from attnpo_jax.prepare import stage as prepare
from attnpo_jax.prepare.pair_forms import PairTokenizer
from attnpo_jax.run import Run
from attnpo_jax.train import loop
from benchmarks import breakdown, by_size, protocol, setting
from benchmarks.int8_change import change
from benchmarks.setting import Spec

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
    prompts = [setting.prompter(config, tokenizer).build(pair) for pair in pairs]
    layers = hf_folder.load_config(folder).num_layers
    peer_input = {
        "model": str(folder),
        "layers": config_lib.source_layers(config.judge.layers, layers),
        "letters": prompts[0].letter_ids,
        "prompts": [[ids.tolist() for ids in prompt.ids] for prompt in prompts],
    }
    (scratch / "judge_prompts.json").write_text(json.dumps(peer_input))
    tokenized = [setting.tokenize(config, tokenizer, pair) for pair in pairs]
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
        config, scratch = setting.config_of(spec), pathlib.Path(spec["scratch"])
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
        config, self._pairs = setting.config_of(spec), setting.pairs_of(spec)
        if "layers" in spec:
            config.judge.layers = tuple(spec["layers"])
        model = setting.model_of(config)
        self._judge = setting.judge_of(config, model)
        self._prompts = [self._judge.prompter.build(pair) for pair in self._pairs]
        self._tokenized = [setting.tokenize(config, model.tokenizer, pair) for pair in self._pairs]
        self.repeat()
        sequences = [ids for prompt in self._prompts for ids in prompt.ids]
        common = len(functools.reduce(common_beginning, sequences))
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
        config, pairs = setting.config_of(spec), setting.pairs_of(spec)
        model = setting.model_of(config)
        self._tokenized = [setting.tokenize(config, model.tokenizer, pair) for pair in pairs]
        backend = setting.preparing_backend(config, model.config)
        attention = setting.attention_of(config, model.config, backend)
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
        config = setting.config_of(spec)
        for field in ("remat", "dtype", "param_dtype"):
            if spec.get(field) is not None:
                config.model[field] = spec[field]
        folder = hf_folder.resolve(config.model.source)
        model = hf_folder.load_config(folder)
        # Prepared once, in one dtype: for the time it takes, the values do not matter.
        data = Run.resolve(setting.config_of(spec), pathlib.Path(spec["scratch"])).open_prepared(
            "train"
        )
        trainer = setting.Trainer(config, model, data.source_layers)
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
        batches = loop.read_ahead(self._batches)
        while True:
            with jax.profiler.TraceAnnotation(breakdown.INPUT):
                host_batch = next(batches, None)
            if host_batch is None:
                break
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
        self._config, self._pairs = setting.config_of(spec), setting.pairs_of(spec)
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
    "curve": by_size.Curve,
    "compile": by_size.Compile,
    "logps_memory": by_size.LogpsMemory,
}

if __name__ == "__main__":
    protocol.serve(WORKLOADS)
