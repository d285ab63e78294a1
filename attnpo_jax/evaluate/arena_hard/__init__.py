"""Arena-Hard v0.1 and v2: win rates against a baseline, judged in both orders, as its package has
them.

`score` makes figures of judgments; both read and write the package's files.
"""

from typing import TYPE_CHECKING

from attnpo_jax.data.prompts import Prompt
from attnpo_jax.evaluate import needs
from attnpo_jax.evaluate.arena_hard import files
from attnpo_jax.evaluate.arena_hard.files import Answer, Judgment, Question
from attnpo_jax.evaluate.arena_hard.score import score
from attnpo_jax.evaluate.evaluator import Evaluator, Result
from attnpo_jax.generate import benchmark_files
from attnpo_jax.parallel import processes
from attnpo_jax.runtime import atomic
from attnpo_jax.runtime.errors import UsageError

if TYPE_CHECKING:
    from attnpo_jax.evaluate.task import Task

__all__ = ["EVALUATOR", "score"]

_QUESTIONS = "the questions, Arena-Hard's question.jsonl"
_ANSWERS = "the baseline's answers, a file or Arena-Hard's folder model_answer"
_SETTINGS = "how the judge is asked, Arena-Hard's config/arena-hard-v2.0.yaml"

_CONTROL = {"none": (), "length": ("length",), "markdown": ("markdown",)}
_CONTROL["both"] = ("length", "markdown")


def run(task: "Task") -> Result:
    """Scores the judgments that are named, or makes them first."""
    control = _CONTROL[task.section.control]
    named = needs.optional_path(task, "judgments")
    if named is not None:
        judgments = files.read_judgments(named, task.section.baseline)
        answers = files.read_answers(needs.path(task, "answers", _ANSWERS)) if control else {}
    else:
        if control and not task.section.judged:
            raise UsageError(
                "evaluate arena-hard --control needs the style of the model's answers, which "
                "Arena-Hard's add_markdown_info.py puts into its file; accepted: --control=none, "
                "then --control with --judgments and --answers"
            )
        answers = files.read_answers(needs.path(task, "answers", _ANSWERS))
        judgments = _judgments(task, answers)
    return score(judgments, control, answers) if judgments else Result([], {})


def _judgments(task: "Task", answers: dict[str, dict[str, Answer]]) -> list[Judgment]:
    """Judgments of a model's answers; of all processes, in the first one."""
    from attnpo_jax.evaluate.arena_hard.judgments import judge
    from attnpo_jax.evaluate.arena_hard.settings import JudgeSettings

    # All that may be missing is asked for before anything is sampled.
    section = task.section
    questions = files.read_questions(needs.path(task, "questions", _QUESTIONS))
    settings = JudgeSettings.read(
        needs.path(task, "settings", _SETTINGS), needs.optional_path(task, "categories")
    )
    folder = needs.folder(task)
    endpoint = needs.judge(task)
    model = section.judged or task.model
    if not section.judged:
        answers = answers | {model: _sampled(task, questions)}
    if not processes.is_first():
        return []
    rows = judge(questions, answers, settings, endpoint, model=model, baseline=section.baseline)
    judge_name = endpoint.model.replace("/", "--")
    atomic.write_json_lines(folder / "model_judgment" / judge_name / f"{model}.jsonl", rows)
    baseline = section.baseline or settings.baseline
    return [files.judgment_of(row, baseline) for row in rows]


def _sampled(task: "Task", questions: list[Question]) -> dict[str, Answer]:
    """The model's answers; the first process writes them as the package has them."""
    prompts = [
        Prompt(question.id, ({"role": "user", "content": question.prompt},))
        for question in questions
    ]
    records = {record["id"]: record for record in task.responses(prompts, samples=1)}
    in_layout = (benchmark_files.arena_hard_answer, benchmark_files.arena_hard_v01_answer)
    rows = [
        in_layout[question.old](records[question.id], task.model)
        for question in questions
        if question.id in records
    ]
    if processes.is_first():
        atomic.write_json_lines(task.folder / "model_answer" / f"{task.model}.jsonl", rows)
    return {id: Answer(record["response"], None) for id, record in records.items()}


EVALUATOR = Evaluator(
    "arena-hard",
    run,
    of_files=lambda section: bool(section.judgments or section.judged),
    reads=("generate.", "model.", "evaluate.judge.model"),
)
