import json
import math

import jax
import pytest

from attnpo_jax.models.decoder import abstract_params
from attnpo_jax.models.io import embedded, hf_folder, known


def parameters(source):
    shapes = abstract_params(known.shape_of(source))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    "source, number",
    [
        # As the models' pages give them.
        ("smollm2-135m-instruct", 134_515_008),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
        ("princeton-nlp/Llama-3-Base-8B-SFT", 8_030_261_248),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("alignment-handbook/zephyr-7b-sft-full", 7_241_732_096),
        ("mistralai/Mistral-7B-Instruct-v0.2", 7_241_732_096),
        ("Qwen/Qwen3-4B", 4_022_468_096),
        ("google/gemma-3-4b-it", 3_880_263_168),  # its text part
    ],
)
def test_known_models_have_as_many_parameters_as_published(source, number):
    assert parameters(source) == number


@pytest.mark.parametrize("source", known.KNOWN)
def test_every_known_model_has_a_shape(source):
    content = known.KNOWN[source]
    content = content.get("text_config", content)
    assert known.shape_of(source).num_layers == content["num_hidden_layers"]


def test_gemma_is_local_but_for_every_sixth_layer():
    windows = known.shape_of("google/gemma-3-4b-it").layer_windows
    assert len(windows) == 34
    assert [i for i, window in enumerate(windows) if window is None] == [5, 11, 17, 23, 29]
    assert set(windows) == {None, 1024}


def test_the_embedded_model_is_as_its_folder_says(smollm2_folder):
    assert known.shape_of(embedded.ALIAS) == hf_folder.load_config(smollm2_folder)


def test_a_folder_goes_before_a_known_name(tmp_path, monkeypatch):
    name = "princeton-nlp/Llama-3-Base-8B-SFT"
    (tmp_path / name).mkdir(parents=True)
    content = {**known.KNOWN[name], "num_hidden_layers": 2}
    (tmp_path / name / "config.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    assert known.shape_of(name).num_layers == 2


def test_what_the_hub_cannot_deliver_is_refused_with_what_would_do(monkeypatch):
    def offline(*_):
        raise OSError("no network")

    monkeypatch.setattr(known.huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(hf_folder.FolderError, match="'a/b'.*no network.*Meta-Llama-3-8B"):
        known.shape_of("a/b")
