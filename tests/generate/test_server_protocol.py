"""What calls may ask for, and how those that ask for more are refused; no engine runs here."""

import dataclasses
import json
import pathlib
import types

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.generate.server import protocol, stage
from attnpo_jax.generate.server.answers import TokenTexts
from attnpo_jax.generate.server.errors import ApiError
from attnpo_jax.sampling import SamplingSettings
from tests import tiny
from tests.generate.calls import CHAT, LENGTH, QUESTION, served_as


@pytest.fixture(scope="module")
def served(served_run, sampled):
    return served_as(sampled, served_run)


def refused(body, served, is_chat):
    """What a call is refused with."""
    with pytest.raises(ApiError) as found:
        protocol.parse(body, served, is_chat=is_chat)
    error = found.value.body()["error"]
    assert error["type"] == "invalid_request_error"
    return found.value.status, error["param"], error["message"]


BAD = [
    ({"temperature": "warm"}, "temperature", "accepted: 0 (the likeliest token)"),
    ({"temperature": float("nan")}, "temperature", "`temperature` is NaN"),
    ({"top_p": 0}, "top_p", "accepted: a number above 0"),
    ({"n": 0}, "n", "accepted: a whole number from 1 to 8"),
    ({"n": True}, "n", "`n` is true"),
    ({"max_tokens": 0}, "max_tokens", "a whole number from 1 up"),
    ({"max_tokens": 500}, "max_tokens", "leave room for"),
    ({"max_completion_tokens": 3}, "max_tokens", "differ"),
    ({"logprobs": 3}, "logprobs", "True or False"),
    ({"top_logprobs": 3}, "top_logprobs", "for `logprobs`: true alone"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
    ({"stop": ""}, "stop", "texts that are not empty"),
    ({"stop": ["a", ""]}, "stop", "texts that are not empty"),
    ({"stop": ["a"] * 65}, "stop", "65 entries"),
    ({"seed": 1.5}, "seed", "a whole number"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "by token id"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "by token id"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "accepted: 0"),
    ({"min_tokens": 20}, "min_tokens", "above max_new_tokens"),
    ({"response_format": {"type": "json_object"}}, "response_format", "text"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "true alone"),
    ({"stream": "yes"}, "stream", "True or False"),
    ({"tool_choice": "required"}, "tool_choice", "'none', 'auto'"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "does not write"),
    ({"messages": []}, "messages", "at least one"),
    ({"messages": [{"role": "user", "content": " "}]}, "messages", "is empty"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages", "is robot"),
    ({"messages": [*QUESTION, {"role": "assistant", "content": "a"}]}, "messages", "last turn"),
    ({"messages": [{"role": "user", "content": "a" * 300}]}, "messages", "there is room for 160"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "Unicode"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages",
        "accepted: text",
    ),
    ({"colour": "blue"}, "colour", "'colour' is not known here"),
]


@pytest.mark.parametrize(
    ("change", "param", "told"),
    BAD,
    ids=[f"{i}-{next(iter(row[0]))}" for i, row in enumerate(BAD)],
)
def test_bad_chats_are_refused(served, change, param, told):
    status, found, message = refused(CHAT | change, served, True)
    assert (status, found) == (400, param)
    assert told in message


@pytest.mark.parametrize(
    ("change", "param", "told"),
    [
        ({"prompt": ""}, "prompt", "none of them empty"),
        ({"prompt": []}, "prompt", "none of them empty"),
        ({"prompt": [1, "a"]}, "prompt", "none of them empty"),
        ({"prompt": [1, 99999]}, "prompt", "holds the token 99999"),
        ({"prompt": [1] * 160}, "prompt", "160 tokens"),
        ({"prompt": ["a"] * 9}, "prompt", "9 prompts; accepted: 8"),
        ({"prompt": ["a"] * 5, "n": 2}, "prompt", "5 prompts times n = 2"),
        ({"prompt": "\ud800"}, "prompt", "Unicode"),
        ({"logprobs": 21}, "logprobs", "from 0 to 20"),
        ({"echo": True}, "echo", "accepted: false"),
        ({"best_of": 3}, "best_of", "the same as `n`"),
        ({"messages": QUESTION}, "messages", "not known here"),
    ],
)
def test_bad_completions_are_refused(served, change, param, told):
    body = {"model": "model", "prompt": "a", "max_tokens": 2} | change
    status, found, message = refused(body, served, False)
    assert (status, found) == (400, param)
    assert told in message


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "7"]), inner)
    ),
    max_leaves=8,
)


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    is_chat=st.booleans(),
    change=st.dictionaries(
        st.sampled_from(sorted(protocol._COMMON | protocol._CHAT | protocol._COMPLETIONS)),
        _ANYTHING,
        max_size=3,
    ),
)
def test_whatever_is_asked_is_read_or_refused(served, is_chat, change):
    body = CHAT if is_chat else {"model": "model", "prompt": "a"}
    try:
        asked = protocol.parse(body | change, served, is_chat=is_chat)
    except ApiError as error:
        assert error.status in (400, 404)
        json.dumps(error.body()).encode()
    else:
        assert all(len(request.tokens) for request in asked.requests)


def test_other_models_are_not_found(served):
    status, param, message = refused(CHAT | {"model": "gpt-4"}, served, True)
    assert (status, param) == (404, "model")
    assert message == "there is no model 'gpt-4'; accepted: 'model'"


def test_settings_reach_the_engine(sampled, served):
    asked = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7}
    asked |= {"repetition_penalty": 1.1, "presence_penalty": 0.3, "stop_token_ids": [5]}
    body = {"model": "model", "prompt": [4, 5], "stop": "x", "min_tokens": 2}
    body["logit_bias"] = {"3": -1}
    [request] = protocol.parse(body | asked | {"user": "u"}, served, is_chat=False).requests
    expected = asked | {"stop_token_ids": (5,), "stop": ("x",), "logit_bias": {3: -1}}
    expected |= {"min_new_tokens": 2, "max_new_tokens": LENGTH - 2}
    assert dataclasses.asdict(request.settings) == expected
    assert request.stop_tokens == sampled.stop_tokens
    # What is null counts as not there.
    nulls = dict.fromkeys(asked) | {"model": "model", "prompt": [4, 5], "max_tokens": 3}
    [request] = protocol.parse(nulls, served, is_chat=False).requests
    seed = request.settings.seed
    assert request.settings == SamplingSettings(max_new_tokens=3, seed=seed)


TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>"
    "{{ m['role'] }}\n{{ m['content'] }}{% for c in m['tool_calls'] or [] %}{{ c | tojson }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_tools_reach_the_template(sampled, served):
    fast = tiny.byte_tokenizer(
        ("<|im_end|>", "<|im_start|>"), WITH_TOOLS, eos_token="<|im_end|>", bos_token="<|im_start|>"
    )
    tokenizer = ChatTokenizer(fast, origin="with tools")
    sampled = dataclasses.replace(
        sampled, model=dataclasses.replace(sampled.model, tokenizer=tokenizer)
    )
    served = dataclasses.replace(served, model=sampled, length=2000)
    call = {"id": "c1", "type": "function"}
    call |= {"function": {"name": "find", "arguments": '{"what": "key"}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "under the mat"},
    ]
    body = {"model": "model", "messages": messages, "tools": [TOOL]}
    [request] = protocol.parse(body, served, is_chat=True).requests
    read = fast.decode(request.tokens)
    assert '"name": "find", "parameters"' in read
    assert "<|im_start|>system\nBe brief.<|im_end|>" in read
    assert '"arguments": {"what": "key"}' in read
    assert read.endswith("under the mat<|im_end|>\n<|im_start|>assistant\n")
    [without] = protocol.parse(body | {"tool_choice": "none"}, served, is_chat=True).requests
    assert '"parameters"' not in fast.decode(without.tokens)


def test_errors_are_of_openai_s_form():
    error = ApiError("no", status=429, param="n", code="c").body()
    assert error == {
        "error": {"message": "no", "type": "rate_limit_error", "param": "n", "code": "c"}
    }


def test_single_tokens_are_shown_with_their_bytes():
    """Of SentencePiece's and of byte-level vocabularies; of others, without."""
    words = ["<unk>", "▁the", "<0xE2>", "s"]
    pieces = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
    pieces.normalizer = normalizers.Replace(" ", "▁")
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    texts = TokenTexts(pieces)
    assert texts(1) == (" the", [*b" the"])
    assert texts(2) == ("\ufffd", [0xE2])
    assert (texts.distinct(2), texts.distinct(3)) == ("bytes:\\xe2", "s")
    bytes_ = TokenTexts(tiny.byte_tokenizer().backend_tokenizer)
    vocabulary = tiny.byte_tokenizer().get_vocab()
    assert bytes_(vocabulary["Ġ"]) == (" ", [32])
    assert bytes_(vocabulary["<|im_end|>"]) == ("<|im_end|>", [*b"<|im_end|>"])
    plain = tokenizers.Tokenizer(models.WordLevel({"word": 0, "<unk>": 1}, unk_token="<unk>"))
    assert TokenTexts(plain)(0) == ("word", None)


@pytest.mark.parametrize(
    ("which", "workdir", "name", "expected"),
    [
        (None, "w", "w/step-30", "step-30"),
        ("trained", "w", "w/step-30", "step-30"),
        ("base", "w", "org/model", "org/model"),
        (None, None, "smollm2-135m-instruct", "smollm2-135m-instruct"),
        (None, None, "FOLDER/", "my-model"),
    ],
)
def test_a_model_has_the_name_that_one_expects(tmp_path, which, workdir, name, expected):
    (tmp_path / "my-model").mkdir()
    run = types.SimpleNamespace(workdir=None if workdir is None else pathlib.Path(workdir))
    name = name.replace("FOLDER", str(tmp_path / "my-model"))
    assert stage._name_of(run, which, types.SimpleNamespace(name=name)) == expected
