"""Ids beyond a model's vocabulary, which JAX would clamp."""

import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.data.vocabulary import check_ids, check_rows, may_exceed
from tests import tiny

TOKENIZER = ChatTokenizer(tiny.byte_tokenizer(), origin="test")  # ids 0 to 257


def test_what_is_beyond_is_named():
    assert not may_exceed(TOKENIZER, 258) and may_exceed(TOKENIZER, 257)
    # What would happen without the check.
    assert int(jnp.arange(257)[jnp.asarray(257)]) == 256
    within = np.array([0, 256], np.int32)
    check_ids(TOKENIZER, 257, {"prompt": within, "chosen": []}, "pair 7")
    with pytest.raises(ValueError) as caught:
        check_ids(TOKENIZER, 257, {"prompt": within, "chosen": [3, 257]}, "pair 7")
    assert str(caught.value).startswith(
        "pair 7: the chosen holds the token '<|im_end|>', whose id 257 is beyond the model's "
        "vocab_size = 257; accepted: the model's own tokenizer (this one: test)"
    )


def test_rows_of_a_prepared_dataset():
    row = {"id": "x", "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3, 257]}
    check_rows(TOKENIZER, 258, [row], "folder")
    with pytest.raises(ValueError, match="folder, pair x: the rejected holds the token"):
        check_rows(TOKENIZER, 257, [row], "folder")
