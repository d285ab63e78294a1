import pytest

from attnpo_jax.config import default_config
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.plan import search, topologies
from attnpo_jax.plan.lengths import Lengths
from attnpo_jax.plan.programs import Setting

MODEL = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)
# Two embeddings; by layer query and output, key and value, gate, up, down, two norms; a last norm.
PARAMETERS = 2 * 64 * 16 + 3 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32 + 2 * 16) + 16


def setting(topology="v5e:2x2", **fields):
    config = default_config()
    config.update_from_flattened_dict(fields)
    return Setting(config, MODEL, topologies.parse(topology), Lengths.of(config))


def test_meshes_divide_and_leave_no_chip_idle():
    tried = list(search.candidates(setting(**{"train.batch_size": 2})))
    # Two pairs: two parts of a batch at most, so two chips share each layer (of two KV heads).
    assert {tuple(c.mesh.values()) for c in tried} == {(1, 2, 2), (2, 1, 2)}
    assert {c.remat for c in tried} == {"none", "dots", "layer"}
    assert {c.microbatch for c in tried} == {2}


@pytest.mark.parametrize("batch", [48, 64])
def test_microbatches_divide_the_batch(batch):
    tried = list(search.candidates(setting("v5e:8x8", **{"train.batch_size": batch})))
    by_parts = {}
    for c in tried:
        by_parts.setdefault(c.mesh["data"] * c.mesh["fsdp"], set()).add(c.microbatch)
    # 32 parts of 48 pairs: none of its divisors is a multiple of 32.
    assert by_parts == ({32: {48}} if batch == 48 else {32: {32, 64}, 64: {64}})


def test_state_is_what_training_keeps():
    # Parameters, two moments and a gradient in float32.
    assert search._state_bytes(setting()) == pytest.approx(16 * PARAMETERS, abs=64)


def test_adapters_alone_have_moments_and_gradients():
    lora = {"lora.rank": 2, "lora.targets": ("q_proj",), "model.param_dtype": "bfloat16"}
    adapters = 3 * 2 * (16 + 16)
    found = search._state_bytes(setting(**lora))
    assert found == pytest.approx(2 * PARAMETERS + 16 * adapters, abs=64)


def test_a_guess_counts_gradients_of_adapters_alone():
    candidate = search.Candidate({"data": 4, "fsdp": 1, "tensor": 1}, 32, "layer")
    lora = {"lora.rank": 2, "lora.targets": ("q_proj",)}
    assert search._guess(setting(), candidate)[0] == 8 * PARAMETERS
    assert search._guess(setting(**lora), candidate)[0] == 8 * 3 * 2 * (16 + 16)
