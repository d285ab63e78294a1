"""Who may ask a server, how much, and how it ends."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import os
import signal
import socket
import threading
import time

import openai
import pytest

from attnpo_jax import cli
from attnpo_jax.generate import server
from attnpo_jax.generate.server import app as app_lib
from attnpo_jax.generate.server import stage
from attnpo_jax.runtime import interrupts
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.sampling import Engine
from tests.generate.calls import CHAT, LENGTH, calling, served_as, wait_until


def slow_down(served, monkeypatch):
    """Has each call of the engine take a while, so that answers are under way for longer."""
    step = served._engine.step

    def slow_step():
        time.sleep(0.05)
        return step()

    monkeypatch.setattr(served._engine, "step", slow_step)


def status_of(app, path, **headers):
    """What the application answers to a GET, without a network."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    named = [(key.encode(), value.encode()) for key, value in headers.items()]
    scope = {"type": "http", "method": "GET", "path": path, "headers": named}
    scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": ""}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"]


def app_of(served, served_run, sampled, **options):
    what = served_as(sampled, served_run)
    options = {"max_body_bytes": 1000, "api_key": None, "hosts": None} | options
    return app_lib.make_app(what, served._engine, served._worker, **options)


def test_a_key_is_asked_for(served, served_run, sampled):
    app = app_of(served, served_run, sampled, api_key="sesame")
    assert status_of(app, "/v1/models") == 401
    assert status_of(app, "/v1/models", authorization="Bearer open") == 401
    assert status_of(app, "/v1/models", authorization="Bearer sesam\xe9") == 401
    assert status_of(app, "/nothing") == 401
    assert status_of(app, "/v1/models", authorization="Bearer sesame") == 200
    assert status_of(app, "/health") == 200


def test_the_key_comes_from_the_environment(served_run, sampled, monkeypatch):
    given = {}
    monkeypatch.setenv(stage.API_KEY, "sesame")
    monkeypatch.setattr(stage, "make_app", lambda *_, **options: given.update(options))
    monkeypatch.setattr(stage.Server, "_warm_up", lambda *_: None)
    with contextlib.closing(stage._bind("127.0.0.1", 0)) as bound:
        stage.Server(served_run, sampled, bound)
        assert (given["api_key"], given["hosts"]) == ("sesame", None)
        monkeypatch.delenv(stage.API_KEY)
        stage.Server(served_run, sampled, bound)
        assert given["api_key"] is None


def test_other_names_of_this_machine_are_refused(served, served_run, sampled):
    app = app_of(served, served_run, sampled, hosts=stage._LOOPBACK)
    assert status_of(app, "/v1/models", host="evil.example:8000") == 400
    assert status_of(app, "/v1/models") == 400
    for host in ("127.0.0.1:8000", "localhost", "[::1]:80"):
        assert status_of(app, "/v1/models", host=host) == 200


def test_more_than_can_wait_is_refused_and_what_is_left_frees_its_place(
    served, client, monkeypatch
):
    slow_down(served, monkeypatch)
    ask = CHAT | {"max_tokens": 100, "logit_bias": {"0": -100, "1": -100}, "n": 6}
    wait_until(lambda: served._worker.open == 0)
    first = client.chat.completions.create(**ask, stream=True)
    second = client.chat.completions.create(**ask, stream=True)
    assert next(iter(first)).choices[0].delta.role == "assistant"
    with pytest.raises(openai.RateLimitError, match="accepted: 12 together") as refused:
        client.chat.completions.create(**ask)
    assert refused.value.response.headers["retry-after"] == "1"
    first.close()
    second.close()
    wait_until(lambda: served._worker.open == 0)
    # Who does not wait for a whole answer frees its place too.
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).chat.completions.create(**ask | {"n": 8})
    wait_until(lambda: served._worker.open == 0)
    wait_until(lambda: not served._engine.running and not served._engine.waiting)
    assert client.chat.completions.create(**CHAT).choices


def test_a_failed_engine_ends_the_server_with_its_error(served_run, sampled, monkeypatch):
    with contextlib.closing(stage._bind("127.0.0.1", 0)) as bound:
        failing = stage.Server(served_run, sampled, bound)

        def step():
            raise MemoryError("no more")

        monkeypatch.setattr(failing._engine, "step", step)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            ended = pool.submit(failing.run)
            wait_until(lambda: failing.is_listening)
            with openai.OpenAI(base_url=failing.url, api_key="any", max_retries=0) as client:
                with pytest.raises(openai.InternalServerError, match="has failed"):
                    client.chat.completions.create(**CHAT)
            with pytest.raises(MemoryError, match="no more"):
                ended.result(timeout=60)


def test_what_does_not_finish_in_time_is_given_up(served_run, sampled, monkeypatch):
    monkeypatch.setitem(served_run.config.serve, "grace_seconds", 0)
    with contextlib.closing(stage._bind("127.0.0.1", 0)) as bound:
        ending = stage.Server(served_run, sampled, bound)
        slow_down(ending, monkeypatch)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            ended = pool.submit(ending.run)
            wait_until(lambda: ending.is_listening)
            ask = CHAT | {"max_tokens": 100, "stream": True}
            with calling(ending, "/v1/chat/completions", ask) as response:
                assert b'"role":"assistant"' in response.readline()
                ending.stop()
                assert ended.result(timeout=60) is None
                with pytest.raises(http.client.IncompleteRead):
                    response.read()
        assert not ending._worker.open and not ending._worker._thread.is_alive()


# --- The command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_lets_answers_finish_and_ends_the_server(
    served_run, caplog, monkeypatch, number, code
):
    # An answer that takes longer than a process with nothing to save has to end.
    monkeypatch.setattr(interrupts, "GRACE_SECONDS", 0.2)
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: time.sleep(0.1) or step(self))
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    came = []

    def talk():
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="a", max_retries=0)
        with client:
            while True:
                try:
                    assert [model.id for model in client.models.list()] == ["tiny"]
                    break
                except openai.APIConnectionError:
                    time.sleep(0.05)
            ask = CHAT | {"model": "tiny", "max_tokens": 60}
            for part in client.chat.completions.create(**ask, stream=True):
                if not came:
                    os.kill(os.getpid(), number)
                came.append(part.choices[0])

    talker = threading.Thread(target=talk)
    talker.start()
    options = [f"--port={port}", "--slots=4", f"--max-length={LENGTH}", "--name=tiny"]
    found = cli.main(["serve", f"--model={served_run.config.model.source}", *options])
    talker.join()
    assert found == code
    assert came[-1].finish_reason in ("length", "stop")
    assert f"serving tiny at http://127.0.0.1:{port}/v1" in caplog.text


def test_an_address_that_is_taken_is_named_before_the_model_is_loaded(served_run, capsys):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--model=no-such-model", f"--port={port}"]) == 1
    assert f"serve.host = '127.0.0.1', serve.port = {port}" in capsys.readouterr().err


def test_without_the_extra_it_says_so(served_run, monkeypatch):
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"starlette and uvicorn: pip install '\.\[serve\]'"):
        server.serve(served_run)
