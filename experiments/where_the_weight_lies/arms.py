"""What is compared: the arms, the grid that each is tuned on, and the config that all share."""

import pathlib

from ml_collections import config_dict

from attnpo_jax import config as config_lib
from attnpo_jax import default_config

PROBE_LAYER = 23
ARMS = {
    "uniform": "name=uniform",
    "last": "name=attention layer=-1",
    "probe": f"name=attention layer={PROBE_LAYER}",
    "shuffled": f"name=shuffled layer={PROBE_LAYER}",
    "diff": "name=diff",
    "oracle": "name=column column=oracle fix_sink=False",
}
"""Each arm's fields of `config.weighting`."""

# Named before anything was run. Pairs are (baseline, arm).
PRIMARY = ("shuffled", "probe")
SECONDARY = tuple(("uniform", arm) for arm in ARMS if arm != "uniform")

GRID = tuple((beta, rate) for beta in (0.05, 0.2) for rate in (1e-5, 3e-5))
"""(beta, learning rate), tried for every arm alike."""

TUNING_SEED = 100
SEEDS = (0, 1, 2, 3, 4)
GATE_SEEDS = SEEDS[:3]
PAIRS = 150
SAMPLES = {"train": 8, "validation": 4, "test": 8}
"""Answers to each prompt, by split."""


def shared_config(pairs: pathlib.Path) -> config_dict.ConfigDict:
    """The config of all runs, on the pairs of a file."""
    config = default_config()
    config.plugins = (str(pathlib.Path(__file__).with_name("shuffled.py")),)
    config.data.train = str(pairs)
    config.data.eval = ""
    config.data.max_length = 256
    config.data.max_prompt_length = 128
    config.data.weight_columns = ("oracle",)
    config.data.num_buckets = 2
    config.judge.layers = (PROBE_LAYER, -1)
    config.judge.num_buckets = 3
    # Every response's weights sum to its number of tokens: arms differ in where they lie.
    config.shaping.normalize = "length"
    config.train.batch_size = 10
    config.train.microbatch_size = 10
    config.train.pairs = PAIRS
    config.train.save_every = 0
    config.train.keep_checkpoints = 1
    config.generate.temperature = 0.8
    config.generate.max_new_tokens = 96
    config.evaluate.names = ()
    config.log.progress = False
    return config


def arm_config(
    pairs: pathlib.Path, arm: str, beta: float, rate: float, seed: int
) -> config_dict.ConfigDict:
    """The config of one run; see `ARMS` and `GRID`."""
    config = shared_config(pairs)
    config.objective.beta = beta
    config.optim.learning_rate = rate
    config.seed = seed
    fields = ARMS[arm].split()
    return config_lib.override(config, [f"--config.weighting.{field}" for field in fields])
