"""MT-Bench's files, as FastChat writes them: questions, answers, judge prompts, judgments."""

import dataclasses
import pathlib
from typing import Any

from attnpo_jax.evaluate import others_files
from attnpo_jax.runtime import schema
from attnpo_jax.runtime.errors import UserError

# Of these, the judge sees a reference answer.
WITH_REFERENCE = ("math", "reasoning", "coding", "arena-hard-200")
UNREADABLE = -1

_ID = schema.Anything()
_QUESTIONS = schema.Table(
    {"question_id": _ID, "category": schema.Text(), "turns": schema.Listed(schema.Text())},
    {"required_temperature": schema.Number()},
    open=True,
)
_CHOICE = schema.Table({"turns": schema.Listed(schema.Text())}, open=True)
_ANSWERS = schema.Table({"question_id": _ID, "choices": schema.Listed(_CHOICE)}, open=True)
_PROMPTS = schema.Table(
    {
        "name": schema.Text(),
        "type": schema.Text(),
        "system_prompt": schema.Text(),
        "prompt_template": schema.Text(),
        "output_format": schema.Text(),
    },
    open=True,
)
_JUDGMENTS = schema.Table(
    {
        "question_id": _ID,
        "model": schema.Text(),
        "score": schema.Number(),
        "turn": schema.Whole(1),
    },
    {"judge": schema.Listed(schema.Text())},
    open=True,
)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of one turn or two.

    Attributes:
      id: its `question_id`, as text.
      number: the same, as the file has it.
      category: such as `writing`.
      turns: what the user says.
      temperature: of the answers.
    """

    id: str
    number: Any
    category: str
    turns: tuple[str, ...]
    temperature: float


# Of answers, by category; of any other, 0.7.
_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
_OTHER = 0.7


def read_questions(file: pathlib.Path) -> list[Question]:
    """The questions, in the file's order.

    Raises:
      UserError: a line is none, or two have the same id.
    """
    questions = {}
    for row in others_files.read_lines(file, _QUESTIONS):
        id, category, turns = str(row["question_id"]), row["category"], tuple(row["turns"])
        if not 1 <= len(turns) <= 2:
            raise UserError(f"{file}, question {id}: {len(turns)} turns; accepted: 1 or 2")
        if id in questions:
            raise UserError(f"{file}: two questions {id}; accepted: one of each question_id")
        temperature = row.get("required_temperature", _TEMPERATURES.get(category, _OTHER))
        questions[id] = Question(id, row["question_id"], category, turns, float(temperature))
    return list(questions.values())


def read_answers(file: pathlib.Path) -> dict[str, tuple[str, ...]]:
    """The first answer to each question, by its id: a text a turn.

    Raises:
      UserError: a line is none.
    """
    answers = {}
    for row in others_files.read_lines(file, _ANSWERS):
        id = str(row["question_id"])
        if not row["choices"]:
            raise UserError(f"{file}, question {id}: no choices; accepted: at least one")
        answers[id] = tuple(row["choices"][0]["turns"])
    return answers


@dataclasses.dataclass(frozen=True)
class JudgePrompt:
    """A prompt that grades one answer.

    Attributes:
      name: as the file has it, such as `single-v1`.
      system: the system message.
      template: the user's, with `{question}`, `{answer}` and so on.
    """

    name: str
    system: str
    template: str


def prompt_name(category: str, turn: int) -> str:
    """The name of the prompt that grades a turn."""
    kind = "single-math-v1" if category in WITH_REFERENCE else "single-v1"
    return kind if turn == 1 else f"{kind}-multi-turn"


def read_prompts(file: pathlib.Path) -> dict[str, JudgePrompt]:
    """The prompts that grade single answers, by name; others are left out.

    Raises:
      UserError: a line is none, or one that is needed is missing or asks for another verdict.
    """
    prompts = {}
    for row in others_files.read_lines(file, _PROMPTS):
        if row["type"] != "single":
            continue
        if row["output_format"] != "[[rating]]":
            raise UserError(
                f"{file}, {row['name']}: output_format {row['output_format']!r}; accepted: "
                "'[[rating]]'"
            )
        made = JudgePrompt(row["name"], row["system_prompt"], row["prompt_template"])
        prompts[made.name] = made
    needed = {prompt_name(category, turn) for category in ("math", "") for turn in (1, 2)}
    if lacks := sorted(needed - set(prompts)):
        raise UserError(
            f"{file}: no prompt {', '.join(lacks)}; accepted: FastChat's judge_prompts.jsonl"
        )
    return prompts


def read_judgments(file: pathlib.Path) -> list[dict[str, Any]]:
    """Judgments of single answers.

    Raises:
      UserError: a line is none; those of pairs are not read.
    """
    return others_files.read_lines(file, _JUDGMENTS)
