"""What a page is made of: sections of paragraphs, tables, figures, answers and the view of tokens.

All texts in them are plain: `page` escapes them, and writes out what is not safe to show.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """A line or some of text."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Attributes:
      caption: what it is of.
      heads: of its columns; the first may be empty.
      rows: cells, as many as there are heads.
      texts: how many of its columns hold text; those behind them hold numbers.
      closed: whether it is folded away until it is asked for.
    """

    kind: ClassVar[str] = "table"
    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    closed: bool = False


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
      svg: an `<svg>` element.
      alt: what it shows, for those who don't see it.
    """

    kind: ClassVar[str] = "picture"
    svg: str
    alt: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """A prompt, and what two models answer.

    Attributes:
      id: the prompt's.
      prompt: the messages, as text.
      before, after: the answers.
    """

    id: str
    prompt: str
    before: str
    after: str


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers of two models side by side.

    Attributes:
      caption: where they are from.
      names: of the two models.
      rows: the answers.
    """

    kind: ClassVar[str] = "answers"
    caption: str
    names: tuple[str, str]
    rows: Sequence[Answer]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The view of pairs, token by token.

    Attributes:
      data: what `assets/page.js` reads, as JSON values.
    """

    kind: ClassVar[str] = "tokens"
    data: Any


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
      id: of its heading, for links.
      title: its heading.
      blocks: what it holds, in order.
    """

    id: str
    title: str
    blocks: Sequence[Any]
