"""Checkpoint folders in and out, against transformers, safetensors and hand-made damage."""

import json
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from attnpo_jax.models import decoder
from attnpo_jax.models.io import embedded
from attnpo_jax.models.io import hf_folder as checkpoints
from attnpo_jax.models.io.hf_folder import CheckpointError

SHAPE = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}


def hf_tensors(*, tied=False, attention_bias=False, mlp_bias=False, dtype=np.float32):
    """Random weights as a Llama checkpoint has them: linear weights are (out, in)."""
    rng = np.random.default_rng(0)
    linear = {
        "self_attn.q_proj": (32, 24),
        "self_attn.k_proj": (16, 24),
        "self_attn.v_proj": (16, 24),
        "self_attn.o_proj": (24, 32),
        "mlp.gate_proj": (32, 24),
        "mlp.up_proj": (32, 24),
        "mlp.down_proj": (24, 32),
    }
    shapes = {"model.embed_tokens.weight": (40, 24), "model.norm.weight": (24,)}
    if not tied:
        shapes["lm_head.weight"] = (40, 24)
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (24,)
        shapes[prefix + "post_attention_layernorm.weight"] = (24,)
        for name, shape in linear.items():
            shapes[prefix + name + ".weight"] = shape
            if attention_bias if name.startswith("self_attn") else mlp_bias:
                shapes[prefix + name + ".bias"] = shape[:1]
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_folder(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SHAPE, **config}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_sharded(folder, tensors, **config):
    """The same in two files with an index."""
    write_folder(folder, tensors, **config)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:10], names[10:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load(folder, **arguments):
    return checkpoints.load_params(folder, checkpoints.load_config(folder), **arguments)


def assert_bit_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].tobytes() == value.tobytes(), name


# --- Loading -------------------------------------------------------------------------------------


def test_every_parameter_is_the_tensor_it_should_be(tmp_path):
    tensors = hf_tensors(attention_bias=True, mlp_bias=True)
    folder = write_folder(tmp_path / "m", tensors, attention_bias=True, mlp_bias=True)
    config = checkpoints.load_config(folder)
    params = checkpoints.load_params(folder, config)
    abstract = decoder.abstract_params(config)
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, abstract)
    layers = jax.tree.map(np.asarray, params["layers"])
    pre = "model.layers.1."
    x_D = np.linspace(-1, 1, 24).astype(np.float32)
    # Applying a projection in either layout gives the same heads.
    query_NH = np.einsum("d,dnh->nh", x_D, layers["query"][1]) + layers["query_bias"][1]
    expected = tensors[pre + "self_attn.q_proj.weight"] @ x_D
    expected += tensors[pre + "self_attn.q_proj.bias"]
    np.testing.assert_allclose(query_NH, expected.reshape(4, 8), atol=1e-5)
    attended_NH = np.arange(32, dtype=np.float32).reshape(4, 8) / 32
    output_D = np.einsum("nh,nhd->d", attended_NH, layers["output"][1]) + layers["output_bias"][1]
    expected = tensors[pre + "self_attn.o_proj.weight"] @ attended_NH.reshape(32)
    expected += tensors[pre + "self_attn.o_proj.bias"]
    np.testing.assert_allclose(output_D, expected, atol=1e-5)
    np.testing.assert_array_equal(layers["down"][1], tensors[pre + "mlp.down_proj.weight"].T)
    np.testing.assert_array_equal(layers["down_bias"][1], tensors[pre + "mlp.down_proj.bias"])
    np.testing.assert_array_equal(
        layers["mlp_norm"][2], tensors["model.layers.2.post_attention_layernorm.weight"]
    )
    np.testing.assert_array_equal(params["lm_head"], tensors["lm_head.weight"])


def test_shards_with_an_index_load_as_one_file_does(tmp_path):
    tensors = hf_tensors()
    one = load(write_folder(tmp_path / "one", tensors))
    many = load(write_sharded(tmp_path / "many", tensors))
    jax.tree.map(np.testing.assert_array_equal, one, many)


def test_bfloat16_files_load_exactly_and_parameters_are_rounded_to_nearest(tmp_path):
    tensors = hf_tensors(dtype=ml_dtypes.bfloat16)
    params = load(write_folder(tmp_path / "b", tensors))
    assert params["embedding"].dtype == jnp.float32
    exact = tensors["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["embedding"], exact)
    full = hf_tensors()
    rounded = load(write_folder(tmp_path / "f", full), param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {jnp.dtype(jnp.bfloat16)}
    expected = jnp.asarray(full["lm_head.weight"]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(rounded["lm_head"], expected)


@pytest.mark.parametrize("spread", ["heads", "embed", "layers", "copies"])
def test_sharded_loading_equals_plain_loading(tmp_path, spread):
    folder = write_folder(tmp_path / "m", hf_tensors(tied=True), tie_word_embeddings=True)
    plain = load(folder)
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    split = {
        "heads": {"query": (None, None, "model"), "output": (None, "model"),
                  "key": (None, None, None, "model"), "down": (None, "data", "model")},
        "embed": {"query": (None, "data", "model"), "output": (None, None, "data", "model"),
                  "gate": (None, "model", "data")},
        "layers": {},
        "copies": {"up": (None, "model")},
    }[spread]  # fmt: skip

    def sharding(path, _):
        axes = split.get(path[-1].key, ())
        return NamedSharding(mesh, PartitionSpec(*axes))

    shardings = jax.tree_util.tree_map_with_path(sharding, plain)
    params = load(folder, shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    assert jax.tree.map(lambda x: x.sharding, params) == shardings


def test_only_the_slices_that_are_needed_are_read(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "m", hf_tensors())
    mesh = jax.make_mesh((4,), ("model",), devices=jax.devices()[:4])
    plain = load(folder)
    sizes = []
    inner = checkpoints._open

    class Opened:
        def __init__(self, file):
            self.file = inner(file)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_slice(self, name):
            slice_ = self.file.get_slice(name)

            class Slice:
                get_shape, get_dtype = slice_.get_shape, slice_.get_dtype

                def __getitem__(self, index):
                    value = slice_[index]
                    sizes.append((name, value.size))
                    return value

            return Slice()

    monkeypatch.setattr(checkpoints, "_open", Opened)
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), plain)
    shardings["layers"]["query"] = NamedSharding(mesh, PartitionSpec(None, None, "model"))
    load(folder, shardings=shardings)
    query = [size for name, size in sizes if name == "model.layers.0.self_attn.q_proj.weight"]
    assert query == [8 * 24] * 4  # one head of four for each device
    # A parameter that every device holds is read once.
    assert [size for name, size in sizes if name == "lm_head.weight"] == [40 * 24]


def test_a_stored_copy_of_a_tied_head_is_left_aside(tmp_path):
    folder = write_folder(tmp_path / "m", hf_tensors(), tie_word_embeddings=True)
    assert "lm_head" not in load(folder)


# --- What is wrong with a folder -----------------------------------------------------------------


def test_one_error_names_all_missing_extra_misshapen_and_integer_tensors(tmp_path):
    tensors = hf_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((32, 24), np.float32)
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(8, np.float32)
    tensors["lm_head.weight"] = np.zeros((40, 24), np.int8)
    folder = write_folder(tmp_path / "m", tensors)
    with pytest.raises(CheckpointError) as raised:
        load(folder)
    message = str(raised.value)
    assert str(folder) in message
    assert "2 missing" in message
    assert "model.layers.1.mlp.up_proj.weight (not in model.safetensors)" in message
    assert "model.norm.weight" in message
    assert (
        "model.layers.0.self_attn.k_proj.weight in model.safetensors: "
        "found (32, 24), expected (16, 24)"
    ) in message
    assert "1 unknown" in message and "self_attn.q_norm.weight in model.safetensors" in message
    assert "lm_head.weight in model.safetensors: I8" in message


def test_a_missing_tensor_of_a_sharded_folder_names_the_file_that_should_hold_it(tmp_path):
    tensors = hf_tensors()
    folder = write_sharded(tmp_path / "m", tensors)
    second = folder / "model-00002-of-00002.safetensors"
    kept = load_file(second)
    del kept["model.layers.2.mlp.up_proj.weight"]
    save_file(kept, second)
    expected = r"model.layers.2.mlp.up_proj.weight \(not in model-00002-of-00002.safetensors\)"
    with pytest.raises(CheckpointError, match=expected):
        load(folder)
    second.unlink()
    with pytest.raises(CheckpointError, match="lacks: model-00002-of-00002.safetensors"):
        load(folder)


def test_biases_that_the_config_does_not_mention_are_not_ignored(tmp_path):
    folder = write_folder(tmp_path / "m", hf_tensors(mlp_bias=True))
    with pytest.raises(CheckpointError, match="9 unknown to this model type"):
        load(folder)


def test_pickled_weights_are_refused(tmp_path):
    folder = write_folder(tmp_path / "m", hf_tensors())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match="pytorch_model.bin are pickles, which are never read"
    ):
        load(folder)


def test_a_file_that_was_cut_short_is_named(tmp_path):
    folder = write_folder(tmp_path / "m", hf_tensors())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for attempt in (load, checkpoints.weights_digest):
        with pytest.raises(CheckpointError, match="model.safetensors is damaged or cut short"):
            attempt(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.json does not exist"),
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json holds a list"),
        ('{"model_type": "bert"}', "config.json: .*model_type 'bert' is not supported"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load_config(tmp_path)


def test_resolve_takes_folders_and_the_alias_and_says_what_it_accepts(tmp_path, monkeypatch):
    assert checkpoints.resolve(str(tmp_path)) == tmp_path
    monkeypatch.setattr(embedded, "fetch", lambda: tmp_path / "fetched")
    assert checkpoints.resolve("smollm2-135m-instruct") == tmp_path / "fetched"
    for wrong in ("no-such-model", str(tmp_path / "none"), "./some/folder"):
        with pytest.raises(CheckpointError, match="accepted: a local Hugging Face folder"):
            checkpoints.resolve(wrong)


def test_resolve_asks_the_hub_for_no_pickles(tmp_path, monkeypatch):
    asked = {}

    def download(name, **arguments):
        asked.update(arguments, name=name)
        return str(tmp_path)

    monkeypatch.setattr(checkpoints.huggingface_hub, "snapshot_download", download)
    assert checkpoints.resolve("owner/some-model.v2") == tmp_path
    assert asked["name"] == "owner/some-model.v2"
    assert "*.safetensors" in asked["allow_patterns"]
    assert list(delivered(asked)) == [
        *("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        *COMPANIONS,
    ]
    checkpoints.resolve("owner/some-model.v2", weights=False)
    assert list(delivered(asked)) == ["config.json", "model.safetensors.index.json", *COMPANIONS]


COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json", "qwen.tiktoken", "generation_config.json"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)
OTHERS = (
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.gguf"),
    *("pytorch_model.bin.index.json", "adapter_config.json", "trainer_state.json"),
    *("training_args.bin", "all_results.json", "README.md", "notes.txt", "onnx/config.json"),
    *("original/tokenizer.model", "onnx/model.safetensors", "original/params.json"),
)


def delivered(asked):
    """What the hub delivers of a repository of all these files."""
    files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    return filter_repo_objects(
        [*files, *COMPANIONS, *OTHERS],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )


def test_an_export_has_all_that_tokenizer_and_processor_consist_of(tmp_path):
    write_folder(tmp_path / "m", hf_tensors())
    for name in (*COMPANIONS, *OTHERS):
        file = tmp_path / "m" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    model = checkpoints.load_config(tmp_path / "m")
    params = checkpoints.load_params(tmp_path / "m", model)
    checkpoints.save(tmp_path / "out", model, params, source_folder=tmp_path / "m")
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
    checkpoints.copy_companions(tmp_path, tmp_path / "out", None)
    assert {file.name for file in (tmp_path / "out").iterdir()} == names


# --- Saving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_load_then_save_gives_every_tensor_back_bit_for_bit(
    tmp_path, monkeypatch, shard_bytes, dtype
):
    monkeypatch.setattr(checkpoints, "_SHARD_BYTES", shard_bytes)
    tensors = hf_tensors(attention_bias=True, mlp_bias=True, dtype=dtype)
    source = write_folder(tmp_path / "m", tensors, attention_bias=True, mlp_bias=True)
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"eos_token_id": 2}')
    (source / "pytorch_model.bin").touch()
    config = checkpoints.load_config(source)
    params = checkpoints.load_params(source, config, param_dtype=dtype)
    target = tmp_path / "out" / "export"
    checkpoints.save(target, config, params, source_folder=source)
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
    ours = checkpoints.load_config(tmp_path / "hf")
    params = checkpoints.load_params(tmp_path / "hf", ours)
    checkpoints.save(tmp_path / "export", ours, params, source_folder=tmp_path / "hf")
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


def test_sharded_parameters_are_exported_whole(tmp_path):
    tensors = hf_tensors()
    source = write_folder(tmp_path / "m", tensors)
    config = checkpoints.load_config(source)
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
    shardings = jax.tree.map(
        lambda leaf: NamedSharding(mesh, PartitionSpec(*([None] * (leaf.ndim - 1)), "model")),
        decoder.abstract_params(config),
    )
    params = checkpoints.load_params(source, config, shardings=shardings)
    checkpoints.save(tmp_path / "export", config, params, source_folder=source)
    assert_bit_equal(load_file(tmp_path / "export" / "model.safetensors"), tensors)


def test_the_sources_own_name_for_the_dtype_is_kept(tmp_path):
    source = write_folder(tmp_path / "m", hf_tensors(), dtype="float32")
    config = checkpoints.load_config(source)
    params = checkpoints.load_params(source, config, param_dtype=jnp.bfloat16)
    checkpoints.save(tmp_path / "export", config, params, source_folder=source)
    written = json.loads((tmp_path / "export" / "config.json").read_text())
    assert written["dtype"] == "bfloat16" and "torch_dtype" not in written


def test_save_replaces_an_export_but_not_other_folders(tmp_path):
    source = write_folder(tmp_path / "m", hf_tensors())
    config = checkpoints.load_config(source)
    params = checkpoints.load_params(source, config)
    target = tmp_path / "export"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="export holds files that are not an earlier export"):
        checkpoints.save(target, config, params, source_folder=source)
    assert [path.name for path in target.iterdir()] == ["notes.txt"]
    checkpoints.save(target, config, params, source_folder=source, overwrite=True)
    assert not (target / "notes.txt").exists()
    changed = {**params, "final_norm": params["final_norm"] + 1}
    checkpoints.save(target, config, changed, source_folder=source)
    np.testing.assert_array_equal(load(target)["final_norm"], changed["final_norm"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "m"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "m", hf_tensors())
    config = checkpoints.load_config(source)
    params = checkpoints.load_params(source, config)
    target = tmp_path / "export"
    checkpoints.save(target, config, params, source_folder=source)
    before = checkpoints.weights_digest(target)

    def full(*_, **__):
        raise checkpoints.SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoints.safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="export: No space left on device"):
        checkpoints.save(target, config, params, source_folder=source)
    assert checkpoints.weights_digest(target) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "m"]


KILLED_WHILE_RENAMING = """
import os, pathlib, signal, sys
from attnpo_jax.models.io import hf_folder as checkpoints

rename, target = os.rename, pathlib.Path(sys.argv[1])

def rename_or_die(source, to):
    if pathlib.Path(to) == target:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, to)

os.rename = rename_or_die
with checkpoints.replacing(target, overwrite=True) as temporary:
    (temporary / "new").touch()
"""


@pytest.mark.process
def test_what_killed_exports_left_is_cleared_up_but_not_the_export_before_them(tmp_path):
    target, others = tmp_path / "export", tmp_path / f".export-adapter.{'0' * 32}.tmp"
    others.mkdir()
    with checkpoints.replacing(target, overwrite=False) as temporary:
        (temporary / "first").touch()
    # The worst moment: the export before has stepped aside, the new one is not in its place.
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_RENAMING, str(target)])
    assert done.returncode == -signal.SIGKILL and not target.exists()
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(OSError, match="disk"):
        with checkpoints.replacing(target, overwrite=False):
            raise OSError("the disk is full")
    assert (target / "first").exists()
    assert sorted(tmp_path.iterdir()) == [others, target]
    with checkpoints.replacing(target, overwrite=False) as temporary:
        (temporary / "second").touch()
    assert (target / "second").exists() and not (target / "first").exists()
    assert sorted(tmp_path.iterdir()) == [others, target]


def test_save_refuses_parameters_of_another_shape(tmp_path):
    source = write_folder(tmp_path / "m", hf_tensors())
    config = checkpoints.load_config(source)
    params = {**checkpoints.load_params(source, config), "final_norm": jnp.zeros(3)}
    del params["lm_head"]
    with pytest.raises(CheckpointError) as raised:
        checkpoints.save(tmp_path / "export", config, params, source_folder=source)
    assert "final_norm: found (3,), expected (24,)" in str(raised.value)
    assert "lm_head: found None, expected (40, 24)" in str(raised.value)
    assert not (tmp_path / "export").exists()


# --- Digest --------------------------------------------------------------------------------------


def test_digest_follows_the_weights_and_not_the_place(tmp_path):
    tensors = hf_tensors()
    one = write_folder(tmp_path / "one", tensors)
    shutil.copytree(one, tmp_path / "two")
    digest = checkpoints.weights_digest(one)
    assert len(digest) == 64
    assert checkpoints.weights_digest(tmp_path / "two") == digest
    tensors["model.norm.weight"][5] += 1
    assert checkpoints.weights_digest(write_folder(tmp_path / "three", tensors)) != digest
    sharded = write_sharded(tmp_path / "four", hf_tensors())
    assert checkpoints.weights_digest(sharded) != digest
