import ast
import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax import config as config_lib
from attnpo_jax.data.batching import Example, RowShape, fill_rows
from attnpo_jax.judge import judge
from attnpo_jax.models import decoder, int8
from attnpo_jax.models.io import embedded, known
from attnpo_jax.models.io.known import KNOWN, shape_of
from attnpo_jax.parallel import backend as backends
from attnpo_jax.parallel import mesh
from attnpo_jax.prepare import reference
from attnpo_jax.train import stage

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
FILES = sorted(FOLDER.rglob("*.py"))
# Nothing is run, so what the machine code is like does not matter.
UNOPTIMIZED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
LLAMAS = ["llama3_8b_base", "llama3_8b_instruct"]
# Those of the embedded model are run by other tests; of two that are the same, one will do.
OF_KNOWN_MODELS = {
    config_lib.to_json(config): file
    for file in FILES
    if (config := config_lib.load_file(str(file))).model.source in KNOWN.keys() - {embedded.ALIAS}
}.values()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_config_is_valid_and_its_header_says_how_to_run_it(file):
    config = config_lib.load_file(str(file))
    config_lib.validate(config)
    assert config.is_locked
    header = ast.get_docstring(ast.parse(file.read_text()))
    name = file.relative_to(FOLDER.parent)
    assert re.search(f"attnpo (run|iterate) --config={re.escape(str(name))} --workdir=", header)


def test_dpo_differs_from_the_quickstart_in_the_weighting_alone():
    quickstart, dpo = (config_lib.load_file(str(FOLDER / f"{n}.py")) for n in ("quickstart", "dpo"))
    changed = config_lib.diff(quickstart, dpo)
    assert changed["weighting.name"] == ("attention", "uniform")
    assert {field.split(".")[0] for field in changed} == {"weighting"}


def test_there_is_a_ready_config_for_each_of_these_models():
    assert {config_lib.load_file(str(file)).model.source for file in OF_KNOWN_MODELS} >= {
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "meta-llama/Llama-3.2-1B-Instruct",
        "alignment-handbook/zephyr-7b-sft-full",
        "mistralai/Mistral-7B-Instruct-v0.2",
        "Qwen/Qwen3-4B",
        "google/gemma-3-4b-it",
    }


def abstract_batch(rows, num_sources):
    """One microbatch of short rows, of a real batch's ranks and types, as shapes alone."""
    ids = np.ones(4, np.int32)
    example = Example(
        0,
        ids,
        (ids, ids),
        (4, 4),
        judge=(np.ones((2, num_sources, 4), np.float32),) * 2,
        verdict=np.zeros(2, np.float32),
        reference_logps=(np.zeros(4, np.float32),) * 2,
    )
    batch = fill_rows([[example]] * rows, RowShape(32, 16, 8), num_sources)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), batch)


# Of the two that differ in model and data alone, as is tested below, one.
PROGRAMS_DIFFER = [file for file in OF_KNOWN_MODELS if file.stem != LLAMAS[1]]


@pytest.mark.process
@pytest.mark.parametrize("file", PROGRAMS_DIFFER, ids=lambda file: file.stem)
def test_programs_of_a_ready_config_compile_for_eight_devices(file):
    config = config_lib.load_file(str(file))
    model = shape_of(config.model.source)
    sources = config_lib.check_layers(config, model.num_layers, model.layer_windows)
    backend = backends.for_training(model, config.parallel)
    assert config.train.microbatch_size % backend.row_shards == 0
    assert config.train.eval_batch_size % backend.row_shards == 0

    settings = config_lib.step_settings(config, model, sources, "xla")
    step = stage.compile_step(config, settings, backend, total_steps=10)
    state, batch = step.abstract_state, abstract_batch(backend.row_shards, len(sources))
    # What the state takes on each device is known beforehand: three times the parameters.
    shares = backend.mesh.shape["fsdp"] * backend.mesh.shape["tensor"]
    copy = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)) / shares
    assert 3 * copy <= argument_bytes(step.run.lower(state, batch)) < 1.01 * 3 * copy

    # The passes of `prepare` have the parameters alone.
    passes = int8.shape_of_passes(model, config.model.prepare_weights)
    backend = backends.for_preparing(
        passes, config.parallel, config.prepare.devices, config.model.param_dtype
    )
    B, L = backend.row_shards, 32
    params = backend.abstract_state(decoder.abstract_params(passes))
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    rows = (shape((B, L)), shape((B, L)), shape((B, L)), shape((B, 2)))
    dtype, chunk = jnp.dtype(config.model.dtype), config.model.logps_chunk
    judged = judge.compile_pass(backend, sources, config=passes, dtype=dtype, attention="xla")
    lowered = judged.lower((params, None, shape((2,))), rows)
    attention, verdict, answer = lowered.out_info
    assert attention.shape == (len(sources), B, 2, L)
    assert verdict.shape == answer.shape == (B, 2)
    assert copy <= argument_bytes(lowered) < 1.01 * copy

    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), abstract_batch(B, num_sources=0)
    )
    scored = reference.compile_pass(
        backend, config=passes, dtype=dtype, chunk=chunk, attention="xla"
    )
    lowered = scored.lower(params, batch)
    (logps,) = lowered.out_info
    assert logps.shape == batch.mask_BG2T.shape == (B, 1, 2, 8)
    assert copy <= argument_bytes(lowered) < 1.01 * copy


def argument_bytes(lowered):
    """What the arguments of a program take on one device, once it is compiled."""
    compiled = lowered.compile(compiler_options=UNOPTIMIZED)
    return compiled.memory_analysis().argument_size_in_bytes


@pytest.mark.parametrize("name", LLAMAS)
@pytest.mark.parametrize(
    "machine, chips", [("8x80gb", 8), ("v5e-64", 64), ("v5p-16", 16), ("32x80gb", 32)]
)
def test_llama_configs_have_the_papers_settings_on_every_machine(name, machine, chips):
    config = config_lib.load_file(f"{FOLDER / name}.py:{machine}")
    config_lib.validate(config)
    assert (config.objective.name, config.objective.beta) == ("sigmoid", 0.005)
    weighting = config.weighting
    assert (weighting.name, weighting.layer, weighting.fix_sink) == ("attention", -1, True)
    optim = config.optim
    assert (optim.learning_rate, optim.schedule, optim.warmup_ratio) == (1e-6, "cosine", 0.1)
    assert optim.max_grad_norm == 1.0
    assert (config.train.batch_size, config.train.epochs) == (32, 1)
    assert (config.data.max_length, config.data.max_prompt_length) == (2048, 1800)
    assert (config.model.dtype, config.model.param_dtype) == ("bfloat16", "float32")
    # Each part of a batch has pairs, and the judge keeps the layer that is used.
    sizes = mesh.axis_sizes(config.parallel.mesh, chips)
    mesh.check_model(known.shape_of(config.model.source), sizes)
    assert config.train.microbatch_size % (sizes["data"] * sizes["fsdp"]) == 0
    assert config_lib.check_layers(config, 32) == (31,)


@pytest.mark.parametrize("name", LLAMAS)
def test_the_papers_way_differs_in_these_fields_alone(name):
    usual = config_lib.load_file(f"{FOLDER / name}.py:v5e-64")
    paper = config_lib.load_file(f"{FOLDER / name}.py:v5e-64,paper")
    config_lib.validate(paper)
    assert config_lib.check_layers(paper, 32) == (31,)
    assert set(config_lib.diff(usual, paper)) == {
        "data.truncation",
        "data.empty_response",
        "data.extra_end_token",
        "data.empty_system_message",
        "judge.whole_responses",
        "weighting.renormalize",
        "weighting.layers",
    }
    alone = config_lib.load_file(f"{FOLDER / name}.py:paper")
    assert alone.data.truncation == "keep_end" and alone.parallel.mesh.fsdp == 8


def test_llama_configs_differ_in_model_and_data_alone():
    base, instruct = (config_lib.load_file(f"{FOLDER / name}.py") for name in LLAMAS)
    assert set(config_lib.diff(base, instruct)) == {"model.source", "data.train", "data.eval"}
    assert instruct.model.source == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert shape_of(instruct.model.source) == shape_of(base.model.source)
    assert instruct.data.train == "princeton-nlp/llama3-ultrafeedback@train"


def test_llama_configs_name_the_machines_there_are():
    with pytest.raises(config_lib.ConfigError, match="'v5e-8'; accepted: 8x80gb, v5e-64, v5p-16"):
        config_lib.load_file(f"{FOLDER}/llama3_8b_instruct.py:v5e-8")
