"""The paper's way, end to end, against what the paper's public code gave on a tiny model.

`goldens/paper.json` says how its figures were made.
"""

import json
import pathlib

import numpy as np
import pytest

from attnpo_jax import config as config_lib
from attnpo_jax.parallel import backend as backends
from attnpo_jax.prepare import prepare
from attnpo_jax.run import Run
from attnpo_jax.train import train
from tests import paper_inputs, tiny

pytestmark = pytest.mark.golden

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "llama3_8b_base.py"


@pytest.fixture(scope="module")
def golden():
    return paper_inputs.golden()


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Three pairs a step keep no mesh busy."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("for_training", "for_preparing"):
            patch.setattr(backends, name, lambda model, *_: backends.one_device(model))
        yield


@pytest.fixture(scope="module")
def prepared(golden, tmp_path_factory):
    """A config with the paper's settings on the tiny model, and the folder of what it prepared."""
    folder = tmp_path_factory.mktemp("paper")
    paper_inputs.write_inputs(folder)
    of = golden["settings"]
    config = tiny.changed(
        config_lib.load_file(f"{CONFIG}:paper"),
        {
            "model__source": str(folder / "model"),
            "model__dtype": "float32",
            "data__train": str(folder / "pairs.jsonl"),
            "data__eval": "",
            "data__on_bad_row": "error",
            "data__shuffle": False,
            "data__num_buckets": 1,
            "data__max_length": of["max_length"],
            "data__max_prompt_length": of["max_prompt_length"],
            "judge__template": str(folder / "template.txt"),
            "judge__layers": ("all", "rollout"),
            "judge__num_buckets": 2,
            "weighting__layer": tuple(of["layers"]),
            "objective__beta": of["beta"],
            "optim__learning_rate": of["learning_rate"],
            "optim__warmup_ratio": of["warmup_ratio"],
            "train__batch_size": of["batch_size"],
            "train__microbatch_size": of["batch_size"],
            "train__epochs": of["epochs"],
            "log__progress": False,
            "evaluate__names": (),
        },
    )
    prepare(Run.resolve(config, folder / "work"))
    return config, folder / "work"


def test_rows_are_as_long_as_those_of_the_public_code(golden, prepared):
    config, workdir = prepared
    most = config.data.max_length
    dataset = Run.resolve(config, workdir).open_prepared("train")
    for row, (prompt, *responses) in zip(dataset, golden["lengths"], strict=True):
        own = row["rejected_prompt_ids"] if len(row["rejected_prompt_ids"]) else row["prompt_ids"]
        contexts = (row["prompt_ids"], own)
        for side, context, length in zip(("chosen", "rejected"), contexts, responses, strict=True):
            # Where a response alone fills its row, its first token there is not predicted.
            assert len(row[f"{side}_ids"]) == min(length, most - 1)
            assert len(context) == max(1, min(prompt, most - length))


def test_weights_of_a_layer_and_of_rollout(golden, prepared):
    dataset = Run.resolve(*prepared).open_prepared("train")
    places = {"1": dataset.source_layers.index(1), "attention_rollout": -1}
    assert dataset.source_layers == (0, 1, 2, "rollout")
    by_id = {row["id"]: row for row in dataset}
    compared = 0
    for want in golden["weights"]:
        row = by_id[want["id"]]
        for side in ("chosen", "rejected"):
            for name, place in places.items():
                total = row[f"judge_{side}_whole"][:, place, :1]
                got = (row[f"judge_{side}"][:, place] / total).mean(axis=0)
                wanted = np.array(want[f"{side}_weights_{name}"])
                assert row[f"judge_{side}_whole"][0, place, 2] == len(wanted)
                first = int(row[f"judge_{side}_whole"][0, place, 3])
                # Of a row that was cut, what is left; white space around the text is not judged.
                wanted = wanted[max(0, -first) :]
                np.testing.assert_allclose(got[max(0, first) :][: len(wanted)], wanted, atol=1e-5)
                compared += 1
    assert compared == 4 * len(golden["weights"])


def test_every_batch_s_loss(golden, prepared):
    config, workdir = prepared
    train(Run.resolve(config, workdir))
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == len(golden["steps"]) == 8
    assert max(abs(step["loss"] - np.log(2)) for step in golden["steps"]) > 0.03
    for got, want in zip(steps, golden["steps"], strict=True):
        where = f"step {got['step']}: "
        assert got["loss"] == pytest.approx(want["loss"], abs=2e-6), where + "loss"
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4), where + "grad_norm"
        assert got["learning_rate"] == pytest.approx(want["learning_rate"], rel=1e-5), where
        for name in want:
            if name.startswith(("logps/", "rewards/")) and not name.endswith("accuracies"):
                assert got[name] == pytest.approx(want[name], rel=1e-5, abs=2e-5), where + name
