"""An endpoint of OpenAI's API in a thread, which fails as it is told to."""

import collections
import hashlib
import http.server
import json
import sys
import threading
import time

KEY = "sk-a-key-that-nobody-may-see"


def verdict_of(body):
    """What is answered: A or B, with log-probs that the messages decide."""
    digest = hashlib.sha256(json.dumps(body["messages"]).encode()).digest()
    letter, other = ("A", "B") if digest[0] % 2 else ("B", "A")
    return letter, {letter: -0.25 - digest[1] / 1024, other: -2.0, " x": -5.0}


def completion(body):
    """The body of a right answer."""
    letter, likeliest = verdict_of(body)
    content = [{"token": letter, "logprob": likeliest[letter], "bytes": None}]
    content[0]["top_logprobs"] = [
        {"token": token, "logprob": logprob, "bytes": None} for token, logprob in likeliest.items()
    ]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": letter},
        "finish_reason": "length",
        "logprobs": {"content": content} if body.get("logprobs") else None,
    }
    usage = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}
    return {"object": "chat.completion", "choices": [choice], "usage": usage}


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        # Those who asked may hang up at any time.
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Endpoint:
    """Listens while its `with` block lasts.

    Args:
      fault: gives a fault's name, or None for an answer, for the number of a request, from 0, and
        its body.
    """

    def __init__(self, fault=lambda number, body: None):
        self.fault = fault
        self.requests = []  # (seconds, authorization, body)
        self.delivered = collections.Counter()  # whole answers by the last message
        self.most_under_way = 0
        self._under_way = 0
        self._lock = threading.Lock()

    def __enter__(self):
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                outer._serve(self)

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def _serve(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = len(self.requests)
            self.requests.append((time.monotonic(), handler.headers["Authorization"], body))
            self._under_way += 1
            self.most_under_way = max(self.most_under_way, self._under_way)
        try:
            fault = self.fault(number, body)
            if fault is None:
                _send(handler, 200, json.dumps(completion(body)).encode())
                with self._lock:
                    self.delivered[body["messages"][-1]["content"]] += 1
            else:
                FAULTS[fault](handler, body, self)
        finally:
            with self._lock:
                self._under_way -= 1


def _send(handler, status, content, length=None, **headers):
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)
    handler.wfile.flush()


def _refuse(status, message, code=None, param=None, **headers):
    def serve(handler, body, endpoint):
        error = {"message": message, "type": "error", "param": param, "code": code}
        _send(handler, status, json.dumps({"error": error}).encode(), **headers)

    return serve


def _answer(change):
    """A right answer that something is done to."""

    def serve(handler, body, endpoint):
        answer = completion(body)
        change(answer)
        _send(handler, 200, json.dumps(answer).encode())

    return serve


def _truncated(handler, body, endpoint):
    whole = json.dumps(completion(body)).encode()
    _send(handler, 200, whole[: len(whole) // 2])


def _cut(handler, body, endpoint):
    whole = json.dumps(completion(body)).encode()
    _send(handler, 200, whole[: len(whole) // 2], len(whole))
    handler.close_connection = True


def _slow(handler, body, endpoint):
    # Until whoever asked hangs up.
    handler.close_connection = True
    handler.connection.settimeout(10)
    handler.connection.recv(1)


def _reset(handler, body, endpoint):
    handler.close_connection = True


FAULTS = {
    "429": _refuse(429, "too many requests", Retry_After="0.05"),
    "429 without a word": _refuse(429, "too many requests"),
    "come tomorrow": _refuse(429, "the day's limit", Retry_After="86400"),
    "no money": _refuse(429, "you exceeded your quota", "insufficient_quota"),
    "500": _refuse(500, "an error of the server"),
    "503": _refuse(503, "loading", Retry_After="0.02"),
    "401": _refuse(401, f"the key {KEY} is not right", "invalid_api_key"),
    "404": _refuse(404, "there is no model 'judge'", "model_not_found"),
    "400": _refuse(400, "no such role"),
    "too long": _refuse(400, "4097 tokens", "context_length_exceeded"),
    "max_tokens": _refuse(400, "use max_completion_tokens", "unsupported_parameter", "max_tokens"),
    "truncated": _truncated,
    "cut": _cut,
    "slow": _slow,
    "reset": _reset,
    "html": lambda handler, body, endpoint: _send(handler, 200, b"<html>Sign in</html>"),
    "list": lambda handler, body, endpoint: _send(handler, 200, b"[1, 2]"),
    "no choices": _answer(lambda answer: answer.update(choices=[])),
    "no message": _answer(lambda answer: answer["choices"][0].pop("message")),
    "error inside": _answer(lambda answer: (answer.clear(), answer.update(error="overloaded"))),
    "no logprobs": _answer(lambda answer: answer["choices"][0].update(logprobs=None)),
    "no usage": _answer(lambda answer: answer.pop("usage")),
}
