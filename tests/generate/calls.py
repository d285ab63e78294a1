"""The calls that the tests of the server make."""

import contextlib
import http.client
import json
import time

from attnpo_jax import config as config_lib
from attnpo_jax.generate.server.protocol import Served

LENGTH = 160
QUESTION = [{"role": "user", "content": "Where is the key?"}]
CHAT = {"model": "model", "messages": QUESTION, "max_tokens": 12, "seed": 3}


def wait_until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


@contextlib.contextmanager
def calling(served, path, body, content_type="application/json"):
    """The response to a call by hand."""
    host, _, port = served.url.removeprefix("http://").removesuffix("/v1").partition(":")
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=60)) as connection:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, text, {"Content-Type": content_type})
        yield connection.getresponse()


def post(*arguments):
    """Status and JSON of a call by hand."""
    with calling(*arguments) as response:
        return response.status, json.loads(response.read())


def served_as(sampled, run):
    """What the parser of calls is told of a model that is served."""
    return Served("model", sampled, config_lib.sampling(run.config.generate), LENGTH, 8)
