"""Responses of the engine: what they are, and that nothing around them changes them."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from attnpo_jax.judge.language_model import load_model
from attnpo_jax.models import decoder, lm_head
from attnpo_jax.parallel import backend as backends
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.sampling import Engine, Request, SamplingSettings
from attnpo_jax.sampling.runner import Runner, row_length
from tests import tiny
from tests.sampling import greedy

HEADER = "<|im_start|>user\nWhat do you say to this one: "
LENGTH = 160
GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(str(tiny.write_folder(tmp_path_factory.mktemp("model"))))


def ids(model, text):
    return np.asarray(model.tokenizer.encode(text)[0], np.int32)


def requests_of(model, number=9, samples=1, **settings):
    settings = SamplingSettings(**{"max_new_tokens": 20, **settings})
    texts = [HEADER + "la " * (k % 5) + f"{k}?" for k in range(number)]
    return [
        Request(f"p{k}", ids(model, text), settings, sample, stop_tokens=(2,))
        for k, text in enumerate(texts)
        for sample in range(samples)
    ]


def engine_of(model, **options):
    return Engine(model.config, model.params, model.tokenizer, **{"length": LENGTH} | options)


def responses(engine, requests):
    return {(r.id, r.sample): r for r in engine.run(requests)}


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, row, branch):
    positions = jnp.arange(row.shape[1])[None]
    hidden = decoder.forward(config, params, row, positions, branch)
    return lm_head.logits(
        hidden, decoder.unembedding(params), softcap=config.final_logit_softcapping
    )[0]


def whole_pass(model, tokens):
    """Logits at every position, by the forward pass; all rows are of one length."""
    row = np.zeros((1, LENGTH), np.int32)
    row[0, : len(tokens)] = tokens
    branch = (np.arange(LENGTH)[None] < len(tokens)).astype(np.int32)
    return np.asarray(_logits(model.config, model.params, row, branch))[: len(tokens)]


def test_greedy_responses_are_those_of_the_whole_pass(model):
    requests = requests_of(model, temperature=0)
    found = responses(engine_of(model, slots=4), requests)
    assert len(found) == len(requests)
    for request in requests:
        response = found[request.id, 0]
        # What follows a token does not change its logits: by induction, one pass tells of all.
        logits = whole_pass(model, [*request.tokens, *response.tokens])[len(request.tokens) - 1 :]
        taken = np.arange(len(response.tokens)), np.array(response.tokens)
        assert (logits[taken] > logits[:-1].max(-1) - 1e-4).all()
        logps = special.log_softmax(logits, axis=-1)
        np.testing.assert_allclose(response.logprobs, logps[taken], atol=1e-4)
        assert response.finish_reason == ("stop" if response.tokens[-1] == 2 else "length")
        assert len(response.tokens) <= 20


SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 3}


@pytest.fixture(scope="module")
def expected(model):
    """Responses that were drawn by one slot, one after the other."""
    return responses(engine_of(model, slots=1), requests_of(model, samples=2, **SAMPLED))


def test_log_probs_are_those_of_the_forward_pass(model, expected):
    for request in requests_of(model, samples=2, **SAMPLED):
        response = expected[request.id, request.sample]
        tokens = [*request.tokens, *response.tokens]
        logps = special.log_softmax(whole_pass(model, tokens), axis=-1)
        at = np.arange(len(request.tokens) - 1, len(tokens) - 1)
        np.testing.assert_allclose(
            response.logprobs, logps[at, np.array(response.tokens)], atol=1e-4
        )


def same(found, expected):
    """The same tokens; log-probs up to rounding."""
    assert found.keys() == expected.keys()
    for key, response in found.items():
        assert response.tokens == expected[key].tokens, key
        assert response.text == expected[key].text
        np.testing.assert_allclose(response.logprobs, expected[key].logprobs, atol=1e-4)


@pytest.mark.parametrize("slots", [3, 7, 64])
@pytest.mark.parametrize("steps", [1, 8])
def test_slots_and_order_change_nothing(model, expected, slots, steps):
    requests = requests_of(model, samples=2, **SAMPLED)
    order = np.random.default_rng(slots).permutation(len(requests))
    engine = engine_of(model, slots=slots, steps=steps)
    same(responses(engine, [requests[i] for i in order]), expected)


@pytest.mark.parametrize(
    ("axis", "count"),
    [("data", 2), ("data", 8), ("fsdp", 2), ("fsdp", 8), ("tensor", 2), ("tensor", 4)],
)
def test_devices_change_nothing(model, expected, axis, count):
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | {axis: count}
    backend = backends.Sharded(model.config, sizes, jax.devices()[:count])
    placed = jax.device_put(model.params, backend.parameter_shardings())
    on_mesh = dataclasses.replace(model, params=placed)
    engine = engine_of(on_mesh, slots=6, backend=backend)
    same(responses(engine, requests_of(model, samples=2, **SAMPLED)), expected)


def test_eight_devices_of_heads_change_nothing(tmp_path):
    folder = tiny.write_folder(tmp_path, num_attention_heads=8, num_key_value_heads=8)
    model = load_model(str(folder))
    requests = requests_of(model, 4, samples=2, max_new_tokens=8, **SAMPLED)
    of_one_size = {"slots": 4, "steady": True}
    wanted = responses(engine_of(model, **of_one_size), requests)
    sizes = {"data": 1, "fsdp": 1, "tensor": 8}
    backend = backends.Sharded(model.config, sizes, jax.devices())
    placed = jax.device_put(model.params, backend.parameter_shardings())
    on_mesh = dataclasses.replace(model, params=placed)
    same(responses(engine_of(on_mesh, **of_one_size, backend=backend), requests), wanted)


@pytest.mark.parametrize("steady", [False, True])
def test_a_prompt_is_read_once_for_all_of_its_samples(model, monkeypatch, steady):
    requests = requests_of(model, number=2, samples=3, repetition_penalty=1.2, **SAMPLED)
    rows = []
    prefill = Runner.prefill

    def noted(self, some, *args, **kwargs):
        rows.extend(some)
        prefill(self, some, *args, **kwargs)

    monkeypatch.setattr(Runner, "prefill", noted)
    together = responses(engine_of(model, slots=6, steady=steady), requests)
    assert [len(row.slots) for row in rows] == [3, 3]
    rows.clear()
    # In steady mode log-probs are the same to the last bit, whoever is read with whom.
    alone = responses(engine_of(model, slots=6, steady=steady), requests[::3])
    assert [len(row.slots) for row in rows] == [1, 1]
    same(alone, {key: together[key] for key in alone})
    if steady:
        assert {r.logprobs for r in alone.values()} <= {r.logprobs for r in together.values()}
    same(together, responses(engine_of(model, slots=1), requests))


def penalized(x, prompt, before):
    """Of what is in the prompt or sampled, and of what is sampled."""
    tokens = np.arange(len(x))
    x = np.where(np.isin(tokens, [*prompt, *before]), np.where(x > 0, x / 1.5, x * 1.5), x)
    x = x - 0.8 * np.isin(tokens, before) + 2.0 * (tokens == 7)
    return np.where(x >= np.sort(x)[-9], x, -np.inf) / 0.7


def nucleus(x, prompt, before):
    x = np.where(x >= np.sort(x)[-12], x, -np.inf) / 0.5
    order = np.argsort(-x)
    p = special.softmax(x)[order]
    x[order[np.cumsum(p) - p >= 0.8]] = -np.inf
    return np.where(special.softmax(x) >= 0.5 * special.softmax(x).max(), x, -np.inf)


DRAWN = {  # Settings, and what they make of logits.
    "penalties": (
        {
            "temperature": 0.7,
            "top_k": 9,
            "repetition_penalty": 1.5,
            "presence_penalty": 0.8,
            "logit_bias": {7: 2.0},
        },
        penalized,
    ),
    "nucleus": ({"temperature": 0.5, "top_k": 12, "top_p": 0.8, "min_p": 0.5}, nucleus),
}


@pytest.mark.parametrize("case", DRAWN)
def test_draws_have_the_model_s_probabilities(model, case):
    """Two tokens a response: what prefill draws, and what decoding does after it."""
    given, changed = DRAWN[case]
    draws = 20_000
    settings = SamplingSettings(max_new_tokens=2, seed=11, **given)
    prompt = ids(model, HEADER + "1?")
    requests = [Request("p", prompt, settings, sample) for sample in range(draws)]
    engine = engine_of(model, slots=250, steps=2)
    pairs = np.array([response.tokens for response in engine.run(requests)])
    assert pairs.shape == (draws, 2)

    def check(tokens, before):
        x = whole_pass(model, [*prompt, *before])[-1].astype(np.float64)
        expected = special.softmax(changed(x, prompt, before)) * len(tokens)
        observed = np.bincount(tokens, minlength=len(x))
        some = expected > 0
        assert observed[~some].sum() == 0 and some.sum() > 3 and expected[some].min() > 5
        assert stats.chisquare(observed[some], expected[some]).pvalue > 1e-3

    check(pairs[:, 0], [])
    for first in np.unique(pairs[:, 0]):
        check(pairs[pairs[:, 0] == first, 1], [first])


def test_some_alone_are_the_same_as_among_others(model, expected):
    # As after an interruption: fewer requests, which share another beginning.
    requests = requests_of(model, samples=2, **SAMPLED)[5:7]
    found = responses(engine_of(model, slots=2), requests)
    same(found, {key: expected[key] for key in found})


def test_requests_of_different_settings_are_served_side_by_side(model):
    various = [
        {"temperature": 0},
        {"temperature": 0.9, "top_k": 5},
        {"temperature": 1.2, "repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 0, "logit_bias": {40: 20.0}, "max_new_tokens": 3},
        {"temperature": 0, "repetition_penalty": 1.5},
        {"min_new_tokens": 6, "stop_token_ids": tuple(range(0, 200))},
    ]
    requests = [
        dataclasses.replace(request, settings=SamplingSettings(**{"max_new_tokens": 9} | given))
        for request, given in zip(requests_of(model, len(various)), various, strict=True)
    ]
    alone = {}
    for request in requests:
        alone |= responses(engine_of(model, slots=1), [request])
    # As many slots as before while they finish, or each number had a program for what is left.
    same(responses(engine_of(model, slots=4, steady=True), requests), alone)
    assert len(alone["p3", 0].tokens) == 3 and set(alone["p3", 0].tokens) == {40}
    repeated = alone["p4", 0].tokens
    assert len(set(repeated)) > len(set(alone["p0", 0].tokens[:9])) or len(repeated) < 9
    # All tokens below 200 end it, but not before six others.
    at_first, later = alone["p5", 0].tokens[:6], alone["p5", 0].tokens[6:]
    assert min(at_first) >= 200 and all(token >= 200 for token in later[:-1])


def test_stop_texts_end_a_response(model, expected):
    key, response = max(expected.items(), key=lambda item: len(item[1].text))
    stop = response.text[4:6]
    (request,) = [r for r in requests_of(model, samples=2, **SAMPLED) if (r.id, r.sample) == key]
    settings = dataclasses.replace(request.settings, stop=(stop,))
    (stopped,) = engine_of(model, slots=1).run([dataclasses.replace(request, settings=settings)])
    assert stopped.finish_reason == "stop"
    assert stopped.text == response.text[: response.text.index(stop)]
    assert stopped.tokens == response.tokens[: len(stopped.tokens)]


def test_updates_stream_what_the_response_is(model, expected):
    engine, streamed = engine_of(model, slots=5, steps=3), {}
    requests = requests_of(model, samples=2, **SAMPLED)
    for request in requests:
        engine.add(request)
    assert (engine.waiting, engine.running) == (len(requests), 0)
    while engine.running or engine.waiting:
        for update in engine.step():
            key = update.request.id, update.request.sample
            text, tokens = streamed.get(key, ("", ()))
            streamed[key] = text + update.text, tokens + update.tokens
            if update.response is not None:
                assert streamed[key] == (update.response.text, update.response.tokens)
    assert {k: tokens for k, (_, tokens) in streamed.items()} == {
        k: response.tokens for k, response in expected.items()
    }


def test_a_cancelled_request_frees_its_slot(model, expected):
    first, second, third = requests_of(model, samples=2, **SAMPLED)[:3]
    engine = engine_of(model, slots=1, steps=1)
    for request in (first, second, third):
        engine.add(request)
    engine.step()
    engine.cancel(first)
    engine.cancel(second)
    found = {}
    while engine.running or engine.waiting:
        found |= {
            (u.response.id, u.response.sample): u.response for u in engine.step() if u.response
        }
    same(found, {(third.id, third.sample): expected[third.id, third.sample]})


def test_logits_that_are_no_numbers_fail_their_own_prompt_alone(model):
    embedding = np.array(model.params["embedding"])
    (bad,) = ids(model, "~").tolist()
    embedding[bad] = np.nan
    params = {**model.params, "embedding": jnp.asarray(embedding)}
    requests = requests_of(model, 3, temperature=0, logit_bias={bad: -100.0})
    broken = np.append(requests[1].tokens, bad).astype(np.int32)
    requests[1] = dataclasses.replace(requests[1], tokens=broken)
    found = responses(engine_of(dataclasses.replace(model, params=params), slots=3), requests)
    assert [found[f"p{k}", 0].finish_reason for k in range(3)] == ["length", "error", "length"]
    assert found["p1", 0].tokens == ()


def test_a_full_slot_ends_a_response(model):
    (request,) = requests_of(model, 1, temperature=0, max_new_tokens=10**6)
    (response,) = engine_of(model, slots=1, length=len(request.tokens) + 5).run([request])
    assert (len(response.tokens), response.finish_reason) == (5, "length")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros(0, np.int32)}, "prompt p0: empty"),
        ({"tokens": np.zeros(LENGTH, np.int32)}, "prompt p0: 160 tokens, and there is room for"),
        ({"tokens": np.array([3, 10**6])}, "a token is 1000000; accepted: 0 to 257"),
        ({"stop_tokens": (-1,)}, "a stop token is -1"),
        ({"settings": SamplingSettings(logit_bias={999: 1.0})}, "a token of logit_bias is 999"),
    ],
)
def test_what_cannot_be_served_is_named(model, change, message):
    (request,) = requests_of(model, 1)
    with pytest.raises(UserError, match=message):
        engine_of(model, slots=1).add(dataclasses.replace(request, **change))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_p": 0}, "top_p = 0; accepted: a number above 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": -1}, "temperature = -1; accepted: 0"),
        ({"stop": ("",)}, "stop = .* texts that are not empty"),
        ({"top_k": 2.5}, "top_k = 2.5"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens = 9 is above"),
        ({"logit_bias": {0: float("inf")}}, "logit_bias"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        SamplingSettings(**given)


def test_rows_are_of_few_lengths():
    lengths = sorted({row_length(n) for n in range(5000)})
    assert lengths == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096,
                       6144]  # fmt: skip
    assert all(row_length(n) >= n for n in range(5000))


def test_nothing_compiles_after_the_warm_up(model, monkeypatch):
    engine = engine_of(model, slots=4)
    list(engine.run(requests_of(model, 9, **SAMPLED)))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if "backend_compile" in event else None
    )
    list(engine.run(requests_of(model, 30, samples=2, **SAMPLED)))
    assert compiled == []


@pytest.mark.golden
def test_the_embedded_models_greedy_tokens(smollm2_folder):
    rows = json.loads((GOLDENS / "smollm2_logits.json").read_text())
    model = load_model(str(smollm2_folder))
    settings = SamplingSettings(temperature=0, max_new_tokens=24)
    requests = [
        Request(str(k), np.array(row["input_ids"]), settings, stop_tokens=(2,))
        for k, row in enumerate(rows)
    ]
    found = responses(engine_of(model, slots=2), requests)
    assert [list(found[r.id, 0].tokens) for r in requests] == [row["greedy_24"] for row in rows]


@pytest.mark.parametrize("k", [1, 5, 7])
def test_the_likeliest_tokens_are_those_of_the_forward_pass(model, expected, k):
    plain = requests_of(model, number=4, samples=2, **SAMPLED)
    # Some ask, and others of the same calls do not.
    requests = [
        dataclasses.replace(request, top_logprobs=k if request.sample else 0) for request in plain
    ]
    found = responses(engine_of(model, slots=3), requests)
    same(found, {key: expected[key] for key in found})
    for request in requests:
        response = found[request.id, request.sample]
        if not request.top_logprobs:
            assert response.top == ()
            continue
        logits = whole_pass(model, [*request.tokens, *response.tokens])
        logps = special.log_softmax(logits, axis=-1)
        assert len(response.top) == len(response.tokens)
        for place, top in enumerate(response.top, len(request.tokens) - 1):
            likeliest = np.argsort(-logps[place], kind="stable")[:k]
            assert [token for token, _ in top] == likeliest.tolist()
            highest = logps[place, likeliest]
            np.testing.assert_allclose([logprob for _, logprob in top], highest, atol=1e-4)


def test_the_likeliest_tokens_can_be_no_more_than_a_program_tells(model):
    request = dataclasses.replace(requests_of(model, number=1)[0], top_logprobs=21)
    with pytest.raises(UserError, match="top_logprobs = 21; accepted: 0 to 20"):
        engine_of(model, slots=1).add(request)


def test_the_embedded_model_s_greedy_responses_are_those_of_transformers(smollm2_folder):
    pytest.importorskip("torch")
    same, apart = greedy.compare(2, 12)
    assert same + len(apart) == 2
    assert all(gap < greedy.TIE for gap in apart)
