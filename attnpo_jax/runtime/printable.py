"""Text of others made safe to print: data, models and paths may hold what terminals and rich obey.

Whatever prints an id, a text, a column's or file's name or a library's message brings it through
here: `printable` for plain streams, `plain` and `say` for rich.
"""

import logging
import re

from rich.console import Console
from rich.text import Text

# Control characters but tab and line feed, marks that turn the direction of text or break lines,
# and halves of characters, which no stream can encode.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: object) -> str:
    r"""The text with everything that a terminal obeys written out, as Python's literals have it.

    Tabs and line feeds stay.

    >>> print(printable("a\x1b[31mred"), printable("\x9b2J"))
    a\x1b[31mred \x9b2J
    """
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], str(text))


def plain(text: object) -> Text:
    """The text for rich's tables, panels and titles: no markup, no emoji, no escape sequences."""
    return Text(printable(text))


def say(console: Console, text: object) -> None:
    """Prints a line as it is, neither marked up nor wrapped."""
    console.print(plain(text), soft_wrap=True)


class Formatter(logging.Formatter):
    """A log's lines, made safe to print."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
