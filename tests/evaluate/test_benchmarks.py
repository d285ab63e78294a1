"""The evaluations by others' benchmarks through the stage: from files alone, and with a model."""

import json

import pytest
from rich.console import Console

from attnpo_jax import cli
from attnpo_jax import config as config_lib
from attnpo_jax.evaluate import evaluate
from attnpo_jax.evaluate.task import Task
from attnpo_jax.run import Run
from attnpo_jax.runtime.errors import UsageError
from tests import tiny
from tests.evaluate import alpaca_set, arena_set, test_alpaca_eval, test_arena_hard, test_mt_bench
from tests.evaluate.fake_judge import FakeJudge

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model's inputs, and small files of each benchmark."""
    folder = tmp_path_factory.mktemp("benchmarks")
    tiny.write_small_inputs(folder)
    outputs = [
        {"instruction": text, "output": "base says", "generator": "base", "dataset": "made-up"}
        for text in ("One?", "Two?")
    ]
    (folder / "reference.json").write_text(json.dumps(outputs))
    (folder / "prompt.txt").write_text(test_alpaca_eval.PROMPT)
    alpaca_set.write_length_data(folder / "df_gamed.csv", 2)
    questions = test_mt_bench.QUESTIONS
    test_mt_bench.lines(folder / "mt.jsonl", questions)
    test_mt_bench.lines(
        folder / "references.jsonl",
        [{"question_id": q["question_id"], "choices": [{"turns": ["r", "s"]}]} for q in questions],
    )
    test_mt_bench.lines(
        folder / "judge_prompts.jsonl",
        [
            {
                "name": name,
                "type": "single",
                "system_prompt": "Grade.",
                "prompt_template": template,
                "output_format": "[[rating]]",
            }
            for name, template in test_mt_bench.PROMPTS
        ],
    )
    for old in (True, False):
        kind = "old" if old else "new"
        arena_set.write(folder / kind, old=old, questions=2)
        rows = [
            {"question_id": f"q{k}", "turns": [{"content": f"question {k}"}]}
            if old
            else {"uid": f"q{k}", "category": "hard_prompt", "prompt": f"question {k}"}
            for k in range(2)
        ]
        test_arena_hard.lines(folder / kind / "question.jsonl", rows)
        (folder / kind / "settings.yaml").write_text(json.dumps(test_arena_hard.SETTINGS[old]))
    (folder / "judge_utils.py").write_text(test_arena_hard.JUDGE_UTILS)
    return folder


@pytest.fixture
def judged(monkeypatch):
    """Has a fake judge answer in place of the endpoint that is not there."""

    def put(answer):
        judge = FakeJudge(answer)
        monkeypatch.setattr(Task, "judge", lambda task: judge)
        return judge

    return put


def evaluated(folder, name, out, *, label=None, **fields):
    config = tiny.small_config(folder, generate__max_new_tokens=5)
    section = config.evaluate[name.replace("-", "_")]
    for field, value in fields.items():
        is_path = field not in ("baseline", "judged", "control") and value
        section[field] = str(folder / value) if is_path else value
    run = Run.resolve(config)
    (found,) = evaluate(run, name=name, model="base", label=label, out=out, console=QUIET)
    return found


ALPACA = {"reference": "reference.json", "prompt": "prompt.txt", "length_data": "df_gamed.csv"}
MT = {"questions": "mt.jsonl", "references": "references.jsonl", "prompts": "judge_prompts.jsonl"}
ARENA = {
    "questions": "new/question.jsonl",
    "answers": "new/model_answer",
    "settings": "new/settings.yaml",
    "categories": "judge_utils.py",
}


def test_alpaca_eval_samples_annotates_and_scores(folder, judged, tmp_path):
    judge = judged(test_alpaca_eval.judge_of(lambda text: 0.75)._answer)
    found = evaluated(folder, "alpaca-eval", tmp_path, **ALPACA)
    outputs = json.loads((tmp_path / "base" / "model_outputs.json").read_text())
    assert [row["instruction"] for row in outputs] == ["One?", "Two?"]
    assert {row["generator"] for row in outputs} == {"base"}
    annotations = json.loads((tmp_path / "base" / "annotations.json").read_text())
    assert {row["preference"] for row in annotations} <= {1.25, 1.75}
    assert {row["annotator"] for row in annotations} == {"judge"}
    mean = sum(row["preference"] - 1 for row in annotations) / 2
    assert found.result.figures["win_rate"].value == pytest.approx(mean)
    assert len(judge.asked) == 2
    # From the files that it wrote, without a model or a judge, the same comes out.
    again = evaluated(
        folder,
        "alpaca-eval",
        tmp_path / "again",
        annotations=tmp_path / "base" / "annotations.json",
        length_data="df_gamed.csv",
    )
    assert again.result.figures == found.result.figures
    assert len(judge.asked) == 2
    kept = evaluated(
        folder,
        "alpaca-eval",
        tmp_path / "given",
        outputs=tmp_path / "base/model_outputs.json",
        **ALPACA,
    )
    assert kept.result.figures == found.result.figures
    assert (tmp_path / "given" / "alpaca-eval" / "annotations.json").exists()


def test_mt_bench_samples_both_turns_judges_and_scores(folder, judged, tmp_path):
    judged(lambda ask: "[[7]]" if ask.id.endswith("/1") else "none")
    found = evaluated(folder, "mt-bench", tmp_path, **MT)
    figures = found.result.figures
    assert figures["turn_1"].value == figures["score"].value == 7
    assert figures["turn_2"].count == 0
    assert found.result.about["unreadable"] == 2
    answers = test_mt_bench.files.read_answers(tmp_path / "model_answer" / "base.jsonl")
    assert [len(answers[str(q["question_id"])]) for q in test_mt_bench.QUESTIONS] == [2, 2, 1, 1]
    again = evaluated(
        folder,
        "mt-bench",
        tmp_path / "again",
        judgments=str(tmp_path / "model_judgment" / "base.jsonl"),
        questions="mt.jsonl",
    )
    assert again.result.rows == found.result.rows
    judge = judged(lambda ask: "[[3]]")
    given = evaluated(
        folder,
        "mt-bench",
        tmp_path / "given",
        answers=str(tmp_path / "model_answer" / "base.jsonl"),
        **MT,
    )
    assert given.result.figures["score"].value == 3 and len(judge.asked) == 6


@pytest.mark.parametrize("old", [True, False])
def test_arena_hard_samples_judges_and_scores(folder, judged, tmp_path, old):
    judged(lambda ask: "[[A>B]]" if ask.id.endswith("/2") else "[[B>>A]]")
    fields = ARENA
    if old:
        fields = {name: value.replace("new/", "old/") for name, value in ARENA.items()}
        fields |= {"baseline": "base"}
        del fields["categories"]
    found = evaluated(folder, "arena-hard", tmp_path, label="ours", **fields)
    assert found.result.figures["win_rate"].value == 1.0
    assert found.result.about["baseline"] == "base"
    answers = test_arena_hard.files.read_answers(tmp_path / "model_answer")
    assert [*answers] == ["ours"] and [*answers["ours"]] == ["q0", "q1"]
    made = test_arena_hard.files.read_judgments(tmp_path / "model_judgment" / "judge", "base")
    assert {one.verdicts for one in made} == {("B>>A", "A>B")}


def test_arena_hard_judges_a_model_of_the_answers_with_its_style(folder, judged, tmp_path):
    judged(lambda ask: "[[A=B]]")
    found = evaluated(folder, "arena-hard", tmp_path, judged="first", control="both", **ARENA)
    figures = found.result.figures
    assert figures["win_rate"].value == figures["style_controlled_win_rate"].value == 0.5
    assert (tmp_path / "model_judgment" / "judge" / "first.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("alpaca-eval", {}, "needs --prompt=PATH: the judge's prompt"),
        ("alpaca-eval", {"prompt": "prompt.txt"}, "needs --reference=PATH"),
        ("alpaca-eval", ALPACA, "needs a judge: --judge-base-url=URL"),
        ("mt-bench", {}, "needs --questions=PATH"),
        ("mt-bench", MT | {"references": ""}, "needs --references=PATH"),
        ("mt-bench", MT, "needs a judge"),
        ("arena-hard", {"judgments": "new/model_judgment/judge", "control": "both"}, "--answers"),
        ("arena-hard", ARENA | {"control": "length"}, "add_markdown_info.py"),
        ("arena-hard", ARENA, "needs a judge"),
    ],
)
def test_what_is_missing_is_asked_for_before_a_model_is_loaded(
    folder, tmp_path, name, fields, message
):
    with pytest.raises(UsageError, match=message):
        evaluated(folder, name, tmp_path, **fields)


def test_annotations_are_scored_without_config_model_or_judge(tmp_path, capsys, monkeypatch):
    alpaca_set.write(tmp_path, rows=20)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "alpaca-eval", "--annotations=annotations.json", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 0 < facts["figures"]["win_rate"]["value"] < 1
    assert not list(tmp_path.glob("**/*.rows.jsonl"))
    arguments = ["--annotations=annotations.json", "--out=kept", "--name=mine"]
    assert cli.main(["evaluate", "alpaca-eval", *arguments]) == 0
    assert json.loads((tmp_path / "kept" / "mine.json").read_text())["model"] == "mine"
    assert config_lib.default_config().evaluate.alpaca_eval.annotations == ""
