import json
import pathlib

import numpy as np
import pytest

from attnpo_jax.evaluate.arena_hard import files, score
from attnpo_jax.evaluate.arena_hard.judgments import judge
from attnpo_jax.evaluate.arena_hard.settings import JudgeSettings
from attnpo_jax.runtime.errors import UserError
from tests.evaluate import arena_set
from tests.evaluate.fake_judge import FakeJudge

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "evaluate" / "arena_hard.json"
CONTROLS = {"both": ("length", "markdown"), "length": ("length",), "markdown": ("markdown",)}


def lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def judgment(id, first, second, old, model="ours"):
    games = [None if score is None else {"score": score} for score in (first, second)]
    if old:
        return {"question_id": id, "model": model, "judge": "j", "games": games}
    named = {"uid": id, "category": "hard_prompt", "model": model, "baseline": "base"}
    return named | {"games": games}


VERDICTS = [("B>>A", "A>B"), ("A=B", "B>A"), ("A>>B", None)]


@pytest.mark.parametrize(
    ("old", "value", "left_out"),
    # Of the games: the model wins 3 and 1; a half and none; and loses 3, which v2 leaves out with
    # the unreadable one.
    [(False, 4.5 / 6, 2), (True, 4.5 / 9, 1)],
)
def test_win_rates_equal_hand_computation(tmp_path, old, value, left_out):
    rows = [judgment(f"q{k}", *both, old) for k, both in enumerate(VERDICTS)]
    found = score(files.read_judgments(lines(tmp_path / "j.jsonl", rows), ""))
    figure = found.figures["win_rate"]
    assert figure.value == pytest.approx(value)
    assert figure.low <= value <= figure.high
    assert found.about["unreadable_games"] == 1
    assert found.about["games_left_out"] == left_out
    assert found.about["baseline"] == ("gpt-4-0314" if old else "base")
    known = [row["win"] for row in found.rows if "win" in row]
    assert len(known) == figure.count == (3 if old else 2)
    assert np.mean(known) == pytest.approx(value)


def test_labels_of_v2_from_b_to_a_are_read_and_those_of_v01_are_not(tmp_path):
    for old, value in ((False, 1.0), (True, 0.5)):
        rows = [judgment("q", "A<<B", "B<A", old), judgment("r", "A=B", "A=B", old)]
        found = score(files.read_judgments(lines(tmp_path / "j.jsonl", rows), ""))
        # 3 and 1 of 4, and two halves of 2.
        expected = 5 / 6 if not old else value
        assert found.figures["win_rate"].value == pytest.approx(expected)


def test_categories_and_models_have_figures_of_their_own(tmp_path):
    rows = [judgment("q", "B>A", "A>B", False), judgment("q", "A>B", "B>A", False, "other")]
    rows.append(judgment("w", "B>A", "B>A", False) | {"category": "creative_writing"})
    found = score(files.read_judgments(lines(tmp_path / "j.jsonl", rows), ""))
    assert {name: figure.value for name, figure in found.figures.items()} == {
        "hard_prompt/ours/win_rate": 1.0,
        "hard_prompt/other/win_rate": 0.0,
        "creative_writing/ours/win_rate": 0.5,
    }
    assert len({row["id"] for row in found.rows}) == 3


@pytest.mark.golden
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("control", list(CONTROLS))
def test_figures_are_those_of_the_package(tmp_path, old, control):
    golden = json.loads(GOLDENS.read_text())["v01" if old else "v2"]
    arena_set.write(tmp_path, old=old)
    judgments = files.read_judgments(tmp_path / "model_judgment" / "judge", arena_set.BASELINE)
    found = score(judgments, CONTROLS[control], files.read_answers(tmp_path / "model_answer"))
    for model in arena_set.MODELS:
        plain = found.figures[f"{model}/win_rate"]
        controlled = found.figures[f"{model}/style_controlled_win_rate"]
        assert plain.value == pytest.approx(golden["win_rate"][model], abs=1e-9)
        # The package's fits stop before the minimum.
        expected = golden[control]["win_rate"][model]
        assert controlled.value == pytest.approx(expected, abs=1e-4 if old else 4e-4)
        assert controlled.low < controlled.value < controlled.high
    coefficients = list(found.about["style_coefficients"].values())
    assert coefficients == pytest.approx(golden[control]["coefficients"], rel=2e-2, abs=1e-3)


def test_without_style_the_fit_is_the_weighted_mean(tmp_path):
    arena_set.write(tmp_path, old=False)
    judgments = files.read_judgments(tmp_path / "model_judgment" / "judge", "")
    answers = {
        model: {id: files.Answer("", files.Style(1.0, (0.0, 0.0, 0.0))) for id in of_model}
        for model, of_model in files.read_answers(tmp_path / "model_answer").items()
    }
    found = score(judgments, ("length", "markdown"), answers).figures
    for model in arena_set.MODELS:
        plain = found[f"{model}/win_rate"].value
        assert found[f"{model}/style_controlled_win_rate"].value == pytest.approx(plain, abs=1e-7)


def test_style_control_says_whose_answers_lack_a_style(tmp_path):
    arena_set.write(tmp_path, old=False, questions=2)
    judgments = files.read_judgments(tmp_path / "model_judgment" / "judge", "")
    with pytest.raises(UserError, match="no answer of .* to q.*add_markdown_info.py"):
        score(judgments, ("length",), {})


SETTINGS = {
    True: {
        "system_prompt": "Judge.",
        "prompt_template": ["{question_1}|{answer_1}|{answer_2}"],
        "regex_pattern": r"\[\[([AB<>=]+)\]\]",
    },
    False: {
        "prompt_template": "{QUESTION}|{ANSWER_A}|{ANSWER_B}",
        "regex_patterns": [r"\[\[([AB<>=]+)\]\]", r"\[([AB<>=]+)\]"],
        "temperature": 0.5,
        "max_tokens": 9,
    },
}
JUDGE_UTILS = """
TEXT = "Judge as \\"ever\\"."
JUDGE_SETTINGS = {
    "hard_prompt": {"baseline": "base", "system_prompt": TEXT},
    "creative_writing": {"baseline": "other", "system_prompt": "Write."},
}
import os
"""


@pytest.mark.parametrize(
    ("said", "old", "new"),
    [
        ("x [[A>B]] y", "A>B", "A>B"),
        ("[[A>B]] no, [[B>A]]", None, "B>A"),
        ("[[a>b]]", None, "A>B"),
        ("so [A=B]", None, "A=B"),
        ("none", None, None),
    ],
)
def test_verdicts_are_read_as_each_version_reads_them(tmp_path, said, old, new):
    for is_old, expected in ((True, old), (False, new)):
        file = tmp_path / "settings.yaml"
        file.write_text(json.dumps(SETTINGS[is_old]))
        assert JudgeSettings.read(file, None).verdict(said) == expected


@pytest.mark.parametrize("old", [True, False])
def test_judgments_are_made_in_both_orders_and_read_again(tmp_path, old):
    (tmp_path / "settings.yaml").write_text(json.dumps(SETTINGS[old]))
    (tmp_path / "judge_utils.py").write_text(JUDGE_UTILS)
    settings = JudgeSettings.read(tmp_path / "settings.yaml", tmp_path / "judge_utils.py")
    if old:
        rows = [{"question_id": "q", "turns": [{"content": "Why {x}?"}]}]
    else:
        rows = [{"uid": "q", "category": "hard_prompt", "prompt": "Why {x}?"}]
    questions = files.read_questions(lines(tmp_path / "question.jsonl", rows))
    answers = {
        model: {"q": files.Answer(text, None)} for model, text in (("base", "1"), ("ours", "2"))
    }
    better = FakeJudge(
        lambda ask: "[[B>>A]]" if ask.messages[1]["content"][-1] == "2" else "[[A>B]]"
    )
    made = judge(questions, answers, settings, better, model="ours", baseline="base" * old)
    assert [ask.messages[1]["content"] for ask in better.asked] == ["Why {x}?|1|2", "Why {x}?|2|1"]
    assert better.asked[0].messages[0]["content"] == ("Judge." if old else 'Judge as "ever".')
    assert better.asked[0].max_tokens == (4096 if old else 9)
    again = files.read_judgments(lines(tmp_path / "made.jsonl", made), "base" * old)
    assert again[0].verdicts == ("B>>A", "A>B")
    assert again[0].baseline == "base"
    assert score(again).figures["win_rate"].value == 1.0


def test_what_the_judge_needs_is_asked_for(tmp_path):
    (tmp_path / "settings.yaml").write_text(json.dumps(SETTINGS[False]))
    settings = JudgeSettings.read(tmp_path / "settings.yaml", None)
    questions = [files.Question("q", "hard_prompt", "Why?", False)]
    with pytest.raises(UserError, match="hard_prompt: no system prompt.*judge_utils.py"):
        judge(questions, {}, settings, FakeJudge(str), model="ours", baseline="base")
    (tmp_path / "judge_utils.py").write_text(JUDGE_UTILS)
    settings = JudgeSettings.read(tmp_path / "settings.yaml", tmp_path / "judge_utils.py")
    with pytest.raises(UserError, match="question q: no answer of base; answers found.*ours"):
        judge(questions, {"ours": {}}, settings, FakeJudge(str), model="ours", baseline="")
    with pytest.raises(UserError, match="base is the baseline too"):
        judge(questions, {}, settings, FakeJudge(str), model="base", baseline="")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1", "accepted: a file of Arena-Hard's"),
        ("prompt_template: x", "regex_patterns"),
        ("{prompt_template: x, regex_patterns: ['(']}", "in a pattern '\\('"),
        ("{prompt_template: x, regex_patterns: ['(a)(b)']}", "patterns of one group"),
        ("a: [", "no YAML"),
    ],
)
def test_settings_that_are_none_are_told_of(tmp_path, content, message):
    file = tmp_path / "settings.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        JudgeSettings.read(file, None)


def test_files_that_are_none_are_told_of(tmp_path):
    with pytest.raises(UserError, match="line 1: it lacks category, baseline"):
        files.read_judgments(lines(tmp_path / "j", [{"uid": "q", "model": "m", "games": []}]), "")
    mixed = [judgment("q", "A>B", "A>B", old) for old in (True, False)]
    with pytest.raises(UserError, match="with question_id and with uid"):
        files.read_judgments(lines(tmp_path / "j", mixed), "")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \*.jsonl there"):
        files.read_answers(tmp_path / "empty")
