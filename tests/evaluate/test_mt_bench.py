import json
import math
import os
import re
import subprocess

import pytest

from attnpo_jax.evaluate.mt_bench import files, score
from attnpo_jax.evaluate.mt_bench.answers import answer
from attnpo_jax.evaluate.mt_bench.judgments import judge, rating
from attnpo_jax.runtime.errors import UserError
from tests.evaluate.fake_judge import FakeJudge

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Shorter."]},
    {"question_id": 111, "category": "math", "turns": ["2+2?", "Times 3?"]},
    {"question_id": 131, "category": "extraction", "turns": ["Find."]},
    {"question_id": 99, "category": "odd", "turns": ["Say."], "required_temperature": 0.2},
]
PROMPTS = [
    ("single-v1", "{question}|{answer}"),
    ("single-math-v1", "{question}|{ref_answer_1}|{answer}"),
    ("single-v1-multi-turn", "{question_1}|{answer_1}|{question_2}|{answer_2}"),
    (
        "single-math-v1-multi-turn",
        "{question_1}|{ref_answer_1}|{question_2}|{ref_answer_2}|{answer_1}|{answer_2}",
    ),
]


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def questions(tmp_path):
    return files.read_questions(lines(tmp_path / "question.jsonl", QUESTIONS))


@pytest.fixture
def prompts(tmp_path):
    rows = [
        {
            "name": name,
            "type": "single",
            "system_prompt": f"System of {name}",
            "prompt_template": template,
            "output_format": "[[rating]]",
        }
        for name, template in PROMPTS
    ]
    pairwise = rows[0] | {"name": "pair-v2", "type": "pairwise", "output_format": "[[A]]"}
    return files.read_prompts(lines(tmp_path / "judge_prompts.jsonl", [*rows, pairwise]))


def judgment(id, turn, value, model="ours"):
    return {
        "question_id": id,
        "model": model,
        "judge": ["gpt-4", "single-v1"],
        "user_prompt": "",
        "judgment": f"[[{value}]]",
        "score": value,
        "turn": turn,
        "tstamp": 0.0,
    }


JUDGMENTS = [
    judgment(81, 1, 8),
    judgment(81, 2, 6),
    judgment(111, 1, -1),
    judgment(111, 2, 3.5),
    judgment(131, 1, 10),
]
CATEGORIES = {"81": "writing", "111": "math", "131": "extraction"}


def test_scores_equal_hand_computation():
    found = score(JUDGMENTS, CATEGORIES)
    assert {name: one.value for name, one in found.figures.items()} == pytest.approx(
        {
            "score": (8 + 6 + 3.5 + 10) / 4,
            "turn_1": (8 + 10) / 2,
            "turn_2": (6 + 3.5) / 2,
            "writing": (8 + 6) / 2,
            "math": 3.5,
            "extraction": 10.0,
        }
    )
    # Student's t of two values 2 apart, and of two 2.5 apart: 12.7062 deviations of the mean.
    for name, half in (("turn_1", 1.0), ("turn_2", 1.25)):
        figure = found.figures[name]
        assert figure.high - figure.value == pytest.approx(12.7062 * half, rel=1e-4)
    assert found.figures["score"].count == 3
    about = found.about
    assert (about["judgments"], about["unreadable"], about["repeated"]) == (5, 1, 0)
    assert about["unreadable_by_turn"] == {"1": 1, "2": 0}
    assert [row["id"] for row in found.rows] == ["81", "111", "131"]


def test_a_turn_without_any_score_is_shown_as_having_none():
    found = score([judgment(81, 1, -1), judgment(81, 2, 5)], CATEGORIES)
    assert math.isnan(found.figures["turn_1"].value) and found.figures["turn_1"].count == 0
    assert found.figures["score"].value == 5


def test_several_models_have_figures_of_their_own_and_repetitions_count():
    again = [judgment(81, 1, 2), judgment(81, 1, 4), judgment(81, 1, 9, "theirs")]
    found = score(again)
    assert found.figures["ours/score"].value == 3
    assert found.figures["theirs/score"].value == 9
    assert found.about["ours/repeated"] == 1
    assert [row["id"] for row in found.rows] == ["ours/81", "theirs/81"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Rating: [[7]] of [[9]]", 7),
        ("[3] then [[8.5]]", 8.5),
        ("I say [6]", 6),
        ("[[10.]]", 10.0),
        ("8/10", -1),
        ("[[eight]] [-3]", -1),
        (f"[[{'9' * 5000}]]", -1),
    ],
)
def test_ratings_are_read_as_fastchat_reads_them(text, value):
    assert rating(text) == value


def test_both_turns_are_sampled_at_the_temperature_of_the_category(questions):
    asked = []

    def respond(prompts, tag, **settings):
        asked.append((tag, settings["temperature"], [prompt.id for prompt in prompts]))
        return [
            {"id": one.id, "response": "/".join(m["content"] for m in one.messages)}
            for one in prompts
        ]

    answers = answer(questions, respond)
    assert asked == [
        ("turn-1-at-0", 0.0, ["111", "131"]),
        ("turn-1-at-0.2", 0.2, ["99"]),
        ("turn-1-at-0.7", 0.7, ["81"]),
        ("turn-2-at-0", 0.0, ["111"]),
        ("turn-2-at-0.7", 0.7, ["81"]),
    ]
    assert answers["81"] == ("Write.", "Write./Write./Shorter.")
    assert answers["131"] == ("Find.",)


def test_each_turn_is_graded_with_its_prompt_and_references_where_they_are_due(questions, prompts):
    answers = {"81": ("{x}", "s"), "111": ("4", "12"), "131": ("f",), "99": ("o",)}
    references = {"111": ("four", "twelve")}
    said = FakeJudge(lambda ask: f"Rating: [[{len(ask.id)}]]" if ask.id != "99/1" else "Good!")
    rows = judge(questions, answers, references, prompts, said, model="ours", max_tokens=77)
    assert [(row["question_id"], row["turn"], row["judge"][1]) for row in rows] == [
        (81, 1, "single-v1"),
        (111, 1, "single-math-v1"),
        (131, 1, "single-v1"),
        (99, 1, "single-v1"),
        (81, 2, "single-v1-multi-turn"),
        (111, 2, "single-math-v1-multi-turn"),
    ]
    assert [row["user_prompt"] for row in rows] == [
        "Write.|{x}",
        "2+2?|four|4",
        "Find.|f",
        "Say.|o",
        "Write.|{x}|Shorter.|s",
        "2+2?|four|Times 3?|twelve|4|12",
    ]
    assert [row["score"] for row in rows] == [4, 5, 5, -1, 4, 5]
    first = said.asked[0]
    assert first.messages[0] == {"role": "system", "content": "System of single-v1"}
    assert (first.max_tokens, first.temperature) == (77, 0.0)


def test_what_is_missing_is_told_of_before_anything_is_asked(questions, prompts):
    silent = FakeJudge(lambda ask: "")
    answers = {str(q["question_id"]): ("a",) * len(q["turns"]) for q in QUESTIONS}
    with pytest.raises(UserError, match="question 111 .math., turn 1: no reference answer"):
        judge(questions, answers, {}, prompts, silent, model="m", max_tokens=9)
    with pytest.raises(UserError, match="question 81 .writing., turn 2: no answer"):
        short = answers | {"81": ("a",)}
        judge(questions, short, {"111": ("a", "b")}, prompts, silent, model="m", max_tokens=9)
    odd = prompts | {"single-v1": files.JudgePrompt("single-v1", "", "{question} {essay}")}
    with pytest.raises(UserError, match="single-v1: {essay} is not known; accepted: {question}"):
        judge(questions, answers, {"111": ("a", "b")}, odd, silent, model="m", max_tokens=9)
    assert not silent.asked


def test_files_that_are_none_are_told_of(tmp_path):
    cases = (
        (files.read_questions, QUESTIONS[0] | {"turns": []}, "question 81: 0 turns"),
        (files.read_answers, {"question_id": 1, "choices": []}, "question 1: no choices"),
        (files.read_judgments, {"question_id": 1, "model": "m"}, "line 1: it lacks score, turn"),
    )
    for read, row, message in cases:
        with pytest.raises(UserError, match=re.escape(message)):
            read(lines(tmp_path / "f.jsonl", [row]))
    with pytest.raises(UserError, match="two questions 81"):
        files.read_questions(lines(tmp_path / "f.jsonl", [QUESTIONS[0], QUESTIONS[0]]))
    (tmp_path / "f.jsonl").write_text("{}\n{")
    with pytest.raises(UserError, match="line 1: it lacks"):
        files.read_answers(tmp_path / "f.jsonl")


@pytest.mark.process
@pytest.mark.skipif(
    "ATTNPO_ALPACA_EVAL" not in os.environ,
    reason="ATTNPO_ALPACA_EVAL names no Python that has fschat too",
)
def test_fastchat_shows_the_same_scores(tmp_path):
    file = lines(tmp_path / "judgments.jsonl", JUDGMENTS)
    command = [os.environ["ATTNPO_ALPACA_EVAL"], "-m", "fastchat.llm_judge.show_result"]
    said = subprocess.run(
        [*command, f"--input-file={file}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=tmp_path,
    ).stdout
    shown = [float(one) for one in re.findall(r"^ours\s.*?([\d.]+)$", said, re.MULTILINE)]
    figures = score(JUDGMENTS).figures
    ours = [figures[name].value for name in ("turn_1", "turn_2", "score")]
    assert shown == pytest.approx(ours, abs=1e-6)
