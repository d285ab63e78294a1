"""PEFT adapters read onto the tensors beneath: the sums, and what is refused by name."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from attnpo_jax.models import int8
from attnpo_jax.models.io import adapter, hf_folder
from attnpo_jax.models.io.hf_folder import FolderError
from tests import tiny

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 3.0, "bias": "none"}
DOWN = "model.layers.1.mlp.down_proj"  # 96 inputs, 64 outputs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("base"))


def factors(module=DOWN, inputs=96, outputs=64, rank=2):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(rank, inputs)), rng.normal(size=(outputs, rank))
    name = f"base_model.model.{module}.lora_"
    return {f"{name}{f}.weight": x.astype(np.float32) for f, x in (("A", a), ("B", b))}


def write(folder, tensors, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_the_product_of_the_factors_is_added_to_its_weight_alone(base, tmp_path):
    tensors = factors()
    read = adapter.load(write(tmp_path, tensors), "adapter")
    model = hf_folder.load_config(base)
    plain, changed = (hf_folder.load_params(base, model, adapter=one) for one in (None, read))
    a, b = tensors.values()
    stored = load_file(base / "model.safetensors")[f"{DOWN}.weight"]
    want = (stored + 3.0 / 2 * b @ a).T
    np.testing.assert_allclose(changed["layers"]["down"][1], want, rtol=1e-6, atol=1e-6)
    changed["layers"]["down"] = changed["layers"]["down"].at[1].set(plain["layers"]["down"][1])
    jax.tree.map(np.testing.assert_array_equal, changed, plain)
    # Before it is held as int8, not after.
    shape = int8.quantized(model)
    params = hf_folder.load_params(base, shape, adapter=read)
    scale = np.abs(want).max(axis=0) / 127
    np.testing.assert_allclose(params["layers"]["down_scale"][1], scale, rtol=1e-5)


def test_the_digest_is_of_weights_and_scale(tmp_path):
    def digest(name, tensors, **changes):
        return adapter.load(write(tmp_path / name, tensors, **changes), "adapter").digest

    one = digest("one", factors())
    assert one == digest("same", factors(), base_model_name_or_path="elsewhere")
    assert one != digest("scaled", factors(), lora_alpha=4.0)
    assert one != digest("other", {k: 2 * v for k, v in factors().items()})


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        (factors(), {"peft_type": "IA3"}, "peft_type is 'IA3'; accepted: 'LORA'"),
        (factors(), {"use_dora": True}, "use_dora is True; accepted: none"),
        (factors(), {"modules_to_save": ["lm_head"]}, "modules_to_save is .*accepted: none"),
        (factors(), {"bias": "all"}, "bias is 'all'"),
        (factors(), {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes"),
        (factors(), {"lora_alpha": "much"}, "lora_alpha is 'much'; accepted: a number"),
        (factors(), {"alpha_pattern": {"(a+)+": 1}}, "alpha_pattern has .*accepted: names"),
        (
            factors() | {"base_model.model.lm_head.weight": np.ones((2, 2), np.float32)},
            {},
            "base_model.model.lm_head.weight is F32 of shape .*accepted: matrices",
        ),
        (dict(list(factors().items())[:1]), {}, "accepted: two factors of a rank"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path, tensors, changes, message):
    with pytest.raises(FolderError, match=message):
        adapter.load(write(tmp_path, tensors, **changes), "adapter")


def test_adapters_of_another_model_and_folders_of_something_else(base, tmp_path):
    model = hf_folder.load_config(base)
    for tensors, found in (
        (factors(inputs=95), "one of shape (64, 96)"),
        (factors("model.layers.7.mlp.down_proj"), "none of that name"),
    ):
        read = adapter.load(write(tmp_path / found[:4], tensors), "adapter")
        with pytest.raises(FolderError) as caught:
            hf_folder.load_params(base, model, adapter=read)
        assert f"the model has {found}" in str(caught.value)
    with pytest.raises(FolderError, match="prepare.scorers.x.adapter = .*accepted: a folder with"):
        adapter.load(base, "prepare.scorers.x.adapter")
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(FolderError, match="adapter_model.bin is a pickle"):
        adapter.load(tmp_path, "adapter")
