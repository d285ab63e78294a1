"""Checks of a response's form and of what stands in it: `check(response, *, ...) -> bool`."""

import json
import math
import re
import unicodedata
from typing import Any

from attnpo_jax.evaluate.checks import texts
from attnpo_jax.evaluate.checks.registry import register

# How the Unicode names of a script's letters begin.
_SCRIPTS = {
    "arabic": ("ARABIC",),
    "armenian": ("ARMENIAN",),
    "cyrillic": ("CYRILLIC",),
    "devanagari": ("DEVANAGARI",),
    "georgian": ("GEORGIAN",),
    "greek": ("GREEK",),
    "hangul": ("HANGUL",),
    "han": ("CJK",),
    "hebrew": ("HEBREW",),
    "japanese": ("CJK", "HIRAGANA", "KATAKANA"),
    "latin": ("LATIN", "FULLWIDTH LATIN"),
    "thai": ("THAI",),
}


def _needs(name: str, value: Any, fits: bool, accepted: str) -> None:
    if not fits:
        raise ValueError(f"{name} = {value!r}; accepted: {accepted}")


def _need_texts(name: str, value: Any, least: int = 1) -> None:
    fits = len(value) >= least and all(isinstance(x, str) and texts.has_text(x) for x in value)
    _needs(name, value, fits, f"a list of at least {least} texts")


# --- What stands there ----------------------------------------------------------------------------


@register
def includes(response: str, *, phrases: list[str]) -> bool:
    """Each of the words or phrases stands there, in any case."""
    _need_texts("phrases", phrases)
    return all(texts.count(response, phrase) for phrase in phrases)


@register
def excludes(response: str, *, phrases: list[str]) -> bool:
    """None of the words or phrases stands there, in any case."""
    _need_texts("phrases", phrases)
    return not any(texts.count(response, phrase) for phrase in phrases)


@register
def without(response: str, *, characters: str) -> bool:
    """None of the characters stands there, in code neither."""
    _needs("characters", characters, bool(characters), "one character or more")
    return not set(characters) & set(response)


@register
def number(response: str, *, value: float) -> bool:
    """The last number of the response is this one."""
    found = texts.numbers(response)
    return bool(found) and math.isclose(found[-1], value, rel_tol=1e-9, abs_tol=1e-9)


@register
def one_of(response: str, *, options: list[str]) -> bool:
    """The response is one of the options and nothing else, but for quotes and a full stop."""
    _need_texts("options", options, 2)
    answer = texts.plain(response).strip("\"'*_. ")
    return answer in {texts.plain(option).strip("\"'*_. ") for option in options}


@register
def repeats(response: str, *, text: str) -> bool:
    """The response begins with this text, in any case, and goes on."""
    start = texts.starts(response, text)
    return start and texts.has_text(texts.plain(response)[len(texts.plain(text)) :])


# --- Letters --------------------------------------------------------------------------------------


@register
def capitals(response: str) -> bool:
    """There are letters, and none is small."""
    return any(c.isupper() for c in response) and not any(c.islower() for c in response)


@register
def small_letters(response: str) -> bool:
    """There are letters, and none is a capital."""
    large = any(c.isupper() or c.istitle() for c in response)
    return any(c.islower() for c in response) and not large


@register
def alphabet(response: str, *, script: str) -> bool:
    """There are letters, all of one script."""
    _needs("script", script, script in _SCRIPTS, ", ".join(_SCRIPTS))
    names = [unicodedata.name(c, "") for c in response if c.isalpha()]
    return bool(names) and all(name.startswith(_SCRIPTS[script]) for name in names)


# --- Start and end --------------------------------------------------------------------------------


@register
def starts_with(response: str, *, text: str) -> bool:
    """The response starts with a word or phrase, in any case."""
    return texts.starts(response, text)


@register
def ends_with(response: str, *, text: str) -> bool:
    """The response ends with a word, phrase or mark, in any case."""
    return texts.ends(response, text)


@register
def paragraph_start(response: str, *, paragraph: int, text: str) -> bool:
    """A paragraph, the first being 1, starts with a word or phrase, in any case."""
    _needs("paragraph", paragraph, paragraph >= 1, "1 or more")
    found = texts.paragraphs(response)
    return len(found) >= paragraph and texts.starts(found[paragraph - 1], text)


@register
def postscript(response: str, *, marker: str) -> bool:
    """The last paragraph starts with a marker such as P.S., and there is one before it."""
    *before, last = texts.paragraphs(response) or [""]
    return bool(before) and repeats(last, text=marker)


@register
def quoted(response: str) -> bool:
    """The whole response is in double quotes."""
    response = response.strip()
    return len(response) > 2 and response[0] in '"“' and response[-1] in '"”'


@register
def title(response: str, *, opening: str, closing: str) -> bool:
    """The first line is a title between two marks, and a text follows."""
    first, *rest = [line.strip() for line in response.strip().splitlines()] or [""]
    inside = first.removeprefix(opening).removesuffix(closing)
    marked = first == f"{opening}{inside}{closing}" and opening not in inside
    return marked and texts.has_text(inside) and texts.has_text("".join(rest))


# --- Parts ----------------------------------------------------------------------------------------


@register
def numbered(response: str, *, items: int) -> bool:
    """There is one numbered list, from 1 to this number."""
    _needs("items", items, items >= 1, "1 or more")
    return texts.numbered(response) == [*range(1, items + 1)]


@register
def sections(response: str, *, heading: str, count: int) -> bool:
    """Headings such as `Part 1` stand at the starts of lines, up to this number, each with a text
    behind it.
    """
    _needs("count", count, count >= 1, "1 or more")
    at_start = rf"^[#*_\s]*{re.escape(heading)}[ \t]+(\d+)\b"
    _, *found = re.split(at_start, texts.prose(response), flags=re.IGNORECASE | re.MULTILINE)
    named = [int(number) for number in found[::2]]
    return named == [*range(1, count + 1)] and all(map(texts.has_text, found[1::2]))


@register
def answers(response: str, *, count: int, divider: str) -> bool:
    """So many different texts, with a line between them that is the divider alone."""
    _needs("count", count, count >= 2, "2 or more")
    parts, lines = [""], response.splitlines()
    for line in lines:
        if line.strip() == divider:
            parts.append("")
        else:
            parts[-1] += f"{line}\n"
    parts = [texts.plain(part) for part in parts]
    return len(parts) == count == len({*parts}) and all(map(texts.has_text, parts))


@register
def acrostic(response: str, *, word: str) -> bool:
    """The first letters of the lines spell a word."""
    _needs("word", word, bool(word) and word.isalpha(), "a word")
    firsts = [next(c for c in line if c.isalnum()) for line in texts.lines(response)]
    return texts.plain("".join(firsts)) == texts.plain(word)


@register
def alphabetical(response: str, *, count: int) -> bool:
    """So many different lines, in the order of the alphabet; bullets, numbers and accents aside."""
    _needs("count", count, count >= 2, "2 or more")
    keys = [_without_accents(texts.item(line)) for line in texts.lines(response)]
    return len(keys) == count == len({*keys}) and keys == sorted(keys)


def _without_accents(text: str) -> str:
    split = unicodedata.normalize("NFKD", texts.plain(text))
    return " ".join("".join(c for c in split if c.isalnum() or c.isspace()).split())


# --- Forms that programs read ---------------------------------------------------------------------


def _parsed(response: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(texts.unfenced(response), parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


@register
def json_object(response: str, *, keys: list[str]) -> bool:
    """The response, or the code block that it consists of, is a JSON object with these keys."""
    _need_texts("keys", keys)
    found = _parsed(response)
    return isinstance(found, dict) and {*found} == {*keys}


@register
def json_list(response: str, *, items: int) -> bool:
    """The response, or the code block that it consists of, is a JSON list of so many items."""
    _needs("items", items, items >= 1, "1 or more")
    found = _parsed(response)
    return isinstance(found, list) and len(found) == items


@register
def table(response: str, *, columns: int, rows: int) -> bool:
    """There is a Markdown table with so many columns, and rows beside its head."""
    _needs("columns", columns, columns >= 1, "1 or more")
    _needs("rows", rows, rows >= 1, "1 or more")
    found = [_cells(line) for line in texts.prose(response).splitlines()]
    for at, rule in enumerate(found):
        if at and rule and all(re.fullmatch(r":?-+:?", cell) for cell in rule):
            body = [*found[at + 1 :], []]
            body = body[: body.index([])]
            widths = {len(cells) for cells in (found[at - 1], rule, *body)}
            if widths == {columns} and len(body) == rows:
                return True
    return False


def _cells(line: str) -> list[str]:
    """The cells of a line of a table; none of any other line."""
    line = line.strip()
    if "|" not in line:
        return []
    inside = re.sub(r"(?<!\\)\|$", "", line.removeprefix("|"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", inside)]


@register
def code(response: str, *, language: str) -> bool:
    """There is a fenced code block that is marked with this language, and not empty."""
    return any(
        named.casefold() == language.casefold() and texts.has_text(content)
        for named, content in texts.code_blocks(response)
    )
