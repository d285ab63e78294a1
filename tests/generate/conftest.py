"""What the tests of responses share: a tiny model, and how it is served."""

import pytest

from attnpo_jax import config as config_lib
from attnpo_jax.generate.api import sampled_of
from attnpo_jax.judge.language_model import load_model
from attnpo_jax.run import Run
from tests import tiny
from tests.generate.calls import LENGTH


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
