"""The lines of `metrics.jsonl`: how they are written, and what is wrong with those that are read.

A line is one JSON object. Its first key is `step`; its last two are `line`, its number in the file,
from 1, and `check`, the CRC-32 (eight hexadecimal digits) of the bytes before `, "check"`. Any
flipped bit is found by the check, and a missing line by the numbers of those around it. Lines that
were written before there were numbers and checks are read as well, in a file of such lines alone.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from attnpo_jax.runtime import checked_lines, json_files

Line = dict[str, Any]

_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclasses.dataclass(frozen=True)
class Found:
    """A line that is whole.

    Attributes:
      values: what it holds, without its number and check.
      text: its bytes.
      number: its number; None where it has none.
    """

    values: Line
    text: bytes
    number: int | None


@dataclasses.dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
      lines: those that are whole, in order.
      damaged: what is none, by its place in the file, from 1.
      gaps: steps between which lines are missing: those of the lines before and after; None for the
        file's beginning.
    """

    lines: list[Found]
    damaged: dict[int, bytes]
    gaps: list[tuple[int | None, int]]


def encode(values: Mapping[str, Any], number: int) -> bytes:
    """A line with its end."""
    whole = {name: _to_json(value) for name, value in values.items()} | {"line": number}
    return checked_lines.encode(whole)


def parse(content: bytes) -> Content:
    """Sorts out what a file holds; an unfinished last line, as a killed run leaves, is nothing."""
    *complete, rest = content.split(b"\n")
    checked = [_checked(text) for text in complete]
    of_old = not any(checked) and _checked(rest) is None
    lines: list[Found] = []
    damaged: dict[int, bytes] = {}
    for place, text in enumerate(complete, 1):
        found = _old(text) if of_old else checked[place - 1]
        if found is None:
            damaged[place] = text
        else:
            lines.append(found)
    if (last := _checked(rest)) is not None:
        lines.append(last)  # whole but for its end
    elif rest and not _is_beginning(rest):
        damaged[len(complete) + 1] = rest
    return Content(lines, damaged, list(_gaps(lines)))


def _checked(text: bytes) -> Found | None:
    """A line with number and check, if it is whole."""
    values = _values(text) if checked_lines.is_whole(text) else None
    if values is None or [*values][-2:] != ["line", "check"]:
        return None
    number = values.pop("line")
    del values["check"]
    return Found(values, text, number) if type(number) is int and number > 0 else None


def _old(text: bytes) -> Found | None:
    """A line without number and check, if it holds what one may hold."""
    values = _values(text)
    if values is None or not all(isinstance(value, (int, float)) for value in values.values()):
        return None
    return Found(values, text, None)


def _values(text: bytes) -> Line | None:
    try:
        line = json_files.loads(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int or line["step"] < 0:
        return None
    return {name: _from_json(value) for name, value in line.items()}


def _is_beginning(text: bytes) -> bool:
    """Whether a line that was being written may have looked so."""
    # What a crashed machine leaves of a file that was being appended to may be zeros.
    return b'"}' not in text and text.startswith(b'{"step": '[: len(text)]) and b"\0" not in text


def _gaps(lines: list[Found]) -> Iterator[tuple[int | None, int]]:
    expected, before = 1, None
    for line in lines:
        if line.number is None:
            continue
        if line.number != expected:
            yield before, line.values["step"]
        expected, before = line.number + 1, line.values["step"]


def _from_json(value: Any) -> Any:
    return _SPECIAL.get(value, value) if isinstance(value, str) else value


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value
