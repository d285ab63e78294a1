"""Compiles small models' programs for GPUs that are not there: `python -m tests.plan.gpu_programs
FILE` writes what `test_gpus.py` checks of them, as JSON.

A process of its own, by the Python of an environment that has JAX's CUDA plugin; one for all.
"""

import json
import re
import sys
import time
from collections import Counter

from attnpo_jax.config import default_config
from attnpo_jax.models.io import hf_config
from attnpo_jax.plan import generation, hlo, topologies, work
from attnpo_jax.plan.lengths import Lengths
from attnpo_jax.plan.programs import DoesNotFit, Setting

LAYERS, MICROBATCHES, VOCABULARY = 3, 2, 4096
# Tokens of a row, of a judge's and of a prompt that is read, no other length among them; and those
# whose logits there are at a time.
ROW, JUDGE_ROW, PROMPT, CHUNK = 384, 768, 320, 48
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WINDOW = {"sliding_window": 128}
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA | WINDOW | {"model_type": "mistral"},
    "qwen2": LLAMA | {"model_type": "qwen2", "num_key_value_heads": 4},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 64},
    # Half of the layers, or all but every second, have the window.
    "gemma2": LLAMA | WINDOW | {"model_type": "gemma2", "head_dim": 64},
    "gemma3": LLAMA
    | WINDOW
    | {"model_type": "gemma3_text", "head_dim": 256, "sliding_window_pattern": 2},
    "phi3": LLAMA | {"model_type": "phi3"},
    "olmo2": LLAMA | {"model_type": "olmo2"},
    "smollm3": LLAMA | {"model_type": "smollm3", "num_key_value_heads": 2},
}
INT8 = {"model.prepare_weights": "int8", "generate.weights": "int8", "generate.cache": "int8"}
LORA = {"lora.rank": 8, "lora.targets": ("q_proj", "v_proj"), "model.param_dtype": "bfloat16"}
XLA = {"model.attention": "xla"}
# Copies on four hosts, each split over the eight GPUs of one.
HOSTS = {"parallel.mesh.data": 4, "train.batch_size": 64, "train.microbatch_size": 32}
PASSES = ("training", "reference", "judge")

# By name: GPUs, family, what is changed of the config, and which programs.
COMPILED = {
    "llama": ("h100:8", "llama", {}, (*PASSES, "generate")),
    "xla": ("h100:8", "llama", XLA, ("training", "judge")),
    "lora": ("h100:8", "llama", LORA, ("training",)),
    "int8": ("h100:8", "llama", INT8, ("reference", "judge", "generate")),
    "hosts": ("h100:4x8", "llama", HOSTS, ("training", "reference")),
    "tensor": ("h100:8", "llama", {"parallel.mesh.tensor": 2}, ("training",)),
    "gemma3": ("h100:8", "gemma3", {}, ("training", "generate")),
    "gemma3 on b200": ("b200:8", "gemma3", {}, ("reference",)),
    "a100": ("a100-80gb:8", "llama", {}, ("reference",)),
    "l40s": ("l40s:8", "llama", {}, ("reference",)),
    "b200": ("b200:8", "llama", {}, ("reference",)),
}
# Traced for GPUs, with JAX's checks, and no further: forward and backward.
LOWERED = {
    f"{family} on {kind}": (f"{kind}:8", family, {}, (*PASSES, "decode", "prefill"))
    for family in FAMILIES
    for kind in (("h100", "b200") if family == "gemma3" else ("h100",))
    if family != "llama"
}


class Lowered(Setting):
    """A setting whose programs are the text of what would be compiled, for GPUs alone."""

    def compile(self, name, topology, backend, batching, needed, lower):
        with topology.compiling():
            return self.attention_of(backend), lower().as_text()


def setting(topology, model, fields, of=Setting):
    config = default_config()
    config.data.max_length, config.data.max_prompt_length = 256, 128
    config.judge.max_length, config.judge.max_answer_length = 512, 128
    config.judge.layers, config.judge.batch_size = (LAYERS - 1,), 8
    config.train.batch_size, config.train.microbatch_size = 8 * MICROBATCHES, 8
    config.model.dtype, config.model.remat, config.model.logps_chunk = "bfloat16", "layer", CHUNK
    config.parallel.mesh.update({"data": 1, "fsdp": -1, "tensor": 1})
    config.generate.max_length, config.generate.slots = PROMPT, 8
    config.update_from_flattened_dict(fields)
    at = topologies.parse(topology)
    return of(config, hf_config.read(model), at, Lengths.of(config, ROW))


def described(program, text, parts):
    """What the tests look at."""
    parsed = hlo.parse(text)
    calls, attention = Counter(), Counter()
    for computation, i, times in parsed.instructions():
        if "fmha" in i.target:
            query = computation.instructions[i.operands[0]].shapes[0]
            attention[i.target] += times
            calls[i.target] += work.cudnn_attention(i, query, parts) * times
    return {
        "topology": program.topology.name,
        "mesh": dict(program.mesh),
        "rows": program.batching.rows,
        "attention": program.attention,
        "peak": program.memory.peak,
        "arguments": program.memory.arguments,
        "model_flops": program.model_flops,
        "flops": program.flops,
        "traffic": program.traffic,
        "unknown_loops": list(program.unknown_loops),
        "collectives": [
            {"kind": c.kind, "axes": c.axes, "shapes": c.shapes, "times": c.times}
            for c in program.collectives
        ],
        "attention_runs": dict(attention),
        "attention_flops": dict(calls),
        "attention_calls": attention_calls(text),
        "squares": squares(text),
        "seconds": program.compile_seconds,
    }


def attention_calls(text):
    """How often a program's text calls cuDNN's attention, by which."""
    return dict(Counter(re.findall(r"__cudnn\$fmha\w+", text)))


def squares(text):
    """Dtypes of arrays with two axes of a row's length, as scores and masks are."""
    length = f"({ROW}|{JUDGE_ROW}|{PROMPT})"
    compiled = re.findall(rf"\b([a-z]+\d*)\[(?:\d+,)*{length},\2(?:,1)*\]", text)
    lowered = re.findall(rf"tensor<(?:\d+x)*{length}x\1x([a-z]+\d*)>", text)
    return sorted({dtype for dtype, _ in compiled} | {dtype for _, dtype in lowered})


def compiled(made, program):
    """Names and descriptions of a setting's programs of one kind."""
    texts, parse = [], hlo.parse

    def kept(text):
        texts.append(text)
        return parse(text)

    hlo.parse = kept
    if program == "generate":
        sampling = generation.plan(made)
        results = sampling.decode, sampling.prefill
    else:
        results = (getattr(made, program)(),)
    hlo.parse = parse
    return {
        r.name: described(r, text, made.parts_of(r.name))
        for r, text in zip(results, texts, strict=True)
    }


def main(file):
    found = {"compiled": {}, "lowered": {}}
    for name, (topology, family, fields, programs) in COMPILED.items():
        made = setting(topology, FAMILIES[family], fields)
        for program in programs:
            start = time.monotonic()
            for what, one in compiled(made, program).items():
                found["compiled"][f"{name}, {what}"] = one
            print(f"{name}, {program}: {time.monotonic() - start:.1f} s", flush=True)
    for name, (topology, family, fields, programs) in LOWERED.items():
        made = setting(topology, FAMILIES[family], fields, Lowered)
        sampling = generation.Sampling.of(made)
        for program in programs:
            attention, text = getattr(made if program in PASSES else sampling, program)()
            found["lowered"][f"{name}, {program}"] = {
                "attention": attention,
                "attention_calls": attention_calls(text),
                "squares": squares(text),
            }
        print(f"{name}: traced", flush=True)
    # Two GPUs have 89 GiB between them; parameters, moments and gradients of this take more.
    large = LLAMA | {"hidden_size": 8192, "intermediate_size": 1 << 17}
    try:
        setting("l40s:2", large, {}).training()
    except DoesNotFit as error:
        found["does not fit"] = str(error)
    with open(file, "w") as out:
        json.dump(found, out)


if __name__ == "__main__":
    main(sys.argv[1])
