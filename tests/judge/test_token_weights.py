import math

import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax import weighting
from attnpo_jax.data.pair import Pair
from attnpo_jax.data.tokenize import TokenizedPair
from attnpo_jax.judge.judge import Judgement
from attnpo_jax.judge.token_weights import token_weights
from attnpo_jax.registry import RegistryError

PAIR = Pair("one", ({"role": "user", "content": "Say hi."},), chosen=" Oh, hi.\n", rejected="No")
TOKENIZED = TokenizedPair(
    id="one",
    prompt_ids=np.array([7], np.int32),
    chosen_ids=np.array([1, 2, 3, 9], np.int32),  # 9: the closing template token
    rejected_ids=np.array([4, 9], np.int32),
    chosen_text_length=3,
    rejected_text_length=1,
    chosen_spans=np.array([[0, 3], [3, 6], [6, 7]], np.int32),
    rejected_spans=np.array([[0, 2]], np.int32),
)
# Layers 2 and 5 of 6; only the orders of the latter are not uniform.
JUDGEMENT = Judgement(
    id="one",
    chosen=np.array([[[1, 1, 1], [0.1, 0.1, 0.2]], [[1, 1, 1], [0.3, 0.1, 0.0]]], np.float32),
    rejected=np.array([[[0.5], [0.5]], [[0.25], [0.5]]], np.float32),
    verdict=np.array([0.5, -0.5], np.float32),
    answer_ids=np.array([1, 1], np.int32),
    source_layers=(2, 5),
    num_layers=6,
)


def test_weights_stand_beside_the_text_of_their_tokens():
    chosen, rejected = token_weights(PAIR, TOKENIZED, JUDGEMENT)
    # Shares (.25, .25, .5) and (.75, .25, 0): their mean (.5, .25, .25), times 3 tokens.
    assert [text for text, _ in chosen] == ["Oh,", " hi", "."]
    assert [weight for _, weight in chosen] == pytest.approx([1.5, 0.75, 0.75])
    assert rejected == [("No", pytest.approx(1.0))]


def test_hyperparameters_reach_the_weighting():
    chosen, _ = token_weights(PAIR, TOKENIZED, JUDGEMENT, fix_sink=False, layer=(2, 5))
    # The mean of 1, 1, 1 and of 1.5, 0.75, 0.75.
    assert [weight for _, weight in chosen] == pytest.approx([1.25, 0.875, 0.875])
    with pytest.raises(RegistryError, match="'uniform' has no hyperparameter 'layer'"):
        token_weights(PAIR, TOKENIZED, JUDGEMENT, "uniform", layer=0)


@pytest.mark.parametrize(
    "layer, expected",
    [(2, [1.0] * 3), (-4, [1.0] * 3), (5, [1.5, 0.75, 0.75]), (-1, [1.5, 0.75, 0.75])],
)
def test_layers_are_those_of_the_model(layer, expected):
    chosen, _ = token_weights(PAIR, TOKENIZED, JUDGEMENT, layer=layer)
    assert [weight for _, weight in chosen] == pytest.approx(expected)


@pytest.mark.parametrize("layer", [0, 1, -2, -5, 6])
def test_a_layer_that_the_judge_did_not_keep_is_refused(layer):
    with pytest.raises(RegistryError, match=rf"layer {layer} .*accepted: 2, 5 \(the model has 6"):
        token_weights(PAIR, TOKENIZED, JUDGEMENT, layer=layer)


def test_log_probs_are_not_made_up(monkeypatch):
    monkeypatch.setattr(weighting.registry, "_functions", {})

    @weighting.register
    def inspected_surprise(response):
        return jnp.where(response.mask_BT, -response.policy_logps_BT, 0.0)

    chosen, rejected = token_weights(PAIR, TOKENIZED, JUDGEMENT, "inspected_surprise")
    assert all(math.isnan(weight) for _, weight in (*chosen, *rejected))
