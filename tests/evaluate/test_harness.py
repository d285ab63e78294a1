"""Tasks of lm-evaluation-harness by `attnpo evaluate harness`, against the harness by itself."""

import json

import pytest
from rich.console import Console

from attnpo_jax import evaluate
from attnpo_jax.generate import model as models
from attnpo_jax.run import Run
from attnpo_jax.runtime.errors import UsageError, UserError
from tests import tiny

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager  # noqa: E402

from attnpo_jax.generate.harness import HarnessModel  # noqa: E402

QUIET = Console(quiet=True)
_SHARED = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}"}
TASKS = {
    "colours": _SHARED
    | {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "words": _SHARED
    | {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
ROWS = {
    "colours": [
        {"question": f"Is {word} red?", "choices": ["yes", "no"], "answer": i % 2}
        for i, word in enumerate(("a rose", "grass", "the sea", "blood", "snow"))
    ],
    "words": [{"question": f"Say {word}:", "answer": word} for word in ("rain", "light")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    tiny.write_small_inputs(folder)
    (folder / "tasks").mkdir()
    for name, rows in ROWS.items():
        file = tiny.write_lines(folder / f"{name}.jsonl", rows)
        task = TASKS[name] | {"task": name, "dataset_kwargs": {"data_files": {"test": str(file)}}}
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(task))
    return folder


def run_of(folder, **changes):
    config = tiny.small_config(
        folder,
        evaluate__harness__include_path=str(folder / "tasks"),
        evaluate__harness__include_defaults=False,
        **changes,
    )
    return Run.resolve(config)


def test_figures_are_the_harness_s_own(folder, tmp_path):
    run = run_of(folder, evaluate__harness__tasks=("colours", "words"))
    [found] = evaluate.evaluate(run, name="harness", out=tmp_path, console=QUIET)
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    expected = lm_eval.simple_evaluate(
        HarnessModel(models.load(run), config=run.config),
        tasks=["colours", "words"],
        task_manager=manager,
    )["results"]
    figures = found.result.figures
    assert set(figures) == {"colours acc", "words exact_match"}
    assert figures["colours acc"].value == expected["colours"]["acc,none"]
    assert figures["words exact_match"].value == expected["words"]["exact_match,none"]
    assert (figures["colours acc"].count, figures["colours acc"].column) == (5, "colours acc")
    assert [row["id"] for row in found.result.rows][:2] == ["colours/0", "colours/1"]
    assert not list(tmp_path.glob(".*"))


def test_what_was_answered_before_an_interruption_is_not_asked_again(folder, tmp_path, monkeypatch):
    run = run_of(folder, evaluate__harness__tasks="colours,words")
    whole = HarnessModel.generate_until

    def fails(self, requests, *arguments, **options):
        raise OSError("the disk is gone")

    monkeypatch.setattr(HarnessModel, "generate_until", fails)
    with pytest.raises(UserError, match="colours, words: OSError: the disk is gone"):
        evaluate.evaluate(run, name="harness", out=tmp_path, console=QUIET)
    monkeypatch.setattr(HarnessModel, "generate_until", whole)
    monkeypatch.setattr(HarnessModel, "loglikelihood", fails)
    [found] = evaluate.evaluate(run, name="harness", out=tmp_path, console=QUIET)
    assert found.result.figures["colours acc"].count == 5


def test_tasks_that_there_are_not_are_named(folder, tmp_path):
    for tasks, said in (("colors", "no task 'colors'"), ((), "it names none")):
        run = run_of(folder, evaluate__harness__tasks=tasks)
        with pytest.raises(UsageError, match=f"{said}; accepted: names or patterns"):
            evaluate.evaluate(run, name="harness", out=tmp_path, console=QUIET)
