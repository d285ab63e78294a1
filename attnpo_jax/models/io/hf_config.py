"""The shape of a decoder from a Hugging Face `config.json`, and what model types differ in."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from attnpo_jax.models.config import LinearRopeScaling, ModelConfig, RopeScaling

_GEMMAS = ("gemma2", "gemma3", "gemma3_text")
_GEMMA = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA3 = {
    **_GEMMA,
    # Files on the hub leave out of their text part whatever is as it is here.
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 131_072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}

# The model types, with defaults of transformers for fields that a file may leave out, where they
# differ from Llama's.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
    "phi3": {"rms_norm_eps": 1e-5},
    "olmo2": {"rms_norm_eps": 1e-5},
    "smollm3": {
        "num_key_value_heads": 4,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
    },
}

# Fields by what they must hold.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_WHOLE_NUMBERS = (
    *_REQUIRED,
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "max_window_layers",
    "sliding_window_pattern",
    "no_rope_layer_interval",
)
# No model has more: what is larger would take all memory, or all time, before it is refused.
_MOST = {
    "vocab_size": 1 << 26,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 16,
}
_MOST_POSITIONS = 1 << 40
_NUMBERS = (
    "rms_norm_eps",
    "rope_theta",
    "rope_local_base_freq",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
_FLAGS = (
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "use_sliding_window",
    "use_bidirectional_attention",
)
_NULL_IS_ABSENT = ("max_window_layers", "sliding_window_pattern", "no_rope_layer_interval")
_MAY_BE_NULL = (
    *_FLAGS,
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
    "rope_local_base_freq",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)


def read(config: Mapping[str, Any]) -> ModelConfig:
    """Reads a parsed `config.json`; of a `gemma3` model, its text part.

    A field that is absent has the value that transformers gives it for the model type.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        raise ValueError(
            f"config.json: model_type {_short(model_type)} is not supported; "
            f"supported: {', '.join(sorted(_DEFAULTS))}"
        )
    if config.get("quantization_config") is not None:
        raise _refusal("quantization_config", config["quantization_config"], "null")
    if model_type == "gemma3":
        config = _text_part(config)
    given = {k: v for k, v in config.items() if v is not None or k not in _NULL_IS_ABSENT}
    config = {**_DEFAULTS[model_type], **given}
    missing = [name for name in _REQUIRED if config.get(name) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    _check_values(config)
    _refuse_unsupported(config, model_type)
    num_heads = config["num_attention_heads"]
    return ModelConfig(
        model_type=model_type,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        activation="gelu_pytorch_tanh" if model_type in _GEMMAS else "silu",
        layer_windows=_layer_windows(config, model_type),
        **_rope(config, model_type),
        **_details(config, model_type),
    )


def _refusal(field: str, found: Any, accepted: str) -> ValueError:
    return ValueError(
        f"config.json: {field} {_short(found)} is not supported; supported: {accepted}"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _check_values(config: Mapping[str, Any]) -> None:
    """Refuses fields of the wrong kind: they would mean something else, or fail later."""
    for field, value in config.items():
        if value is None and field in _MAY_BE_NULL:
            continue
        if field in _WHOLE_NUMBERS and not (isinstance(value, int) and _is_positive(value)):
            # Layers with a window may begin with the first.
            if field != "max_window_layers" or value != 0 or isinstance(value, bool):
                raise _refusal(field, value, "a whole number above 0")
        if field in _WHOLE_NUMBERS and value > (most := _MOST.get(field, _MOST_POSITIONS)):
            raise _refusal(field, value, f"up to {most}")
        if field in _NUMBERS and not _is_positive(value):
            raise _refusal(field, value, "a number above 0")
        if field in _FLAGS and not isinstance(value, bool):
            raise _refusal(field, value, "true or false")
        if field in ("rope_parameters", "rope_scaling"):
            if value is not None and not isinstance(value, Mapping):
                raise _refusal(field, value, "an object")
        if field in ("layer_types", "no_rope_layers") and not isinstance(value, list | None):
            raise _refusal(field, value, "a list with an entry for each layer")
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise _refusal(
            "hidden_size", hidden_size, f"a multiple of num_attention_heads ({num_heads})"
        )


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf


def _text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `text_config` of a model that also sees images, with what the outer level decides."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError("config.json lacks text_config")
    return {**text, "tie_word_embeddings": config.get("tie_word_embeddings", True)}


def _refuse_unsupported(config: Mapping[str, Any], model_type: str) -> None:
    if model_type in _GEMMAS:
        field, accepted = "hidden_activation", ("gelu_pytorch_tanh",)
    else:
        field, accepted = "hidden_act", ("silu", "swish")
    if (config.get(field) or accepted[0]) not in accepted:
        raise _refusal(field, config[field], repr(accepted[0]))
    if config.get("use_bidirectional_attention"):
        raise _refusal("use_bidirectional_attention", True, "false")
    # transformers has these fields for Gemma 3 too, but its model does not apply them.
    unread = {"gemma3_text": ("attn",), "gemma3": ("attn", "final")}.get(model_type, ())
    for field in (f"{name}_logit_softcapping" for name in unread):
        if config.get(field) is not None:
            raise _refusal(field, config[field], f"null, for {model_type}")


def _details(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The fields of `ModelConfig` that only some model types have."""
    details: dict[str, Any] = {}
    if model_type not in ("mistral", "phi3", "qwen2"):
        details["attention_bias"] = bool(config.get("attention_bias", False))
    if model_type in ("llama", "smollm3"):
        details["mlp_bias"] = bool(config.get("mlp_bias", False))
    if model_type == "qwen2":
        details["qkv_bias"] = True
    if model_type in ("qwen3", "gemma3", "gemma3_text"):
        details["qk_norm"] = "head"
    if model_type == "olmo2":
        details |= {
            "qk_norm": "projection",
            "norm_style": "olmo2",
            "pre_norms": False,
            "post_norms": True,
        }
    if model_type in _GEMMAS:
        details |= {
            "norm_style": "gemma",
            "post_norms": True,
            "embedding_scale": config["hidden_size"] ** 0.5,
            "query_pre_attn_scalar": float(config["query_pre_attn_scalar"]),
        }
        for field in ("attn_logit_softcapping", "final_logit_softcapping"):
            if config.get(field) is not None:
                details[field] = float(config[field])
    if model_type == "smollm3":
        details["nope_layers"] = _nope_layers(config)
    return details


def _nope_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """SmolLM3's layers without rotary positions: listed as 0, or every so many."""
    n, interval = config["num_hidden_layers"], config["no_rope_layer_interval"]
    listed = config.get("no_rope_layers")
    rotates = [(i + 1) % interval for i in range(n)] if listed is None else listed
    if len(rotates) < n:
        raise _refusal("no_rope_layers", rotates, f"one entry for each of the {n} layers")
    return tuple(i for i in range(n) if not rotates[i])


def _layer_windows(config: Mapping[str, Any], model_type: str) -> tuple[int | None, ...] | None:
    """For each layer its sliding window or None, as `ModelConfig.layer_windows` has it."""
    n, window = config["num_hidden_layers"], config.get("sliding_window")
    if model_type in ("qwen2", "qwen3", "smollm3") and not config.get("use_sliding_window"):
        window = None
    if model_type in ("llama", "olmo2"):
        window = None
    local = [window is not None] * n
    if model_type in ("qwen2", "qwen3"):
        local = [window is not None and i >= config["max_window_layers"] for i in range(n)]
    elif model_type == "smollm3":
        local = [window is not None and i in _nope_layers(config) for i in range(n)]
    elif model_type in _GEMMAS:
        pattern = 2 if model_type == "gemma2" else config.get("sliding_window_pattern", 6)
        local = [(i + 1) % pattern != 0 for i in range(n)]
    types = config.get("layer_types")
    if types is not None:
        accepted = f"'full_attention' or 'sliding_attention' for each of the {n} layers"
        if len(types) != n or any(k not in ("full_attention", "sliding_attention") for k in types):
            raise _refusal("layer_types", types, accepted)
        listed = [kind == "sliding_attention" for kind in types]
        if model_type in ("llama", "mistral", "olmo2", "phi3") and listed != local:
            raise _refusal("layer_types", types, f"one type for all layers of a {model_type} model")
        local = listed
    if not any(local):
        return None
    if not isinstance(window, int) or not _is_positive(window):
        raise _refusal("sliding_window", window, "a positive number where layers slide")
    return tuple(window if slides else None for slides in local)


def _rope(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Rotary bases and scaling, from either of the two layouts that transformers has written.

    Version 5 puts both into `rope_parameters`, by layer type for Gemma 3; earlier files have
    `rope_theta`, `rope_scaling` and, for Gemma 3, `rope_local_base_freq`.
    """
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    by_layer_type = any(isinstance(value, Mapping) for value in parameters.values())
    if model_type not in ("gemma3", "gemma3_text"):
        if by_layer_type:
            raise _refusal("rope_parameters", parameters, "the same for all layers")
        theta, scaling = _theta_and_scaling(config, parameters, config.get("rope_theta"))
        return {"rope_theta": theta, "rope_scaling": scaling}
    local: Mapping[str, Any] = {}
    if by_layer_type:
        local = parameters.get("sliding_attention") or {}
        parameters = parameters.get("full_attention") or {}
        for kind in (local, parameters):
            if not isinstance(kind, Mapping):
                raise _refusal("rope_parameters", kind, "an object for each type of layer")
    theta, scaling = _theta_and_scaling(config, parameters, config["rope_theta"])
    local_theta, scaled = _theta_and_scaling(config, local, config["rope_local_base_freq"])
    if scaled is not None:
        raise _refusal("rope_parameters for sliding_attention", local, "rope_type 'default'")
    return {"rope_theta": theta, "rope_scaling": scaling, "local_rope_theta": local_theta}


def _theta_and_scaling(
    config: Mapping[str, Any], parameters: Mapping[str, Any], default_theta: float | None
) -> tuple[float, RopeScaling | LinearRopeScaling | None]:
    theta = parameters.get("rope_theta")
    if theta is not None and not _is_positive(theta):
        raise _refusal("rope_theta", theta, "a number above 0")
    theta = float(theta or default_theta or 10_000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    share = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if share != 1.0:
        raise _refusal("partial_rotary_factor", share, "1.0")
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise ValueError(
            f"config.json: rope type {kind!r} is not supported; "
            "supported: 'default', 'linear', 'llama3'"
        )
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    needed = ["factor"] if kind == "linear" else names
    missing = [name for name in needed if parameters.get(name) is None]
    if missing:
        raise ValueError(f"config.json: rope type {kind!r} lacks {', '.join(missing)}")
    for name in needed:
        if not _is_positive(parameters[name]) or parameters[name] > _MOST_POSITIONS:
            raise _refusal(f"{name} of rope type {kind!r}", parameters[name], "a number above 0")
    if kind == "linear":
        return theta, LinearRopeScaling(float(parameters["factor"]))
    return theta, RopeScaling(
        factor=float(parameters["factor"]),
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_max_position_embeddings=int(parameters["original_max_position_embeddings"]),
    )
