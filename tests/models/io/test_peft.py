"""Exported adapters in PEFT, against the adapted decoder and against the merged export."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from attnpo_jax.models import decoder, lm_head, lora
from attnpo_jax.models.config import LoraConfig
from attnpo_jax.models.io import adapter, hf_folder, hf_save, peft

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tests.models import test_families as families  # noqa: E402  needs torch

EVERY = ("query", "key", "value", "output", "gate", "up", "down")
CASES = {
    "llama": EVERY,
    "qwen3": ("query", "value", "down"),
    "gemma2": EVERY,
    "gemma3": EVERY,
    "phi3": EVERY,
    "phi3-some": ("query", "value", "up", "down"),
    "olmo2": ("output", "gate"),
    "mistral": EVERY,
    "qwen2": EVERY,
    "gemma3_text": EVERY,
    "smollm3": EVERY,
}


def logits_in_torch(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_peft_gives_the_logits_of_the_merged_export_and_ours(case, tmp_path):
    name = case.split("-")[0]
    families.build(name).save_pretrained(tmp_path / "base")
    model = hf_folder.load_config(tmp_path / "base")
    policy = dataclasses.replace(model, lora=LoraConfig(3, 2.0, CASES[case]))
    base = hf_folder.load_params(tmp_path / "base", model)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32),
        lora.abstract_adapters(policy),
    )
    peft.save_adapter(
        tmp_path / "adapter",
        policy,
        adapters,
        base=str(tmp_path / "base"),
        source_folder=tmp_path / "base",
    )
    merged = lora.merge(policy, base, adapters)
    hf_save.save(tmp_path / "merged", model, merged, source_folder=tmp_path / "base")

    auto = transformers.AutoModelForCausalLM
    if name == "gemma3":
        auto = transformers.AutoModelForImageTextToText
    tokens = rng.integers(3, families.V, (1, 20))
    plain = auto.from_pretrained(tmp_path / "base").eval()
    without = logits_in_torch(plain, tokens)
    adapted = theirs.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    # All of the adapter found its place, and nothing else got one.
    factors = {n for n in adapted.state_dict() if "lora_" in n}
    written = load_file(tmp_path / "adapter" / peft._WEIGHTS)
    assert {n.replace(".default.", ".") for n in factors} == written.keys()
    got = logits_in_torch(adapted, tokens)
    assert np.abs(got - without).max() > 0.1
    again = logits_in_torch(auto.from_pretrained(tmp_path / "merged").eval(), tokens)
    np.testing.assert_allclose(got, again, atol=1e-4)
    hidden = decoder.forward(
        policy, lora.join(base, adapters), tokens, np.arange(20)[None], np.ones((1, 20), np.int32)
    )
    cap = policy.final_logit_softcapping
    ours = lm_head.logits(hidden, decoder.unembedding(base), softcap=cap)
    np.testing.assert_allclose(ours, got, atol=1e-4)
    # And back: the base read with what the adapters add is the merged model.
    read = adapter.load(tmp_path / "adapter", "adapter")
    back = hf_folder.load_params(tmp_path / "base", model, adapter=read)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), back, merged)


def test_adapters_that_peft_has_made_are_read_with_the_scale_of_each_module(tmp_path):
    base = families.build("llama")
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    settings = theirs.LoraConfig(
        r=2,
        lora_alpha=3,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,  # B random too
    )
    for change in ({}, {"use_rslora": False, "alpha_pattern": {"mlp.down_proj": 7}}):
        wrapped = theirs.get_peft_model(
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
            dataclasses.replace(settings, **change),
        ).eval()
        wrapped.save_pretrained(tmp_path / "adapter")
        tokens = np.arange(3, 15)[None]
        model = hf_folder.load_config(tmp_path / "base")
        read = adapter.load(tmp_path / "adapter", "adapter")
        params = hf_folder.load_params(tmp_path / "base", model, adapter=read)
        hidden = decoder.forward(
            model, params, tokens, np.arange(12)[None], np.ones((1, 12), np.int32)
        )
        ours = lm_head.logits(hidden, decoder.unembedding(params))
        np.testing.assert_allclose(ours, logits_in_torch(wrapped, tokens), atol=1e-4)


def test_projections_that_share_a_module_become_one_adapter_of_the_sum_of_their_ranks(tmp_path):
    source = tmp_path / "base"
    families.build("phi3").save_pretrained(source)
    model = hf_folder.load_config(source)
    policy = dataclasses.replace(model, lora=LoraConfig(3, 2.0, ("query", "value", "down")))
    adapters = lora.init_adapters(policy, jax.random.key(0))
    peft.save_adapter(tmp_path / "out", policy, adapters, base="a/b", source_folder=source)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["qkv_proj", "down_proj"]
    assert config["rank_pattern"] == {"qkv_proj": 6}
    assert config["alpha_pattern"] == {"qkv_proj": 4.0}
    assert (config["r"], config["lora_alpha"]) == (3, 2.0)
    assert config["base_model_name_or_path"] == "a/b"
