"""HF folders read: every tensor in its place, and what damaged ones are told."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from attnpo_jax.models import decoder
from attnpo_jax.models.io import embedded, hf_folder
from attnpo_jax.models.io.hf_folder import FolderError

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
    """Random weights as a Llama has them there: linear weights are (out, in)."""
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
    return hf_folder.load_params(folder, hf_folder.load_config(folder), **arguments)


def assert_bit_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].tobytes() == value.tobytes(), name


# --- Loading -------------------------------------------------------------------------------------


def test_every_parameter_is_the_tensor_it_should_be(tmp_path):
    tensors = hf_tensors(attention_bias=True, mlp_bias=True)
    folder = write_folder(tmp_path / "m", tensors, attention_bias=True, mlp_bias=True)
    config = hf_folder.load_config(folder)
    params = hf_folder.load_params(folder, config)
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
    inner = hf_folder.open_file

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

    monkeypatch.setattr(hf_folder, "open_file", Opened)
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), plain)
    shardings["layers"]["query"] = NamedSharding(mesh, PartitionSpec(None, None, "model"))
    load(folder, shardings=shardings)
    query = [size for name, size in sizes if name == "model.layers.0.self_attn.q_proj.weight"]
    assert query == [8 * 24] * 4  # one head of four for each device
    # A parameter that every device holds is read once.
    assert [size for name, size in sizes if name == "lm_head.weight"] == [40 * 24]


@pytest.mark.parametrize("write", [write_folder, write_sharded])
def test_a_stored_copy_of_a_tied_head_is_left_aside(tmp_path, write, monkeypatch, caplog):
    monkeypatch.setattr(hf_folder, "_COMPARED", 3 * 24)  # three rows of the 40 at a time
    tensors = hf_tensors(tied=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    folder = write(tmp_path / "m", tensors, tie_word_embeddings=True)
    assert "lm_head" not in load(folder)
    assert not caplog.records


@pytest.mark.parametrize("write", [write_folder, write_sharded])
@pytest.mark.parametrize("row", [0, 39])
def test_a_tied_head_that_is_stored_with_other_values_is_used(
    tmp_path, write, row, monkeypatch, caplog
):
    monkeypatch.setattr(hf_folder, "_COMPARED", 3 * 24)
    tensors = hf_tensors(tied=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"][row, 23] += 1
    folder = write(tmp_path / "m", tensors, tie_word_embeddings=True)
    assert not hf_folder.load_config(folder).tie_word_embeddings
    (warning,) = caplog.records
    assert str(folder) in warning.getMessage()
    assert "lm_head.weight that is stored differs from the embedding" in warning.getMessage()
    params = load(folder)
    np.testing.assert_array_equal(params["lm_head"], tensors["lm_head.weight"])
    np.testing.assert_array_equal(params["embedding"], tensors["model.embed_tokens.weight"])


def test_a_stored_head_of_another_shape_than_the_embedding_is_named(tmp_path):
    tensors = hf_tensors(tied=True) | {"lm_head.weight": np.zeros((44, 24), np.float32)}
    folder = write_folder(tmp_path / "m", tensors, tie_word_embeddings=True)
    found = r"lm_head.weight in model.safetensors: found \(44, 24\), expected \(40, 24\)"
    with pytest.raises(FolderError, match=found):
        load(folder)


@pytest.mark.parametrize("write", [write_folder, write_sharded])
def test_a_model_without_its_head_has_no_prefix_and_loads_where_the_head_is_tied(tmp_path, write):
    tensors = hf_tensors(tied=True)
    whole = load(write(tmp_path / "whole", tensors, tie_word_embeddings=True))
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    base = load(write(tmp_path / "base", bare, tie_word_embeddings=True))
    jax.tree.map(np.testing.assert_array_equal, base, whole)
    with pytest.raises(FolderError, match="1 missing:\n    lm_head.weight"):
        load(write(tmp_path / "untied", bare))
    del bare["layers.1.mlp.up_proj.weight"]
    bare["layers.1.mlp.bias_proj.weight"] = np.zeros(3, np.float32)
    with pytest.raises(FolderError) as raised:
        load(write(tmp_path / "wrong", bare, tie_word_embeddings=True))
    assert "model.layers.1.mlp.up_proj.weight (not in" in str(raised.value)
    assert "\n    layers.1.mlp.bias_proj.weight in" in str(raised.value)  # as the file calls it


@pytest.mark.parametrize("write", [write_folder, write_sharded])
def test_a_tied_model_that_stores_its_head_alone_has_it_for_embedding(tmp_path, write):
    tensors = hf_tensors(tied=True)
    expected = load(write(tmp_path / "whole", tensors, tie_word_embeddings=True))
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    folder = write(tmp_path / "m", tensors, tie_word_embeddings=True)
    jax.tree.map(np.testing.assert_array_equal, load(folder), expected)
    with pytest.raises(FolderError, match="missing:\n    model.embed_tokens.weight"):
        load(write(tmp_path / "untied", tensors))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", np.float32),
        ("model.rotary_emb.original_inv_freq", np.float32),
        ("model.rotary_emb_local.inv_freq", np.float32),
        ("model.layers.2.self_attn.rotary_emb.cos_cached", np.float32),
        ("model.layers.1.self_attn.masked_bias", np.float32),
        ("model.layers.1.self_attn.bias", np.bool_),
        ("model.embed_tokens.embed_scale", np.float32),
        ("model.position_ids", np.int64),
    ],
)
def test_buffers_are_no_parameters_whatever_their_type(tmp_path, name, dtype):
    tensors = hf_tensors(dtype=ml_dtypes.bfloat16)
    plain = load(write_folder(tmp_path / "plain", tensors))
    folder = write_folder(tmp_path / "m", tensors | {name: np.ones((1, 4), dtype)})
    jax.tree.map(np.testing.assert_array_equal, load(folder), plain)
    assert hf_folder.stored_dtype(folder) == ml_dtypes.bfloat16


def test_a_folder_whose_weights_are_not_there_has_the_shape_that_its_config_says(tmp_path):
    folder = write_sharded(tmp_path / "m", hf_tensors(), tie_word_embeddings=True)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert hf_folder.load_config(folder).tie_word_embeddings


# --- What is wrong with a folder -----------------------------------------------------------------


def test_one_error_names_all_missing_extra_misshapen_and_integer_tensors(tmp_path):
    tensors = hf_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((32, 24), np.float32)
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(8, np.float32)
    tensors["lm_head.weight"] = np.zeros((40, 24), np.int8)
    folder = write_folder(tmp_path / "m", tensors)
    with pytest.raises(FolderError) as raised:
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
    with pytest.raises(FolderError, match=expected):
        load(folder)
    second.unlink()
    with pytest.raises(FolderError, match="lacks: model-00002-of-00002.safetensors"):
        load(folder)


def test_biases_that_the_config_does_not_mention_are_not_ignored(tmp_path):
    folder = write_folder(tmp_path / "m", hf_tensors(mlp_bias=True))
    with pytest.raises(FolderError, match="9 unknown to this model type"):
        load(folder)


def test_pickled_weights_are_refused(tmp_path):
    folder = write_folder(tmp_path / "m", hf_tensors())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FolderError, match="pytorch_model.bin are pickles, which are never read"):
        load(folder)


def test_a_file_that_was_cut_short_is_named(tmp_path):
    folder = write_folder(tmp_path / "m", hf_tensors())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for attempt in (load, hf_folder.weights_digest):
        with pytest.raises(FolderError, match="model.safetensors is damaged or cut short"):
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
    with pytest.raises(FolderError, match=message):
        hf_folder.load_config(tmp_path)


def test_resolve_takes_folders_and_the_alias_and_says_what_it_accepts(tmp_path, monkeypatch):
    assert hf_folder.resolve(str(tmp_path)) == tmp_path
    monkeypatch.setattr(embedded, "fetch", lambda: tmp_path / "fetched")
    assert hf_folder.resolve("smollm2-135m-instruct") == tmp_path / "fetched"
    for wrong in ("no-such-model", str(tmp_path / "none"), "./some/folder"):
        with pytest.raises(FolderError, match="accepted: a local Hugging Face folder"):
            hf_folder.resolve(wrong)


def test_resolve_asks_the_hub_for_no_pickles(tmp_path, monkeypatch):
    asked = {}

    def download(name, **arguments):
        asked.update(arguments, name=name)
        return str(tmp_path)

    monkeypatch.setattr(hf_folder.huggingface_hub, "snapshot_download", download)
    assert hf_folder.resolve("owner/some-model.v2") == tmp_path
    assert asked["name"] == "owner/some-model.v2"
    assert "*.safetensors" in asked["allow_patterns"]
    assert list(delivered(asked)) == [
        *("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        *COMPANIONS,
    ]
    hf_folder.resolve("owner/some-model.v2", weights=False)
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


def test_digest_follows_the_weights_and_not_the_place(tmp_path):
    tensors = hf_tensors()
    one = write_folder(tmp_path / "one", tensors)
    shutil.copytree(one, tmp_path / "two")
    digest = hf_folder.weights_digest(one)
    assert len(digest) == 64
    assert hf_folder.weights_digest(tmp_path / "two") == digest
    tensors["model.norm.weight"][5] += 1
    assert hf_folder.weights_digest(write_folder(tmp_path / "three", tensors)) != digest
    sharded = write_sharded(tmp_path / "four", hf_tensors())
    assert hf_folder.weights_digest(sharded) != digest
