"""Checks that count something of a response.

Each is `check(response, *, ...) -> bool`. `least` and `most` bound the count, both included; a
`most` of None is no bound. What counts is in `texts`.
"""

import re

from attnpo_jax.evaluate.checks import texts
from attnpo_jax.evaluate.checks.registry import register

_PLACEHOLDER = re.compile(r"\[[^\[\]\n]*\w[^\[\]\n]*\](?!\()")
_HIGHLIGHT = re.compile(r"(?<!\*)(\*{1,3})(?=[^\s*])[^*\n]*(?<=[^\s*])\1(?!\*)")


def _within(count: int, least: int, most: int | None) -> bool:
    if least < 0 or (most is not None and most < least):
        raise ValueError(f"least = {least}, most = {most}; accepted: 0 <= least <= most")
    return least <= count and (most is None or count <= most)


@register
def words(response: str, *, least: int = 1, most: int | None = None) -> bool:
    """The number of words."""
    return _within(len(texts.words(response)), least, most)


@register
def sentences(response: str, *, least: int = 1, most: int | None = None) -> bool:
    """The number of sentences."""
    return _within(len(texts.sentences(response)), least, most)


@register
def paragraphs(response: str, *, least: int = 1, most: int | None = None) -> bool:
    """The number of paragraphs, with empty lines between them."""
    return _within(len(texts.paragraphs(response)), least, most)


@register
def lines(response: str, *, least: int = 1, most: int | None = None) -> bool:
    """The number of lines that are not empty."""
    return _within(len(texts.lines(response)), least, most)


@register
def bullets(response: str, *, least: int = 1, most: int | None = None) -> bool:
    """The number of list items with a bullet."""
    return _within(len(texts.bullets(response)), least, most)


@register
def questions(response: str, *, least: int = 0, most: int | None = None) -> bool:
    """The number of sentences that end in a question mark."""
    ends = [sentence.rstrip("\"'”’»)]*_")[-1:] for sentence in texts.sentences(response)]
    return _within(sum(end in tuple("?？؟") for end in ends), least, most)


@register
def capital_words(response: str, *, least: int = 0, most: int | None = None) -> bool:
    """The number of words of two letters or more that are in capitals."""
    found = [
        word
        for word in texts.words(response)
        if word.isupper() and sum(c.isalpha() for c in word) > 1
    ]
    return _within(len(found), least, most)


@register
def highlights(response: str, *, least: int = 0, most: int | None = None) -> bool:
    """The number of parts between asterisks, *so* or **so**."""
    found = [part for line in texts.lines(response) for part in _HIGHLIGHT.findall(line)]
    return _within(len(found), least, most)


@register
def placeholders(response: str, *, least: int = 0, most: int | None = None) -> bool:
    """The number of parts in square brackets, as in [your name]; links are none."""
    return _within(len(_PLACEHOLDER.findall(texts.prose(response))), least, most)


@register
def mentions(response: str, *, text: str, least: int = 0, most: int | None = None) -> bool:
    """How often a word or phrase stands in the response, in any case."""
    return _within(texts.count(response, text), least, most)


@register
def letter(response: str, *, letter: str, least: int = 0, most: int | None = None) -> bool:
    """How often a letter stands in the response, small or capital."""
    if len(letter) != 1 or not letter.isalpha():
        raise ValueError(f"letter = {letter!r}; accepted: one letter")
    return _within(texts.plain(response).count(texts.plain(letter)), least, most)


@register
def sentence_length(response: str, *, most: int, least: int = 1) -> bool:
    """The number of words of every sentence."""
    counts = [len(texts.words(sentence)) for sentence in texts.sentences(response)]
    # The bounds are looked at where there is no sentence, too.
    return all(_within(count, least, most) for count in [*counts, least]) and bool(counts)


@register
def word_length(response: str, *, most: int, least: int = 1) -> bool:
    """The number of letters and digits of every word."""
    counts = [sum(c.isalnum() for c in word) for word in texts.words(response)]
    return all(_within(count, least, most) for count in [*counts, least]) and bool(counts)


@register
def distinct_words(response: str, *, least: int = 1) -> bool:
    """No word stands there twice, and there are at least so many."""
    found = [texts.plain(word).strip("\"'.,;:!?()[]{}*_") for word in texts.words(response)]
    return _within(len(found), least, None) and len({*found}) == len(found)


@register
def palindrome(response: str, *, letters: int) -> bool:
    """There is a word of at least so many letters that reads the same backwards."""
    found = ("".join(c for c in texts.plain(w) if c.isalpha()) for w in texts.words(response))
    return any(len(word) >= max(letters, 1) and word == word[::-1] for word in found)
