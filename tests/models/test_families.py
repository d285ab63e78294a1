"""Every model type held against torch in float32, on small models with all features on.

Each model is written by transformers, read by `hf_folder`, and run over rows that transformers
sees as separate sequences.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from attnpo_jax import losses, weighting
from attnpo_jax.data.batching import Example, RowShape, fill_rows
from attnpo_jax.judge import judge
from attnpo_jax.models import decode, decoder, kv_cache, lm_head
from attnpo_jax.models.io import hf_folder, hf_save
from attnpo_jax.pair_loss import StepSettings, batch_losses

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V = 61
WINDOW = 7
GLOBAL, LOCAL = "full_attention", "sliding_attention"
# 9 heads of 4 in 3 groups: neither count is even, and queries are wider than the model.
BASE = {
    "vocab_size": V,
    "hidden_size": 27,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
GEMMA3 = {
    "head_dim": 4,
    "attention_bias": True,
    "query_pre_attn_scalar": 7,
    "sliding_window": WINDOW,
    "layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL],
    "rope_parameters": {GLOBAL: LINEAR, LOCAL: ROPE},
}
EVEN = {"hidden_size": 36}  # for types whose head_dim is hidden_size / num_attention_heads

# name -> (transformers' class of configs, its fields)
MODELS = {
    "llama": ("LlamaConfig", {"head_dim": 4, "attention_bias": True, "mlp_bias": True,
                              "rope_parameters": LLAMA3}),
    "llama-linear": ("LlamaConfig", {"head_dim": 4, "rope_parameters": LINEAR}),
    "mistral": ("MistralConfig", {"head_dim": 4, "sliding_window": WINDOW,
                                  "rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2Config", {**EVEN, "use_sliding_window": True, "sliding_window": WINDOW,
                              "max_window_layers": 2, "rope_parameters": LINEAR}),
    "qwen2-global": ("Qwen2Config", {**EVEN, "sliding_window": WINDOW, "max_window_layers": 2,
                                     "tie_word_embeddings": True, "rope_parameters": ROPE}),
    "qwen3": ("Qwen3Config", {"head_dim": 4, "attention_bias": True, "use_sliding_window": True,
                              "sliding_window": WINDOW, "max_window_layers": 1,
                              "rope_parameters": LLAMA3}),
    "gemma2": ("Gemma2Config", {"head_dim": 4, "attention_bias": True, "query_pre_attn_scalar": 7,
                                "sliding_window": WINDOW, "attn_logit_softcapping": 1.5,
                                "final_logit_softcapping": 3.0, "rope_parameters": LINEAR}),
    "gemma3_text": ("Gemma3TextConfig", {**GEMMA3, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Config", GEMMA3),
    "phi3": ("Phi3Config", {**EVEN, "sliding_window": WINDOW, "rope_parameters": ROPE}),
    "olmo2": ("Olmo2Config", {**EVEN, "attention_bias": True, "rope_parameters": LINEAR}),
    "smollm3": ("SmolLM3Config", {**EVEN, "attention_bias": True, "mlp_bias": True,
                                  "no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True,
                                  "sliding_window": WINDOW, "rope_parameters": LLAMA3}),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Model:
    """One model on both sides."""

    theirs: torch.nn.Module
    folder: object
    config: decoder.ModelConfig
    params: decoder.Params


def build(name):
    kind, fields = MODELS[name]
    fields = {**BASE, **fields}
    if kind == "Gemma3Config":
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                  "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
        config = transformers.Gemma3Config(
            text_config=fields, vision_config=vision, tie_word_embeddings=False
        )
    else:
        config = getattr(transformers, kind)(**fields)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText if kind == "Gemma3Config" else None
    model = (model or transformers.AutoModelForCausalLM).from_config(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:  # far from zero, so that attention is far from uniform
                parameter.copy_(0.25 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    @functools.cache
    def model(name):
        theirs = build(name)
        folder = tmp_path_factory.mktemp(name)
        theirs.save_pretrained(folder)
        config = hf_folder.load_config(folder)
        return Model(theirs, folder, config, hf_folder.load_params(folder, config))

    return model


def run(model, tokens):
    """Logits (L, V) and attention (layers, N, L, L) in torch."""
    with torch.no_grad():
        output = model(torch.tensor(np.asarray(tokens)[None]), output_attentions=True)
    return output.logits[0].numpy(), np.concatenate([a.numpy() for a in output.attentions])


def rolled_out(attention):
    """The last position's attention rollout (L,), from the whole matrices of all layers."""
    rollout = np.eye(attention.shape[-1])
    for of_heads in attention:
        rollout = (0.5 * of_heads.mean(0) + 0.5 * np.eye(len(rollout))) @ rollout
    return rollout[-1]


def row_of_two_pairs(rng, pad=5):
    """A padded row of two pairs, and where in it each of the four sequences stands."""
    tokens, positions, branch, segment, sequences = [], [], [], [], []
    for pair, (p, a, b) in enumerate(((17, 9, 12), (5, 11, 4)), start=1):
        start = len(tokens)
        prefix = list(range(start, start + p))
        first = list(range(start + p, start + p + a))
        second = list(range(start + p + a, start + p + a + b))
        sequences += [prefix + first, prefix + second]
        tokens += list(rng.integers(3, V, p + a + b))
        positions += [*range(p + a), *range(p, p + b)]
        branch += [1] * p + [2] * a + [3] * b
        segment += [pair] * (p + a + b)
    arrays = (np.pad(np.array(x, np.int32), (0, pad))[None] for x in
              (tokens, positions, branch, segment))  # fmt: skip
    return *arrays, sequences


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_packed_rows_equal_those_of_separate_sequences_in_torch(models, name):
    m = models(name)
    tokens, positions, branch, segment, sequences = row_of_two_pairs(np.random.default_rng(0))
    forward = jax.jit(decoder.forward, static_argnums=0)
    hidden = forward(m.config, m.params, tokens, positions, branch, segment_BL=segment)
    cap = m.config.final_logit_softcapping
    logits = np.asarray(lm_head.logits(hidden, decoder.unembedding(m.params), softcap=cap))[0]
    assert np.isfinite(logits).all()
    for places in sequences:
        want, _ = run(m.theirs, tokens[0, places])
        assert np.abs(want).max() > 0.5
        np.testing.assert_allclose(logits[places], want, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_attention_and_verdicts_equal_those_of_torch(models, name):
    m = models(name)
    rng = np.random.default_rng(1)
    common, prefix, pad = 11, 17, 3  # the first tokens run ahead, as a shared past
    orders = [np.concatenate([np.arange(prefix), np.arange(17, 30)]),
              np.concatenate([np.arange(prefix), np.arange(30, 46)])]  # fmt: skip
    tokens = rng.integers(3, V, 46).astype(np.int32)
    positions = np.concatenate([np.arange(30), np.arange(17, 33)]).astype(np.int32)
    branch = np.repeat(np.array([1, 2, 3], np.int32), [17, 13, 16])
    row = [np.pad(x[common:], (0, pad))[None] for x in (tokens, positions, branch)]
    read = np.array([[29, 45]]) - common
    letters = jnp.array([7, 40])
    layers = tuple(range(m.config.num_layers))
    heads = ((2, 8), (0, 4), (layers[-1], 0))
    past = jax.jit(decoder.make_past, static_argnums=0)(m.config, m.params, tokens[:common])
    judge_rows = jax.jit(
        functools.partial(
            judge._judge_rows,
            config=m.config,
            sources=(*layers, *heads, "rollout"),
            dtype=jnp.dtype("float32"),
            attention="xla",
        )
    )
    rows, verdict, answer = judge_rows((m.params, past, letters), (*row, read))
    for order, places in enumerate(orders):
        logits, attention = run(m.theirs, tokens[places])
        of_heads = [attention[layer, head, -1] for layer, head in heads]
        want = np.stack([*attention.mean(1)[:, -1], *of_heads, rolled_out(attention)])
        own = places >= common
        got = np.asarray(rows)[:, 0, order]
        np.testing.assert_allclose(got[:, places[own] - common], want[:, own], atol=1e-5)
        # What the other order holds, and the padding, is not seen.
        others = np.setdiff1d(np.arange(got.shape[1]), places[own] - common)
        np.testing.assert_array_equal(got[:, others], 0.0)
        sign = 1 if order == 0 else -1
        want_verdict = sign * (logits[-1, 7] - logits[-1, 40])
        np.testing.assert_allclose(verdict[0, order], want_verdict, atol=1e-4)
        assert answer[0, order] == logits[-1].argmax()
    windows = m.config.layer_windows or [None] * len(layers)
    for layer, window in enumerate(windows):
        seen = int((np.asarray(rows)[layer, 0, 0] > 0).sum())
        assert seen == (30 - common if window is None else WINDOW)


def examples(rng):
    """Three preference pairs with reference log-probs."""
    made = []
    for index, (p, c, r) in enumerate(((13, 8, 5), (4, 12, 15), (9, 3, 7))):
        responses = tuple(rng.integers(3, V, n).astype(np.int32) for n in (c, r))
        reference = tuple(rng.normal(-4, 0.5, n).astype(np.float32) for n in (c, r))
        made.append(
            Example(
                index=index,
                prompt_ids=rng.integers(3, V, p).astype(np.int32),
                response_ids=responses,
                text_lengths=(c, r),
                judge=tuple(np.ones((2, 1, n), np.float32) for n in (c, r)),
                verdict=np.zeros(2, np.float32),
                reference_logps=reference,
            )
        )
    return made


def torch_dpo(model, pairs, beta):
    total = 0.0
    for pair in pairs:
        margin = 0.0
        for sign, ids, reference in zip(
            (1, -1), pair.response_ids, pair.reference_logps, strict=True
        ):
            sequence = torch.tensor(np.concatenate([pair.prompt_ids, ids])).long()
            logps = model(sequence[None]).logits[0].log_softmax(-1)
            n = len(ids)
            picked = logps[-n - 1 : -1].gather(1, sequence[-n:, None])
            margin = margin + sign * (picked.sum() - float(reference.sum()))
        total = total - torch.nn.functional.logsigmoid(beta * margin)
    return total / len(pairs)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_dpo_loss_equal_those_of_torch(models, name, tmp_path):
    m = models(name)
    pairs, beta = examples(np.random.default_rng(2)), 0.05
    m.theirs.zero_grad()
    want_loss = torch_dpo(m.theirs, pairs, beta)
    want_loss.backward()
    # Two pairs packed in one row, one in the other, which is padded.
    batch = fill_rows([pairs[:2], pairs[2:]], RowShape(64, 48, 16, pairs=2), num_sources=1)
    settings = StepSettings(
        model=m.config,
        weighting=weighting.get("uniform"),
        objective=functools.partial(losses.get("sigmoid"), beta=beta),
        beta=beta,
        source_layers=(0,),
        logps_chunk=16,
    )

    def mean_loss(params):
        return batch_losses(settings, params, batch)[0].sum() / len(pairs)

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(m.params)
    np.testing.assert_allclose(loss, want_loss.item(), atol=1e-5)
    # Gradients in transformers' layout: exported as if they were weights.
    hf_save.save(tmp_path / "grads", m.config, grads, source_folder=m.folder)
    got = load_file(tmp_path / "grads" / "model.safetensors")
    compared = 0
    for parameter_name, parameter in m.theirs.named_parameters():
        if "vision_tower" in parameter_name or "multi_modal" in parameter_name:
            continue
        stored = parameter_name
        if name == "gemma3":
            inner = parameter_name.removeprefix("model.language_model.")
            stored = f"language_model.{inner}" if inner == parameter_name else None
            stored = stored or f"language_model.model.{inner}"
        want = parameter.grad.numpy()
        # Small gradients as well as large ones.
        atol = min(1e-4, 1e-3 * np.abs(want).max() + 1e-7)
        np.testing.assert_allclose(got[stored], want, atol=atol, err_msg=parameter_name)
        # Without rotary positions (SmolLM3's fourth layers), a key bias shifts all of a query's
        # scores alike, which changes nothing: its gradient is 0.
        if not (name == "smollm3" and parameter_name.endswith("k_proj.bias")):
            assert np.abs(got[stored]).max() > 1e-6, parameter_name
        compared += 1
    assert compared == sum("vision_tower" not in n and "multi_modal" not in n for n in got)


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("name", MODELS)
def test_export_gives_back_every_tensor_in_the_sources_dtype(
    models, name, shard_bytes, tmp_path, monkeypatch
):
    source = tmp_path / "source"
    theirs = models(name).theirs
    tensors = {key: value.clone() for key, value in theirs.state_dict().items()}
    try:
        theirs.to(torch.bfloat16).save_pretrained(source)
        stored = {k: v.clone() for k, v in theirs.state_dict().items()}
    finally:
        theirs.to(torch.float32).load_state_dict(tensors)
    config = hf_folder.load_config(source)
    assert config == models(name).config
    params = hf_folder.load_params(source, config, param_dtype=jnp.float32)
    monkeypatch.setattr(hf_save, "_SHARD_BYTES", shard_bytes)
    hf_save.save(tmp_path / "export", config, params, source_folder=source)
    files = sorted((tmp_path / "export").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == 20_000)
    got = {k: v for file in files for k, v in load_file(file).items()}
    want = load_file(source / "model.safetensors")
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].dtype == value.dtype and got[key].tobytes() == value.tobytes(), key
    written = json.loads((tmp_path / "export" / "config.json").read_text())
    assert written == json.loads((source / "config.json").read_text())
    again = type(theirs).from_pretrained(tmp_path / "export", dtype="auto")
    for key, value in again.state_dict().items():
        assert value.dtype == stored[key].dtype and torch.equal(value, stored[key]), key


def test_a_model_that_sees_images_can_lie_under_either_name(models, tmp_path):
    m = models("gemma3")
    tensors = load_file(m.folder / "model.safetensors")
    renamed = {}
    for key, value in tensors.items():
        key = key.replace("language_model.lm_head", "lm_head")
        key = key.replace("language_model.model.", "model.language_model.")
        key = key.replace("vision_tower.", "model.vision_tower.")
        renamed[key.replace("multi_modal_projector.", "model.multi_modal_projector.")] = value
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((m.folder / "config.json").read_bytes())
    save_file(renamed, source / "model.safetensors")
    params = hf_folder.load_params(source, m.config)
    jax.tree.map(np.testing.assert_array_equal, params, m.params)
    hf_save.save(tmp_path / "export", m.config, params, source_folder=source)
    got = load_file(tmp_path / "export" / "model.safetensors")
    assert got.keys() == renamed.keys()


@pytest.mark.parametrize("name", MODELS)
def test_parameters_have_logical_axes_and_neutral_norms(models, name):
    config = models(name).config
    abstract, axes = decoder.abstract_params(config), decoder.logical_axes(config)
    ranks = jax.tree.map(lambda p: len(p.shape), abstract)
    assert jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple)) == ranks
    fresh = decoder.init_params(config, jax.random.key(0))
    neutral = 0.0 if name.startswith("gemma") else 1.0
    norms = {k: v for k, v in {**fresh, **fresh["layers"]}.items() if k.endswith("_norm")}
    assert len(norms) >= 3
    for key, value in norms.items():
        np.testing.assert_array_equal(value, neutral, err_msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_decoding_equals_transformers(models, name):
    """Past a window's end and a ring's, whose blocks hold four positions."""
    model, new = models(name), 24
    fresh = build(name)  # other tests have hooks on theirs
    rng = np.random.default_rng(4)
    prompts = [rng.integers(3, V, n).astype(np.int32) for n in (1, 6, 17)]
    shape = decode.CacheShape.of(model.config, len(prompts), 48, jnp.float32, block=4)
    length_B = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
    tokens_BL = np.zeros((len(prompts), 20), np.int32)
    for row, prompt in zip(tokens_BL, prompts, strict=True):
        row[: len(prompt) - 1] = prompt[:-1]

    @jax.jit
    def decoded(params, token_B):
        cache, slot_BS = kv_cache.empty(shape), jnp.arange(3)[:, None]
        cache = decode.prefill(model.config, params, cache, shape, tokens_BL, length_B, slot_BS)

        def one(carry, _):
            token_B, length_B, cache = carry
            logits_BV, cache = decode.step(model.config, params, cache, shape, token_B, length_B)
            token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
            return (token_B, length_B + 1, cache), (token_B, jax.lax.top_k(logits_BV, 2)[0])

        carry = token_B, jnp.asarray(length_B), cache
        return jax.lax.scan(one, carry, None, length=new)[1]

    found_nB, best_nB2 = jax.tree.map(
        np.asarray, decoded(model.params, np.array([prompt[-1] for prompt in prompts]))
    )
    for b, prompt in enumerate(prompts):
        with torch.no_grad():
            theirs = fresh.generate(
                torch.tensor(prompt[None].astype(np.int64)),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
        for k, (ours, their) in enumerate(zip(found_nB[:, b].tolist(), theirs, strict=True)):
            if ours != their:
                # What follows a tie has another past.
                assert best_nB2[k, b, 0] - best_nB2[k, b, 1] < 1e-3, (k, b)
                break
