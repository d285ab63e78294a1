"""Endpoints that answer, that fail in many ways, and that are stopped: what is asked, and kept."""

import collections
import contextlib
import itertools
import os
import random
import signal
import sqlite3
import sys
import time

import pytest

from attnpo_jax import config as config_lib
from attnpo_jax.evaluate import endpoint as endpoints
from attnpo_jax.evaluate.endpoint import Ask, asking
from attnpo_jax.parallel import preemption
from attnpo_jax.runtime.errors import Preempted, UserError
from tests import forked
from tests.evaluate import faulty


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", faulty.KEY)


def asks(number, **fields):
    fields = {"max_tokens": 1, "top_logprobs": 5} | fields
    return [
        Ask(f"q{i}", ({"role": "user", "content": f"no {i}"},), **fields) for i in range(number)
    ]


def judge(server, folder, **fields):
    section = config_lib.default_config().evaluate.judge
    given = {"base_url": getattr(server, "url", server), "model": "judge", "key_env": "JUDGE_KEY"}
    for name, value in (given | {"timeout": 20.0, "concurrency": 4} | fields).items():
        section[name] = value
    return endpoints.Endpoint(section, folder / "answers.sqlite", False, first_backoff=0.002)


def expected(wanted):
    return [faulty.verdict_of({"messages": list(ask.messages)}) for ask in wanted]


def heard(answers):
    return [(answer.text, answer.top_logprobs[0]) for answer in answers]


def tried(folder):
    """Outcomes and tokens of all that was sent."""
    with contextlib.closing(sqlite3.connect(folder / "answers.sqlite")) as database:
        return database.execute("SELECT outcome, tokens FROM attempts ORDER BY id").fetchall()


# --- What is asked --------------------------------------------------------------------------------


def test_answers_are_in_order_and_asked_for_once(tmp_path):
    wanted = asks(20)
    wanted.append(Ask("same as q3", wanted[3].messages, 1, top_logprobs=5))
    with faulty.Endpoint(lambda number, body: time.sleep(0.01)) as server:
        answers = judge(server, tmp_path).ask(wanted)
        again = judge(server, tmp_path).ask(wanted[::-1])
    assert heard(answers) == expected(wanted)
    assert again == answers[::-1]
    assert len(server.requests) == 20 and set(server.delivered.values()) == {1}
    assert 1 < server.most_under_way <= 4
    assert {sent[1] for sent in server.requests} == {f"Bearer {faulty.KEY}"}
    body = next(body for *_, body in server.requests if body["messages"][0]["content"] == "no 7")
    assert body == wanted[7].body("judge")
    assert (answers[0].prompt_tokens, answers[0].completion_tokens) == (10, 1)
    assert answers[0].finish_reason == "length"


def test_another_address_with_the_same_model_is_not_asked_again(tmp_path):
    with faulty.Endpoint() as first:
        answers = judge(first, tmp_path).ask(asks(3))
    nobody = "http://127.0.0.1:9/v1"
    assert judge(nobody, tmp_path).ask(asks(3)) == answers
    with faulty.Endpoint() as second:
        judge(second, tmp_path, model="another").ask(asks(3))
        judge(second, tmp_path).ask(asks(3, temperature=0.5))
    assert len(second.requests) == 6


def test_endpoints_without_a_key_are_sent_a_placeholder(tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY")
    with faulty.Endpoint() as server:
        judge(server, tmp_path).ask(asks(1))
    assert server.requests[0][1] == "Bearer none"


def test_models_that_know_the_newer_name_of_the_length_alone(tmp_path):
    def fault(number, body):
        return "max_tokens" if "max_tokens" in body else None

    with faulty.Endpoint(fault) as server:
        answers = judge(server, tmp_path, retries=0, concurrency=2).ask(asks(6))
    assert heard(answers) == expected(asks(6))
    assert server.requests[-1][2]["max_completion_tokens"] == 1
    assert len(server.requests) <= 8


# --- What goes wrong ------------------------------------------------------------------------------

PASSING = [
    *("429", "429 without a word", "500", "503", "truncated", "cut", "slow", "reset", "html"),
    *("list", "no choices", "no message", "error inside"),
]


def timeout_for(fault):
    """Seconds; few only where they pass, since whoever is late counts as one who got nothing."""
    return 0.3 if fault == "slow" else 20.0


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_leaves_no_trace_in_the_answers(tmp_path, fault):
    seen = collections.Counter()

    def first_times(number, body):
        seen[body["messages"][0]["content"]] += 1
        return fault if seen[body["messages"][0]["content"]] <= 2 else None

    with faulty.Endpoint(first_times) as server:
        answers = judge(server, tmp_path, timeout=timeout_for(fault)).ask(asks(4))
    assert heard(answers) == expected(asks(4))
    assert set(server.delivered.values()) == {1} and len(server.requests) == 12


def test_a_storm_of_429_is_waited_out_as_long_as_it_says(tmp_path):
    with faulty.Endpoint(lambda number, body: "429" if number < 12 else None) as server:
        answers = judge(server, tmp_path).ask(asks(8))
    assert heard(answers) == expected(asks(8))
    assert set(server.delivered.values()) == {1}
    sent = collections.defaultdict(list)
    for seconds, _, body in server.requests:
        sent[body["messages"][0]["content"]].append(seconds)
    waits = [two - one for times in sent.values() for one, two in itertools.pairwise(times)]
    assert len(waits) == 12 and min(waits) >= 0.05


LASTING = {
    "429": r"no answer in 3 attempts; the last: HTTP 429: too many requests; accepted: .*base_url",
    "500": "no answer in 3 attempts; the last: HTTP 500: an error of the server",
    "slow": "no answer in 3 attempts; the last: no answer within 0.3 s",
    "cut": "no answer in 3 attempts; the last: the connection was cut",
    "truncated": r"no answer in 3 attempts; the last: HTTP 200, but no JSON \(",
    "html": r"no answer in 3 attempts; the last: HTTP 200, but no JSON \(",
    "no choices": "HTTP 200, but no `choices` in it: {",
    "error inside": "HTTP 200, but no `choices` in it: an error: 'overloaded'",
    "no message": "HTTP 200, but no chat completion",
    "come tomorrow": r"HTTP 429: the day's limit \(it asks to wait 86400 s\); come back when",
    "no money": "HTTP 429: you exceeded your quota; its account has nothing left",
    "401": r"HTTP 401: the key \*\*\* is not right; accepted: a key of this endpoint in "
    r"\$JUDGE_KEY, which holds one that it does not take",
    "404": r"HTTP 404: there is no model 'judge'; accepted: a model that it has "
    r"\(config.evaluate.judge.model\)",
    "400": "HTTP 400: no such role; this was request q[0-9]+",
    "no logprobs": "answered without the log-probs that it asks for; accepted: an endpoint and",
}


@pytest.mark.parametrize("fault", LASTING)
def test_what_lasts_ends_clearly_and_the_same_command_goes_on(tmp_path, fault):
    def after_five(number, body):
        return fault if number >= 5 else None

    wanted = asks(12)
    with faulty.Endpoint(after_five) as server:
        asked = judge(server, tmp_path, retries=2, timeout=timeout_for(fault))
        with pytest.raises(endpoints.EndpointError, match=LASTING[fault]) as caught:
            asked.ask(wanted)
        told = str(caught.value)
        assert told.startswith(f"{server.url}, model judge: ") and "are kept in" in told
        server.fault = lambda number, body: None
        assert heard(asked.ask(wanted)) == expected(wanted)
    assert set(server.delivered.values()) == {1} and len(server.delivered) == 12
    everything = told + "".join(f.read_bytes().decode("latin-1") for f in tmp_path.iterdir())
    assert faulty.KEY not in everything + repr(asked) + str(asked.section)


def test_an_endpoint_that_is_down(tmp_path):
    down = judge("http://127.0.0.1:9/v1", tmp_path, retries=1, max_tokens=10_000)
    with pytest.raises(endpoints.EndpointError, match=r"the last: no connection \(.*0 answers"):
        down.ask(asks(2))
    assert {tokens for _, tokens in tried(tmp_path)} == {0}


def test_log_probs_that_are_not_needed(tmp_path):
    with faulty.Endpoint(lambda number, body: "no logprobs") as server:
        [answer] = judge(server, tmp_path).ask(asks(1, needs_logprobs=False))
        assert answer.text in "AB" and answer.top_logprobs == ()
        with pytest.raises(endpoints.EndpointError, match="log-probs"):
            judge(server, tmp_path).ask(asks(1))
        server.fault = lambda number, body: None
        [answer] = judge(server, tmp_path).ask(asks(1))
    assert answer.top_logprobs


def test_one_request_that_is_too_long_does_not_keep_the_others(tmp_path):
    def fault(number, body):
        return "too long" if body["messages"][0]["content"] == "no 2" else None

    with faulty.Endpoint(fault) as server:
        answers = judge(server, tmp_path, retries=0).ask(asks(5))
    assert [answer.finish_reason for answer in answers].count("length") == 4
    assert answers[2] == endpoints.Answer("", (), "context_length_exceeded", 0, 0)


def test_keys_that_can_be_none(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "schlüssel")
    with pytest.raises(UserError, match="JUDGE_KEY .* printable ASCII") as caught:
        endpoints.Endpoint.open(judge("http://127.0.0.1:9/v1", tmp_path).section, tmp_path / "a")
    assert "schl" not in str(caught.value)


def test_messages_that_are_no_unicode(tmp_path):
    bad = Ask("q", ({"role": "user", "content": "\ud800"},), 1)
    with pytest.raises(UserError, match="request q: a message is not Unicode"):
        judge("http://127.0.0.1:9/v1", tmp_path).ask([bad])


@pytest.mark.parametrize("content", [b"no database at all, " * 100, None])
def test_files_that_are_no_cache(tmp_path, content):
    file = tmp_path / "answers.sqlite"
    if content:
        file.write_bytes(content)
    else:
        with contextlib.closing(sqlite3.connect(file)) as database:
            database.execute("CREATE TABLE others (x)")
    before = file.read_bytes()
    with pytest.raises(UserError, match="answers.sqlite: .*; accepted: a file of answers that"):
        judge("http://127.0.0.1:9/v1", tmp_path).ask(asks(1))
    assert file.read_bytes() == before


# --- Budgets --------------------------------------------------------------------------------------


def test_a_budget_of_requests_is_kept_while_they_are_sent_again(tmp_path):
    def fault(number, body):
        return "500" if number % 3 == 0 else None

    wanted = asks(10)
    with faulty.Endpoint(fault) as server:
        with pytest.raises(UserError, match="10 to ask.* so nothing was asked; accepted: 10"):
            judge(server, tmp_path, max_requests=9).ask(wanted)
        assert not server.requests
        with pytest.raises(endpoints.EndpointError, match="budget .* 12 of 12 requests") as caught:
            judge(server, tmp_path, max_requests=12).ask(wanted)
        assert len(server.requests) == 12 and "The 8 answers" in str(caught.value)
        judge(server, tmp_path, max_requests=20).ask(wanted)
    assert set(server.delivered.values()) == {1} and len(server.delivered) == 10


def test_a_budget_of_tokens_counts_those_under_way_at_their_most(tmp_path):
    wanted = asks(10)
    most = wanted[0].most_tokens  # 4 bytes, 16 and 64 around, 1 of the answer; an answer takes 11
    assert most == 85
    with faulty.Endpoint(lambda number, body: time.sleep(0.02)) as server:
        with pytest.raises(endpoints.EndpointError, match="55 of 130 tokens are spent.* 85 tokens"):
            judge(server, tmp_path, max_tokens=130).ask(wanted)
        # After five answers, 55 tokens are spent, and another one could take 85.
        assert len(server.requests) == 5 and server.most_under_way == 1
        assert len(judge(server, tmp_path, max_tokens=5 * 11 + 4 * 85 + 11).ask(wanted)) == 10
    assert [tokens for _, tokens in tried(tmp_path)] == [11] * 10
    assert set(server.delivered.values()) == {1}


@pytest.mark.parametrize("fault, tokens", [("no usage", 85), ("500", 0), ("cut", 85), ("html", 85)])
def test_tokens_of_requests_that_may_have_been_worked_on(tmp_path, fault, tokens):
    with faulty.Endpoint(lambda number, body: None if number else fault) as server:
        judge(server, tmp_path).ask(asks(1))
    assert tried(tmp_path)[0][1] == tokens


def test_what_is_to_come_is_told_before_and_a_dry_run_asks_nothing(tmp_path, caplog):
    caplog.set_level("INFO")
    with faulty.Endpoint() as server:
        judge(server, tmp_path).ask(asks(2))
        assert "2 requests, 0 of them answered before and 2 to ask, with about 2 tokens" in (
            caplog.text
        )
        dry = judge(server, tmp_path, dry_run=True, max_requests=7)
        with pytest.raises(
            endpoints.DryRun,
            match="5 requests, 2 of them answered before and 3 to ask, with about 3 tokens in "
            "prompts .estimated from characters. and up to 3 in answers; 2 of 7 requests and 22 "
            ".no limit. tokens are spent. Nothing was asked",
        ):
            dry.ask(asks(5))
    assert len(server.requests) == 2


# --- Being stopped --------------------------------------------------------------------------------


def stop_after(monkeypatch, stops):
    """Has each asking told to stop once so many requests were begun."""

    @contextlib.contextmanager
    def watch():
        yield stops

    monkeypatch.setattr(preemption, "watch", watch)


def test_stopped_at_random_five_times_among_faults(tmp_path, monkeypatch):
    rng = random.Random(4)
    faults = [*[None] * 12, *(fault for fault in PASSING if fault != "slow")]
    due = [0]
    with faulty.Endpoint(lambda number, body: rng.choice(faults)) as server:
        stop_after(monkeypatch, lambda: len(server.requests) >= due[0])
        monkeypatch.setattr(asking, "_LOOK_SECONDS", 0.005)
        wanted, stopped = asks(40), 0
        asked = judge(server, tmp_path, retries=50)
        while stopped < 5:
            due[0] = len(server.requests) + rng.randrange(2, 15)
            with pytest.raises(Preempted, match="answers are kept, and the same command goes on"):
                asked.ask(wanted)
            stopped += 1
        due[0] = 1e9
        assert heard(asked.ask(wanted)) == expected(wanted)
    assert set(server.delivered.values()) == {1} and len(server.delivered) == 40


def test_what_is_under_way_has_a_while_to_finish(tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(asking, "_LOOK_SECONDS", 0.005)
    with faulty.Endpoint(lambda number, body: "slow" if number else time.sleep(0.05)) as server:
        stop_after(monkeypatch, lambda: len(server.requests) == 2)
        start = time.monotonic()
        with pytest.raises(Preempted):
            judge(server, tmp_path, timeout=30.0, concurrency=2).ask(asks(5))
        assert time.monotonic() - start < 8  # the slow one takes ten seconds
    outcomes = sorted(tried(tmp_path))
    assert outcomes == [("answered", 11), ("sent", 85)]


def test_sigterm_ends_it_with_what_was_under_way(tmp_path):
    def fault(number, body):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)

    with faulty.Endpoint(fault) as server:
        asked = judge(server, tmp_path, concurrency=2)
        with pytest.raises(Preempted):
            asked.ask(asks(40))
        before = len(server.requests)
        assert before < 40
        assert heard(asked.ask(asks(40))) == expected(asks(40))
    assert len(server.requests) == 40 and set(server.delivered.values()) == {1}


KILLED = """
import pathlib, sys
from tests.evaluate import test_endpoint as of
of.judge(sys.argv[1], pathlib.Path(sys.argv[2])).ask(of.asks(30))
"""


@pytest.mark.process
def test_killed_it_loses_what_was_under_way_alone(tmp_path):
    def fault(number, body):
        if number == 12:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.02)

    with faulty.Endpoint(fault) as server:
        command = [sys.executable, "-c", KILLED, server.url, str(tmp_path)]
        process = forked.Process(command, os.environ)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == -signal.SIGKILL, output
        before = len(server.requests)
        sent = [tokens for outcome, tokens in tried(tmp_path) if outcome == "sent"]
        assert before < 30 and 1 <= len(sent) <= 4 and set(sent) <= {85, 86}
        server.fault = lambda number, body: None
        assert heard(judge(server, tmp_path).ask(asks(30))) == expected(asks(30))
    assert len(server.requests) - 30 <= len(sent)
