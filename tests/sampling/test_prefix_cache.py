"""Prompts that are read behind what slots hold: the same responses, and less is read."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpo_jax.judge.language_model import load_model
from attnpo_jax.sampling import Engine, Request, SamplingSettings, runner
from attnpo_jax.sampling.prefix_cache import place
from attnpo_jax.sampling.runner import Runner
from tests import tiny

LENGTH = 240


@pytest.fixture(scope="module", params=[None, 100])
def model(request, tmp_path_factory):
    """Without windows, and with one whose ring is too short for some prompts."""
    model = load_model(str(tiny.write_folder(tmp_path_factory.mktemp("model"))))
    windows = None if request.param is None else (request.param,) * model.config.num_layers
    return dataclasses.replace(
        model, config=dataclasses.replace(model.config, layer_windows=windows)
    )


def engine_of(model, **options):
    options = {"length": LENGTH, "slots": 1, "steps": 3} | options
    return Engine(model.config, model.params, model.tokenizer, **options)


def requests_of(model, prompts, **given):
    settings = SamplingSettings(**{"max_new_tokens": 9, "temperature": 0.8, "top_p": 0.9} | given)
    return [
        Request(f"p{k}", tokens, settings, stop_tokens=(2,)) for k, tokens in enumerate(prompts)
    ]


def conversations(model, number):
    """Prompts of which many begin as others do."""
    rng = np.random.default_rng(number)
    prompts = [rng.integers(3, model.config.vocab_size, 50)]
    for _ in range(number - 1):
        before = prompts[rng.integers(len(prompts))]
        kept = before[: rng.integers(len(before) // 2, len(before) + 1)]
        more = rng.integers(3, model.config.vocab_size, rng.integers(1, 60))
        prompts.append(np.concatenate([kept, more])[:220])
    return [np.asarray(tokens, np.int32) for tokens in prompts]


def run(engine, requests, rng=None, cancelled=()):
    """Adds requests at any time, and gives some up; the responses of the others."""
    left, found = list(requests), {}
    while left or engine.running or engine.waiting:
        many = len(left) if rng is None else rng.integers(0, 4)
        for request in left[:many]:
            engine.add(request)
        left = left[many:]
        for update in engine.step():
            if update.request.id in cancelled and rng.random() < 0.5:
                engine.cancel(update.request)
            elif update.response is not None:
                found[update.request.id] = update.response
    return found


@pytest.mark.parametrize(("slots", "asked"), [(1, {}), (4, {"repetition_penalty": 1.3})])
def test_responses_are_those_of_prompts_that_are_read_whole(model, monkeypatch, slots, asked):
    monkeypatch.setattr(runner, "_MOST_BEHIND", 40)  # some take two calls
    requests = requests_of(model, conversations(model, 24), **asked)
    wanted = run(engine_of(model), requests)
    rng = np.random.default_rng(slots)
    cancelled = {"p3", "p7", "p8"}
    engine = engine_of(model, slots=slots, prefix_caching=True)
    found = run(engine, requests, rng, cancelled)
    assert wanted.keys() - cancelled <= found.keys()
    for id, response in found.items():
        assert response.tokens == wanted[id].tokens, id
        np.testing.assert_allclose(response.logprobs, wanted[id].logprobs, atol=1e-4)
    assert sum(response.cached_tokens > 0 for response in found.values()) >= 3
    assert not any(response.cached_tokens for response in wanted.values())


def test_the_next_turn_reads_what_is_new_alone(model, monkeypatch):
    engine, read = engine_of(model, prefix_caching=True), []
    extend = Runner.extend

    def counted(self, rows, size):
        read.extend(len(row.tokens) - 1 - row.held for row in rows)
        extend(self, rows, size)

    monkeypatch.setattr(Runner, "extend", counted)
    prompt, cached = conversations(model, 1)[0].astype(np.int32), []
    for turn in range(3):
        (request,) = requests_of(model, [prompt], min_new_tokens=9, seed=turn)
        response = run(engine, [request])["p0"]
        cached.append(response.cached_tokens)
        prompt = np.append(prompt, [*response.tokens, 5, 6, 7]).astype(np.int32)
    # The last token of a response is sampled, not read.
    assert cached == [0, 58, 70] and read == [3, 3]


def test_prompts_that_come_together_read_their_beginning_once(model, monkeypatch):
    engine, rows = engine_of(model, slots=8, prefix_caching=True), []
    prefill = Runner.prefill

    def noted(self, some, *args, **kwargs):
        rows.extend(some)
        prefill(self, some, *args, **kwargs)

    monkeypatch.setattr(Runner, "prefill", noted)
    first = conversations(model, 1)[0]
    prompts = [np.append(first, [k, 9, k]).astype(np.int32) for k in range(20, 25)]
    requests = requests_of(model, [*prompts, prompts[0]])
    wanted = run(engine_of(model), requests)
    rows.clear()
    found = run(engine, requests)
    assert len(rows) == 1
    assert {k: r.tokens for k, r in found.items()} == {k: r.tokens for k, r in wanted.items()}
    assert sorted(r.cached_tokens for r in found.values()) == [0, 0, 50, 50, 50, 50]


def test_other_parameters_have_nothing_cached(model):
    (request,) = requests_of(model, conversations(model, 1))
    engine = engine_of(model, prefix_caching=True)
    run(engine, [request])
    for forget in (lambda: engine.set_params(model.params), engine.release):
        assert run(engine, [request])["p0"].cached_tokens == 49
        forget()
        assert run(engine, [request])["p0"].cached_tokens == 0


def test_chats_that_take_turns_keep_what_was_said(model):
    engine = engine_of(model, slots=4, prefix_caching=True)
    engine._resizes = False  # as elsewhere than on a CPU
    system, cached = conversations(model, 1)[0], []
    prompts = [np.append(system, np.full(29, k)).astype(np.int32) for k in (10, 20, 30)]
    for _ in range(2):
        for k, prompt in enumerate(prompts):
            (request,) = requests_of(model, [prompt], min_new_tokens=9)
            response = run(engine, [request])["p0"]
            prompts[k] = np.append(prompt, [*response.tokens, 5, 6, 7]).astype(np.int32)
            cached.append(response.cached_tokens)
    assert cached == [0, 50, 50, 87, 87, 87]


@pytest.fixture(scope="module")
def broken(model):
    """A model that gives no numbers once it has read a token, and the token."""
    (bad,) = np.asarray(model.tokenizer.encode("~")[0]).tolist()
    embedding = np.array(model.params["embedding"])
    embedding[bad] = np.nan
    return dataclasses.replace(model, params={**model.params, "embedding": embedding}), bad


@pytest.mark.parametrize("quantized", [False, True])
def test_no_numbers_of_one_prompt_do_not_reach_others(broken, quantized):
    model, bad = broken
    rng, never = np.random.default_rng(0), {"logit_bias": {bad: -100.0}}
    start, other = (rng.integers(3, 60, n).astype(np.int32) for n in (50, 90))

    def after(tokens, *more):
        return np.append(tokens, more).astype(np.int32)

    engine = engine_of(model, slots=1, prefix_caching=True, quantized_cache=quantized)

    def reasons(engine, *prompts, **asked):
        found = run(engine, requests_of(model, prompts, **never | asked))
        found = [found[f"p{k}"] for k in range(len(prompts))]
        return [response.finish_reason for response in found], [r.cached_tokens for r in found]

    # What has failed is not held, and what it left in its slot is not seen by others.
    long = np.concatenate([other, other])[:170]
    assert reasons(engine, after(long, bad, 5)) == (["error"], [0])
    assert reasons(engine, other) == (["length"], [0])
    reason, [cached] = reasons(engine, np.concatenate([other, start]))
    assert reason == ["length"] and (cached >= 90 or model.config.layer_windows)
    # The sampled token is read, behind what is held, while another goes on in the same call.
    engine = engine_of(model, slots=2, prefix_caching=True, quantized_cache=quantized)
    engine._resizes = False
    [last] = requests_of(model, [start], max_new_tokens=1, logit_bias={bad: 100.0})
    [on] = requests_of(model, [other], max_new_tokens=3, **never)
    on = dataclasses.replace(on, id="on")
    assert run(engine, [last, on])["p0"].tokens == (bad,)
    assert reasons(engine, start) == (["length"], [49])
    # One that began as a prompt that fails is read by itself.
    engine = engine_of(model, slots=3, prefix_caching=True, quantized_cache=quantized)
    prompts = after(start, bad, 5, 6), after(start, 5, 6, 7), after(start, bad, 7, 8)
    assert reasons(engine, *prompts) == (["error", "length", "error"], [0, 0, 0])


def test_a_prompt_that_fails_behind_a_good_beginning_fails_once(broken):
    model, bad = broken
    engine = engine_of(model, slots=4, prefix_caching=True)
    engine._resizes = False
    first = conversations(model, 1)[0] % bad
    rest = np.arange(3, 53, dtype=np.int32)  # so that the beginning is copied, and stays
    [good] = requests_of(model, [np.append(first, rest)], logit_bias={bad: -100.0})
    [failing] = requests_of(model, [np.append(first, [bad, 5])], logit_bias={bad: -100.0})
    assert run(engine, [good])["p0"].finish_reason == "length"
    engine.add(failing)
    updates = [update for _ in range(4) for update in engine.step()]
    assert [u.response.finish_reason for u in updates if u.response] == ["error"]
    assert not engine.running and not engine.waiting
    assert run(engine, [good])["p0"].cached_tokens > 90


def test_what_was_not_read_is_not_held(model, monkeypatch):
    engine = engine_of(model, prefix_caching=True)
    (request,) = requests_of(model, conversations(model, 1))
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "prefill", lambda *args, **kwargs: 1 / 0)
        engine.add(request)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.cancel(request)
    assert run(engine, [request])["p0"].cached_tokens == 0


def test_steady_engines_read_all_of_a_prompt(model):
    with pytest.raises(ValueError, match="steady"):
        engine_of(model, steady=True, prefix_caching=True)


TOKENS = st.lists(st.integers(0, 2), min_size=0, max_size=4).map(
    lambda parts: np.concatenate([np.zeros(0, np.int32), *(np.full(20, part) for part in parts)])
)


@given(st.data())
@settings(max_examples=300)
def test_a_source_holds_what_a_prompt_begins_with_when_it_is_copied(data):
    prompts = data.draw(st.lists(TOKENS, min_size=1, max_size=5))
    slots = data.draw(st.integers(len(prompts), 9))
    busy = data.draw(st.sets(st.integers(0, slots - 1), max_size=slots - len(prompts)))
    held = data.draw(st.dictionaries(st.integers(0, slots - 1), TOKENS))
    free = data.draw(st.permutations(sorted(set(range(slots)) - busy)))
    free = sorted(free, key=lambda b: b in held)
    counts, spare = [], len(free) - len(prompts)
    for _ in prompts:
        counts.append(1 + data.draw(st.integers(0, spare)))
        spare -= counts[-1] - 1
    placed = place(prompts, counts, free, held)

    assert [len(one.slots) for one in placed] == counts
    taken = [b for one in placed for b in one.slots]
    assert len(set(taken)) == len(taken) and set(taken) <= set(free)
    now = {b: list(tokens) for b, tokens in held.items()}
    for waits in (False, True):
        some = [pair for pair in zip(placed, prompts, strict=True) if pair[0].waits == waits]
        for one, prompt in some:
            if one.source is not None:
                assert now[one.source][: one.length] == list(prompt[: one.length])
                assert one.length >= 32
                now[one.slots[0]] = now[one.source]
        for one, prompt in some:
            now |= {b: list(prompt) for b in one.slots}
    if len(prompts) == 1:
        [one], [prompt] = placed, prompts
        best = max((len(t) for t in held.values() if list(t) == list(prompt[: len(t)])), default=0)
        assert one.length >= best or best < 32
        # What others hold is lost only where there is no other place.
        empty = [b for b in free if b not in held]
        lost = [b for b in one.slots if b in held and b != one.source]
        assert not lost or len(empty) < counts[0]
