"""What the tests of responses share: a tiny model, and how it is served."""

import contextlib
import threading

import openai
import pytest

from attnpo_jax import config as config_lib
from attnpo_jax.generate.api import sampled_of
from attnpo_jax.generate.server import stage
from attnpo_jax.judge.language_model import load_model
from attnpo_jax.run import Run
from tests import tiny
from tests.generate.calls import LENGTH, wait_until


@pytest.fixture(scope="module")
def served_run(tmp_path_factory):
    """A run that serves a tiny model within small limits."""
    config = config_lib.default_config()
    config.model.source = str(tiny.write_folder(tmp_path_factory.mktemp("served")))
    config.serve.slots, config.serve.max_length = 4, LENGTH
    config.serve.max_waiting, config.serve.max_choices = 8, 8
    config.serve.max_body_bytes = 20_000
    config.serve.port = 0
    return Run.resolve(config, None)


@pytest.fixture(scope="module")
def sampled(served_run):
    """The model on one device, for which programs compile faster."""
    return sampled_of(load_model(served_run.config.model.source))[0]


@pytest.fixture(scope="module")
def served(served_run, sampled):
    """A server that runs in a thread."""
    with contextlib.closing(stage._bind("127.0.0.1", 0)) as bound:
        running = stage.Server(served_run, sampled, bound)
        thread = threading.Thread(target=running.run)
        thread.start()
        try:
            yield running
        finally:
            running.stop()
            thread.join()


@pytest.fixture(scope="module")
def client(served):
    wait_until(lambda: served.is_listening)
    with openai.OpenAI(base_url=served.url, api_key="any", max_retries=0) as client:
        yield client
