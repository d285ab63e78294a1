"""What is trained on, against rows written out by hand, and TRL's cuts from their definition."""

import numpy as np
import pytest

from attnpo_jax.data.batching import Example, RowShape, fill_rows
from attnpo_jax.data.pair import BadExample, Pair
from attnpo_jax.data.tokenize import ChatTokenizer, tokenize_pair
from attnpo_jax.data.trained import TrainedForm
from attnpo_jax.runtime.errors import UserError
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes; a turn is `<|im_start|>role\\n...<|im_end|>\\n`."""
    return ChatTokenizer(tiny.byte_tokenizer(eos_token="<|im_end|>"), origin="bytes")


def pair(chosen="abcdefgh", rejected="xy", prompt="Why so?"):
    return Pair("p", ({"role": "user", "content": prompt},), chosen, rejected)


def tokenized(tokenizer, of, *, max_length=1000, max_prompt_length=500, **form):
    lengths = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    return tokenize_pair(tokenizer, of, **lengths, form=TrainedForm(**form))


def text(tokenizer, ids):
    return tokenizer.tokenizer.decode(ids)


def test_an_empty_response_is_one_space(tokenizer):
    for content in ("", " \n "):
        of = tokenized(tokenizer, pair(chosen=content), empty_response="space")
        assert text(tokenizer, of.chosen_ids) == " <|im_end|>\n"
        assert of.chosen_text_length == 1 and of.chosen_spans.tolist() == [[0, 1]]
        assert text(tokenizer, of.rejected_ids) == "xy<|im_end|>\n"
    with pytest.raises(BadExample, match="no token.*data.empty_response = 'space' trains on one"):
        tokenized(tokenizer, pair(chosen=""))


def test_an_extra_end_token_follows_the_template_s(tokenizer):
    of = tokenized(tokenizer, pair(), extra_end_token=True)
    assert text(tokenizer, of.chosen_ids) == "abcdefgh<|im_end|>\n<|im_end|>"
    assert of.chosen_text_length == 8
    none = ChatTokenizer(tiny.byte_tokenizer(), origin="bytes")
    with pytest.raises(UserError, match="bytes: .*no end token.*data.extra_end_token"):
        tokenized(none, pair(), extra_end_token=True)


def test_an_empty_system_message_where_there_is_none_and_a_place_for_it(tokenizer):
    system = "<|im_start|>system\n<|im_end|>\n"
    usual = "<|im_start|>user\nWhy so?<|im_end|>\n<|im_start|>assistant\n"
    assert text(tokenizer, tokenized(tokenizer, pair()).prompt_ids) == usual
    of = tokenized(tokenizer, pair(), empty_system_message=True)
    assert text(tokenizer, of.prompt_ids) == system + usual
    told = ({"role": "system", "content": "Be brief"}, *pair().prompt)
    of = tokenized(tokenizer, Pair("p", told, "a", "b"), empty_system_message=True)
    assert text(tokenizer, of.prompt_ids).startswith("<|im_start|>system\nBe brief<|im_end|>")
    bare = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    bare += "{% if add_generation_prompt %}[assistant]{% endif %}"
    placeless = ChatTokenizer(tiny.byte_tokenizer(chat_template=bare), origin="bytes")
    of = tokenized(placeless, pair(), empty_system_message=True)
    assert text(placeless, of.prompt_ids) == "[user]Why so?[assistant]"


def kept_by_trl(prompt, response, max_length):
    """A row's tokens, and which of them count, under TRL's `keep_end`: the row's last tokens, of
    which the first has none before it that could predict it.
    """
    row = [*prompt, *response][-max_length:]
    counts = ([False] * len(prompt) + [True] * len(response))[-max_length:]
    return row, [False, *counts[1:]]


@pytest.mark.parametrize("max_length", [1000, 43, 35, 12, 11, 7, 5])
def test_keep_end_is_what_trl_keeps(tokenizer, max_length):
    whole = tokenized(tokenizer, pair(), extra_end_token=True)
    options = {"truncation": "keep_end", "extra_end_token": True, "max_length": max_length}
    of = tokenized(tokenizer, pair(), **options)
    for side, text_length in (("chosen", 8), ("rejected", 2)):
        full = getattr(whole, f"{side}_ids")
        row, counts = kept_by_trl(whole.prompt_ids, full, max_length)
        ids, context = getattr(of, f"{side}_ids"), of.prompt_of(side)
        assert [*context, *ids] == row
        assert counts == [False] * len(context) + [True] * len(ids)
        cut = len(full) - len(ids)
        assert getattr(of, f"{side}_text_length") == text_length - cut
        spans = np.concatenate([getattr(of, f"{side}_cut_spans"), getattr(of, f"{side}_spans")])
        np.testing.assert_array_equal(spans, getattr(whole, f"{side}_spans"))
        assert len(getattr(of, f"{side}_cut_spans")) == cut
        assert getattr(of, f"{side}_truncated") == (cut > 0)
    own = len(of.rejected_prompt_ids) > 0
    assert own == (not np.array_equal(of.prompt_of("chosen"), of.prompt_of("rejected")))
    assert of.prompt_truncated == (max_length < len(whole.prompt_ids) + len(whole.chosen_ids))


def test_keep_end_leaves_some_of_the_text_or_says_so(tokenizer):
    with pytest.raises(BadExample, match="the chosen response is left with no token"):
        tokenized(tokenizer, pair(), truncation="keep_end", max_length=3)


def test_responses_with_prompts_of_their_own_share_no_tokens_in_a_row():
    ids = [np.array(x, np.int32) for x in ([1, 2, 3], [4, 5], [3], [6, 7, 8])]
    prompt, chosen, own, rejected = ids
    of = Example(0, prompt, (chosen, rejected), (2, 2), rejected_prompt_ids=own)
    batch = fill_rows([[of]], RowShape(11, 6, 4), num_sources=0)
    assert of.row_length == 9
    assert batch.tokens_BL[0].tolist() == [1, 2, 3, 4, 5, 3, 6, 7, 8, 0, 0]
    assert batch.branch_BL[0].tolist() == [2, 2, 2, 2, 2, 3, 3, 3, 3, 0, 0]
    assert batch.positions_BL[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0]
    assert batch.read_BM[0].tolist() == [2, 3, 5, 6, 7, 0]
    assert batch.target_BM[0].tolist() == [4, 5, 6, 7, 8, 0]
