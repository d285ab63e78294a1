"""Arena-Hard's judgments by any endpoint: every answer against the baseline's, in both orders."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attnpo_jax.evaluate import others_files
from attnpo_jax.evaluate.arena_hard.files import V01_BASELINE, Answer, Question
from attnpo_jax.evaluate.arena_hard.settings import JudgeSettings
from attnpo_jax.evaluate.endpoint import Answer as Judged
from attnpo_jax.evaluate.endpoint import Ask, Endpoint
from attnpo_jax.runtime.errors import UserError

Answers = Mapping[str, Mapping[str, Answer]]


def judge(
    questions: Sequence[Question],
    answers: Answers,
    settings: JudgeSettings,
    endpoint: Endpoint,
    *,
    model: str,
    baseline: str,
) -> list[dict[str, Any]]:
    """Has a model's answers judged against the baseline's.

    Args:
      questions: what was asked.
      answers: by model and question, of the model and of all baselines.
      settings: how the judge is asked.
      model: whose answers are judged.
      baseline: whose they are judged against; "" for what the settings say.

    Returns:
      Rows as the package keeps them, in the layout of the questions' file.

    Raises:
      UserError: an answer is missing, or the settings do not know a question's category.
    """
    asks: list[Ask] = []
    against = []
    for question in questions:
        of_category = settings.categories.get(question.category, {})
        other = baseline or of_category.get("baseline") or settings.baseline
        other = other or (V01_BASELINE if question.old else "")
        system = of_category.get("system_prompt") or settings.system_prompt
        if not other or not system:
            raise UserError(
                f"category {question.category}: no {'baseline' if system else 'system prompt'}; "
                "accepted: evaluate.arena_hard.categories, Arena-Hard's utils/judge_utils.py, "
                "which has both for each category"
            )
        if other == model:
            raise UserError(f"{model} is the baseline too; accepted: another --name for the model")
        pair = [_answer(answers, name, question.id) for name in (other, model)]
        for order, (a, b) in enumerate((pair, pair[::-1]), 1):
            messages = ({"role": "system", "content": system}, *_asked(settings, question, a, b))
            asks.append(
                Ask(f"{question.id}/{order}", messages, settings.max_tokens, settings.temperature)
            )
        against.append(other)
    found = zip(asks, endpoint.ask(asks), strict=True)
    return [
        _row(question, model, other, endpoint.model, settings, [next(found), next(found)])
        for question, other in zip(questions, against, strict=True)
    ]


def _answer(answers: Answers, model: str, id: str) -> str:
    found = answers.get(model, {}).get(id)
    if found is None:
        there = ", ".join(list(answers)[:6]) or "none"
        raise UserError(
            f"question {id}: no answer of {model}; answers found are of: {there}; accepted: one of "
            "the model and one of its category's baseline for each question"
        )
    return found.text


def _asked(settings: JudgeSettings, question: Question, a: str, b: str) -> Iterator[dict[str, Any]]:
    texts = {"QUESTION": question.prompt, "ANSWER_A": a, "ANSWER_B": b}
    texts |= {"question_1": question.prompt, "answer_1": a, "answer_2": b}
    for template in settings.templates:
        content = others_files.fill(template, "Arena-Hard's prompt_template", **texts)
        yield {"role": "user", "content": content}


def _row(
    question: Question,
    model: str,
    baseline: str,
    judge_model: str,
    settings: JudgeSettings,
    both: Sequence[tuple[Ask, Judged]],
) -> dict[str, Any]:
    if question.old:
        games = [
            {
                "user_prompt": ask.messages[1]["content"],
                "judgment": found.text,
                "score": settings.verdict(found.text),
            }
            for ask, found in both
        ]
        named = {"question_id": question.id, "model": model, "judge": judge_model}
        return named | {"games": games}
    return {
        "uid": question.id,
        "category": question.category,
        "judge": judge_model,
        "model": model,
        "baseline": baseline,
        "games": [
            {
                "score": settings.verdict(found.text),
                "judgment": {"answer": found.text},
                "prompt": list(ask.messages),
            }
            for ask, found in both
        ],
    }
