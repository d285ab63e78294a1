"""Read a Llama-architecture GGUF file and write it as an ordinary Hugging Face folder.

Quantized tensors are dequantized to float32 with the `gguf` package; the tokenizer, the chat
template and the configuration are rebuilt from the file's metadata. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from attnpo_jax.models.decoder import abstract_params
from attnpo_jax.models.io import hf_config
from attnpo_jax.models.io.tensors import parts, table
from attnpo_jax.runtime.errors import UserError

_REQUIRED = object()


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """GPT-2's byte-level split, for both names that are known here.

    "smollm" stands for splitting off every digit first. Its vocabulary has no token of two digits,
    nor one of a space and a digit, so that step would change nothing but white space of several
    characters before a digit; the method's published figures on this model were made without it.
    """
    if name in ("gpt-2", "smollm"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    raise ValueError(
        f"tokenizer.ggml.pre is {name!r}; supported pre-tokenizers are 'gpt-2' and 'smollm'"
    )


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of the rows of a query or key projection.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head, Hugging Face rotates rows i and
    i + H/2; llama.cpp's converter therefore interleaves the two halves of every head. This puts
    them back.

    Args:
      weight: (num_heads * H, ...) rows as stored in the GGUF file.
      num_heads: heads of this projection (KV heads for the key projection).

    Returns:
      An array of the same shape, rows in Hugging Face order.
    """
    rows = weight.shape[0]
    if rows % (2 * num_heads):
        raise ValueError(f"{rows} rows cannot be cut into {num_heads} heads of even width")
    paired = weight.reshape(num_heads, rows // num_heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(weight.shape)


class _Metadata:
    """The key-value section of a GGUF file, with errors that name the key."""

    def __init__(self, reader: gguf.GGUFReader):
        self._fields = reader.fields

    def get(self, key: str, default=_REQUIRED):
        field = self._fields.get(key)
        if field is not None:
            return field.contents()
        if default is _REQUIRED:
            raise ValueError(f"the metadata has no {key!r}")
        return default

    def get_float(self, key: str) -> float:
        # GGUF stores float32; its shortest decimal form is the number that was meant (1e-5).
        return float(str(np.float32(self.get(key))))


def read_config(metadata: _Metadata, *, tied: bool) -> dict:
    """The Hugging Face config.json content for a Llama-architecture GGUF file's metadata."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"general.architecture is {architecture!r}; only 'llama' is supported")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"llama.rope.scaling.type is {scaling!r}; only 'none' is supported")
    num_heads = metadata.get("llama.attention.head_count")
    hidden_size = metadata.get("llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata.get("tokenizer.ggml.tokens")),
        "hidden_size": hidden_size,
        "intermediate_size": metadata.get("llama.feed_forward_length"),
        "num_hidden_layers": metadata.get("llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", num_heads),
        "head_dim": metadata.get("llama.attention.key_length", hidden_size // num_heads),
        "hidden_act": "silu",
        "max_position_embeddings": metadata.get("llama.context_length"),
        "rms_norm_eps": metadata.get_float("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.get_float("llama.rope.freq_base"),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id", None),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id", None),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id", None),
        "torch_dtype": "float32",
    }


def build_tokenizer(metadata: _Metadata) -> tuple[Tokenizer, dict]:
    """Rebuild the byte-level BPE tokenizer of a GGUF file.

    Returns:
      The tokenizer (its offsets cover the space in front of a word) and the content of
      tokenizer_config.json, chat template included when the file carries one.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(
            f"tokenizer.ggml.model is {kind!r}; only byte-level BPE ('gpt2') is supported"
        )
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        raise ValueError("tokenizer.ggml.add_bos_token is true; only false is supported")
    tokens = metadata.get("tokenizer.ggml.tokens")
    # Pieces are written in the byte alphabet, which has no space: one space separates the two.
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(metadata.get("tokenizer.ggml.pre"))
    tokenizer.decoder = decoders.ByteLevel()

    added = []
    for token, kind in zip(tokens, metadata.get("tokenizer.ggml.token_type"), strict=True):
        if kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
            special = kind == gguf.TokenType.CONTROL
            added.append(AddedToken(token, special=special, normalized=False))
    tokenizer.add_tokens(added)

    # GPT2Tokenizer would rebuild the pre-tokenizer by its own rules; this class takes
    # tokenizer.json as it is.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get("llama.context_length"),
    }
    for name, key in (
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
    ):
        index = metadata.get(f"tokenizer.ggml.{key}", None)
        if index is not None:
            if not 0 <= index < len(tokens):
                raise ValueError(
                    f"tokenizer.ggml.{key} is {index}; accepted: one of {len(tokens)} tokens"
                )
            config[name] = tokens[index]
    template = metadata.get("tokenizer.chat_template", None)
    if template is not None:
        config["chat_template"] = template
    return tokenizer, config


def _hf_names(config: Mapping[str, object]) -> dict[str, str]:
    """GGUF's names of a model's tensors -> Hugging Face's."""
    model = hf_config.read(config)
    of_gguf = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.num_layers)
    shapes = flatten_dict(abstract_params(model), sep="/")
    names = [part.name for part in parts(table(model), shapes)]
    return {of_gguf.get_name(name, try_suffixes=(".weight",)): name for name in names}


def read_tensors(reader: gguf.GGUFReader, config: Mapping[str, object]) -> dict[str, np.ndarray]:
    """Every tensor of the file under its Hugging Face name, float32, in Hugging Face row order."""
    if (layers := config["num_hidden_layers"]) > len(reader.tensors):
        raise ValueError(
            f"num_hidden_layers {layers}, but the file has {len(reader.tensors)} tensors"
        )
    tensors, unknown, names = {}, [], _hf_names(config)
    for tensor in reader.tensors:
        name = names.get(tensor.name)
        if name is None:
            unknown.append(tensor.name)
            continue
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith("q_proj.weight"):
            value = unpermute(value, config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            value = unpermute(value, config["num_key_value_heads"])
        tensors[name] = np.ascontiguousarray(value, dtype=np.float32)
    if unknown:
        raise ValueError(f"no Hugging Face name is known for the tensors {unknown[:20]}")
    return tensors


class _Reader(gguf.GGUFReader):
    """Ends where the file does: past that, gguf reads on and on, as many items as a length says."""

    def _get(self, offset, dtype, count=1, override_order=None):
        stop = int(offset) + np.dtype(dtype).itemsize * int(count)
        if stop > len(self.data):
            raise ValueError(f"what begins at byte {offset} would end at {stop}, beyond the file")
        return super()._get(offset, dtype, count, override_order)


def convert(path: str | Path, folder: str | Path) -> None:
    """Write a Llama-architecture GGUF file as a Hugging Face folder with float32 weights.

    Writes config.json, generation_config.json, tokenizer.json, tokenizer_config.json (with the chat
    template) and model.safetensors into `folder`, which must exist.
    """
    path, folder = Path(path), Path(folder)
    try:
        reader = _Reader(path)
        metadata = _Metadata(reader)
        tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
        config = read_config(metadata, tied=tied)
        tokenizer, tokenizer_config = build_tokenizer(metadata)
        tensors = read_tensors(reader, config)
    except Exception as error:  # whatever gguf and tokenizers meet in a file like no other
        raise UserError(f"{path}: {error}") from error
    weights = folder / "model.safetensors"
    safetensors.numpy.save_file(
        tensors,
        weights,
        # transformers refuses safetensors files that do not say which framework laid them out.
        metadata={"format": "pt"},
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config),
    ):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    # The safetensors writer makes private files; the weights are as readable as the rest.
    shutil.copymode(folder / "config.json", weights)
