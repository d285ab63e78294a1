"""`attnpo evaluate versus`: who answers, who judges, and what comes of it."""

import functools
import json
import math

import numpy as np
import pytest
from rich.console import Console

from attnpo_jax import cli, evaluate
from attnpo_jax.data.pair import Pair
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.evaluate import versus
from attnpo_jax.evaluate.versus import outcomes
from attnpo_jax.evaluate.versus.judges import Verdicts
from attnpo_jax.judge.judge import judge_pairs
from attnpo_jax.judge.language_model import load_model
from attnpo_jax.models.io import hf_folder
from attnpo_jax.run import Run
from attnpo_jax.runtime import intervals
from attnpo_jax.runtime.errors import UserError
from tests import tiny
from tests.evaluate import faulty

QUIET = Console(quiet=True)
PROMPTS = [[{"role": "user", "content": row["prompt"]}] for row in tiny.ROWS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The config's model, another one of its shape, and two samples files.

    The files hold the chosen responses and the rejected ones, but that one of those is the same.
    """
    folder = tmp_path_factory.mktemp("versus")
    tiny.write_small_inputs(folder, held_out=tiny.ROWS)
    shape = json.loads((folder / "source" / "config.json").read_text())
    change = functools.partial(tiny.larger, factor=5.0)
    tiny.write_model(folder / "other", shape, tiny.byte_tokenizer(), change)
    for name, side in (("a", "chosen"), ("b", "rejected")):
        texts = [row[side] for row in tiny.ROWS]
        texts[3] = tiny.ROWS[3]["chosen"] + ("\n" if name == "b" else "")
        write_samples(folder / f"{name}.jsonl", texts)
    return folder


def write_samples(file, texts, prompts=PROMPTS):
    return tiny.write_lines(
        file,
        [
            {"id": row["id"], "sample": 0, "response": text, "prompt": prompt}
            for row, text, prompt in zip(tiny.ROWS, texts, prompts, strict=False)
        ],
    )


def compare(folder, out, model="a.jsonl", config=None, judge=None, label=None, **fields):
    """The result of one command; `judge` is a server."""
    config = config or tiny.small_config(folder)
    section = config.evaluate
    if judge is not None:
        section.judge.base_url, section.judge.model = judge.url, "judge"
    for name, value in ({"baseline": str(folder / "b.jsonl")} | fields).items():
        section.versus[name] = value
    run = Run.resolve(config, None)
    model = str(folder / model) if "." in model or model == "other/model" else model
    [found] = evaluate.evaluate(
        run, name="versus", model=model, label=label, out=out, console=QUIET
    )
    return found.result


# --- Who judges -----------------------------------------------------------------------------------


def test_a_model_on_this_machine_judges_as_its_own_pass_does(folder, tmp_path):
    result = compare(folder, tmp_path)
    config = tiny.small_config(folder)
    pairs = load_pairs(config.data.eval).pairs
    model = load_model(config.model.source)
    judged = judge_pairs(model, pairs, template=config.judge.template)
    assert [row["id"] for row in result.rows] == [pair.id for pair in pairs]
    for row, (_, judgement) in zip(result.rows, judged, strict=True):
        if row["id"] == "row-3":
            assert (row["win"], row["tie"], row["verdicts"]) == (0.5, "identical", None)
        else:
            np.testing.assert_allclose(row["verdicts"], judgement.verdict, rtol=1e-4, atol=1e-5)
            assert row["win"] == outcomes.outcome(judgement.verdict)
    assert [row["length"] for row in result.rows] == [len(row["chosen"]) for row in tiny.ROWS]
    assert result.about["judge"] == config.model.source
    assert result.about["baseline"] == str(folder / "b.jsonl")


def expected_verdicts(config, text_alone=False):
    """What the endpoint says, by id and order, toward the first file's answer."""
    template = open(config.judge.template).read()
    found = {}
    for row in tiny.ROWS:
        answers = [row["chosen"], row["rejected"]]
        orders = []
        for sign, (a, b) in zip((1, -1), (answers, answers[::-1]), strict=True):
            text = template.format(question=row["prompt"], answer_a=a, answer_b=b)
            letter, top = faulty.verdict_of({"messages": [{"role": "user", "content": text}]})
            toward_a = 2 * (letter == "A") - 1 if text_alone else top["A"] - top["B"]
            orders.append(sign * toward_a)
        found[row["id"]] = orders
    return found


@pytest.mark.parametrize("fault", [None, "no logprobs"])
def test_an_endpoint_is_asked_in_both_orders_once(folder, tmp_path, fault):
    config = tiny.small_config(folder)
    with faulty.Endpoint(lambda number, body: fault) as server:
        result = compare(folder, tmp_path, config=config, judge=server)
        again = compare(folder, tmp_path, config=config, judge=server, label="few", count=4)
    expected = expected_verdicts(config, text_alone=fault is not None)
    for row in result.rows:
        if row["id"] != "row-3":
            np.testing.assert_allclose(row["verdicts"], expected[row["id"]])
    assert len(server.requests) == 10 and result.about["judge"] == "judge"
    decided = [math.prod(pair) > 0 for id, pair in expected.items() if id != "row-3"]
    assert result.figures["decided"].value == sum(decided) / 6
    assert again.rows == result.rows[:4] and (tmp_path / "judge.sqlite").exists()


def test_an_endpoint_that_can_not_be_read_gives_ties(folder, tmp_path):
    with faulty.Endpoint(lambda number, body: "too long") as server:
        result = compare(folder, tmp_path, judge=server)
    assert result.about["ties"] == {"identical": 1, "unreadable": 5}
    assert result.figures["first_shown_preferred"].count == 0


def test_pairs_that_a_model_can_not_judge_are_shown_and_not_counted(folder, tmp_path):
    config = tiny.small_config(folder)
    config.judge.max_answer_length = 99
    texts = [row["rejected"] for row in tiny.ROWS]
    texts[1] = "One, two, three " * 20
    long = [texts[0], texts[1][::-1], *texts[2:]]
    write_samples(tmp_path / "long.jsonl", texts)
    files = {"baseline": str(write_samples(tmp_path / "b.jsonl", long))}
    result = compare(tmp_path, tmp_path / "out", "long.jsonl", config=config, **files)
    row = result.rows[1]
    assert row["win"] is None and "judge.max_length = 200 allows 199" in row["refused"]
    assert result.about["not judged"].startswith("1, the first one row-1: the judge prompt takes")
    assert result.figures["win_rate"].count == 5


def test_there_must_be_an_endpoint_where_one_is_asked_for(folder, tmp_path):
    config = tiny.small_config(folder)
    config.evaluate.versus.judge = "endpoint"
    with pytest.raises(UserError, match="versus.judge = 'endpoint', but .*base_url = ''"):
        compare(folder, tmp_path, config=config)


# --- Who answers ----------------------------------------------------------------------------------


def test_two_models_answer_and_their_samples_stay(folder, tmp_path):
    settings = {"baseline": "base", "max_new_tokens": 8, "count": 4}
    result = compare(folder, tmp_path, "other/model", **settings)
    names = ("base.baseline.jsonl", "model.samples.jsonl")
    theirs, ours = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in names
    )
    assert [one["id"] for one in ours] == [f"row-{i}" for i in range(4)]
    assert [row["length"] for row in result.rows] == [len(one["response"]) for one in ours]
    assert [row["baseline_length"] for row in result.rows] == [len(r["response"]) for r in theirs]
    assert {len(one["tokens"]) <= 8 for one in ours} == {True}
    assert [one["response"] for one in ours] != [one["response"] for one in theirs]
    # The same from the files that it left, whose prompts are taken.
    files = {"baseline": str(tmp_path / names[0])}
    config = tiny.small_config(folder)
    again = compare(tmp_path, tmp_path / "out", names[1], config=config, **files)
    assert again.rows == result.rows


def test_a_model_against_itself_is_all_ties(folder, tmp_path):
    result = compare(folder, tmp_path, "base", baseline="base", max_new_tokens=4, count=3)
    assert {row["tie"] for row in result.rows} == {"identical"}
    assert result.figures["win_rate"].value == 0.5


def test_samples_of_other_prompts(folder, tmp_path):
    others = [[{"role": "user", "content": "Another question"}], *PROMPTS[1:]]
    file = write_samples(tmp_path / "c.jsonl", [row["chosen"] for row in tiny.ROWS], others)
    with pytest.raises(UserError, match="c.jsonl: what it answers as prompt row-0 is another"):
        compare(folder, tmp_path, baseline=str(file))
    file.write_text(file.read_text().replace("row-", "line-"))
    with pytest.raises(UserError, match="none of 6 prompts is answered by both .*a.jsonl .6 answ"):
        compare(folder, tmp_path, baseline=str(file))
    file.write_text('{"id": "row-0", "sample": 0, "response": "a"}\n')
    with pytest.raises(UserError, match="c.jsonl, line 1: .*accepted: a samples file of attnpo"):
        compare(folder, tmp_path, baseline=str(file))


def test_prompts_that_are_none_are_told_of_before_a_model_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_folder, "load_params", None)
    file = tiny.write_lines(tmp_path / "p.jsonl", [{"prompt": ""}])
    with pytest.raises(UserError, match="versus.prompts: none of 1 is one: .*p.jsonl, .* is empty"):
        compare(folder, tmp_path, "other/model", prompts=str(file), baseline="base")


def test_other_settings_under_another_name_have_their_own_baseline(folder, tmp_path):
    """And samples of a file that has changed meanwhile are no longer those that were judged."""
    settings = {"baseline": "base", "max_new_tokens": 4}
    compare(folder, tmp_path, count=1, **settings)
    [row, other] = compare(folder, tmp_path, count=2, label="two", **settings).rows
    assert (row["id"], other["id"]) == ("row-0", "row-1")
    changed = tmp_path / "a.jsonl"
    changed.write_text((folder / "a.jsonl").read_text())
    options = {"baseline": str(folder / "b.jsonl")}
    compare(tmp_path, tmp_path / "out", "a.jsonl", config=tiny.small_config(folder), **options)
    changed.write_text(changed.read_text().replace("Because", "As"))
    with pytest.raises(evaluate.EvaluationMismatch, match="a.jsonl.json: .*sha256 of models"):
        compare(tmp_path, tmp_path / "out", "a.jsonl", config=tiny.small_config(folder), **options)


# --- What comes of it -----------------------------------------------------------------------------


def test_rows_and_figures_by_hand():
    nan = math.nan
    said = [(1.0, 2.0)] * 5 + [(-1.0, -3.0)] + [(2.0, -1.0)] * 2 + [(nan, 1.0), None]
    pairs = [Pair(str(i), (), "x" * (10 + i), "x" * 12) for i in range(10)]
    verdicts = [one if one is None else Verdicts(one) for one in said]
    rows = [versus.row_of(pair, one) for pair, one in zip(pairs, verdicts, strict=True)]
    rows.append(versus.row_of(pairs[0], Verdicts((nan, nan), "too long")))
    found = versus.figures(rows)
    wins = [1.0] * 5 + [0.0] + [0.5] * 4
    controlled, *_ = outcomes.length_controlled(wins, range(10, 20), [12] * 10)
    assert {name: (figure.value, figure.count) for name, figure in found.items()} == {
        "win_rate": (0.7, 10),  # five wins, a loss, four ties
        "length_controlled_win_rate": (controlled, 10),
        "decided": (0.6, 10),
        "sign_test_p": (intervals.sign_test(5, 1), 6),
        # Half of each that is decided, both of two that are not, none of what is read once.
        "first_shown_preferred": (pytest.approx((6 * 0.5 + 2 * 1.0 + 0.0) / 9), 9),
        # Pairs 0 and 1 are shorter and won, 2 as long, 3 and 4 longer and won, 5 longer and lost.
        "longer_preferred": (0.4, 5),
    }
    assert versus.summary(rows) == {
        "wins": 5,
        "losses": 1,
        "ties": {"identical": 1, "orders disagree": 2, "unreadable": 1},
        "characters": round((sum(range(10, 20)) + 10) / 11, 1),
        "characters of the baseline": 12.0,
        "not judged": "1, the first one 0: too long",
    }
    assert rows[8]["verdicts"] == [None, 1.0]
    json.dumps(rows, allow_nan=False)


def test_a_dry_run_from_the_command_line(folder, tmp_path, capsys):
    with faulty.Endpoint() as server:
        options = {"model": folder / "a.jsonl", "baseline": folder / "b.jsonl", "out": tmp_path}
        options |= {"judge-base-url": server.url, "judge-model": "judge"}
        command = ["evaluate", "versus", *(f"--{key}={value}" for key, value in options.items())]
        assert cli.main([*command, "--judge-dry-run=True"]) == 0
        assert "10 requests, 0 of them answered before and 10 to ask" in capsys.readouterr().out
        assert not server.requests and not (tmp_path / "a.jsonl.json").exists()
        assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert "length_controlled_win_rate" in told and "judge: judge" in told
    assert cli.main([text for text in command if "judge-model" not in text]) == 1
    assert "judge.model = '': accepted: the name of a model" in capsys.readouterr().err
