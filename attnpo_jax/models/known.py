"""The shapes of well-known models, so that a run can be planned before anything is downloaded.

Each entry holds what the shape depends on of the model's public config.json, under its own names.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub

from attnpo_jax.models import checkpoints, embedded
from attnpo_jax.models.config import ModelConfig

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

KNOWN: dict[str, Mapping[str, Any]] = {
    embedded.ALIAS: {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
    },
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_3_8B,
    "princeton-nlp/Llama-3-Base-8B-SFT": _LLAMA_3_8B,
}
"""config.json by `model.source`."""


def shape_of(source: str | os.PathLike) -> ModelConfig:
    """A model's shape, from as little as will do: no weights are read or downloaded.

    Args:
      source: `model.source` of a config: a local folder, whose config.json is read; a model that
        is known here; or another hub id, of which config.json alone is downloaded.

    Raises:
      CheckpointError: it is none of these, or its config.json can't be had or used.
    """
    text = os.fspath(source)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return checkpoints.load_config(folder)
    if text in KNOWN:
        return ModelConfig.from_hf(KNOWN[text])
    try:
        file = huggingface_hub.hf_hub_download(text, "config.json")
    except Exception as error:
        raise checkpoints.CheckpointError(
            f"model.source {text!r} is no local folder, and its config.json could not be "
            f"downloaded from the hub ({error}). Accepted without the hub: a folder with a "
            f"config.json, {', '.join(KNOWN)}"
        ) from error
    return checkpoints.load_config(Path(file).parent)
