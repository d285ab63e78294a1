"""The parts of experiments/where_the_weight_lies that decide its figures."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from attnpo_jax import Run, prepare, registry, weighting
from attnpo_jax.config import validate
from experiments.where_the_weight_lies import analyse, arms, pairs, places, prompts, results
from tests import tiny

NO_THE = prompts.TASKS["no_the"]


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What the plugin registers is gone when a test ends."""
    monkeypatch.setattr(weighting.registry, "_functions", dict(weighting.registry._functions))
    monkeypatch.setattr(registry, "_loaded_plugins", {})


def test_no_topic_is_in_two_splits():
    splits = prompts.topics()
    assert {name: len(found) for name, found in splits.items()} == {
        "train": 88,
        "validation": 17,
        "test": 34,
    }
    for one, other in itertools.combinations(splits.values(), 2):
        assert not set(one) & set(other)
    found = {split: prompts.prompts("no_the", split) for split in splits}
    assert {split: len(of_split) for split, of_split in found.items()} == prompts.MOST
    texts = [p.messages[0]["content"] for of_split in found.values() for p in of_split]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    "text, spans",
    [
        ("The sea, the other ocean and breathe the", [(0, 3), (8, 12), (36, 40)]),
        ("Then they bathe", []),
    ],
)
def test_violations_are_whole_words_with_the_space_before_them(text, spans):
    assert NO_THE.violations(text) == spans


def test_unfinished_and_short_answers_fail():
    long = "One two three four five six seven eight nine ten"
    assert NO_THE.passes(long, finished=True)
    assert not NO_THE.passes(long, finished=False)
    assert not NO_THE.passes(long.removesuffix(" ten"), finished=True)
    assert not NO_THE.passes(f"{long} the", finished=True)


def answer(sample, text, tokens, finish="stop"):
    long = text + " one two three four five six seven eight nine"
    return {
        "id": "sea/0",
        "prompt": [{"role": "user", "content": "?"}],
        "sample": sample,
        "response": long,
        "tokens": [0] * tokens,
        "finish_reason": finish,
    }


def test_pairs_are_of_answers_of_close_lengths_each_used_once():
    records = [
        answer(0, "Good a", 20),
        answer(1, "Bad the", 50),
        answer(2, "Good b", 48),
        answer(3, "Bad the", 23),
        answer(4, "Bad the", 30),
        answer(5, "Good c", 21, finish="length"),
    ]
    made = pairs.make_pairs(records, NO_THE)
    assert [row["id"] for row in made] == ["sea/0#2-1", "sea/0#0-3"]
    assert made[0]["rejected_tokens"][:2] == ["Bad", " the"]
    assert made[0]["rejected_weights_oracle"] == [0.0, 1.0, 0.0]
    assert made[0]["chosen_weights_oracle"] == [0.0]
    assert all("".join(row["rejected_tokens"]) == row["rejected"] for row in made)


def test_all_arms_are_configs_that_can_run(tmp_path):
    source = tmp_path / "pairs.jsonl"
    source.write_text("")
    for arm in arms.ARMS:
        config = arms.arm_config(source, arm, 0.05, 1e-5, 3)
        validate(config)
        assert (config.seed, config.objective.beta) == (3, 0.05)
    assert set(arms.PRIMARY) <= set(arms.ARMS) and arms.PRIMARY not in arms.SECONDARY


def test_places_are_of_every_arm_whatever_it_reads(tmp_path, monkeypatch):
    tiny.write_model(tmp_path, tiny.HF_CONFIG | {"vocab_size": 258}, tiny.byte_tokenizer())
    shared = arms.shared_config

    def of_tiny_model(source):
        config = shared(source)
        config.model.source = str(tmp_path / "model")
        config.data.max_length = 512  # characters are tokens
        return config

    monkeypatch.setattr(arms, "shared_config", of_tiny_model)
    monkeypatch.setattr(arms, "PROBE_LAYER", 0)
    monkeypatch.setattr(arms, "ARMS", {k: v.replace("23", "0") for k, v in arms.ARMS.items()})
    pool = tmp_path / "no_the" / "pool"
    made = pairs.make_pairs([answer(0, "Good a", 20), answer(1, "Bad the", 23)], NO_THE)
    pool.mkdir(parents=True)
    tiny.write_lines(pool / "pairs.jsonl", made)
    prepare.prepare(Run.resolve(of_tiny_model(pool / "pairs.jsonl"), pool))
    found = places.places(tmp_path, "no_the")
    assert found.keys() == arms.ARMS.keys()
    assert found["uniform"]["on_violations"] == found["uniform"]["effective"] == 1
    assert found["oracle"]["share"] == 1 and found["probe"]["share"] < 1


def test_shuffled_weights_are_those_of_attention_elsewhere_whatever_the_padding():
    registry.load_plugins([pathlib.Path(arms.__file__).with_name("shuffled.py")])
    rng = np.random.default_rng(0)
    # The last two rows differ in their tokens alone.
    text_BT = np.arange(40) < np.array([[37], [20], [20]])
    tokens_BT = np.where(text_BT, rng.integers(0, 99, (3, 40)), -1)
    judge_B2ST = rng.random((3, 2, 1, 40)).astype(np.float32)
    judge_B2ST[2] = judge_B2ST[1]

    def weights(name, rows=slice(None), pad=0):
        end = ((0, 0), (0, pad))
        response = weighting.ResponseTokens.of(
            np.pad(text_BT[rows], end),
            tokens_BT=np.pad(tokens_BT[rows], end, constant_values=-1),
            judge_B2ST=np.pad(judge_B2ST[rows], ((0, 0), (0, 0), *end)),
        )
        return np.asarray(weighting.get(name)(response))

    plain_BT, dealt_BT = weights("attention"), weights("shuffled")
    np.testing.assert_array_equal(np.sort(dealt_BT), np.sort(plain_BT))
    assert not dealt_BT[~text_BT].any()
    assert (dealt_BT != plain_BT)[text_BT].mean() > 0.8
    assert (dealt_BT[1] != dealt_BT[2])[:20].mean() > 0.5
    # Sums of padded rows round otherwise.
    again_BT = weights("shuffled", slice(1, 3), pad=9)
    np.testing.assert_allclose(again_BT[:, :40], dealt_BT[1:], rtol=1e-5)


def test_a_difference_the_same_at_all_prompts_is_tested_over_seeds():
    baseline = np.full((3, 2), 0.25)
    arm = baseline + np.array([[0.1], [0.2], [0.3]])
    found = analyse.compared(baseline, arm)
    # t = .2 / (.1 / sqrt 3) = 3.464 with 2 degrees of freedom.
    assert found["difference"] == pytest.approx(0.2)
    assert found["p"] == pytest.approx(0.0742, abs=5e-5)
    assert found["interval"] == pytest.approx((0.2 - 0.24841, 0.2 + 0.24841), abs=5e-5)


def test_a_rerun_is_held_to_the_committed_figures(tmp_path, capsys):
    key = {"task": "no_the", "arm": "uniform", "beta": 0.2, "learning_rate": 1e-5, "seed": 0}
    records = [answer(0, "Good", 20), answer(1, "Bad the the", 30, finish="length")]
    row = key | {"split": "test"} | results.scores(records, NO_THE)
    assert (row["pass"], row["finished"], row["tokens"]) == (0.5, 0.5, 25)
    assert (row["violations"], row["passes"], row["samples"]) == (4.0, [1], 2)
    one, other = results.Results(tmp_path / "a"), results.Results(tmp_path / "b")
    one.add(row)
    other.add(row)
    other.add(row | {"seed": 1})
    assert json.loads((tmp_path / "a/runs.jsonl").read_text()) == row
    assert analyse.same(results.Results(tmp_path / "a"), other)
    other.add(row | {"passes": [0]})
    assert not analyse.same(one, other)
    assert not analyse.same(one, results.Results(tmp_path / "none"))
    elsewhere = results.Results(tmp_path / "elsewhere")
    elsewhere.add(row | {"device": "another", "passes": [0]})
    assert not analyse.same(one, elsewhere)  # nothing to hold against each other
    elsewhere.add(row | {"seed": 1, "device": "another"})
    one.add(row | {"seed": 1, "device": "another"})
    assert analyse.same(one, elsewhere)
    assert "there, on None here and another there" in capsys.readouterr().out


def test_results_keep_the_pairs_of_a_task(tmp_path):
    of = results.Results(tmp_path)
    assert of.pairs("no_the") is None
    of.add_pairs("no_the", '{"id": "ü"}\n')
    first = (tmp_path / "pairs-no_the.jsonl.gz").read_bytes()
    of.add_pairs("no_the", '{"id": "ü"}\n')
    assert results.Results(tmp_path).pairs("no_the") == '{"id": "ü"}\n'
    assert (tmp_path / "pairs-no_the.jsonl.gz").read_bytes() == first
    assert of.pairs("no_commas") is None
