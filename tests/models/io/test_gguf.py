"""GGUF conversion: row order, dequantization, tokenizer and configuration, on tiny files."""

import json
import types

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from attnpo_jax.models.io import gguf as reader

LAYERS, WIDTH, HEADS, KV_HEADS, FFN = 2, 64, 4, 2, 96
HEAD = WIDTH // HEADS
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "Ċ Ċ"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), "Ġt", "he", "Ġthe", "ĊĊ"]


def llama_cpp_order(weight, num_heads):
    """Rows as llama.cpp stores them: row 2i of a head is HF's row i, row 2i + 1 is HF's i + H/2."""
    head = weight.shape[0] // num_heads
    rows = []
    for first in range(0, weight.shape[0], head):
        for i in range(head // 2):
            rows += [first + i, first + head // 2 + i]
    return weight[rows]


def hf_weights(rng):
    """Random weights under Hugging Face names, with the GGUF name of each."""
    shapes = {
        "attn_norm": ("input_layernorm", (WIDTH,)),
        "attn_q": ("self_attn.q_proj", (WIDTH, WIDTH)),
        "attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD, WIDTH)),
        "attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD, WIDTH)),
        "attn_output": ("self_attn.o_proj", (WIDTH, WIDTH)),
        "ffn_norm": ("post_attention_layernorm", (WIDTH,)),
        "ffn_gate": ("mlp.gate_proj", (FFN, WIDTH)),
        "ffn_up": ("mlp.up_proj", (FFN, WIDTH)),
        "ffn_down": ("mlp.down_proj", (WIDTH, FFN)),
    }
    named = {
        "token_embd.weight": ("model.embed_tokens.weight", (len(TOKENS), WIDTH)),
        "output_norm.weight": ("model.norm.weight", (WIDTH,)),
    }
    for layer in range(LAYERS):
        for ours, (theirs, shape) in shapes.items():
            named[f"blk.{layer}.{ours}.weight"] = (f"model.layers.{layer}.{theirs}.weight", shape)
    return {
        ours: (theirs, rng.standard_normal(shape).astype(np.float32))
        for ours, (theirs, shape) in named.items()
    }


def write_gguf(path, weights, *, pre="smollm", skip=(), extra=None, quantize=()):
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    if "rms_eps" not in skip:
        writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    kinds = [gguf.TokenType.CONTROL] * len(SPECIAL)
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, (_, value) in weights.items():
        if "attn_q" in name:
            value = llama_cpp_order(value, HEADS)
        elif "attn_k" in name:
            value = llama_cpp_order(value, KV_HEADS)
        kind = gguf.GGMLQuantizationType.Q4_1 if name in quantize else None
        if kind is not None:
            value = gguf.quants.quantize(value, kind)
        writer.add_tensor(name, value, raw_dtype=kind)
    if extra is not None:
        writer.add_tensor(extra, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_unpermute_gives_back_the_order_of_rows_by_hand():
    # Two heads of width 4: HF rows 0 1 2 3 | 4 5 6 7 are stored as 0 2 1 3 | 4 6 5 7.
    stored = np.array([0, 2, 1, 3, 4, 6, 5, 7], np.float32)[:, None]
    np.testing.assert_array_equal(reader.unpermute(stored, 2)[:, 0], np.arange(8))


def test_unpermute_refuses_rows_that_do_not_fit_the_heads():
    with pytest.raises(ValueError, match="6 rows cannot be cut into 2 heads"):
        reader.unpermute(np.zeros((6, 2)), 2)


def test_convert_writes_every_tensor_bit_for_bit(tmp_path):
    weights = hf_weights(np.random.default_rng(0))
    write_gguf(tmp_path / "tiny.gguf", weights)
    reader.convert(tmp_path / "tiny.gguf", tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == {name for name, _ in weights.values()}
    for name, value in weights.values():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 100000.0
    assert (config["num_key_value_heads"], config["head_dim"]) == (KV_HEADS, HEAD)
    assert config["vocab_size"] == len(TOKENS)


def test_convert_keeps_an_untied_head(tmp_path):
    weights = hf_weights(np.random.default_rng(0))
    head = np.ones((len(TOKENS), WIDTH), np.float32)
    write_gguf(tmp_path / "t.gguf", {**weights, "output.weight": ("lm_head.weight", head)})
    reader.convert(tmp_path / "t.gguf", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["lm_head.weight"], head)


def test_quantized_query_comes_back_within_half_a_step_in_hf_order(tmp_path):
    weights = hf_weights(np.random.default_rng(1))
    write_gguf(tmp_path / "q.gguf", weights, quantize=["blk.1.attn_q.weight"])
    reader.convert(tmp_path / "q.gguf", tmp_path)
    name, value = weights["blk.1.attn_q.weight"]
    found = load_file(tmp_path / "model.safetensors")[name]
    # Q4_1: 32 values share a minimum and a step of (max - min) / 15, stored as float16.
    blocks = value.reshape(-1, 32)
    step = ((blocks.max(1) - blocks.min(1)) / 15).max()
    assert 0 < np.abs(found - value).max() <= 0.55 * step


def test_tokenizer_merges_and_covers_spaces(tmp_path):
    write_gguf(tmp_path / "t.gguf", hf_weights(np.random.default_rng(0)))
    reader.convert(tmp_path / "t.gguf", tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    encoding = tokenizer.encode("a the12<|im_end|>", add_special_tokens=False)
    assert encoding.tokens == ["a", "Ġthe", "1", "2", "<|im_end|>"]
    assert encoding.offsets == [(0, 1), (1, 5), (5, 6), (6, 7), (7, 17)]
    assert encoding.ids[-1] == 2
    assert tokenizer.decode(encoding.ids, skip_special_tokens=True) == "a the12"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == TEMPLATE
    assert config["pad_token"] == "<|im_end|>" and config["unk_token"] == "<|endoftext|>"


@pytest.mark.parametrize("pre", ["gpt-2", "smollm"])
def test_white_space_before_a_digit_is_split_as_gpt2_does(tmp_path, pre):
    write_gguf(tmp_path / "t.gguf", hf_weights(np.random.default_rng(0)), pre=pre)
    reader.convert(tmp_path / "t.gguf", tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    # GPT-2's pattern leaves the last white space of a run to what follows, so that the pair is cut.
    assert tokenizer.encode("a\n\n1").tokens == ["a", "Ċ", "Ċ", "1"]
    assert tokenizer.encode("a\n\n").tokens == ["a", "ĊĊ"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe'; supported .* 'smollm'"),
        ({"skip": ["rms_eps"]}, "no 'llama.attention.layer_norm_rms_epsilon'"),
        ({"extra": "rope_freqs.weight"}, r"\['rope_freqs.weight'\]"),
    ],
)
def test_what_is_not_known_is_named_with_the_file(tmp_path, arguments, message):
    write_gguf(tmp_path / "odd.gguf", hf_weights(np.random.default_rng(0)), **arguments)
    with pytest.raises(ValueError, match=message) as raised:
        reader.convert(tmp_path / "odd.gguf", tmp_path)
    assert "odd.gguf" in str(raised.value)
    assert not (tmp_path / "model.safetensors").exists()


def test_layers_that_the_file_has_no_tensors_for_are_refused_at_once():
    empty = types.SimpleNamespace(tensors=[])
    with pytest.raises(ValueError, match="num_hidden_layers 100000000, but the file has 0 tensors"):
        reader.read_tensors(empty, {"num_hidden_layers": 100_000_000})
