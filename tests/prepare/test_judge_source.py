"""A judge that is not the model that training starts from, with a tokenizer of its own."""

import functools
import io

import jax
import numpy as np
import pytest
from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax.config import ConfigError
from attnpo_jax.data.batching import EvalBatches
from attnpo_jax.data.pair import BadExample
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.judge.judge import Judge, judge_pairs
from attnpo_jax.judge.language_model import load_model
from attnpo_jax.pair_loss import losses_of_logps
from attnpo_jax.prepare.reference import Reference
from attnpo_jax.prepare.stage import prepare
from attnpo_jax.run import Run
from tests import tiny

MERGES = [("B", "e"), ("c", "a"), ("u", "s"), ("us", "e"), ("Ġ", "i"), ("e", "y"), ("t", "h")]
MARKS = ("<s>", "</s>")
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<s>assistant:{% endif %}"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with the model, the data and the template, and two judges of two layers."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_small_inputs(folder)
    tokenizer = tiny.byte_tokenizer(MARKS, TEMPLATE, MERGES)
    shape = tiny.HF_CONFIG | {"vocab_size": len(tokenizer), "num_hidden_layers": 2}
    for name, factor in (("judge", 4.0), ("judge2", 5.0)):
        change = functools.partial(tiny.larger, factor=factor)
        tiny.write_model(folder / name, shape, tokenizer, change)
    return folder


def config_of(inputs, judge="judge", **changes):
    source = str(inputs / judge / "model") if judge else ""
    return tiny.small_config(
        inputs, data__eval="", judge__source=source, judge__layers=(-1,), **changes
    )


def run(config, workdir):
    prepare(Run.resolve(config, workdir), console=Console(file=io.StringIO()))
    return Run.resolve(config, workdir).open_prepared("train")


def test_its_attention_is_carried_over_to_the_training_tokens(inputs, tmp_path):
    config = config_of(inputs)
    dataset = run(config, tmp_path)
    assert (dataset.source_layers, dataset.num_layers) == ((1,), 2)
    judge, own = load_model(config.judge.source), load_model(config.model.source)
    pairs = load_pairs(config.data.train).pairs
    wanted = judge_pairs(
        judge,
        pairs,
        trained=own.tokenizer,
        max_length=200,
        max_prompt_length=100,
        template=config.judge.template,
        source_layers=(1,),
    )
    for row, pair, (tokenized, judgement) in zip(dataset, pairs, wanted, strict=True):
        np.testing.assert_array_equal(row["chosen_ids"], tokenized.chosen_ids)
        np.testing.assert_allclose(row["judge_verdict"], judgement.verdict, atol=1e-4)
        for side in ("chosen", "rejected"):
            found = row[f"judge_{side}"]
            assert found.shape == (2, 1, len(getattr(pair, side)))
            np.testing.assert_allclose(found, getattr(judgement, side), atol=1e-6)

    # "Because it": Be ca use Ġi t. Tokens here are characters, which share a judge's token evenly.
    because = dataset[0]["judge_chosen"][:, 0]
    for start, end in ((0, 2), (2, 4), (4, 7), (7, 9)):
        np.testing.assert_allclose(because[:, start:end].T, [because[:, start]] * (end - start))
    assert len(np.unique(because[0, [0, 2, 4, 7, 9]])) == 5

    # Negative layers count from the judge's last one: of a model with three, -1 would be missing.
    settings = config_lib.step_settings(
        config,
        tiny.MODEL,
        dataset.source_layers,
        "xla",
        dataset.columns,
        num_layers=dataset.num_layers,
    )
    batch = jax.tree.map(lambda x: x[0], EvalBatches(dataset, batch_size=6)[0])
    losses, _ = losses_of_logps(settings, batch.reference_logps_BG2T, {}, batch)
    np.testing.assert_allclose(losses[batch.valid_BG.reshape(-1)], np.log(2), rtol=1e-6)


def test_another_judge_costs_its_own_pass_alone(inputs, tmp_path, monkeypatch):
    passed = {"judge": 0, "reference": 0}
    for kind, of in (("judge", Judge), ("reference", Reference)):

        def spy(self, *given, of=of.run, kind=kind):
            passed[kind] += len(given[-1])
            return of(self, *given)

        monkeypatch.setattr(of, "run", spy)

    def judged_by(judge, **changes):
        dataset = run(config_of(inputs, judge, **changes), tmp_path)
        counts = dict(passed)
        passed.update(judge=0, reference=0)
        return dataset, counts

    first, counts = judged_by("judge")
    assert counts == {"judge": 6, "reference": 6}
    second, counts = judged_by("judge2")
    assert counts == {"judge": 6, "reference": 0}
    assert np.abs(first[0]["judge_chosen"] - second[0]["judge_chosen"]).max() > 1e-4
    np.testing.assert_array_equal(first[0]["ref_chosen_logps"], second[0]["ref_chosen_logps"])
    # The model itself judges too, and all three are there; fewer layers of one are there as well.
    third, counts = judged_by("")
    assert counts == {"judge": 6, "reference": 0} and third.num_layers == 3
    again, counts = judged_by("judge", judge__verdict=False)
    assert counts == {"judge": 0, "reference": 0}
    np.testing.assert_array_equal(again[0]["judge_chosen"], first[0]["judge_chosen"])
    assert "judge_verdict" in first[0] and "judge_verdict" not in again[0]
    assert judged_by("")[1] == {"judge": 0, "reference": 0}
    # What a run is known by has each judge's own digests.
    known = [dataset.identity["judge"] for dataset in (first, second)]
    assert known[0]["tokenizer"] == known[1]["tokenizer"]
    assert known[0]["model"]["weights"] != known[1]["model"]["weights"]
    assert "model" not in third.identity["judge"]


def test_what_it_can_not_hold_or_have_is_told(inputs, tmp_path):
    # Rows are the dataset's, which knows nothing of this judge: none can be left out.
    config = config_of(
        inputs, data__on_bad_row="skip", judge__max_length=50, judge__max_answer_length=24
    )
    told = "example 1: config.judge.source: the judge prompt takes .*data.on_bad_row can't leave"
    with pytest.raises(BadExample, match=told):
        run(config, tmp_path)
    with pytest.raises(ConfigError, match="judge.layers = .2,.*this model of 2 layers: -2 to 1"):
        Run.resolve(tiny.changed(config_of(inputs), {"judge__layers": (2,)})).source_layers  # noqa: B018
    template = {"judge__chat_template": str(inputs / "judge.txt")}
    with pytest.raises(ConfigError, match="judge.chat_template = .*in config.judge.source"):
        Run.resolve(config_of(inputs, "", **template))
