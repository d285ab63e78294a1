"""What each labeler says of answers at hand, on tiny models, and what it costs."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from attnpo_jax import prepare
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.data.prompts import Prompt
from attnpo_jax.data.tokenize import tokenize_pair
from attnpo_jax.iterate import Answer, Group, Label, Labels, labeling, register
from attnpo_jax.iterate.rounds import Round
from attnpo_jax.judge.judge import Judge
from attnpo_jax.judge.language_model import load_model
from attnpo_jax.models import decoder
from attnpo_jax.run import Run
from attnpo_jax.runtime.errors import UserError
from tests import tiny
from tests.evaluate import faulty

QUIET = Console(quiet=True)
ANSWERS = {
    "a": ["Because it rained.", "No idea", "It rained, I think."],
    "b/c": ["One, two, three", "Three!"],
    "d": ["Blue", "Blue is the sky", "Sky", "The sky is not always blue."],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelers")
    tiny.write_small_inputs(folder)
    shape = json.loads((folder / "source" / "config.json").read_text())
    change = functools.partial(tiny.larger, factor=5.0)
    tiny.write_model(folder / "other", shape, tiny.byte_tokenizer(), change)
    return folder


def groups(failed=(), **rows):
    def answer(id, k, text):
        return Answer(text, (k,), (id, k) not in failed, (id, k) in failed)

    return [
        Group(
            Prompt(id, ({"role": "user", "content": f"Say {id}."},)),
            rows.get(id, {}),
            tuple(answer(id, k, text) for k, text in enumerate(texts)),
        )
        for id, texts in ANSWERS.items()
    ]


def round_of(inputs, workdir, labeler, **changes):
    small = {"data__eval": "", "iterate__labeler": labeler} | changes
    base = Run.resolve(tiny.small_config(inputs, **small), workdir)
    return Round(base, 1, base.config.model.source)


def labels_of(round, of):
    run = round.run()
    return labeling.labeler_of(run.config)(labeling.task_of(round, run), of)


def scores(found):
    return [list(one.scores) for one in found.labels]


# --- verifier -------------------------------------------------------------------------------------


def test_checks_of_all_answers_or_of_each_prompt_s_own(inputs, tmp_path):
    of = groups(failed={("d", 0)})
    both = ({"kind": "without", "characters": ","}, {"kind": "words", "most": 2})
    found = labels_of(round_of(inputs, tmp_path, "verifier", iterate__verifier__checks=both), of)
    assert scores(found) == [[0.5, 1, 0], [0, 1], [0, 0.5, 1, 0.5]]
    assert found.figures["pass_rate"] == pytest.approx(3 / 9)
    own = {"a": [both[1]], "b/c": [both[0]], "d": list(both)}
    of = groups(**{id: {"checks": checks} for id, checks in own.items()})
    round = round_of(inputs, tmp_path, "verifier")
    assert scores(labels_of(round, of)) == [[0, 1, 0], [0, 1], [1, 0.5, 1, 0.5]]
    with pytest.raises(UserError, match="prompt a: has no `checks`; accepted: .*verifier.checks"):
        labels_of(round, groups())


def test_a_function_of_prompt_and_response_scores(inputs, tmp_path):
    file = tmp_path / "verify.py"
    round = round_of(inputs, tmp_path, "verifier", iterate__verifier__file=str(file))
    file.write_text("def verify(prompt, response):\n    return len(response) - prompt['from']\n")
    rows = {id: {"from": 10} for id in ANSWERS}
    of = groups(failed={("d", 3)}, **rows)
    # What has failed is as bad as the worst, or as 0 where all are better.
    assert scores(labels_of(round, of)) == [[8, -3, 9], [5, -4], [-6, 5, -7, -7]]
    head = "def verify(prompt, response):"
    for text, told in (
        (f"{head}\n    return prompt['x']", "verify.py:2, of an answer to prompt a: KeyError"),
        (f"{head}\n    return 'good'", "gave 'good' for an answer to prompt a"),
        ("def verify(response): pass", r"a file with a function verify\(prompt, response\)"),
        ("1 / 0", "verify.py:1: ZeroDivisionError"),
    ):
        file.write_text(f"{text}\n")
        with pytest.raises(UserError, match=f"verifier.file = .*{told}"):
            labels_of(round, of)
    file.unlink()
    with pytest.raises(UserError, match="verify.py': no such file"):
        labeling.check(round, round.run())  # before anything is sampled


# --- A plugin's -----------------------------------------------------------------------------------


def test_a_plugin_s_labeler_takes_its_options_and_what_it_gives_is_checked(inputs, tmp_path):
    @register
    def by_length(task, groups, *, sign: int = 1, short: bool = False):
        found = [[sign * len(one.text) for one in group.answers] for group in groups]
        return Labels([Label(one[:1] if short else one) for one in found])

    of = groups()
    options = {"iterate__options": {"sign": -1}}
    found = labels_of(round_of(inputs, tmp_path, "by_length", **options), of)
    assert scores(found)[1] == [-15, -6]
    round = round_of(inputs, tmp_path, "by_length", iterate__options={"short": True})
    with pytest.raises(UserError, match="'by_length': 1 scores for the 3 answers to prompt a"):
        labeling.label(round, round.run(), of, [])
    round = round_of(inputs, tmp_path, "by_length", iterate__options={"long": True})
    with pytest.raises(UserError, match="no hyperparameter 'long'; accepted: sign, short"):
        labels_of(round, of)
    with pytest.raises(UserError, match="unknown labeler 'best'; accepted: .*verifier"):
        labels_of(round_of(inputs, tmp_path, "best"), of)


def test_pairs_that_differ_only_in_what_is_cut_off_are_counted_and_left_out(inputs, tmp_path):
    @register
    def longer(task, groups):
        return Labels([Label([len(one.text) for one in group.answers]) for group in groups])

    lengths = {"data__max_length": 24, "data__max_prompt_length": 20}
    round = round_of(inputs, tmp_path, "longer", **lengths)
    same = groups()[0]
    texts = ("Blue is one", "Blue is three")
    same = dataclasses.replace(
        same, answers=tuple(Answer(text, (k,), True, False) for k, text in enumerate(texts))
    )
    of = [same, groups()[1]]
    records = [
        {"id": group.prompt.id, "sample": k, "tokens": [1, 2], "finish_reason": reason}
        for group in of
        for k, reason in enumerate(("stop", "length"))
    ]
    found = labeling.label(round, round.run(), of, records)
    assert found["without a pair"] == {"can't be trained on": 1}
    wanted = {"prompts": 2, "responses": 4, "pairs": 1, "tokens": 2, "unfinished": 0.5}
    assert wanted.items() <= found["figures"].items()
    assert [json.loads(line)["id"] for line in round.pairs.read_text().splitlines()] == ["b/c/0-1"]


# --- judge ----------------------------------------------------------------------------------------


@pytest.fixture
def judged(monkeypatch):
    """How many pairs were judged in each pass. The judge, which is random, says what is longer, and
    leans to A: by little, or, of answers to "d", by so much that the orders disagree.
    """
    passes = []
    run = Judge.run

    def counted(self, prompts, tokenized):
        passes.append(len(prompts))
        for done in run(self, prompts, tokenized):
            yield [(i, dataclasses.replace(of, verdict=verdict(tokenized[i]))) for i, of in done]

    def verdict(pair):
        longer = np.sign(pair.chosen_text_length - pair.rejected_text_length)
        return longer + np.float32([1, -1]) * (2 if pair.id[0] == "d" else 0.25)

    monkeypatch.setattr(Judge, "run", counted)
    return passes


def test_the_pass_that_labels_is_the_pass_that_weighs(inputs, tmp_path, judged):
    round = round_of(inputs, tmp_path / "work", "judge", iterate__pairing="best_rest")
    run, of = round.run(), groups()
    records = [
        {"id": id, "sample": k, "tokens": [1] * len(text), "finish_reason": "stop"}
        for id, texts in ANSWERS.items()
        for k, text in enumerate(texts)
    ]
    found = labeling.label(round, run, of, records)
    assert sum(judged) == 3 + 1 + 6
    assert found["without a pair"] == {"none is better": 1}
    figures = found["figures"]
    assert (figures["compared"], figures["agreement"], figures["pairs"]) == (10, 0.4, 3)
    assert figures["position_bias"] == pytest.approx((4 * 0.25 + 6 * 2) / 10)
    ids = [json.loads(line)["id"] for line in round.pairs.read_text().splitlines()]
    assert ids == ["a/2-0", "a/2-1", "b/c/0-1"]
    judged.clear()
    assert labeling.label(round, run, of, records) == found  # from what is written
    for name in ("labeled.json", "prepared/train/prepared.json"):
        (round.folder / name).unlink()  # as if killed before
    assert labeling.label(round, run, of, records) == found
    prepare.prepare(run, console=QUIET)
    assert judged == []

    # The same as if the pairs were judged as they are now.
    config = tiny.small_config(inputs, data__eval="", data__train=str(round.pairs))
    prepare.prepare(plain := Run.resolve(config, tmp_path / "plain"), console=QUIET)
    assert sum(judged) == 3
    pairs = zip(run.open_prepared("train"), plain.open_prepared("train"), strict=True)
    for row, expected in pairs:
        assert row.keys() == expected.keys()
        for name, value in row.items():
            if getattr(value, "dtype", None) == np.float32:
                np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)
            else:
                assert np.array_equal(value, expected[name]), name


def test_another_judge_labels_and_its_attention_is_not_taken(inputs, tmp_path, judged):
    other = str(inputs / "other" / "model")
    round = round_of(inputs, tmp_path, "judge", iterate__judge__model=other)
    found = labels_of(round, groups(failed={("d", 1)}))
    assert found.judged is None and sum(judged) == 10
    assert scores(found)[:2] == [[1, 0, 2], [1, 0]]
    assert found.labels[2].beats == {(0, 1), (2, 1), (3, 1)}  # but for what has failed, none agree
    weights = Prepared.open(tmp_path / "rounds/1/labels/prepared/train").meta["components"]
    assert weights["source_layers"] == [2]


# --- endpoint -------------------------------------------------------------------------------------


def test_an_endpoint_is_not_shown_what_has_failed_and_is_asked_once(inputs, tmp_path):
    with faulty.Endpoint() as server:
        fields = {"base_url": server.url, "model": "judge"}
        fields = {f"evaluate__judge__{name}": value for name, value in fields.items()}
        round = round_of(inputs, tmp_path, "endpoint", **fields)
        found = labels_of(round, groups(failed={("a", 1)}))
        again = labels_of(round, groups(failed={("a", 1)}))
    assert len(server.requests) == 2 * (1 + 1 + 6) and again == found
    template = (inputs / "judge.txt").read_text()
    agreed = 0
    for group, label in zip(groups(), found.labels, strict=True):
        for i, j in group.candidates():
            texts = [group.answers[place].text for place in (i, j)]
            toward = []
            for (a, b), sign in ((texts, 1), (texts[::-1], -1)):
                values = {"question": f"Say {group.prompt.id}.", "answer_a": a, "answer_b": b}
                message = {"role": "user", "content": template.format(**values)}
                letter, _ = faulty.verdict_of({"messages": [message]})
                toward.append(sign if letter == "A" else -sign)
            if group.prompt.id == "a" and 1 in (i, j):
                assert ((i, j) if j == 1 else (j, i)) in label.beats  # which has failed
            else:
                assert ((i, j) in label.beats) == (sum(toward) == 2)
                assert ((j, i) in label.beats) == (sum(toward) == -2)
                agreed += abs(sum(toward)) == 2
    assert found.figures["agreement"] == agreed / 8 and found.figures["unreadable"] == 0


# --- reward ---------------------------------------------------------------------------------------


def test_rewards_are_log_ratios_of_whole_answers(inputs, tmp_path):
    """One plain sequence at a time, with neither packing nor branches, nor the config's beta."""
    models = {"model": inputs / "other" / "model", "reference": inputs / "model"}
    fields = {f"iterate__reward__{name}": str(folder) for name, folder in models.items()}
    round = round_of(inputs, tmp_path, "reward", objective__beta=0.01, **fields)
    of = groups(failed={("b/c", 0), ("d", 3)})
    found = labels_of(round, of)
    policy, reference = (load_model(str(folder)) for folder in models.values())

    @jax.jit
    def logits(params, tokens):
        places = jnp.arange(len(tokens))[None]
        hidden = decoder.forward(policy.config, params, tokens[None], places, jnp.ones_like(places))
        return jax.nn.log_softmax(hidden[0] @ decoder.unembedding(params).T)

    for group, label in zip(of, found.labels, strict=True):
        if group.prompt.id == "b/c":  # one is left, and better than what has failed
            assert list(label.scores) == [None, 0.0]
            continue
        for place, one in enumerate(group.answers):
            if one.failed:
                assert label.scores[place] is None
                continue
            pair = tokenize_pair(
                policy.tokenizer, group.pair(place, place), max_length=200, max_prompt_length=100
            )
            ids = np.concatenate([pair.prompt_ids, pair.chosen_ids])
            padded = jnp.asarray(np.pad(ids, (0, 128 - len(ids))))
            at = np.arange(len(pair.prompt_ids), len(ids))
            sums = [
                np.asarray(logits(model.params, padded), np.float64)[at - 1, ids[at]].sum()
                for model in (policy, reference)
            ]
            assert label.scores[place] == pytest.approx(sums[0] - sums[1], rel=1e-3, abs=1e-3)
    said = [score for label in found.labels for score in label.scores if score is not None]
    assert found.figures["reward"] == pytest.approx(sum(said) / 6) and np.ptp(said) > 1
