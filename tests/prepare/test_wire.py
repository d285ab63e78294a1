"""A pair's tokens on their way between processes."""

import dataclasses
import json

import numpy as np
import pytest

from attnpo_jax.data.pair import Pair
from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.data.trained import TrainedForm
from attnpo_jax.judge.prompt import JudgePrompter, JudgeTemplate
from attnpo_jax.prepare import wire
from attnpo_jax.prepare.pair_forms import PairTokenizer
from attnpo_jax.runtime import schema
from tests import tiny

PAIR = Pair("p\ud800", ({"role": "user", "content": "Why?"},), "Because it rained.", "No idea")


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    template = tmp_path_factory.mktemp("template") / "judge.txt"
    template.write_text("{question} A {answer_a} B {answer_b} Which?")
    tokenizer = ChatTokenizer(tiny.byte_tokenizer(), origin="tiny")
    prompter = JudgePrompter(tokenizer, JudgeTemplate.load(str(template)), 200, 60)
    # Each response with what is left of its own prompt, and the first of its beginning.
    form = TrainedForm(truncation="keep_end")
    lengths = {"max_length": 16, "max_prompt_length": 15}
    tokenize = PairTokenizer(tokenizer, prompter, form=form, **lengths)
    weights = tuple(np.array([[0.1, -2.5e-30]], np.float32) for _ in range(2))
    numbers = {"weight": 2.0, "margin": -0.5}
    forms = dataclasses.replace(tokenize.forms(PAIR), precomputed=weights, numbers=numbers)
    own = dataclasses.replace(forms.tokenized, prompt_ids=forms.tokenized.prompt_ids[::-1])
    return dataclasses.replace(forms, own=own)


def test_forms_of_all_parts(forms):
    pair = forms.tokenized
    assert len(pair.chosen_cut_spans) == 5 and len(pair.rejected_prompt_ids) == 7


def sent(forms):
    return json.loads(json.dumps(wire.to_json(forms)))


def assert_same(found, expected):
    assert type(found) is type(expected)
    if dataclasses.is_dataclass(found):
        for field in dataclasses.fields(found):
            assert_same(getattr(found, field.name), getattr(expected, field.name))
    elif isinstance(found, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(found, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize("without", [(), ("prompt",), ("precomputed", "own")])
def test_what_arrives_is_what_was_sent(forms, without):
    forms = dataclasses.replace(forms, **dict.fromkeys(without))
    value = sent(forms)
    schema.check([value], wire.FORMS)
    assert_same(wire.from_json(value), forms)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"shape": [10**9]}, r"prompt_ids has \d+ bytes for the shape \[1000000000\]"),
        ({"shape": [-1]}, r"prompt_ids.shape\[0\] is -1"),
        ({"shape": [1, 1]}, r"prompt_ids.shape is a list of 2; accepted: a list of 1"),
        ({"dtype": "object"}, r"prompt_ids.dtype is 'object'; accepted: 'int32'"),
        ({"bytes": "?"}, "prompt_ids.bytes is no base64"),
        ({"bytes": None}, "prompt_ids.bytes is None; accepted: a text"),
        ({"more": 1}, "prompt_ids.more is not known"),
    ],
)
def test_no_other_array_is_taken(forms, change, why):
    value = sent(forms)
    value["tokenized"]["prompt_ids"] |= change
    with pytest.raises(schema.SchemaError, match=why):
        schema.check([value], wire.FORMS)
