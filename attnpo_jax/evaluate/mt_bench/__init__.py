"""MT-Bench: a judge's scores, 1 to 10, of two turns' answers, as FastChat has them.

`score` makes figures of judgments; both read and write FastChat's files.
"""

from typing import TYPE_CHECKING, Any

from attnpo_jax.evaluate import needs
from attnpo_jax.evaluate.evaluator import Evaluator, Result
from attnpo_jax.evaluate.mt_bench import files
from attnpo_jax.evaluate.mt_bench.answers import answer
from attnpo_jax.evaluate.mt_bench.score import score
from attnpo_jax.generate import benchmark_files
from attnpo_jax.parallel import processes
from attnpo_jax.runtime import atomic

if TYPE_CHECKING:
    from attnpo_jax.evaluate.task import Task

__all__ = ["EVALUATOR", "score"]

_QUESTIONS = "the questions, FastChat's question.jsonl"
_PROMPTS = "the judge's prompts, FastChat's judge_prompts.jsonl"
_REFERENCES = "answers to the questions of " + ", ".join(files.WITH_REFERENCE[:3])


def run(task: "Task") -> Result:
    """Scores the judgments that are named, or makes them first."""
    named = needs.optional_path(task, "judgments")
    file = needs.optional_path(task, "questions")
    if named is not None:
        questions = [] if file is None else files.read_questions(file)
        judgments = files.read_judgments(named)
    else:
        questions = files.read_questions(needs.path(task, "questions", _QUESTIONS))
        judgments = _judgments(task, questions)
    categories = {question.id: question.category for question in questions}
    return score(judgments, categories) if judgments else Result([], {})


def _judgments(task: "Task", questions: list[files.Question]) -> list[dict[str, Any]]:
    """Judgments of the answers that are named or sampled; of all processes, in the first one."""
    from attnpo_jax.evaluate.mt_bench.judgments import judge

    # All that may be missing is asked for before anything is sampled.
    prompts = files.read_prompts(needs.path(task, "prompts", _PROMPTS))
    references: dict[str, tuple[str, ...]] = {}
    if any(question.category in files.WITH_REFERENCE for question in questions):
        references = files.read_answers(needs.path(task, "references", _REFERENCES))
    folder = needs.folder(task)
    endpoint = needs.judge(task)
    named = needs.optional_path(task, "answers")
    if named is None:
        answers = answer(questions, task.responses)
    else:
        answers = files.read_answers(named)
    if not processes.is_first():
        return []
    if named is None:
        rows = [
            benchmark_files.mt_bench_answer(one.number, answers[one.id], task.model)
            for one in questions
        ]
        atomic.write_json_lines(folder / "model_answer" / f"{task.model}.jsonl", rows)
    judgments = judge(
        questions,
        answers,
        references,
        prompts,
        endpoint,
        model=task.model,
        max_tokens=task.section.max_tokens,
    )
    atomic.write_json_lines(folder / "model_judgment" / f"{task.model}.jsonl", judgments)
    return judgments


EVALUATOR = Evaluator(
    "mt-bench",
    run,
    of_files=lambda section: bool(section.judgments or section.answers),
    reads=("generate.", "model.", "evaluate.judge.model"),
)
