"""Arena-Hard's files, of v0.1 and of v2: questions, answers, judgments.

v0.1 began with FastChat's layout (`question_id`, `turns`, `choices`), which is `old` here; since v2
both have another one (`uid`, `prompt`, `messages`). A file is read in either.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from attnpo_jax.evaluate import others_files
from attnpo_jax.runtime import schema
from attnpo_jax.runtime.errors import UserError

V01 = "arena-hard-v0.1"
V01_BASELINE = "gpt-4-0314"

_ANY = schema.Anything()
_SAID = schema.Table({"content": _ANY}, open=True)
_GAME = schema.Table({"score": schema.Maybe(schema.Text())}, open=True)
_GAMES = schema.Row((schema.Maybe(_GAME), schema.Maybe(_GAME)))


@dataclasses.dataclass(frozen=True)
class _Either:
    """A row of one of both layouts: the old one has `question_id`, the other `uid`."""

    old: Mapping[str, schema.Form]
    new: Mapping[str, schema.Form]

    def check(self, value: Any) -> None:
        old = isinstance(value, dict) and _is_old(value)
        schema.Table(self.old if old else self.new, open=True).check(value)


def _is_old(row: Mapping[str, Any]) -> bool:
    return "question_id" in row and "uid" not in row


_QUESTIONS = _Either(
    {
        "question_id": schema.Text(),
        "turns": schema.Row((schema.Table({"content": schema.Text()}, open=True),)),
    },
    {"uid": schema.Text(), "category": schema.Text(), "prompt": schema.Text()},
)
_ANSWERS = _Either(
    {
        "question_id": schema.Text(),
        "model_id": schema.Text(),
        "choices": schema.Listed(schema.Table({"turns": schema.Listed(_ANY)}, open=True)),
    },
    {"uid": schema.Text(), "model": schema.Text(), "messages": schema.Listed(_SAID)},
)
_JUDGMENTS = _Either(
    {"question_id": schema.Text(), "model": schema.Text(), "games": _GAMES},
    {
        "uid": schema.Text(),
        "category": schema.Text(),
        "model": schema.Text(),
        "baseline": schema.Text(),
        "games": _GAMES,
    },
)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question; `old` says which layout its file has."""

    id: str
    category: str
    prompt: str
    old: bool


@dataclasses.dataclass(frozen=True)
class Style:
    """What an answer looks like.

    Attributes:
      tokens: how long it is.
      marks: headers, items of lists, and bold texts in it.
    """

    tokens: float
    marks: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's answer, with its style where the package has put it there."""

    text: str
    style: Style | None


@dataclasses.dataclass(frozen=True)
class Judgment:
    """Two games on a question: in the first, the baseline is A; in the second, the model.

    Attributes:
      id: the question's.
      category: the question's; `V01` for the old layout.
      model, baseline: whose answers they are.
      verdicts: the judge's labels, such as `A>>B`; None where it gave none.
      old: which layout the file has.
    """

    id: str
    category: str
    model: str
    baseline: str
    verdicts: tuple[str | None, str | None]
    old: bool


def read_questions(file: pathlib.Path) -> list[Question]:
    """The questions, in the file's order.

    Raises:
      UserError: a line is none.
    """
    questions = []
    for row in others_files.read_lines(file, _QUESTIONS):
        if _is_old(row):
            made = Question(row["question_id"], V01, row["turns"][0]["content"], True)
        else:
            made = Question(row["uid"], row["category"], row["prompt"], False)
        questions.append(made)
    return questions


def read_answers(path: pathlib.Path) -> dict[str, dict[str, Answer]]:
    """Answers of a file, or of a folder's: by model and question.

    Raises:
      UserError: a line is none.
    """
    answers: dict[str, dict[str, Answer]] = {}
    for file in others_files.files_in(path, ".jsonl"):
        for number, row in enumerate(others_files.read_lines(file, _ANSWERS), 1):
            old = _is_old(row)
            said = row["choices"][:1] if old else row["messages"][-1:]
            said = said[0]["turns"][-1:] if old and said else said
            text = _text(said[0]) if said else None
            if text is None:
                raise UserError(f"{file}, answer {number}: no text in it; accepted: an answer")
            style = _style(row.get("conv_metadata" if old else "metadata"))
            id, model = (row["question_id"], row["model_id"]) if old else (row["uid"], row["model"])
            answers.setdefault(model, {})[id] = Answer(text, style)
    return answers


def _text(said: Any) -> str | None:
    """The text of a turn or message: `{"content": {"answer": ...}}`, or less deep."""
    for key in ("content", "answer"):
        if isinstance(said, dict):
            said = said.get(key)
    return said if isinstance(said, str) else None


def _style(metadata: Any) -> Style | None:
    if not isinstance(metadata, dict):
        return None
    names = ("token_len", "header_count", "list_count", "bold_count")
    counts = []
    for value in map(metadata.get, names):
        parts = list(value.values()) if isinstance(value, dict) else [value]
        if not all(isinstance(part, (int, float)) for part in parts):
            return None
        counts.append(float(sum(parts)))
    return Style(counts[0], (counts[1], counts[2], counts[3]))


def read_judgments(path: pathlib.Path, baseline: str) -> list[Judgment]:
    """Judgments of a file, or of a folder's.

    Args:
      baseline: the baseline's name where they do not say it; "" for v0.1's own.

    Raises:
      UserError: a line is none, or files of both layouts are mixed.
    """
    judgments = []
    for file in others_files.files_in(path, ".jsonl"):
        judgments += [
            judgment_of(row, baseline) for row in others_files.read_lines(file, _JUDGMENTS)
        ]
    if len({one.old for one in judgments}) > 1:
        raise UserError(f"{path}: rows with question_id and with uid; accepted: one of these alone")
    return judgments


def judgment_of(row: Mapping[str, Any], baseline: str) -> Judgment:
    """A row of a judgments file."""
    first, second = (None if game is None else game["score"] for game in row["games"])
    old = _is_old(row)
    if old:
        named = (row["question_id"], V01, row["model"], baseline or V01_BASELINE)
    else:
        named = (row["uid"], row["category"], row["model"], row["baseline"])
    return Judgment(*named, (first, second), old)
