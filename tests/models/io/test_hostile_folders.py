"""Model folders that were made to break something: one line names the file, and no code runs."""

import json
import os
import pathlib
import struct

import gguf as gguf_package
import numpy as np
import pytest
import safetensors.numpy

from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.models.io import gguf, hf_folder, hf_save
from attnpo_jax.runtime.errors import UserError
from tests import tiny

# Files of a folder are texts, bytes, or JSON values; None: the file is taken away.
CONFIG = "config.json"
INDEX = hf_folder.INDEX
WEIGHTS = hf_folder.SINGLE
TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
DEEP = "[" * 200_000
CANARY = "import os; os.system('touch canary'); open('canary', 'w')"


def header(tensors, body=b"", length=None):
    """A safetensors file of any header."""
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor(shape, start=0, end=0, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def config(**changes):
    return tiny.HF_CONFIG | changes


# What a folder holds in place of a good one's files, and what the error names.
CONFIGS = {
    "no object": ([1], "config.json holds a list"),
    "nested": (DEEP, "config.json is not valid JSON"),
    "digits": ('{"vocab_size": ' + "9" * 5000 + "}", "config.json is not valid JSON"),
    "bytes": (b"\xff\xfe{}", "config.json is not valid JSON"),
    "empty": ("", "config.json is not valid JSON"),
    "layers 1e9": (config(num_hidden_layers=10**9), "num_hidden_layers 1000000000 is not"),
    "layers 1e9 float": (config(num_hidden_layers=1e9), "num_hidden_layers 1000000000.0"),
    "layers -1": (config(num_hidden_layers=-1), "num_hidden_layers -1"),
    "layers text": (config(num_hidden_layers="3"), "num_hidden_layers '3'"),
    "layers true": (config(num_hidden_layers=True), "num_hidden_layers True"),
    "vocabulary": (config(vocab_size=10**12), "vocab_size 1000000000000"),
    "width": (config(hidden_size=2**40), "hidden_size 1099511627776"),
    "heads": (config(num_attention_heads=0), "num_attention_heads 0"),
    "many heads": (config(num_attention_heads=2**30), "num_attention_heads 1073741824"),
    "head size": (config(head_dim=2**31), "head_dim 2147483648"),
    "positions": (config(max_position_embeddings=10**300), "max_position_embeddings 1000"),
    "norm": (config(rms_norm_eps="x"), "rms_norm_eps 'x'"),
    "type list": (config(model_type=["llama"]), "model_type .'llama'. is not supported"),
    "type object": (config(model_type={}), "model_type {} is not supported"),
    "type null": (config(model_type=None), "model_type None is not supported"),
    "rope list": (config(rope_scaling=[1]), "rope_scaling .1. is not"),
    "rope type": (config(rope_scaling={"rope_type": ["a"]}), "rope type .'a'. is not supported"),
    "rope factor": (
        config(rope_scaling={"rope_type": "linear", "factor": 1e300}),
        "factor of rope type 'linear' 1e.300",
    ),
    "rope of types": (
        config(
            model_type="gemma3_text",
            rope_parameters={"full_attention": {"rope_theta": 1.0}, "sliding_attention": [1]},
        ),
        "rope_parameters .1. is not",
    ),
    "layer types": (config(layer_types=[{}] * 3), "layer_types "),
    "quantized": (config(quantization_config={"a": 1}), "quantization_config"),
    "code": (config(model_type="x", auto_map={"AutoConfig": "code.C"}), "model_type 'x'"),
}
INDEXES = {
    "number": ({"weight_map": {"a": 1}}, "weight_map has 1 for a"),
    "list": ({"weight_map": {"a": ["x.safetensors"]}}, "weight_map has .* for a"),
    "null": ({"weight_map": {"a": None}}, "weight_map has None"),
    "up": ({"weight_map": {"a": "../x.safetensors"}}, "weight_map has '../x.safetensors'"),
    "absolute": ({"weight_map": {"a": "/etc/x.safetensors"}}, "weight_map has '/etc"),
    "folder": ({"weight_map": {"a": "b/x.safetensors"}}, "weight_map has 'b/x"),
    "other kind": ({"weight_map": {"a": "/etc/passwd"}}, "weight_map has '/etc/passwd'"),
    "pickle": ({"weight_map": {"a": "pytorch_model.bin"}}, "weight_map has 'pytorch_model.bin'"),
    "missing": ({"weight_map": {"a": "x.safetensors"}}, "names files that .* lacks"),
    "no map": ({"weight_map": []}, "no 'weight_map'"),
    "nested": (DEEP, "index.json is not valid JSON"),
}
HEADERS = {
    "empty": b"",
    "short": b"\1\0",
    "length": header(b"{}", length=2**63),
    "length beyond": header(b"{}", length=1000),
    "nested": header(b'{"a":' * 100_000),
    "not JSON": header(b"\xff\xfe"),
    "list": header(b"[]"),
    "offsets beyond": header({"a": tensor([1000], 0, 4000)}, b"\0" * 8),
    "offsets back": header({"a": tensor([1], 4, 0)}, b"\0" * 8),
    "offsets negative": header({"a": tensor([1], -4, 0)}, b"\0" * 8),
    "offsets gap": header({"a": tensor([1], 4, 8)}, b"\0" * 8),
    "shape too large": header({"a": tensor([2**40, 2**40], 0, 8)}, b"\0" * 8),
    "shape negative": header({"a": tensor([-1], 0, 4)}, b"\0" * 4),
    "shape text": header({"a": tensor("x", 0, 4)}, b"\0" * 4),
    "dtype": header({"a": tensor([1], 0, 4, "OBJECT")}, b"\0" * 4),
    "pickle": b"\x80\x04cos\nsystem\n(S'touch canary'\ntR.",
    "zip": b"PK\x03\x04" + b"\0" * 100,
}
# Tensors that a header may have, but not those of this model.
TENSORS = {
    "no tensors": header({}),
    "nothing of much": header(
        {
            "model.embed_tokens.weight": tensor([0, 10**15]),
            "lm_head.weight": tensor([0, 10**15]),
        }
    ),
    "scalar": header({"model.norm.weight": tensor([], 0, 4)}, b"\0" * 4),
    "integers": header({"model.norm.weight": tensor([1], 0, 8, "I64")}, b"\0" * 8),
    "escapes": header({"\x1b[31m[/red]": tensor([1], 0, 4)}, b"\0" * 4),
}
TOKENIZERS = {
    "not JSON": ({TOKENIZER: "{"}, "tokenizer.json is not valid JSON"),
    "nested": ({TOKENIZER: DEEP}, "tokenizer.json is not valid JSON"),
    "list": ({TOKENIZER: "[]"}, "tokenizer.json holds a list"),
    "empty object": ({TOKENIZER: "{}"}, "tokenizer.json: transformers can't load"),
    "unknown model": ({TOKENIZER: {"model": {"type": "X"}}}, "tokenizer.json: transformers"),
    "merges": ({TOKENIZER: ("model", "merges", [["qq", "zz"]])}, "tokenizer.json: transformers"),
    "id": ({TOKENIZER: ("model", "vocab", {"a": 4_000_000_000})}, "'a' has the id 4000000000"),
    "ids text": ({TOKENIZER: ("model", "vocab", {"a": "b"})}, "tokenizer.json: transformers"),
    "settings": ({SETTINGS: "[1"}, "tokenizer_config.json is not valid JSON"),
    "settings list": ({SETTINGS: "[]"}, "tokenizer_config.json holds a list"),
    "class": ({SETTINGS: {"tokenizer_class": 7}}, "can't load the tokenizer"),
    "code": (
        {
            TOKENIZER: None,
            "vocab.json": "{}",
            SETTINGS: {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", None]}},
            "code.py": CANARY,
        },
        "can't load the tokenizer|no chat template",
    ),
    "template number": (
        {SETTINGS: {"chat_template": 7}, "chat_template.jinja": None},
        "chat_template is no text|can't load",
    ),
    "only tokenizer.model": (
        {TOKENIZER: None, SETTINGS: None, "tokenizer.model": b"\x0a\x03abc"},
        "tokenizer.model: transformers can't load the tokenizer",
    ),
    "nothing": ({TOKENIZER: None}, "holds no tokenizer"),
}
LINKED = [CONFIG, WEIGHTS, "merges.txt", TOKENIZER, SETTINGS, "chat_template.jinja"]


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """The files of a folder that is what it should be."""
    folder = tmp_path_factory.mktemp("good")
    model = tiny.write_folder(folder)
    return {file.name: file.read_bytes() for file in model.iterdir() if file.is_file()}


@pytest.fixture
def write(good, tmp_path, monkeypatch):
    """A function that makes a good folder with some files changed; no canary may be left."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"

    def write(changes):
        folder.mkdir()
        for name, content in {**good, **changes}.items():
            if isinstance(content, tuple):
                *path, last, value = content
                content = json.loads(good[name])
                held = content
                for key in path:
                    held = held[key]
                held[last] = value
            if isinstance(content, (dict, list)):
                content = json.dumps(content)
            if isinstance(content, str):
                content = content.encode()
            if content is not None:
                (folder / name).write_bytes(content)
        return folder

    yield write
    assert not list(tmp_path.rglob("canary"))


def one_line(caught, *names):
    text = str(caught.value)
    assert all(name in text for name in names) and len(text) < 1500
    assert "\n" not in text
    return text


def test_the_folder_that_these_are_made_of_is_good(write):
    folder = write({})
    shape = hf_folder.load_config(hf_folder.resolve(folder))
    hf_folder.load_params(folder, shape)
    assert ChatTokenizer.load(folder).encode("a")[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_config(write, name):
    content, message = CONFIGS[name]
    folder = write({CONFIG: content})
    with pytest.raises(UserError, match=message) as caught:
        hf_folder.load_config(folder)
    one_line(caught, f"{folder}/config.json")


@pytest.mark.parametrize("name", INDEXES)
def test_index(write, name):
    content, message = INDEXES[name]
    folder = write({WEIGHTS: None, INDEX: content})
    with pytest.raises(UserError, match=message) as caught:
        hf_folder.weight_files(folder)
    one_line(caught, str(folder), INDEX)


@pytest.mark.parametrize("name", HEADERS)
def test_header(write, name):
    folder = write({WEIGHTS: HEADERS[name]})
    for read in (hf_folder.weights_digest, hf_folder.stored_dtype):
        with pytest.raises(UserError, match="is damaged or cut short") as caught:
            read(folder)
        one_line(caught, f"{folder}/{WEIGHTS}")


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(write, name):
    folder = write({WEIGHTS: TENSORS[name]})
    for tied in (False, True):
        (folder / CONFIG).write_text(json.dumps(config(tie_word_embeddings=tied)))
        shape = hf_folder.load_config(folder)
        with pytest.raises(UserError, match="the tensors do not fit config.json") as caught:
            hf_folder.load_params(folder, shape)
        assert str(folder) in str(caught.value)


def test_a_tensor_in_two_files_is_refused(write):
    twice = header({"a": tensor([1], 0, 4)}, b"\0" * 4)
    index = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    folder = write({WEIGHTS: None, INDEX: index, "x.safetensors": twice, "y.safetensors": twice})
    with pytest.raises(UserError, match="a is in x.safetensors and in .*y.safetensors"):
        hf_folder.stored_tensors(hf_folder.weight_files(folder)[0])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer(write, name):
    changes, message = TOKENIZERS[name]
    folder = write(changes)
    with pytest.raises((UserError, FileNotFoundError), match=message) as caught:
        ChatTokenizer.load(folder)
    one_line(caught, str(folder))


@pytest.mark.parametrize("name", LINKED)
def test_links_out_of_the_folder_are_not_followed(write, tmp_path, good, name):
    secret = tmp_path / "secret"
    secret.write_bytes(good.get(name, b"secret"))
    folder = write({name: None})
    (folder / name).symlink_to(secret)
    message = f"{folder}/{name} is a link out of its folder, to {secret}"
    for read in (
        hf_folder.resolve,
        hf_save.companions_digest,
        lambda folder: hf_save.copy_companions(folder, tmp_path, None),
        hf_folder.weight_files,
    ):
        with pytest.raises(UserError) as caught:
            read(folder)
        assert message in one_line(caught)


def test_a_linked_folder_of_templates_is_not_followed(write, tmp_path):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "a.jinja").write_text("secret")
    folder = write({})
    (folder / "additional_chat_templates").symlink_to(tmp_path / "secrets")
    with pytest.raises(UserError, match="a.jinja is a link out of its folder"):
        hf_folder.resolve(folder)


def test_links_within_a_folder_and_of_the_hubs_cache_are_followed(write, good, tmp_path):
    folder = write({})
    (folder / "tokenizer.json").rename(folder / "kept")
    (folder / "tokenizer.json").symlink_to("kept")
    assert hf_folder.resolve(folder) == folder
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, (name, content) in enumerate(good.items()):
        (cache / "blobs" / str(number)).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "alias").symlink_to(snapshot)
    for given in (snapshot, tmp_path / "alias"):
        hf_folder.load_params(given, hf_folder.load_config(hf_folder.resolve(given)))
        assert hf_save.companions_digest(given)
    (snapshot / "merges.txt").symlink_to("../../refs")
    (cache / "refs").write_text("secret")
    with pytest.raises(UserError, match="merges.txt is a link out of its folder"):
        hf_folder.resolve(snapshot)


def test_no_pickle_is_read(write):
    folder = write({WEIGHTS: None, "pytorch_model.bin": HEADERS["pickle"]})
    with pytest.raises(UserError, match="pytorch_model.bin are pickles, which are never read"):
        hf_folder.weight_files(folder)


def gguf_file(path, **changes):
    """A GGUF file of a llama without layers that matter, with other values of some keys."""
    writer = gguf_package.GGUFWriter(str(path), "llama")
    values = {
        "llama.block_count": 1,
        "llama.embedding_length": 8,
        "llama.feed_forward_length": 8,
        "llama.attention.head_count": 2,
        "llama.context_length": 64,
        "tokenizer.ggml.bos_token_id": 0,
    } | changes
    for key, value in values.items():
        writer.add_uint32(key, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_types([1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_tensor("token_embd.weight", np.zeros((3, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GGUF_KEYS = {
    "layers": ({"llama.block_count": 10**9}, "num_hidden_layers 1000000000"),
    "no heads": ({"llama.attention.head_count": 0}, "."),
    "width": ({"llama.embedding_length": 2**31}, "hidden_size 2147483648"),
    "token": ({"tokenizer.ggml.bos_token_id": 10**9}, "bos_token_id is 1000000000; accepted: one"),
}


@pytest.mark.parametrize("name", GGUF_KEYS)
def test_gguf_values(tmp_path, name):
    changes, message = GGUF_KEYS[name]
    path = gguf_file(tmp_path / "m.gguf", **changes)
    with pytest.raises(UserError, match=message) as caught:
        gguf.convert(path, tmp_path)
    one_line(caught, f"{path}: ")
    assert os.listdir(tmp_path) == ["m.gguf"]


@pytest.mark.parametrize("kind", ["empty", "magic", "counts", "half", "lengths"])
def test_gguf_damage(tmp_path, kind):
    path = gguf_file(tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    match kind:
        case "empty":
            content = bytearray()
        case "magic":
            content[:4] = b"EVIL"
        case "counts":
            content[8:24] = b"\xff" * 16
        case "half":
            content = content[: len(content) // 2]
        case "lengths":
            content[24:32] = struct.pack("<Q", 2**60)
    path.write_bytes(content)
    with pytest.raises(UserError, match="m.gguf: ."):
        gguf.convert(path, tmp_path)


def test_an_export_has_no_file_that_a_marker_names_elsewhere(tmp_path):
    for files in (["a"], 7):
        (tmp_path / "attnpo_export.json").write_text(json.dumps({"files": files, "origin": 1}))
        assert hf_save.read_origin(pathlib.Path(tmp_path)) is None


def test_weights_that_only_look_like_a_file_are_named(write):
    folder = write({WEIGHTS: safetensors.numpy.save({"a": np.zeros(3, np.int32)})})
    with pytest.raises(UserError, match="no weights of a floating dtype"):
        hf_folder.stored_dtype(folder)
