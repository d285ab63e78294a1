import ast
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax import config as config_lib
from attnpo_jax import judge
from attnpo_jax.data.batching import Example, RowShape, fill_rows
from attnpo_jax.models import embedded
from attnpo_jax.models.known import KNOWN, shape_of
from attnpo_jax.parallel import backend as backends
from attnpo_jax.train import loop

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
FILES = sorted(FOLDER.rglob("*.py"))
# Nothing is run, so what the machine code is like does not matter.
UNOPTIMIZED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# Those of the embedded model are run by other tests.
OF_KNOWN_MODELS = [
    file
    for file in FILES
    if config_lib.load_file(str(file)).model.source in KNOWN.keys() - {embedded.ALIAS}
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_config_is_valid_and_its_header_says_how_to_run_it(file):
    config = config_lib.load_file(str(file))
    config_lib.validate(config)
    assert config.is_locked
    header = ast.get_docstring(ast.parse(file.read_text()))
    name = file.relative_to(FOLDER.parent)
    assert f"attnpo run --config={name} --workdir=" in header


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


@pytest.mark.parametrize("file", OF_KNOWN_MODELS, ids=lambda file: file.stem)
def test_steps_of_a_ready_config_compile_for_eight_devices(file):
    config = config_lib.load_file(str(file))
    model = shape_of(config.model.source)
    sources = config_lib.check_layers(config, model.num_layers, model.layer_windows)
    backend = backends.for_training(model, config.parallel)
    assert config.train.microbatch_size % backend.row_shards == 0
    assert config.train.eval_batch_size % backend.row_shards == 0

    settings = loop.step_settings(config, model, sources)
    step = loop.compile_step(config, settings, backend, total_steps=10)
    state, batch = step.abstract_state, abstract_batch(backend.row_shards, len(sources))
    compiled = step.run.lower(state, batch).compile(compiler_options=UNOPTIMIZED)
    # What the state takes on each device is known beforehand: three times the parameters.
    per_device = compiled.memory_analysis().argument_size_in_bytes
    shares = backend.row_shards if config.parallel.mesh.fsdp == -1 else 1
    whole = 3 * 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    assert whole / shares <= per_device < 1.01 * whole / shares

    B, L = backend.row_shards, 32
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    rows = (shape((B, L)), shape((B, L)), shape((B, L)), shape((B, 2)))
    judged = judge.compile_pass(backend, model, sources, jnp.dtype(config.model.dtype))
    lowered = judged.lower((state.params, None, shape((2,))), rows)
    attention, verdict, answer = lowered.out_info
    assert attention.shape == (len(sources), B, 2, L)
    assert verdict.shape == answer.shape == (B, 2)
