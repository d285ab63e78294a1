"""Numbers as short texts, so that a page can hold many: what `assets/page.js` reads back.

A number takes two characters of 64, twelve bits: the sign, and 11 bits m of its size, which is
2^(-10 + 20 (m - 1) / 2046), from 2^-10 to 2^10 in steps of 0.7%; m = 0 is 0. What is below 2^-11 is
0, what is above 2^10 is cut to it. The code of -0 stands for what is no number. An index takes
three characters, 18 bits.
"""

import numpy as np

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_OCTAVES, _LEVELS = 10, 2046
_SIGN = 1 << 11
MOST_INDEX = 64**3 - 1
_CHARACTERS = np.frombuffer(ALPHABET.encode(), np.uint8)


def numbers(values: np.ndarray) -> str:
    """Numbers (n,) as 2n characters; as two where all have the same code.

    >>> numbers(np.array([0.0, 1.0, -1.0, np.nan]))
    'AAQAwAgA'
    >>> numbers(np.ones(5))
    'QA'
    """
    x = np.asarray(values, np.float64)
    known = np.isfinite(x) | np.isinf(x)
    size = np.where(known, np.abs(x), 0.0)
    with np.errstate(divide="ignore"):
        logs = np.clip(np.log2(size), -_OCTAVES - 1, _OCTAVES)
    level = np.rint((logs + _OCTAVES) * _LEVELS / (2 * _OCTAVES)).astype(np.int64) + 1
    level = np.where(size < 2.0 ** (-_OCTAVES - 1), 0, np.clip(level, 1, _LEVELS + 1))
    code = np.where(known, level + np.where((x < 0) & (level > 0), _SIGN, 0), _SIGN)
    if len(code) and (code == code[0]).all():
        code = code[:1]
    return _text(code, 2)


def indices(values: np.ndarray) -> str:
    """Whole numbers (n,) from 0 to `MOST_INDEX`, as 3n characters."""
    return _text(np.asarray(values, np.int64), 3)


def _text(codes: np.ndarray, width: int) -> str:
    digits = [(codes >> (6 * place)) & 63 for place in reversed(range(width))]
    return _CHARACTERS[np.stack(digits, axis=-1).reshape(-1)].tobytes().decode()
