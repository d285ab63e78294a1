"""The judge's weights, written as they are published, and trained on as if someone else had."""

import dataclasses
import io
import json
import pathlib

import jax
import numpy as np
import pytest
import transformers
from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax import weighting
from attnpo_jax.config import ConfigError, section_for
from attnpo_jax.data.batching import EvalBatches
from attnpo_jax.data.precomputed_weights import WeightReader
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.data.tokenize import ChatTokenizer, tokenize_pair
from attnpo_jax.export.weights import export_weights
from attnpo_jax.judge.judge import Judge
from attnpo_jax.judge.language_model import load_model
from attnpo_jax.pair_loss import batch_losses
from attnpo_jax.prepare.stage import prepare
from attnpo_jax.run import Run
from tests import tiny

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "judge_weights.jsonl"


def run(function, config, workdir):
    output = io.StringIO()
    function(Run.resolve(config, workdir), console=Console(file=output, width=200))
    return output.getvalue()


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A config, and a workdir where its pairs are judged and their weights exported."""
    folder = tmp_path_factory.mktemp("judged")
    # A multi-turn prompt with a system message, too.
    turns = ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")
    talk = {"prompt": [{"role": role, "content": text} for role, text in turns]}
    rows = [*tiny.ROWS[:3], {"id": "talk", **talk, "chosen": " Good bye, then. ", "rejected": "Hm"}]
    tiny.write_small_inputs(folder, rows, tiny.ROWS[3:4])
    config = tiny.small_config(folder)
    run(prepare, config, folder / "work")
    run(export_weights, config, folder / "work")
    return config, folder / "work"


def unjudged(workdir, **changes):
    """The config for the files exported to a workdir."""
    config = tiny.small_config(workdir.parent)
    config.data.train = str(workdir / "weights" / "train.jsonl")
    config.data.eval = str(workdir / "weights" / "test.jsonl")
    config.data.weight_columns = "all"
    config.judge.layers = "none"
    with config.unlocked():
        config.weighting = section_for(weighting, "column")
    return tiny.changed(config, changes)


@pytest.fixture(scope="module")
def read_back(judged, tmp_path_factory):
    """The same for the exported files, which are prepared without a judge."""
    config = unjudged(judged[1])
    workdir = tmp_path_factory.mktemp("read_back")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Judge, "__init__", None)
        assert "precomputed weights" in run(prepare, config, workdir)
    return config, workdir


@pytest.mark.golden
def test_the_files_are_in_the_published_form(judged):
    config, workdir = judged
    lines = [json.loads(x) for x in (workdir / "weights" / "train.jsonl").read_text().splitlines()]
    with GOLDENS.open() as file:
        published = set(json.loads(file.readline()))
    own = {"chosen_weights_2", "rejected_weights_2", "prompt_id"}
    layers = {f"{side}_weights_{k}" for side in ("chosen", "rejected") for k in (6, 14, 21, 29)}
    assert set(lines[0]) == (published - layers) | own
    assert [line["prompt_id"] for line in lines] == ["row-0", "row-1", "row-2", "talk"]
    assert lines[3]["prompt"] == "Hi"
    assert lines[3]["chosen"][0] == {"role": "system", "content": "Be brief."}
    assert lines[3]["chosen"][-1] == {"role": "assistant", "content": " Good bye, then. "}

    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.source)
    dataset = Run.resolve(config, workdir).open_prepared("train")
    for line, row in zip(lines, dataset, strict=True):
        for side, letter in (("chosen", "cr"), ("rejected", "rc")):
            weights = line[f"{side}_weights_2"]
            assert len(weights) == len(line[f"{side}_tokens"])
            np.testing.assert_allclose(sum(weights), 1, rtol=1e-6)
            # What follows the prompt in the rendered conversation begins with these tokens.
            prompt = tokenizer.apply_chat_template(
                line[side][:-1], tokenize=False, add_generation_prompt=True
            )
            whole = tokenizer.apply_chat_template(line[side], tokenize=False)
            ids = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
            assert ids[: len(weights)] == line[f"{side}_tokens"]
            assert line[f"{letter}_last_token"] in "AB"
        # Chosen at A, an agreeing verdict is A; chosen at B, it is B.
        assert (line["cr_last_token"] == "A") == (row["judge_verdict"][0] > 0)
        assert (line["rc_last_token"] == "B") == (row["judge_verdict"][1] > 0)


def by_pair(config, workdir, split="train"):
    """Losses and metrics of every pair, with the weights of both responses."""
    dataset = Run.resolve(config, workdir).open_prepared(split)
    model = load_model(config.model.source)
    settings = config_lib.step_settings(
        config, model.config, dataset.source_layers, "xla", dataset.weight_columns
    )
    # Not the reference itself, where every loss would be log 2.
    params = jax.tree.map(lambda p: 1.01 * p, model.params)
    batches = EvalBatches(dataset, batch_size=len(dataset))
    batch = jax.tree.map(lambda x: x[0], batches[0])
    seen = []

    def spy(response):
        weights = config_lib.bind_section(weighting, config.weighting)(response)
        seen.append(weights)
        return weights

    loss, _ = batch_losses(dataclasses.replace(settings, weighting=spy), params, batch)
    return np.asarray(loss), np.asarray(seen[0]), batch


def test_round_trip_gives_the_weights_and_the_loss_of_attention(judged, read_back):
    config, workdir = read_back
    dataset = Run.resolve(config, workdir).open_prepared("train")
    assert dataset.source_layers == () and dataset.weight_columns == ("0", "2")
    assert "judge_chosen" not in dataset[0]
    loss, weights, batch = by_pair(config, workdir)
    wanted_loss, wanted, judged_batch = by_pair(*judged)
    assert batch.ready_BG2KT.shape[3] == 2 and judged_batch.ready_BG2KT is None
    np.testing.assert_allclose(weights, wanted, rtol=1e-6, atol=1e-7)
    assert np.ptp(wanted[wanted > 0]) > 0.1
    # Weights go through float32 once more on their way.
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    assert np.ptp(wanted_loss) > 0

    # Exported once more, nothing changes.
    run(export_weights, config, workdir)
    again = load_pairs(str(workdir / "weights" / "train.jsonl"), weight_columns="all").pairs
    first = load_pairs(config.data.train, weight_columns="all").pairs
    for one, other in zip(first, again, strict=True):
        for side in ("chosen", "rejected"):
            np.testing.assert_array_equal(
                one.precomputed.tokens[side], other.precomputed.tokens[side]
            )
            np.testing.assert_array_equal(
                one.precomputed.weights[side], other.precomputed.weights[side]
            )


def test_what_the_weights_come_from_is_part_of_what_was_prepared(judged, read_back, tmp_path):
    workdir = read_back[1]
    one = unjudged(judged[1], data__weight_columns=(2,))
    with pytest.raises(ValueError, match=r'weight_columns: on disk \["0", "2"\], config \["2"\]'):
        Run.resolve(one, workdir).open_prepared("train")
    missing = unjudged(judged[1], weighting__column=1)
    with pytest.raises(ConfigError, match="column 1 is neither .* accepted: 0, 2"):
        Run.resolve(missing, workdir).open_prepared("train")
    with pytest.raises(
        ConfigError, match="weighting.column: .*data.weight_columns and .* name none"
    ):
        prepare(Run.resolve(unjudged(judged[1], data__weight_columns=()), tmp_path))
    with pytest.raises(ConfigError, match="judge.layers = 'none': the weighting 'attention' reads"):
        prepare(Run.resolve(tiny.small_config(judged[1].parent, judge__layers="none"), tmp_path))


def test_other_pairs_than_were_prepared_are_refused(judged):
    config, workdir = judged
    file = pathlib.Path(config.data.eval)
    before = file.read_text()
    try:
        tiny.write_lines(file, tiny.ROWS[4:5])
        with pytest.raises(ValueError, match="config.data.eval .* holds other pairs"):
            export_weights(Run.resolve(config, workdir))
    finally:
        file.write_text(before)


@pytest.mark.golden
def test_published_weights_of_the_embedded_model_are_the_identity(smollm2_folder):
    loaded = load_pairs(str(GOLDENS), weight_columns="all")
    assert loaded.weight_columns == ("0", "6", "14", "21", "29")
    tokenizer = ChatTokenizer.load(smollm2_folder)
    reader = WeightReader(tokenizer.tokenizer.backend_tokenizer, tokenizer.origin)
    rows = [json.loads(line) for line in GOLDENS.read_text().splitlines()]
    for pair, row in zip(loaded.pairs, rows, strict=True):
        tokenized = tokenize_pair(tokenizer, pair, max_length=2048, max_prompt_length=1800)
        found = reader.carry(pair.precomputed, pair.chosen, pair.rejected, tokenized)
        for side, weights in zip(("chosen", "rejected"), found, strict=True):
            wanted = [row[f"{side}_weights_{layer}"] for layer in loaded.weight_columns]
            np.testing.assert_array_equal(weights, np.array(wanted, np.float32))
