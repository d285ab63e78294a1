"""A model's answers to MT-Bench: both turns, at the temperature of each question's category."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnpo_jax.data.prompts import Prompt
from attnpo_jax.evaluate.mt_bench.files import Question

# `Task.responses`: prompts, a tag of the samples file, settings of sampling.
Respond = Callable[..., list[dict[str, Any]]]


def answer(questions: Sequence[Question], respond: Respond) -> dict[str, tuple[str, ...]]:
    """Samples answers; the second turn is asked after the model's own first answer.

    Args:
      questions: what to answer.
      respond: called for each turn and temperature.

    Returns:
      By id, a text a turn; a question has fewer where the model could not answer one.
    """
    answers: dict[str, tuple[str, ...]] = {question.id: () for question in questions}
    for turn in (1, 2):
        for temperature in sorted({question.temperature for question in questions}):
            asked = [
                Prompt(question.id, _conversation(question, answers[question.id]))
                for question in questions
                if question.temperature == temperature
                and len(question.turns) >= turn == len(answers[question.id]) + 1
            ]
            if not asked:
                continue
            records = respond(
                asked, f"turn-{turn}-at-{temperature:g}", samples=1, temperature=temperature
            )
            for record in records:
                answers[record["id"]] += (record["response"],)
    return answers


def _conversation(question: Question, answered: Sequence[str]) -> tuple[Mapping[str, Any], ...]:
    said: list[dict[str, Any]] = []
    for turn, text in enumerate(question.turns[: len(answered) + 1]):
        said.append({"role": "user", "content": text})
        if turn < len(answered):
            said.append({"role": "assistant", "content": answered[turn]})
    return tuple(said)
