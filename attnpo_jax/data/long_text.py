"""The tokens around a place of a long text, without those of all of it.

A window of the text is encoded, and once more with other, further ends. Where both agree but for
what lies at the window's own ends, its tokens are those of the whole text: tokenizers split text
from left to right, and what they join does not depend on text that is far away, unless a run of
like characters leads there. In such a run tokens shift with the place where the text begins, which
the second encoding tells, since it begins a prime number of characters earlier. Then the window
grows, to the whole text at last.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from attnpo_jax.data.pair import BadExample

Tokens = tuple[np.ndarray, np.ndarray]
"""Ids int32 (n,) and their [start, end) characters int32 (n, 2) in the whole text."""


class Near(NamedTuple):
    """A place in a text, by character, and how many tokens are wanted before and behind it."""

    at: int
    before: int
    after: int


# Characters a token, more than usual: a window seldom has to grow.
_PER_TOKEN = 8
# Characters left out at a window's ends, and those by which the second one is longer (a prime).
_GUARD, _FURTHER = 512, 1021
# Up to so many characters are encoded at once where nothing smaller will do; about 300 bytes each.
LONGEST = 1 << 21


def is_long(length: int, tokens: int) -> bool:
    """Whether a text of `length` characters is so long that a window of `tokens` is less work."""
    return length > 32 * tokens + (1 << 14)


def around(
    encode: Callable[[int, int], Tokens], length: int, at: int, before: int, after: int
) -> Tokens:
    """Tokens of a text, those near the character `at`, as they are in the whole text's.

    Args:
      encode: the tokens of the text from one character to another.
      length: of the text, in characters.
      before, after: at least so many tokens more are there before and behind, or all there are.

    Raises:
      BadExample: no window of less than `LONGEST` characters will do, and the text is longer.
    """
    if not is_long(length, before + after):
        return encode(0, length)
    left, right = (_PER_TOKEN * n + 2 * _GUARD for n in (before, after))
    while left + right < LONGEST:
        start, end = max(0, at - left), min(length, at + right)
        first = start + _GUARD if start else 0
        last = end - _GUARD if end < length else length
        window = _between(encode(start, end), first, last)
        further = encode(max(0, start - _FURTHER), min(length, end + _FURTHER))
        further = _between(further, first, last)
        agree = all(np.array_equal(a, b) for a, b in zip(window, further, strict=True))
        lacks_left = start > 0 and np.sum(window[1][:, 1] <= at) <= before
        lacks_right = end < length and np.sum(window[1][:, 0] >= at) <= after
        if agree and not lacks_left and not lacks_right:
            return window
        left *= 1 + (lacks_left or not agree)
        right *= 1 + (lacks_right or not agree)
    if length <= LONGEST:
        return encode(0, length)
    raise BadExample(
        f"a text of {length} characters can't be cut to {before + after} tokens: they depend on "
        f"text far away, as in a run of like characters; accepted: up to {LONGEST} characters, or "
        "a text of words"
    )


def _between(tokens: Tokens, first: int, last: int) -> Tokens:
    ids, offsets = tokens
    inside = (offsets[:, 0] >= first) & (offsets[:, 1] <= last)
    return ids[inside], offsets[inside]


def shared_beginning(a: str, b: str, i: int = 0, j: int = 0) -> int:
    """How many characters are the same, in `a` from character i on and in `b` from j on."""
    most, done, step = min(len(a) - i, len(b) - j), 0, 1 << 10
    while done < most and a[i + done : i + done + step] == b[j + done : j + done + step]:
        done = min(done + step, most)
    while done < most and a[i + done] == b[j + done]:
        done += 1
    return done
