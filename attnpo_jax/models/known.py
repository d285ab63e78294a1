"""The `config.json` of public models that the ready configs name: what decides their shape.

For asking what a run would take before a model has been downloaded. Once it is there, its own
`config.json` counts.
"""

from typing import Any

from attnpo_jax.models.config import ModelConfig

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

KNOWN: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        **_SMOLLM2,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
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
"""Hub id -> the fields of its `config.json` that `ModelConfig.from_hf` reads."""


def known_config(source: str) -> ModelConfig:
    """The shape of a public model, without its files.

    Args:
      source: a hub id.

    Raises:
      KeyError: the table lacks it; the message lists those it has.

    >>> known_config("Qwen/Qwen3-4B").num_layers
    36
    """
    if source not in KNOWN:
        raise KeyError(f"{source!r} is not in the table of known shapes: {', '.join(KNOWN)}")
    return ModelConfig.from_hf(KNOWN[source])
