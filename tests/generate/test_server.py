"""The server, asked by OpenAI's client and, where that would not say such things, by hand."""

import concurrent.futures

import jax
import numpy as np
import openai
import pytest

from attnpo_jax.data.token_bytes import TokenBytes
from attnpo_jax.generate import generate
from attnpo_jax.models import decoder, lm_head
from tests.generate.calls import CHAT, LENGTH, QUESTION, post


@pytest.fixture(scope="module")
def letters(sampled):
    """A bias towards small letters, so that what is sampled can be read."""
    vocabulary = sampled.model.tokenizer.tokenizer.get_vocab()
    return {str(vocabulary[letter]): 60 for letter in "abcdefghijklmnopqrstuvwxyz"}


@pytest.fixture(scope="module")
def logps(sampled):
    """Gives the forward pass's log-probs (L, V) of a sequence."""
    model = sampled.model

    @jax.jit
    def whole(tokens_1L, branch_1L):
        positions = np.arange(LENGTH)[None]
        hidden = decoder.forward(model.config, model.params, tokens_1L, positions, branch_1L)
        logits = lm_head.logits(hidden, decoder.unembedding(model.params))
        return jax.nn.log_softmax(logits)[0]

    def of(tokens):
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(tokens)] = tokens
        return np.asarray(whole(row, (np.arange(LENGTH)[None] < len(tokens)).astype(np.int32)))

    return of


# --- What is answered -----------------------------------------------------------------------------


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["model"]
    assert client.models.retrieve("model").owned_by == "attnpo"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        client.models.retrieve("gpt-4")


def test_chats_are_answered_as_generate_does(sampled, client):
    answer = client.chat.completions.create(**CHAT | {"temperature": 0})
    [expected] = generate(sampled, [QUESTION], temperature=0, max_new_tokens=12)
    [choice] = answer.choices
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert answer.usage.total_tokens == expected.prompt_tokens + len(expected.tokens)
    assert answer.object == "chat.completion"
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    again = client.chat.completions.create(**CHAT | {"temperature": 0, "messages": parts})
    assert again.choices[0].message.content == expected.text


def test_the_next_turn_of_a_chat_is_not_read_from_its_start(sampled, client):
    ask = CHAT | {"temperature": 0}
    said = client.chat.completions.create(**ask).choices[0].message.content
    turns = [*QUESTION, {"role": "assistant", "content": said}, {"role": "user", "content": "So?"}]
    [expected] = generate(sampled, [turns], temperature=0, max_new_tokens=12)
    parts = client.chat.completions.create(
        **ask | {"messages": turns, "stream": True, "stream_options": {"include_usage": True}}
    )
    *rest, last = parts
    assert "".join(part.choices[0].delta.content or "" for part in rest) == expected.text
    assert 32 <= last.usage.prompt_tokens_details.cached_tokens < last.usage.prompt_tokens
    again = client.chat.completions.create(**ask | {"messages": turns})
    assert again.choices[0].message.content == expected.text
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert cached == again.usage.prompt_tokens - 1


def test_completions_go_on_with_texts_and_with_tokens(sampled, client, letters):
    ask = {"model": "model", "temperature": 0, "max_tokens": 5, "logit_bias": letters}
    prompts = ["To be", "or not"]
    both = client.completions.create(**ask, prompt=prompts, n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.usage.prompt_tokens == sum(
        len(sampled.model.tokenizer.encode(text)[0]) for text in prompts
    )
    assert both.usage.completion_tokens == 20
    for i, text in enumerate(prompts):
        [alone] = client.completions.create(**ask, prompt=text).choices
        [by_ids] = client.completions.create(
            **ask, prompt=sampled.model.tokenizer.encode(text)[0]
        ).choices
        # Greedy, so that both samples are the same.
        texts = {choice.text for choice in both.choices[2 * i : 2 * i + 2]}
        assert texts == {alone.text} == {by_ids.text}
        assert len(alone.text) == 5 and alone.text.isalpha()


def test_log_probs_are_those_of_the_forward_pass(sampled, client, logps):
    ask = CHAT | {"logprobs": True, "top_logprobs": 20, "n": 2, "temperature": 0.8}
    answer = client.chat.completions.create(**ask)
    chats = sampled.model.tokenizer
    prompt = sampled.model.tokenizer.encode(chats.render(QUESTION, generation_prompt=True))[0]
    bytes_of = TokenBytes(chats.tokenizer.backend_tokenizer)
    token_of = {bytes_of(token): token for token in range(sampled.model.config.vocab_size)}
    assert len(answer.choices) == 2
    for choice in answer.choices:
        entries = choice.logprobs.content
        tokens = [token_of[bytes(entry.bytes)] for entry in entries]
        expected = logps([*prompt, *tokens])[len(prompt) - 1 :]
        assert len(entries) == 12
        for entry, token, row in zip(entries, tokens, expected, strict=False):
            assert entry.logprob == pytest.approx(row[token], abs=1e-4)
            likeliest = [top.logprob for top in entry.top_logprobs]
            assert likeliest == sorted(likeliest, reverse=True)
            np.testing.assert_allclose(likeliest, np.sort(row)[::-1][:20], atol=1e-4)
            assert sum(np.exp(likeliest)) < 1


def test_completions_have_log_probs_in_their_own_form(client, letters):
    ask = {"model": "model", "prompt": "To be", "max_tokens": 6, "seed": 1, "logit_bias": letters}
    [choice] = client.completions.create(**ask, logprobs=3).choices
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text
    assert told.text_offset == list(range(6))
    for token, logprob, top in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, strict=True
    ):
        assert top[token] == logprob
        assert 3 <= len(top) <= 4
    [plain] = client.completions.create(**ask, logprobs=0).choices
    assert plain.logprobs.top_logprobs is None
    np.testing.assert_allclose(plain.logprobs.token_logprobs, told.token_logprobs, atol=1e-5)
    [without] = client.completions.create(**ask).choices
    assert without.logprobs is None and without.text == choice.text


@pytest.mark.parametrize("stop", [None, "w"])
def test_a_chat_in_parts_is_the_whole_chat(client, letters, stop):
    ask = CHAT | {"n": 3, "logprobs": True, "top_logprobs": 2, "max_tokens": 40}
    ask |= {"logit_bias": letters, "stop": stop}
    whole = client.chat.completions.create(**ask)
    texts, told, reasons = [""] * 3, [[] for _ in range(3)], [None] * 3
    *parts, last = client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    )
    for part in parts:
        assert part.usage is None
        [choice] = part.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.logprobs:
            told[choice.index] += choice.logprobs.content
        reasons[choice.index] = choice.finish_reason
    # The call before this one has read the prompt.
    cached = {"prompt_tokens_details": last.usage.prompt_tokens_details}
    assert last.choices == [] and last.usage == whole.usage.model_copy(update=cached)
    assert cached["prompt_tokens_details"].cached_tokens == last.usage.prompt_tokens - 1
    assert {part.id for part in (*parts, last)} == {last.id}
    for choice in whole.choices:
        i = choice.index
        assert texts[i] == choice.message.content
        assert reasons[i] == choice.finish_reason
        shown = [(e.token, [top.token for top in e.top_logprobs]) for e in told[i]]
        expected = [
            (e.token, [top.token for top in e.top_logprobs]) for e in choice.logprobs.content
        ]
        assert shown == expected
        if stop:
            assert "w" not in texts[i]
    if stop:
        assert "stop" in reasons


def test_a_completion_in_parts_is_the_whole_completion(client, letters):
    ask = {"model": "model", "prompt": "To be", "max_tokens": 30, "seed": 5, "logprobs": 1}
    ask |= {"logit_bias": letters}
    [whole] = client.completions.create(**ask).choices
    parts = list(client.completions.create(**ask, stream=True))
    assert len(parts) > 2
    assert "".join(part.choices[0].text for part in parts) == whole.text
    for name in ("tokens", "text_offset"):
        came = [x for part in parts for x in getattr(part.choices[0].logprobs, name)]
        assert came == getattr(whole.logprobs, name)
    assert parts[-1].choices[0].finish_reason == "length"
    assert all(part.usage is None for part in parts)


def test_draws_depend_on_the_seed(client):
    def said(**ask):
        return [c.message.content for c in client.chat.completions.create(**ask).choices]

    assert said(**CHAT, n=3) == said(**CHAT, n=3)
    assert len(set(said(**CHAT, n=3))) == 3
    assert said(**CHAT | {"seed": 4}) != said(**CHAT)
    without = {key: value for key, value in CHAT.items() if key != "seed"}
    assert said(**without) != said(**without)


def test_stop_texts_and_tokens_end_an_answer(sampled, client, letters):
    ask = {"model": "model", "prompt": "To be", "temperature": 1, "seed": 1, "max_tokens": 20}
    ask |= {"logit_bias": letters}
    [plain] = client.completions.create(**ask).choices
    cut = plain.text[7:9]
    [stopped] = client.completions.create(**ask, stop=["not there", cut]).choices
    assert stopped.text == plain.text[: plain.text.index(cut)]
    assert stopped.finish_reason == "stop"
    [end] = sampled.model.tokenizer.encode(plain.text[7])[0]
    [ended] = client.completions.create(
        **ask, logprobs=0, extra_body={"stop_token_ids": [int(end)]}
    ).choices
    before = plain.text[: plain.text.index(plain.text[7])]
    assert (ended.finish_reason, "".join(ended.logprobs.tokens)) == ("stop", before)


def test_biases_and_penalties_change_what_is_said(client, letters):
    ask = {"model": "model", "prompt": "To be", "max_tokens": 8, "temperature": 0}
    only = client.completions.create(**ask, logit_bias={next(iter(letters)): 1000}).choices[0].text
    assert only == "a" * 8
    fresh = client.completions.create(**ask, logit_bias=letters, presence_penalty=100)
    assert len(set(fresh.choices[0].text)) == 8


def test_eight_clients_at_once_get_what_they_get_alone(client):
    def said(number):
        ask = CHAT | {"seed": number, "max_tokens": 5 + 5 * number}
        return client.chat.completions.create(**ask).choices[0].message.content

    alone = [said(number) for number in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(said, range(8))) == alone


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"{", 400, "the body is not JSON"),
        (b"[1]", 400, "not a JSON object"),
        (b"[" * 9000, 400, "levels deep"),
        (b'{"model": 5}', 400, "`model` is 5"),
        (b"{}", 404, "`model` is missing"),
        (b'{"model": "gpt-4"}', 404, "there is no model 'gpt-4'; accepted: 'model'"),
        (b'{"model": "model", "prompt": "a", "n": 0}', 400, "accepted: a whole number from 1 to 8"),
        (
            b'{"model": "model", "prompt": "a", "logit_bias": {"9999": 1}}',
            400,
            "a token of logit_bias is 9999",
        ),
        (b" " * 20_001, 413, "more than 20000 bytes"),
    ],
)
def test_bad_bodies_are_refused(served, client, body, status, told):
    found, answer = post(served, "/v1/completions", body)
    assert (found, told in answer["error"]["message"]) == (status, True), answer


def test_other_types_and_places_are_refused(served, client):
    assert post(served, "/v1/completions", CHAT, "text/plain")[0] == 415
    status, answer = post(served, "/v1/embeddings", CHAT)
    assert (status, answer["error"]["message"]) == (404, "POST /v1/embeddings: Not Found")
    assert post(served, "/v1/models", CHAT)[0] == 405


def test_logits_that_are_no_numbers_are_told(served, sampled, client):
    served._engine.set_params(jax.tree.map(lambda x: x * float("nan"), sampled.model.params))
    try:
        with pytest.raises(openai.InternalServerError, match="no numbers"):
            client.chat.completions.create(**CHAT)
        with pytest.raises(openai.APIError, match="no numbers"):
            list(client.chat.completions.create(**CHAT, stream=True))
    finally:
        served._engine.set_params(sampled.model.params)
