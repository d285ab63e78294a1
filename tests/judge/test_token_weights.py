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
# Source layers 0 and 1; only the last one's orders are not uniform.
JUDGEMENT = Judgement(
    id="one",
    chosen=np.array([[[1, 1, 1], [0.1, 0.1, 0.2]], [[1, 1, 1], [0.3, 0.1, 0.0]]], np.float32),
    rejected=np.array([[[0.5], [0.5]], [[0.25], [0.5]]], np.float32),
    verdict=np.array([0.5, -0.5], np.float32),
    answer_ids=np.array([1, 1], np.int32),
)


def test_weights_stand_beside_the_text_of_their_tokens():
    chosen, rejected = token_weights(PAIR, TOKENIZED, JUDGEMENT)
    # Shares (.25, .25, .5) and (.75, .25, 0): their mean (.5, .25, .25), times 3 tokens.
    assert [text for text, _ in chosen] == ["Oh,", " hi", "."]
    assert [weight for _, weight in chosen] == pytest.approx([1.5, 0.75, 0.75])
    assert rejected == [("No", pytest.approx(1.0))]


def test_hyperparameters_reach_the_weighting():
    chosen, _ = token_weights(PAIR, TOKENIZED, JUDGEMENT, layer=0)
    assert [weight for _, weight in chosen] == pytest.approx([1.0, 1.0, 1.0])
    with pytest.raises(RegistryError, match="'uniform' has no hyperparameter 'layer'"):
        token_weights(PAIR, TOKENIZED, JUDGEMENT, "uniform", layer=0)


def test_log_probs_are_not_made_up(monkeypatch):
    monkeypatch.setattr(weighting.registry, "_functions", {})

    @weighting.register
    def inspected_surprise(response):
        return jnp.where(response.mask_BT, -response.policy_logps_BT, 0.0)

    chosen, rejected = token_weights(PAIR, TOKENIZED, JUDGEMENT, "inspected_surprise")
    assert all(math.isnan(weight) for _, weight in (*chosen, *rejected))
