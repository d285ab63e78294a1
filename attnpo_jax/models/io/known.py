"""The shapes of well-known models, so that a run can be planned before anything is downloaded.

Each entry holds what the shape depends on of the model's public config.json, under its own names.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub

from attnpo_jax.models.config import ModelConfig
from attnpo_jax.models.io import embedded, hf_config, hf_folder

_LLAMA_3_8B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA_32_1B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": _LLAMA3_ROPE,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
_MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
}
_SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}

_SMOLLM2_135M = {
    **_SMOLLM2,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}

KNOWN: dict[str, Mapping[str, Any]] = {
    embedded.ALIAS: _SMOLLM2_135M,
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_3_8B,
    "princeton-nlp/Llama-3-Base-8B-SFT": _LLAMA_3_8B,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-360M-Instruct": {
        **_SMOLLM2,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": {
        **_SMOLLM2,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rope_theta": 130_000.0,
    },
    "meta-llama/Llama-3.2-1B": _LLAMA_32_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_32_1B,
    "alignment-handbook/zephyr-7b-sft-full": {
        **_MISTRAL_7B,
        "rope_theta": 10_000.0,
        "sliding_window": 4096,
    },
    "mistralai/Mistral-7B-Instruct-v0.2": {
        **_MISTRAL_7B,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
    },
    "Qwen/Qwen3-4B": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    # What its text part leaves out is as transformers has it for the type: 8 heads of 256, 4 of
    # them for keys and values, every sixth layer global.
    "google/gemma-3-4b-it": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "num_hidden_layers": 34,
            "sliding_window": 1024,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    },
}
"""config.json by `model.source`."""


def shape_of(source: str | os.PathLike) -> ModelConfig:
    """A model's shape, from as little as will do: no weights are read or downloaded.

    Args:
      source: `model.source` of a config: a local folder, whose config.json is read; a model that
        is known here; or another hub id, of which config.json alone is downloaded.
    """
    text = os.fspath(source)
    folder = Path(text).expanduser()
    if folder.is_dir():
        hf_folder.check_links(folder)
        return hf_folder.load_config(folder)
    if text in KNOWN:
        return hf_config.read(KNOWN[text])
    try:
        file = huggingface_hub.hf_hub_download(text, "config.json")
    except Exception as error:
        raise hf_folder.FolderError(
            f"model.source {text!r} is no local folder, and its config.json could not be "
            f"downloaded from the hub ({error}). Accepted without the hub: a folder with a "
            f"config.json, {', '.join(KNOWN)}"
        ) from error
    return hf_folder.load_config(Path(file).parent)
