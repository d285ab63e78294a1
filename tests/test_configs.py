import ast
import pathlib

import pytest

from attnpo_jax import config as config_lib
from attnpo_jax.models import known
from attnpo_jax.parallel import mesh

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
FILES = sorted(FOLDER.rglob("*.py"))


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


LLAMAS = ["llama3_8b_base", "llama3_8b_instruct"]


@pytest.mark.parametrize("name", LLAMAS)
@pytest.mark.parametrize("machine, chips", [("8x80gb", 8), ("v5e-64", 64), ("v5p-16", 16)])
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


def test_llama_configs_differ_in_model_and_data_alone():
    base, instruct = (config_lib.load_file(f"{FOLDER / name}.py") for name in LLAMAS)
    assert set(config_lib.diff(base, instruct)) == {"model.source", "data.train", "data.eval"}
    assert instruct.model.source == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert instruct.data.train == "princeton-nlp/llama3-ultrafeedback@train"


def test_llama_configs_name_the_machines_there_are():
    with pytest.raises(config_lib.ConfigError, match="'v5e-8'; accepted: 8x80gb, v5e-64, v5p-16"):
        config_lib.load_file(f"{FOLDER}/llama3_8b_instruct.py:v5e-8")
