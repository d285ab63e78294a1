import math

import jax
import pytest

from attnpo_jax.models.decoder import abstract_params
from attnpo_jax.models.known import KNOWN, known_config

# As the hub counts them from the published tensors; Gemma's is its text part alone.
PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "alignment-handbook/zephyr-7b-sft-full": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "google/gemma-3-4b-it": 3_880_263_168,
}


def test_every_known_model_has_as_many_parameters_as_the_published_one():
    found = {}
    for source in KNOWN:
        leaves = jax.tree.leaves(abstract_params(known_config(source)))
        found[source] = sum(math.prod(leaf.shape) for leaf in leaves)
    assert found == PARAMETERS


def test_gemma_is_local_but_for_every_sixth_layer():
    windows = known_config("google/gemma-3-4b-it").layer_windows
    assert len(windows) == 34
    assert [i for i, window in enumerate(windows) if window is None] == [5, 11, 17, 23, 29]
    assert set(windows) == {None, 1024}


def test_an_unknown_model_is_named_with_those_there_are():
    with pytest.raises(KeyError, match=r"'a/b' is not in the table .*Qwen/Qwen3-4B"):
        known_config("a/b")
