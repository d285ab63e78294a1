"""What a response is made of: words, sentences, paragraphs, items of lists. Functions of a text.

Fenced code is no prose: its lines are no words, sentences, paragraphs or items.
"""

import re
import unicodedata
from collections.abc import Iterator

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([^`\s]*)[^`]*")
_BULLET = re.compile(r"\s*[-+*•–]\s+(?=\S)")
_NUMBERED = re.compile(r"\s*(\d+)[.)]\s+(?=\S)")
_NUMBER = re.compile(
    r"(?<![^\W_])(?<!\d\.)([-−+]?)"
    r"(\d{1,3}(?:[,\u00a0\u202f’']\d{3})+(?!\d)|\d+|(?=\.\d))(\.\d+)?"
)
_HEADING = re.compile(r" {0,3}#{1,6}\s")

_CLOSING = "\"'”’»)]*_"
_SENTENCE_END = re.compile(rf"[.!?…؟।]+[{re.escape(_CLOSING)}]*(?=\s|$)|[。！？]+[」』”’]*")
# Words whose full stop ends no sentence: before a name, in the midst of one, before a number.
_BEFORE_NAMES = set("mr mrs ms dr prof st gen capt lt rev hon sen gov".split())
_WITHIN = set("e.g i.e cf vs viz".split())
_BEFORE_NUMBERS = set("no fig vol approx ca p pp ch sec".split())


def plain(text: str) -> str:
    """A text as texts are compared: composed (NFC), without case, with straight quotes, and with
    one space for white space.
    """
    straight = text.translate(str.maketrans("“”„‘’‚", "\"\"\"'''"))
    return " ".join(unicodedata.normalize("NFC", straight).casefold().split())


def has_text(text: str) -> bool:
    """Whether there is a letter or a digit."""
    return any(c.isalnum() for c in text)


def code_blocks(text: str) -> list[tuple[str, str]]:
    """The fenced code blocks: language (as written, perhaps empty) and content of each.

    A fence that is not closed holds all that follows, as in Markdown.
    """
    return [
        (language, "\n".join(lines)) for language, lines in _blocks(text) if language is not None
    ]


def prose(text: str) -> str:
    """The text without its fenced code, in whose place are empty lines."""
    return "\n".join(
        "" if language is not None else "\n".join(lines) for language, lines in _blocks(text)
    )


def _blocks(text: str) -> Iterator[tuple[str | None, list[str]]]:
    """Lines in turn: those of a code block with its language, those of prose with None."""
    language, fence, held = None, "", []
    for line in text.splitlines():
        found = _FENCE.fullmatch(line)
        if language is None and found:
            yield None, held
            fence, language, held = found[1], found[2], []
        elif language is not None and found and not found[2] and found[1].startswith(fence):
            yield language, held
            language, held = None, []
        else:
            held.append(line)
    yield language, held


def unfenced(text: str) -> str:
    """What is in the code block that a text consists of; any other text as it is."""
    blocks = code_blocks(text)
    return blocks[0][1] if len(blocks) == 1 and not has_text(prose(text)) else text


def words(text: str) -> list[str]:
    """What stands between white space or dashes and has a letter or a digit; `it's` and
    `well-known` are one word each.
    """
    return [word for word in re.split(r"[\s—–]+", prose(text)) if has_text(word)]


def lines(text: str) -> list[str]:
    """The lines of prose that are not empty."""
    return [line.strip() for line in prose(text).splitlines() if has_text(line)]


def paragraphs(text: str) -> list[str]:
    """What stands between empty lines."""
    return [part.strip() for part in re.split(r"\n\s*\n", prose(text)) if has_text(part)]


def bullets(text: str) -> list[str]:
    """The items with a bullet, as `-`, `*` or `•`, without it."""
    return [
        line[mark.end() :].strip()
        for line in prose(text).splitlines()
        if (mark := _BULLET.match(line)) and has_text(line)
    ]


def numbered(text: str) -> list[int]:
    """The numbers of the items of numbered lists, as `1.` or `1)`, in turn."""
    return [int(mark[1]) for line in prose(text).splitlines() if (mark := _NUMBERED.match(line))]


def item(line: str) -> str:
    """A line without its bullet or number."""
    for mark in (_BULLET, _NUMBERED):
        line = mark.sub("", line, count=1) if mark.match(line) else line
    return line.strip()


def sentences(text: str) -> list[str]:
    """The sentences; a paragraph or an item of a list is one at least, a heading is none.

    A full stop ends none in abbreviations that names or numbers follow (`Dr.`, `e.g.`, `No. 5`),
    after a single capital letter but I (`J. Smith`) or a point's number (`1. First`), or before a
    small letter, unless the text has small letters alone.
    """
    cased = any(c.isupper() for c in text) and any(c.islower() for c in text)
    found: list[str] = []
    for block in _running_texts(text):
        start = 0
        for end in _SENTENCE_END.finditer(block):
            if _ends(block[start : end.start()], end[0], block[end.end() :], cased):
                found.append(block[start : end.end()].strip())
                start = end.end()
        found.append(block[start:].strip())
    return [sentence for sentence in found if has_text(sentence)]


def _running_texts(text: str) -> Iterator[str]:
    held: list[str] = []
    for line in prose(text).splitlines():
        heading = _HEADING.match(line)
        if held and (heading or not line.strip() or item(line) != line.strip()):
            yield " ".join(held)
            held = []
        if line.strip() and not heading:
            held.append(item(line))
    if held:
        yield " ".join(held)


def _ends(before: str, mark: str, after: str, cased: bool) -> bool:
    """Whether a mark ends the sentence before it."""
    following = next((c for c in after if c.isalnum()), None)
    if following is None or mark[0] in "。！？":
        return True
    if cased and following.islower():
        return False
    if mark[0] != "." or mark[:2] == "..":
        return True
    if before.strip().isdigit():  # the number of a point in running text
        return False
    last = before.split()[-1].lstrip("(\"'“‘«[*_") if before.strip() else ""
    folded = last.casefold()
    if folded in _BEFORE_NAMES or folded in _WITHIN:
        return False
    if folded in _BEFORE_NUMBERS and following.isdigit():
        return False
    return not (len(last) == 1 and last.isupper() and last != "I")


def numbers(text: str) -> list[float]:
    """The numbers in figures, in turn; thousands may be set apart by a comma, an apostrophe or a
    space that does not break, and decimals follow a point.
    """
    found = []
    for sign, whole, decimals in _NUMBER.findall(text):
        digits = re.sub(r"\D", "", whole) + decimals
        found.append(float(digits) * (-1 if sign in ("-", "−") and sign else 1))
    return found


def count(text: str, phrase: str) -> int:
    """How often a phrase stands in a text as a whole, not inside of a longer word, in any case."""
    return sum(1 for _ in _places(plain(text), plain(phrase)))


def starts(text: str, phrase: str) -> bool:
    """Whether a text starts with a phrase as a whole, in any case."""
    return next(_places(plain(text), plain(phrase)), None) == 0


def ends(text: str, phrase: str) -> bool:
    """Whether a text ends with a phrase as a whole, in any case."""
    text, phrase = plain(text), plain(phrase)
    return len(text) - len(phrase) in _places(text, phrase)


def _places(text: str, phrase: str) -> Iterator[int]:
    at = text.find(phrase)
    while at >= 0:
        behind = at + len(phrase)
        if not (_joins(text[at - 1 : at], phrase[0]) or _joins(phrase[-1], text[behind:][:1])):
            yield at
        at = text.find(phrase, at + 1)


def _joins(one: str, next_one: str) -> bool:
    """Whether two characters beside one another are in one word."""
    if not one or not next_one:
        return False
    in_word = (c.isalnum() or unicodedata.category(c)[0] == "M" for c in (one, next_one))
    return all(in_word)
