"""Model shapes read from config.json files as they are published, and what is refused."""

import pytest

from attnpo_jax.models.config import LinearRopeScaling, RopeScaling
from attnpo_jax.models.io import hf_config

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def read(model_type, **fields):
    return hf_config.read({"model_type": model_type, **SHAPE, **fields})


def test_mistral_has_a_window_unless_its_file_says_null():
    # As Mistral-7B-v0.1 and v0.3 are published.
    first = read("mistral", sliding_window=4096, rope_theta=10000.0, rms_norm_eps=1e-05)
    assert first.layer_windows == (4096,) * 6 and first.rms_norm_eps == 1e-5
    later = read("mistral", sliding_window=None, rope_theta=1000000.0)
    assert later.layer_windows is None and later.rope_theta == 1e6
    assert read("mistral").layer_windows == (4096,) * 6  # the default of transformers


def test_qwen2_slides_from_max_window_layers_on_and_only_if_it_is_told_to():
    fields = {"sliding_window": 32768, "max_window_layers": 4}
    assert read("qwen2", use_sliding_window=False, **fields).layer_windows is None
    sliding = read("qwen2", use_sliding_window=True, **fields)
    assert sliding.layer_windows == (None,) * 4 + (32768,) * 2
    assert read("qwen2", **fields | {"max_window_layers": None}).layer_windows is None
    assert read("qwen2", use_sliding_window=True, **fields | {"max_window_layers": 0}).layer_windows
    assert sliding.qkv_bias and not sliding.attention_bias and sliding.qk_norm is None
    # Files of version 5 list the layers.
    types = ["full_attention", "sliding_attention"] * 3
    listed = read("qwen2", use_sliding_window=True, layer_types=types, **fields)
    assert listed.layer_windows == (None, 32768) * 3


def test_qwen3_has_head_norms_and_heads_of_128():
    config = read("qwen3", rope_theta=1000000, attention_bias=False)
    assert (config.qk_norm, config.head_dim, config.qkv_bias) == ("head", 128, False)
    assert config.layer_windows is None


def test_gemma2_takes_what_its_file_leaves_out_from_transformers():
    config = read("gemma2", hidden_act="gelu_pytorch_tanh", hidden_activation=None)
    assert config.layer_windows == (4096, None) * 3
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert config.tie_word_embeddings and config.head_dim == 256
    assert config.embedding_scale == 8.0 and config.query_pre_attn_scalar == 256.0
    assert config.pre_norms and config.post_norms and config.norm_style == "gemma"
    uncapped = read("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert uncapped.attn_logit_softcapping is None and uncapped.final_logit_softcapping is None


def test_gemma3_is_read_from_a_text_part_that_leaves_out_its_defaults():
    # The text part of Gemma-3-4B-it as it is published.
    config = hf_config.read(
        {
            "model_type": "gemma3",
            "vision_config": {"hidden_size": 1152},
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
        }
    )
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (262_208, 2560, 34)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.rope_theta == 1e6 and config.local_rope_theta == 1e4
    assert config.rope_scaling == LinearRopeScaling(8.0)
    global_layers = [i for i, window in enumerate(config.layer_windows) if window is None]
    assert global_layers == [5, 11, 17, 23, 29]
    assert set(config.layer_windows) == {None, 1024}
    assert config.tie_word_embeddings and config.qk_norm == "head"
    assert config.attn_logit_softcapping is None and config.final_logit_softcapping is None


def test_gemma3_rope_is_the_same_in_both_layouts():
    old = read("gemma3_text", rope_theta=5e5, rope_local_base_freq=2e4,
               rope_scaling={"rope_type": "linear", "factor": 2.0}, sliding_window=512)  # fmt: skip
    new = read(
        "gemma3_text",
        sliding_window=512,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    )
    assert old == new and new.local_rope_theta == 2e4


def test_phi3_olmo2_and_smollm3():
    phi = read("phi3", sliding_window=2047, rope_scaling=None)
    assert phi.layer_windows == (2047,) * 6 and phi.rms_norm_eps == 1e-5
    olmo = read("olmo2", rope_theta=500000)
    assert (olmo.qk_norm, olmo.pre_norms, olmo.post_norms) == ("projection", False, True)
    smol = read("smollm3", no_rope_layers=[1, 1, 1, 0, 1, 1], sliding_window=None)
    assert smol.nope_layers == (3,) and smol.layer_windows is None
    assert smol.rope_theta == 2e6 and smol.tie_word_embeddings
    assert read("smollm3", no_rope_layer_interval=2).nope_layers == (1, 3, 5)


def test_llama_scaling_from_either_layout():
    stretch = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192, "rope_type": "llama3"}  # fmt: skip
    old = read("llama", rope_theta=500000.0, rope_scaling=stretch)
    new = read("llama", rope_parameters={**stretch, "rope_theta": 500000.0})
    assert old == new and old.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("gpt_neox", {}, "model_type 'gpt_neox' is not supported; supported: gemma2, .*smollm3"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor 0.75"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope type 'linear' lacks factor"),
        ("llama", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "rope_parameters .*all layers"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
        ("gemma2", {"sliding_window": None}, "sliding_window None"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear",
         "factor": 2.0}}}, "rope_parameters for sliding_attention"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 6}, "layer_types .*chunked"),
        ("mistral", {"layer_types": ["full_attention"] * 6}, "layer_types .*mistral"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers"),
        ("llama", {"num_attention_heads": "8"}, "num_attention_heads '8' .*a whole number above 0"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads 0 "),
        ("llama", {"num_attention_heads": None}, "lacks num_attention_heads"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers True "),
        ("llama", {"vocab_size": 1e3}, "vocab_size 1000.0 "),
        ("llama", {"max_position_embeddings": None}, "max_position_embeddings None "),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps '1e-5' .*a number above 0"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps None "),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings 'false' .*true or false"),
        ("llama", {"hidden_size": 50}, "hidden_size 50 .*multiple of num_attention_heads"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling 'linear' .*an object"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor of rope type"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": -2.0}}, "factor .* -2.0 "),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor .* '2' "),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_"),
        ("llama", {"rope_theta": "1e4"}, "rope_theta '1e4' "),
        ("llama", {"rope_parameters": {"rope_theta": 0}}, "rope_theta 0 "),
        ("gemma2", {"sliding_window": True}, "sliding_window True"),
        ("gemma2", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar None"),
        ("gemma2", {"final_logit_softcapping": "30"}, "final_logit_softcapping '30'"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern 0"),
        ("qwen2", {"max_window_layers": "4"}, "max_window_layers '4'"),
        ("qwen3", {"layer_types": "full_attention"}, "layer_types 'full_attention' .*a list"),
        ("qwen3", {"layer_types": [{}] * 6}, "layer_types "),
        ("smollm3", {"no_rope_layers": 4}, "no_rope_layers 4 .*a list"),
    ],
)  # fmt: skip
def test_what_the_decoder_lacks_is_refused_by_name(model_type, fields, message):
    with pytest.raises(ValueError, match=message):
        read(model_type, **fields)


def test_a_model_with_eyes_needs_its_text_part():
    with pytest.raises(ValueError, match="lacks text_config"):
        hf_config.read({"model_type": "gemma3", "vision_config": {}})
    text = {**SHAPE, "final_logit_softcapping": 30.0}
    with pytest.raises(ValueError, match="final_logit_softcapping 30.0 .*null, for gemma3"):
        hf_config.read({"model_type": "gemma3", "text_config": text})
