"""From answers to groups, labels and pairs: by hand."""

import json

import pytest

from attnpo_jax import config as config_lib
from attnpo_jax.data.columns import Columns
from attnpo_jax.data.prompts import Prompt
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.iterate import Answer, Group, Label, answers, pairing, rounds
from attnpo_jax.iterate.labeler import contest

PROMPT = Prompt("a/b", ({"role": "user", "content": "Why?"},))


def group(*texts, failed=()):
    found = [Answer(t, (k,), k not in failed, k in failed or not t) for k, t in enumerate(texts)]
    return Group(PROMPT, {}, tuple(found))


def pairs(of, scores, which="best_worst", beats=None):
    chosen = pairing.pairs_of(of, Label(scores, beats), which)
    return list(chosen.places) or chosen.why_none


# --- Answers --------------------------------------------------------------------------------------


def records(*answers_):
    return [
        {"id": "a/b", "sample": k, "response": text, "finish_reason": reason}
        for k, (text, reason) in enumerate(answers_)
    ]


def test_answers_that_are_the_same_are_one_and_what_ends_for_want_of_room_may_fail():
    said = records(("Yes.", "stop"), (" Yes.\n", "length"), ("No", "length"), (" ", "stop"))
    asked = [(PROMPT, {"x": 1}), (Prompt("c", PROMPT.messages), {})]
    for unfinished, failed in (("failed", True), ("as_they_are", False)):
        [found] = answers.groups_of(asked, said, unfinished)
        assert (found.prompt, found.row) == (PROMPT, {"x": 1})
        assert list(found.answers) == [
            Answer("Yes.", (0, 1), True, False),
            Answer("No", (2,), False, failed),
            Answer(" ", (3,), True, True),
        ]
        assert found.candidates() == [(0, 1)]


def test_rounds_take_other_prompts_until_all_were_taken():
    asked = [(Prompt(str(k), PROMPT.messages), {}) for k in range(7)]

    def taken(number, per_round, seed=0):
        found = [prompt.id for prompt, _ in answers.of_round(asked, number, per_round, seed)]
        assert len({*found}) == len(found) == min(per_round or 7, 7)
        return found

    assert taken(1, 0) == taken(5, 0) == taken(2, 9) == [str(k) for k in range(7)]
    first = taken(1, 3) + taken(2, 3)
    assert len({*first}) == 6 and first != sorted(first)
    # The last one of the first order, then the second one from its beginning.
    assert {*first, taken(3, 3)[0]} == {str(k) for k in range(7)}
    assert taken(1, 3) == taken(1, 3) != taken(1, 3, seed=1)


# --- Pairs ----------------------------------------------------------------------------------------


def test_the_best_answer_meets_the_worst_or_all_that_are_worse():
    four = group("a", "b", "c", "d")
    assert pairs(four, [0.5, 1, 0, 0]) == [(1, 2)]
    assert pairs(four, [0.5, 1, 0, 0], "best_rest") == [(1, 0), (1, 2), (1, 3)]
    assert pairs(four, [1, 1, 0, 0.5], "best_rest") == [(0, 2), (0, 3)]
    assert pairs(four, [1, 1, 1, 1]) == pairing.TIE
    assert pairs(four, [None, -2.0, None, None]) == [(1, 0)]


def test_blank_answers_are_in_no_pair_and_failed_ones_are_never_the_better():
    assert pairs(group("a", ""), [1, 0]) == pairs(group("a"), [1]) == pairing.ALIKE
    assert pairs(group("a", "b", failed=[1]), [0, 1]) == pairing.TIE
    assert pairs(group("a", "b", failed=[1]), [0, -1]) == [(0, 1)]
    assert pairs(group("a", "b", failed=[0, 1]), [0, 1]) == pairing.TIE


def test_a_contest_is_won_where_both_orders_agree():
    nan = float("nan")
    verdicts = {(0, 1): (1.0, 2.0), (0, 2): (-1.0, -0.5), (1, 2): (0.3, -0.3), (0, 3): (nan, 1.0)}
    label, counts = contest(group("a", "b", "c", "d"), verdicts)
    assert label.beats == {(0, 1), (2, 0)} and label.scores == [1, 0, 1, 0]
    assert counts == {"compared": 4, "agreed": 2}
    # The first of the best, and what it has beaten itself: 2 has not been seen to beat 1.
    four = group("a", "b", "c", "d")
    assert pairs(four, label.scores, beats=label.beats) == [(0, 1)]
    assert pairs(four, label.scores, "best_rest", label.beats) == [(0, 1)]


def test_a_failed_answer_loses_a_contest_whatever_the_judge_says():
    of = group("a", "b", "c", failed=[0, 2])
    label, _ = contest(of, {(0, 1): (1.0, 1.0), (1, 2): (1.0, -1.0)})
    assert label.beats == {(1, 0), (1, 2)}
    assert pairs(of, label.scores, "best_rest", label.beats) == [(1, 0), (1, 2)]


def test_pairs_are_read_back_by_the_columns_that_the_config_names(tmp_path):
    config = config_lib.default_config()
    names = {"prompt": "asked", "chosen": "good", "system": "rules", "weight": "w", "margin": "m"}
    for field, column in names.items():
        config.data.fields[field] = column
    tools = ({"type": "function", "function": {"name": "f"}},)
    of = Group(Prompt("a/b", PROMPT.messages, tools), {}, group("x", "y ").answers)
    rounds.write_pairs(tmp_path / "pairs.jsonl", [(of, 1, 0)], config)
    [pair] = load_pairs(str(tmp_path / "pairs.jsonl"), columns=Columns(names)).pairs
    assert (pair.id, pair.prompt, pair.chosen, pair.rejected) == ("a/b/1-0", of.prompt.messages, "y ", "x")  # fmt: skip  # noqa: E501
    assert pair.tools == tools and pair.numbers == {"weight": 1.0, "margin": 0.0}
    [row] = map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines())
    assert (row["chosen_sample"], row["rejected_sample"]) == (1, 0)


# --- The config -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, problem",
    [
        ({"labeler": "reward", "reward__model": "m"}, "iterate.reward.reference = ''"),
        ({"labeler": "endpoint"}, "evaluate.judge.base_url = '': accepted: the address"),
        (
            {"verifier__file": "a.py", "verifier__checks": ({"kind": "capitals"},)},
            "iterate.verifier.file = 'a.py': accepted: ''",
        ),
        ({"verifier__checks": ({"of": "capitals"},)}, "a tuple of dicts, each with the `kind`"),
        ({"samples_per_prompt": 1}, "a whole number from 2"),
        ({"options": [1]}, "None, or a dict"),
    ],
)
def test_what_does_not_go_together_is_told(fields, problem):
    config = config_lib.default_config()
    for name, value in fields.items():
        *section, field = name.split("__")
        (config.iterate[section[0]] if section else config.iterate)[field] = value
    with pytest.raises(config_lib.ConfigError, match=problem.replace("(", r"\(")):
        config_lib.validate(config)


def test_checks_and_options_survive_a_config_s_file():
    config = config_lib.default_config()
    config.iterate.verifier.checks = ({"kind": "without", "characters": ","},)
    config.iterate.options = {"least": 3, "words": ["a"]}
    back = config_lib.from_json(config_lib.to_json(config))
    assert back.iterate.verifier.checks == config.iterate.verifier.checks
    assert dict(back.iterate.options) == dict(config.iterate.options)
    override = "--config.iterate.verifier.checks=({'kind': 'words', 'most': 3},)"
    changed = config_lib.override(back, [override])
    assert changed.iterate.verifier.checks == ({"kind": "words", "most": 3},)
