"""A tiny model and pairs on which the paper's public code was run, see `goldens/paper.json`."""

import json
import pathlib

import jax
import numpy as np

from tests import tiny

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "paper.json"
SHAPE = tiny.HF_CONFIG | {"vocab_size": 258, "hidden_size": 32, "max_position_embeddings": 4096}


def golden():
    """Settings, pairs and figures of the public code's run."""
    return json.loads(GOLDEN.read_text())


def _weights(params):
    """Normal numbers of a generator that is the same in all versions; norms scale by 1."""
    rng = np.random.RandomState(17)

    def draw(x):
        return (0.3 * rng.standard_normal(x.shape)).astype(np.float32) if np.std(x) > 0 else x

    return jax.tree.map(draw, params)


def write_model(folder):
    """The model's Hugging Face folder: three layers over bytes, in ChatML."""
    marks = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return tiny.write_model(folder, SHAPE, tiny.byte_tokenizer(**marks), _weights)


def write_inputs(folder):
    """The model, the pairs as `pairs.jsonl` and the judge's template as `template.txt`."""
    of = golden()
    write_model(folder)
    tiny.write_lines(folder / "pairs.jsonl", of["pairs"])
    (folder / "template.txt").write_text(of["template"])
