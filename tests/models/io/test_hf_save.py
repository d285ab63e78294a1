"""Exports against transformers and safetensors, and what a failed or killed one leaves."""

import json
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from attnpo_jax.models import decoder
from attnpo_jax.models.io import hf_folder, hf_save
from attnpo_jax.models.io.hf_folder import FolderError
from tests import tiny
from tests.models.io.test_hf_folder import (
    COMPANIONS,
    OTHERS,
    SHAPE,
    assert_bit_equal,
    hf_tensors,
    load,
    write_folder,
)


def test_an_export_has_all_that_tokenizer_and_processor_consist_of(tmp_path):
    write_folder(tmp_path / "m", hf_tensors())
    for name in (*COMPANIONS, *OTHERS):
        file = tmp_path / "m" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    model = hf_folder.load_config(tmp_path / "m")
    params = hf_folder.load_params(tmp_path / "m", model)
    hf_save.save(tmp_path / "out", model, params, source_folder=tmp_path / "m")
    written = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*.*")}
    assert written == {*COMPANIONS, "config.json", "model.safetensors", "attnpo_export.json"}


def test_files_of_every_tokenizer_that_decoders_have_go_into_an_export(tmp_path):
    transformers = pytest.importorskip("transformers")
    names = {"tokenizer_config.json"}
    for kind in ("Llama", "Qwen2", "GPT2", "Gemma", "T5", "XLMRoberta", "Bert", "Albert", "XGLM"):
        tokenizer = getattr(transformers, f"{kind}Tokenizer")
        names |= set(tokenizer.vocab_files_names.values())
    assert {"tokenizer.json", "vocab.txt", "spiece.model"} <= names
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / name).write_text("{}")
    hf_save.copy_companions(tmp_path, tmp_path / "out", None)
    assert {file.name for file in (tmp_path / "out").iterdir()} == names


def test_an_exported_tokenizer_has_names_that_transformers_4_knows(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    tokenizer = tiny.byte_tokenizer(
        (*tiny.MARKS, "<|extra|>"), eos_token="<|im_end|>", extra_special_tokens=["<|extra|>"]
    )
    source, out = tmp_path / "source", tmp_path / "out"
    tokenizer.save_pretrained(source)
    of_source = json.loads((source / "tokenizer_config.json").read_text())
    assert of_source["tokenizer_class"] == "TokenizersBackend"  # or there is nothing to test
    assert of_source["extra_special_tokens"] == ["<|extra|>"]
    out.mkdir()
    hf_save.copy_companions(source, out, None)
    # transformers 4.57 finds no class of the other name, and asks the list for its keys.
    written = json.loads((out / "tokenizer_config.json").read_text())
    changed = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<|extra|>"],
    }
    del of_source["extra_special_tokens"]
    assert written == of_source | changed
    again = transformers.AutoTokenizer.from_pretrained(out)
    assert again.eos_token == "<|im_end|>"
    assert again.all_special_tokens == ["<|im_end|>", "<|extra|>"]
    assert again.chat_template == tokenizer.chat_template
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_tokenizer_config_that_version_4_reads_is_copied_as_it_is(tmp_path):
    text = '{"tokenizer_class":"LlamaTokenizer", "extra_special_tokens": {"image_token": "<i>"}}'
    (tmp_path / "tokenizer_config.json").write_text(text)
    (tmp_path / "out").mkdir()
    hf_save.copy_companions(tmp_path, tmp_path / "out", None)
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == text


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_load_then_save_gives_every_tensor_back_bit_for_bit(
    tmp_path, monkeypatch, shard_bytes, dtype
):
    monkeypatch.setattr(hf_save, "_SHARD_BYTES", shard_bytes)
    tensors = hf_tensors(attention_bias=True, mlp_bias=True, dtype=dtype)
    source = write_folder(tmp_path / "m", tensors, attention_bias=True, mlp_bias=True)
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"eos_token_id": 2}')
    (source / "pytorch_model.bin").touch()
    config = hf_folder.load_config(source)
    params = hf_folder.load_params(source, config, param_dtype=dtype)
    target = tmp_path / "out" / "export"
    hf_save.save(target, config, params, source_folder=source)
    files = sorted(target.glob("*.safetensors"))
    if shard_bytes == 20_000:
        assert len(files) > 1 and all(file.stat().st_size < 25_000 for file in files)
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        for name, file in index["weight_map"].items():
            assert name in load_file(target / file)
    else:
        assert [file.name for file in files] == ["model.safetensors"]
    assert_bit_equal({n: t for file in files for n, t in load_file(file).items()}, tensors)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (target / name).read_text() == (source / name).read_text()
    assert not (target / "pytorch_model.bin").exists()
    written = json.loads((target / "config.json").read_text())
    assert written == {**SHAPE, "attention_bias": True, "mlp_bias": True,
                       "torch_dtype": np.dtype(dtype).name}  # fmt: skip
    assert [path.name for path in target.parent.iterdir()] == ["export"]
    again = load(target, param_dtype=dtype)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_models_survive_the_round_trip(tmp_path, tied):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{k: v for k, v in SHAPE.items() if k not in ("model_type", "rope_theta")},
        initializer_range=0.5,
        tie_word_embeddings=tied,
        attention_bias=not tied,
        mlp_bias=not tied,
    )
    model = LlamaForCausalLM(config).eval()
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value)
    model.save_pretrained(tmp_path / "hf")
    ours = hf_folder.load_config(tmp_path / "hf")
    params = hf_folder.load_params(tmp_path / "hf", ours)
    hf_save.save(tmp_path / "export", ours, params, source_folder=tmp_path / "hf")
    assert_bit_equal(
        load_file(tmp_path / "export" / "model.safetensors"),
        load_file(tmp_path / "hf" / "model.safetensors"),
    )
    ids = torch.arange(12)[None] * 3 % 40
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(again(ids).logits, expected, atol=1e-4, rtol=0)
    tokens_BL = jnp.asarray(ids.numpy(), jnp.int32)
    positions_BL = jnp.arange(12)[None]
    hidden = decoder.forward(ours, params, tokens_BL, positions_BL, jnp.ones_like(tokens_BL))
    logits = hidden @ decoder.unembedding(params).T
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", ["Llama", "Gemma3Text", "Gemma3"])
@pytest.mark.parametrize("stored", ["copy", "other head", "head alone", "without head"])
def test_stored_heads_of_tied_models_count_as_in_transformers(tmp_path, kind, stored):
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    shape = {k: v for k, v in SHAPE.items() if k not in ("model_type", "rope_theta", "hidden_act")}
    text = {**shape, "initializer_range": 0.3, "tie_word_embeddings": True}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config, head = {
        "Llama": lambda: (transformers.LlamaConfig(**text), "lm_head.weight"),
        "Gemma3Text": lambda: (transformers.Gemma3TextConfig(**text), "lm_head.weight"),
        "Gemma3": lambda: (
            transformers.Gemma3Config(text_config=text, vision_config=vision),
            "language_model.lm_head.weight",
        ),
    }[kind]()
    makers = transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM
    whole = makers[kind != "Gemma3"].from_config(config)
    (whole.model if stored == "without head" else whole).save_pretrained(tmp_path / "hf")
    if stored != "without head":
        tensors = load_file(tmp_path / "hf" / "model.safetensors")
        embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
        tensors[head] = tensors[embedding].copy()
        if stored == "other head":
            tensors[head] += np.random.default_rng(0).normal(size=(40, 24)).astype(np.float32)
        if stored == "head alone":
            del tensors[embedding]
        save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})

    ours = hf_folder.load_config(tmp_path / "hf")
    assert ours.tie_word_embeddings == (stored != "other head")
    params = hf_folder.load_params(tmp_path / "hf", ours)
    hf_save.save(tmp_path / "export", ours, params, source_folder=tmp_path / "hf")
    written = json.loads((tmp_path / "export" / "config.json").read_text())
    assert written.get("tie_word_embeddings", True) == (stored != "other head")
    last = "ForConditionalGeneration" if kind == "Gemma3" else "ForCausalLM"
    assert written["architectures"] == [f"{kind.removesuffix('Text')}{last}"]
    assert (head in load_file(tmp_path / "export" / "model.safetensors")) == (
        stored == "other head"
    )

    ids = torch.arange(12)[None] * 3 % 39
    tokens_BL, positions_BL = jnp.asarray(ids.numpy(), jnp.int32), jnp.arange(12)[None]
    hidden = decoder.forward(ours, params, tokens_BL, positions_BL, jnp.ones_like(tokens_BL))
    logits = hidden @ decoder.unembedding(params).T
    for folder in ("hf", "export"):
        model = makers[1].from_pretrained(tmp_path / folder, dtype=torch.float32).eval()
        with torch.no_grad():
            np.testing.assert_allclose(logits, model(ids).logits.numpy(), atol=1e-4)


def test_a_head_that_stands_for_the_embedding_is_exported_as_one_in_its_dtype(tmp_path):
    tensors = hf_tensors(tied=True, dtype=ml_dtypes.bfloat16)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    source = write_folder(tmp_path / "m", tensors, tie_word_embeddings=True)
    config = hf_folder.load_config(source)
    hf_save.save(tmp_path / "out", config, hf_folder.load_params(source, config),
                 source_folder=source)  # fmt: skip
    tensors["model.embed_tokens.weight"] = tensors.pop("lm_head.weight")
    assert_bit_equal(load_file(tmp_path / "out" / "model.safetensors"), tensors)


def test_sharded_parameters_are_exported_whole(tmp_path):
    tensors = hf_tensors()
    source = write_folder(tmp_path / "m", tensors)
    config = hf_folder.load_config(source)
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
    shardings = jax.tree.map(
        lambda leaf: NamedSharding(mesh, PartitionSpec(*([None] * (leaf.ndim - 1)), "model")),
        decoder.abstract_params(config),
    )
    params = hf_folder.load_params(source, config, shardings=shardings)
    hf_save.save(tmp_path / "export", config, params, source_folder=source)
    assert_bit_equal(load_file(tmp_path / "export" / "model.safetensors"), tensors)


def test_the_sources_own_name_for_the_dtype_is_kept(tmp_path):
    source = write_folder(tmp_path / "m", hf_tensors(), dtype="float32")
    config = hf_folder.load_config(source)
    params = hf_folder.load_params(source, config, param_dtype=jnp.bfloat16)
    hf_save.save(tmp_path / "export", config, params, source_folder=source)
    written = json.loads((tmp_path / "export" / "config.json").read_text())
    assert written["dtype"] == "bfloat16" and "torch_dtype" not in written


def test_save_replaces_an_export_but_not_other_folders(tmp_path):
    source = write_folder(tmp_path / "m", hf_tensors())
    config = hf_folder.load_config(source)
    params = hf_folder.load_params(source, config)
    target = tmp_path / "export"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(FolderError, match="export holds files that are not an earlier export"):
        hf_save.save(target, config, params, source_folder=source)
    assert [path.name for path in target.iterdir()] == ["notes.txt"]
    hf_save.save(target, config, params, source_folder=source, overwrite=True)
    assert not (target / "notes.txt").exists()
    changed = {**params, "final_norm": params["final_norm"] + 1}
    hf_save.save(target, config, changed, source_folder=source)
    np.testing.assert_array_equal(load(target)["final_norm"], changed["final_norm"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "m"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "m", hf_tensors())
    config = hf_folder.load_config(source)
    params = hf_folder.load_params(source, config)
    target = tmp_path / "export"
    hf_save.save(target, config, params, source_folder=source)
    before = hf_folder.weights_digest(target)

    def full(*_, **__):
        raise hf_save.SafetensorError("No space left on device")

    monkeypatch.setattr(hf_save.safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match=rf"\[Errno 28\] No space left on device: '{target}'"):
        hf_save.save(target, config, params, source_folder=source)
    assert hf_folder.weights_digest(target) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "m"]


KILLED_WHILE_RENAMING = """
import os, pathlib, signal, sys
from attnpo_jax.models.io import hf_save

rename, target = os.rename, pathlib.Path(sys.argv[1])

def rename_or_die(source, to):
    if pathlib.Path(to) == target:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, to)

os.rename = rename_or_die
with hf_save.replacing(target, overwrite=True) as temporary:
    (temporary / "new").touch()
"""


@pytest.mark.process
def test_what_killed_exports_left_is_cleared_up_but_not_the_export_before_them(tmp_path):
    target, others = tmp_path / "export", tmp_path / f".export-adapter.{'0' * 32}.tmp"
    others.mkdir()
    with hf_save.replacing(target, overwrite=False) as temporary:
        (temporary / "first").touch()
    # The worst moment: the export before has stepped aside, the new one is not in its place.
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_RENAMING, str(target)])
    assert done.returncode == -signal.SIGKILL and not target.exists()
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(OSError, match="disk"):
        with hf_save.replacing(target, overwrite=False):
            raise OSError("the disk is full")
    assert (target / "first").exists()
    assert sorted(tmp_path.iterdir()) == [others, target]
    with hf_save.replacing(target, overwrite=False) as temporary:
        (temporary / "second").touch()
    assert (target / "second").exists() and not (target / "first").exists()
    assert sorted(tmp_path.iterdir()) == [others, target]


def test_save_refuses_parameters_of_another_shape(tmp_path):
    source = write_folder(tmp_path / "m", hf_tensors())
    config = hf_folder.load_config(source)
    params = {**hf_folder.load_params(source, config), "final_norm": jnp.zeros(3)}
    del params["lm_head"]
    with pytest.raises(FolderError) as raised:
        hf_save.save(tmp_path / "export", config, params, source_folder=source)
    assert "final_norm: found (3,), expected (24,)" in str(raised.value)
    assert "lm_head: found None, expected (40, 24)" in str(raised.value)
    assert not (tmp_path / "export").exists()
