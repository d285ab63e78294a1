"""MT-Bench's single-answer grading by any endpoint."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from attnpo_jax.evaluate import others_files
from attnpo_jax.evaluate.endpoint import Ask, Endpoint
from attnpo_jax.evaluate.mt_bench.files import (
    UNREADABLE,
    WITH_REFERENCE,
    JudgePrompt,
    Question,
    prompt_name,
)
from attnpo_jax.runtime.errors import UserError

_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


def rating(judgment: str) -> float | int:
    """The first `[[number]]` of a judgment, else the first `[number]`, else `UNREADABLE`.

    >>> rating("Rating: [[8]], not [3]"), rating("[7.5]"), rating("8 of 10")
    (8, 7.5, -1)
    """
    for pattern in _RATINGS:
        if found := pattern.search(judgment):
            value = float(found[1])
            if not math.isfinite(value):
                return UNREADABLE
            return value if "." in found[1] else int(value)
    return UNREADABLE


def judge(
    questions: Sequence[Question],
    answers: Mapping[str, Sequence[str]],
    references: Mapping[str, Sequence[str]],
    prompts: Mapping[str, JudgePrompt],
    endpoint: Endpoint,
    *,
    model: str,
    max_tokens: int,
) -> list[dict[str, Any]]:
    """Has each turn of each answer graded.

    Args:
      questions: what was asked.
      answers: of the model, by id, a text a turn.
      references: likewise, for the categories that have them.
      prompts: by name, see `files.read_prompts`.
      model: its name in the judgments.
      max_tokens: of a judgment.

    Returns:
      Rows as FastChat keeps them, the first turns before the second ones.

    Raises:
      UserError: an answer or a reference is missing; a prompt has an unknown place.
    """
    turns = [(one, turn) for turn in (1, 2) for one in questions if len(one.turns) >= turn]
    asks = []
    for question, turn in turns:
        prompt = prompts[prompt_name(question.category, turn)]
        content = _content(question, turn, answers, references, prompt)
        messages = (
            {"role": "system", "content": prompt.system},
            {"role": "user", "content": content},
        )
        asks.append(Ask(f"{question.id}/{turn}", messages, max_tokens))
    rows = []
    for (question, turn), ask, found in zip(turns, asks, endpoint.ask(asks), strict=True):
        rows.append(
            {
                "question_id": question.number,
                "model": model,
                "judge": [endpoint.model, prompt_name(question.category, turn)],
                "user_prompt": ask.messages[1]["content"],
                "judgment": found.text,
                "score": rating(found.text),
                "turn": turn,
                "tstamp": 0.0,
            }
        )
    return rows


def _content(
    question: Question,
    turn: int,
    answers: Mapping[str, Sequence[str]],
    references: Mapping[str, Sequence[str]],
    prompt: JudgePrompt,
) -> str:
    texts: dict[str, str] = {}
    given = _turns(answers, question, turn, "answer")
    if turn == 1:
        texts |= {"question": question.turns[0], "answer": given[0]}
    else:
        texts |= {"question_1": question.turns[0], "question_2": question.turns[1]}
        texts |= {"answer_1": given[0], "answer_2": given[1]}
    if question.category in WITH_REFERENCE:
        right = _turns(references, question, turn, "reference answer")
        texts |= {f"ref_answer_{k}": text for k, text in enumerate(right[:turn], 1)}
    return others_files.fill(prompt.template, f"judge prompt {prompt.name}", **texts)


def _turns(
    found: Mapping[str, Sequence[str]], question: Question, turn: int, what: str
) -> Sequence[str]:
    turns = found.get(question.id, ())
    if len(turns) < turn:
        raise UserError(
            f"question {question.id} ({question.category}), turn {turn}: no {what}; accepted: one "
            "for each turn"
        )
    return turns
